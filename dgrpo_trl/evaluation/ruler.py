"""RULER's synthetic tasks (arXiv 2404.06654): prompts of a given length in the model's tokens.

[`make_samples`] makes eleven of them from a seed, without downloads. To add one, write a function that returns its
[`Draft`] and name it in [`RULER_TASKS`].

| task | in the text | asked for |
| --- | --- | --- |
| `niah_single_1` | a number for a key, in repeated noise | the number |
| `niah_single_2`, `niah_single_3` | a number, or a UUID, in a text | that |
| `niah_multikey_1` | numbers of four keys, in a text | one of them |
| `niah_multikey_2`, `niah_multikey_3` | a number (UUID) among as many others as fit | that |
| `niah_multivalue` | four numbers of one key, in a text | all four |
| `niah_multiquery` | numbers of four keys, in a text | all four |
| `vt` | a value that goes from variable to variable, in noise; an example before it | the five variables |
| `cwe` | a list in which ten words come more often; an example before it | the ten |
| `fwe` | coded words whose frequency falls with the square of their rank | the three most frequent |

What differs from RULER: noise, or a text of the user, replaces its essays, which would have to be downloaded; samples
start at different places of that text; words come from `ruler.yaml`, not from the package `wonderwords`; the
example of `vt` has less noise below 2560 tokens; and below 1024, where there is no room, `cwe` has no example and
repeats its words half as often.
"""

import itertools
import math
import string
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from transformers import PreTrainedTokenizerBase

from ..chat import escape_special_tokens
from ..files import read_table
from .haystack import NEEDLES, NOISE, NOISE_LINE, Haystack
from .samples import Sample, count_tokens, prompt_text


# Lengths from which `cwe` has an example, and from which it repeats its words as often as in RULER
_EXAMPLE_LENGTH, _FULL_LENGTH = 1024, 4096

ADJECTIVES, NOUNS = (words.split() for words in read_table(__package__, "ruler.yaml").values())
COMPOUNDS = [first + second for first in NOUNS for second in NOUNS if first != second]


@dataclass(frozen=True)
class Draft:
    """A sample but for its amount of filler. It does not depend on the tokenizer: all models are asked the same."""

    content: Callable[[int], str]  # user turn by the number of units of filler, the least amounts, such as words
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int
    min_units: int = 0  # the least filler the task makes sense with
    max_units: int | None = None  # all filler there is
    reads_haystack: bool = False  # whether the filler comes from the haystack given


def _needles(
    rng: Random,
    length: int,
    haystack: Haystack,
    *,
    fixed_haystack: Haystack | None = None,
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Draft:
    """Needle in a haystack: `num_values` values for each of `num_keys` keys, of which `num_queries` are asked for."""
    reads_haystack, haystack = fixed_haystack is None, fixed_haystack or haystack
    taken: set[str] = set()

    def draw(kind: str) -> str:
        """A key or value that is in no needle and not in the text."""
        while True:
            if kind == "words":
                drawn = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
            elif kind == "numbers":
                drawn = str(rng.randrange(10**6, 10**7))
            else:
                drawn = str(uuid.UUID(int=rng.getrandbits(128), version=4))
            if drawn not in taken and drawn not in haystack.text:
                return drawn

    def draw_new(kind: str) -> str:
        drawn = draw(kind)
        taken.add(drawn)
        return drawn

    def needle(key: str, value: str) -> str:
        return f"One of the special magic {values} for {key} is: {value}."

    pairs = {key: [draw_new(values) for _ in range(num_values)] for key in [draw_new(keys) for _ in range(num_keys)]}
    # Depths are shares of the text, so that they do not depend on its number of sentences
    depths = [(rng.random(), needle(key, value)) for key, of_key in pairs.items() for value in of_key]
    queries = rng.sample(list(pairs), num_queries)
    start = rng.randrange(max(1, len(haystack.sentences)))
    distractors: list[str] = []

    def context(num_units: int) -> str:
        if haystack.sentences:
            sentences = haystack.first(num_units, start)
        else:
            while len(distractors) < num_units:
                distractors.append(needle(draw(keys), draw(values)))
            sentences = distractors[:num_units]
        return haystack.separator.join(_with_inserted(sentences, depths))

    asked = queries[0] if num_queries == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    if num_queries * num_values == 1:
        kind, introduction, verb = values[:-1], f"A special magic {values[:-1]} is", "is the"
        prefix_verb = "is"
    else:
        kind, introduction, verb = values, f"Some special magic {values} are", "are all the"
        prefix_verb = "are"
    return Draft(
        content=lambda num_units: (
            f"{introduction} hidden within the following text. Make sure to memorize it. I will quiz you about the "
            f"{kind} afterwards.\n{context(num_units)}\nWhat {verb} special magic {kind} for {asked} mentioned in the "
            "provided text?"
        ),
        answer_prefix=f"The special magic {kind} for {asked} mentioned in the provided text {prefix_verb}",
        references=tuple(value for key in queries for value in pairs[key]),
        max_new_tokens=128,
        reads_haystack=reads_haystack,
    )


def _with_inserted(sentences: list[str], depths: Iterable[tuple[float, str]]) -> list[str]:
    """The sentences with each text at its depth, a share of their number. Texts at one place keep their order."""
    texts_at = defaultdict(list)
    for depth, text in depths:
        texts_at[int(depth * (len(sentences) + 1))].append(text)
    result: list[str] = []
    for position, sentence in enumerate([*sentences, None]):
        result += texts_at[position]
        if sentence is not None:
            result.append(sentence)
    return result


_NUM_HOPS = 4


def _variable_tracking(rng: Random, length: int, haystack: Haystack) -> Draft:
    """A chain of assignments in noise, in order, after an example with little noise."""

    def chain(num_letters: int, taken: str) -> tuple[str, list[str], list[tuple[float, str]]]:
        """Value, names, and statements with their depths."""
        names: list[str] = []
        while len(names) <= _NUM_HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=num_letters))
            names += [name] if name not in names else []
        value = taken
        while value == taken:
            value = str(rng.randrange(10000, 100000))
        statements = [f"VAR {names[0]} = {value}"]
        statements += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
        depths = sorted(rng.random() for _ in statements)
        return value, names, list(zip(depths, statements, strict=True))

    def question(value: str, statements: list[tuple[float, str]], lines: list[str]) -> str:
        context = NOISE.separator.join(_with_inserted(lines, statements))
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
        )

    def prefix(value: str) -> str:
        return (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{_NUM_HOPS + 1} variables are assigned the value {value}, they are:"
        )

    value, names, statements = chain(5, taken="")
    example_value, example_names, example_statements = chain(3, taken=value)
    example_lines = [NOISE_LINE] * min(10, length // 256)
    example = question(example_value, example_statements, example_lines)
    example = f"{example} {prefix(example_value)} {' '.join(example_names)}"
    return Draft(
        content=lambda num_units: f"{example}\n\n{question(value, statements, NOISE.first(num_units, 0))}",
        answer_prefix=prefix(value),
        references=tuple(names),
        max_new_tokens=30,
    )


def _common_words(rng: Random, length: int, haystack: Haystack) -> Draft:
    """A numbered list in which ten words occur more often than the others, after a shorter example."""
    words = rng.sample(COMPOUNDS, len(COMPOUNDS))
    common, example_common, words = words[:10], words[10:20], words[20:]
    shuffle_seed = rng.getrandbits(64)

    def question(common: list[str], repeats: int, others: list[str], other_repeats: int) -> str:
        entries = common * repeats + others * other_repeats
        Random(shuffle_seed).shuffle(entries)
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{_numbered(entries)}\n"
            "Question: What are the 10 most common words in the above list?"
        )

    prefix = "Answer: The top 10 words that appear most often in the list are:"
    if length >= _FULL_LENGTH:
        num_others, example_repeats, repeats = 30, (10, 3), (30, 3)
    else:
        num_others, example_repeats = 10, (3, 1)
        repeats = (6, 1) if length >= _EXAMPLE_LENGTH else (3, 1)
    example_others, others = words[:num_others], words[num_others:]
    example = ""
    if length >= _EXAMPLE_LENGTH:
        asked = question(example_common, example_repeats[0], example_others, example_repeats[1])
        example = f"{asked} {prefix} {_numbered(example_common)}\n"
    return Draft(
        content=lambda num_units: example + question(common, repeats[0], others[:num_units], repeats[1]),
        answer_prefix=prefix,
        references=tuple(common),
        max_new_tokens=120,
        min_units=1,
        max_units=len(others),
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


# With fewer coded words, the third and the fourth are equally frequent
_MIN_CODED_WORDS = 53


def _frequent_words(rng: Random, length: int, haystack: Haystack) -> Draft:
    """Coded words; that of rank k has a share of k^-2 / zeta(2). Dots have rank 1, and are not asked for."""
    words: dict[str, None] = {}
    while len(words) < max(5, length // 50):
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *list(words)[1:]]
    shuffle_seed = rng.getrandbits(64)

    def content(num_units: int) -> str:
        text = [
            word
            for rank, word in enumerate(ranked, start=1)
            for _ in range(int(num_units * 6 / (math.pi * rank) ** 2))
        ]
        Random(shuffle_seed).shuffle(text)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore the "
            "dots '....'. What are the three most frequently appeared words in the above coded text?"
        )

    return Draft(
        content=content,
        answer_prefix="Answer: According to the coded text above, the three most frequently appeared words are:",
        references=tuple(ranked[1:4]),
        max_new_tokens=50,
        min_units=_MIN_CODED_WORDS,
    )


# The names and numbers of RULER's `synthetic.yaml`. Where no haystack is fixed, RULER has essays.
RULER_TASKS: dict[str, Callable[[Random, int, Haystack], Draft]] = {
    "niah_single_1": partial(_needles, fixed_haystack=NOISE),
    "niah_single_2": _needles,
    "niah_single_3": partial(_needles, values="uuids"),
    "niah_multikey_1": partial(_needles, num_keys=4),
    "niah_multikey_2": partial(_needles, fixed_haystack=NEEDLES),
    "niah_multikey_3": partial(_needles, fixed_haystack=NEEDLES, keys="uuids", values="uuids"),
    "niah_multivalue": partial(_needles, num_values=4),
    "niah_multiquery": partial(_needles, num_keys=4, num_queries=4),
    "vt": _variable_tracking,
    "cwe": _common_words,
    "fwe": _frequent_words,
}


def make_samples(
    task: str,
    length: int,
    num_samples: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    haystack: Haystack | None = None,
    system_message: str | None = None,
) -> list[Sample]:
    """Samples of one of RULER's tasks, drawn independently of each other.

    What is asked depends on `seed`, `task`, `length` and the number of the sample alone: it is the same for every
    tokenizer, and whether ten samples are made or a hundred. The amount of filler depends on the tokenizer.

    The prompt and `max_new_tokens` together never exceed `length`, and either one more unit of filler would, or fewer
    tokens are left than an average unit has. A unit is a word of the noise or the text, a distractor needle in
    `niah_multikey_2` and `_3`, the repeats (one, or three from 4096 tokens on) of an uncommon word in `cwe`, and in
    `fwe` the next coded word, or the few whose turn comes at the same time.

    Args:
        task (`str`):
            One of `RULER_TASKS`.
        length (`int`):
            Tokens of the prompt as the model reads it (see [`prompt_text`]) and of the completion, together.
        haystack ([`Haystack`], *optional*):
            Replaces RULER's essays in the tasks that have them: `NOISE` (the default, easier than essays), `NEEDLES`,
            or a text. The other tasks do not read it.

    Raises:
        ValueError: If the task is unknown, `num_samples` is below 1, the tokenizer has no chat template, or the length
            is too small for the task, or larger than its words can fill (`cwe`, beyond about 500,000 tokens).
    """
    if task not in RULER_TASKS:
        raise ValueError(f"`task` is {task!r}. There is no such task. Choose from {', '.join(RULER_TASKS)}.")
    if num_samples < 1:
        raise ValueError(f"`num_samples` is {num_samples}. A score needs a sample. Choose 1 or more.")
    filler = haystack or NOISE
    # A text may quote the control tokens of the model: they have to stay text, as in training
    sentences = tuple(escape_special_tokens(sentence, tokenizer) for sentence in filler.sentences)
    filler = replace(filler, sentences=sentences)
    system = [] if system_message is None else [{"role": "system", "content": system_message}]
    samples = []
    for number in range(num_samples):
        draft = RULER_TASKS[task](Random(f"{seed}:{task}:{length}:{number}"), length, filler)
        messages, num_tokens = _filled(draft, task, length, system, tokenizer)
        suffix = f"-{haystack.name}" if haystack is not None and draft.reads_haystack else ""
        samples.append(
            Sample(
                id=f"{task}-{length}-{seed}-{number}{suffix}",
                messages=messages,
                answer_prefix=draft.answer_prefix,
                references=draft.references,
                max_new_tokens=draft.max_new_tokens,
                num_tokens=num_tokens,
            )
        )
    return samples


def _filled(
    draft: Draft, task: str, length: int, system: list[dict], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict], int]:
    """The messages with as much filler as `length` holds, and the tokens of the prompt."""

    def messages(num_units: int) -> list[dict]:
        return [*system, {"role": "user", "content": draft.content(num_units)}]

    def count(num_units: int) -> int:
        return count_tokens(prompt_text(messages(num_units), draft.answer_prefix, tokenizer), tokenizer)

    budget = length - draft.max_new_tokens
    num_units, num_tokens = fit_units(count, budget, draft.min_units, draft.max_units)
    if num_tokens > budget:
        raise ValueError(
            f"`length` is {length} tokens, but {task!r} takes {num_tokens + draft.max_new_tokens} with its shortest "
            f"text: a prompt of {num_tokens} and a completion of {draft.max_new_tokens}, in tokens of this model. "
            "Choose a larger length, or leave out the task."
        )
    if num_units == draft.max_units:
        raise ValueError(
            f"`length` is {length} tokens, but {task!r} has words for about {num_tokens + draft.max_new_tokens}. A "
            "shorter text would be another length. Choose a smaller length, or leave out the task."
        )
    return messages(num_units), num_tokens


def fit_units(
    count: Callable[[int], int], budget: int, min_units: int = 0, max_units: int | None = None
) -> tuple[int, int]:
    """The number of units whose `count` fits a budget of tokens, up to less than an average unit; and that count.

    Tokens grow almost evenly with units, so that a line through two counts leads close to the number sought: a long
    prompt is tokenized a few times, not once for every halving of an interval. If no number fits, it is `min_units`
    and its count, which is over the budget.
    """
    low, low_tokens = min_units, count(min_units)
    high = math.inf if max_units is None else max_units + 1
    last, guess, rate = (low, low_tokens), low + 64, 1.0
    while high - low > 1 and budget - low_tokens >= rate:
        guess = int(max(low + 1, min(guess, high - 1)))
        tokens = count(guess)
        if abs(guess - last[0]) >= 8 and (tokens - last[1]) * (guess - last[0]) > 0:
            rate = (tokens - last[1]) / (guess - last[0])
        last = guess, tokens
        if tokens > budget:
            high = guess
        else:
            low, low_tokens = guess, tokens
        guess = guess + math.floor((budget - tokens) / rate)
    return low, low_tokens
