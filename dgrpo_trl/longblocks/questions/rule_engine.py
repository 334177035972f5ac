"""The `rule` engine: questions over long documents whose answers are certain, without a language model.

A row's document is a window of a real one, of a chosen length. The task decides what is done to it:

| task | in the window | languages |
| --- | --- | --- |
| `lookup_number`, `lookup_name`, `two_hop` | facts among near misses, see [`facts`] | English, code |
| `multi_hop` | the same: a sum or a difference of two places, or an office in the largest of three | English, code |
| `key_chain` | notes that lead from key to key, to a number; other chains besides | with these phrases, code |
| `reconstruction` | blocks taken out, whose order is asked for | with these phrases, code |
| `counting` | nothing: how often does a word occur? | with this phrase, code |
| `unanswerable` | a chain, or facts (English, code), without the last of those needed | with these phrases, code |
| `passage_order` | nothing: four sentences, whose order is asked for | English |
| `play_*` | nothing: who says it, after whom, who enters, who speaks most or at all: [`plays`] | English plays |
| `heading*` | nothing: heading of a passage, headings with a word, references: [`headings`] | English |
| `code_*` | nothing: caller, callers, chain, raiser, default: [`python_code`] | Python |

The last four need the structure of a text: only documents that have it are asked, and only where one answer is
certain in the window. The answers of `play_speakers`, `headings` and `code_callers` are lists: `list_match_reward`.

The phrases of a language are in `languages.yaml`. A new task is a method of [`RuleEngine`] and a line in `TASKS`.

The evidence of `reconstruction` is each mark of a gap with the blocks around it; that of `counting` is the blocks that
hold the word. Code gets its facts as comments above a line, Markdown as paragraphs of their own.

Names, places and numbers belong to one split; sums, differences, counts and orders of gaps are of no split, nor are
documents: those of an evaluation set must be others.
"""

import itertools
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from pydantic import Field, field_validator

from ...strict_model import StrictModel
from ..records import UNANSWERABLE, Document, Drop, Evidence, Row
from ..sources.files import comment_prefix
from . import headings, passages, plays, python_code
from .blocks import Block, terms
from .facts import Case, Facts, count_word
from .languages import LANGUAGES, not_stated, or_say_not_stated
from .windows import Draft, Window, assemble, choose_window, insert_facts


STAGE = "questions"

_ATTEMPTS = 8

# Words of which it is not certain whether they are whole: "couldn't", "well-known", and one that a hyphen parts
_JOINED = re.compile(r"(?<!\w)\w+(?:['’‐‑-](?:[ \t]*\r?\n[ \t]*)?\w+)+")
# Accents that are characters of their own, soft hyphens and other invisible characters
_MARKS = ("Mn", "Mc", "Me", "Cf")

GAP = "[[GAP {number}]]"


def checked_weights(tasks: dict[str, float], known: Collection[str]) -> dict[str, float]:
    """Weights of tasks; raises a `ValueError` if there are none, or one is unknown or negative."""
    if not tasks or set(tasks) - set(known) or min(tasks.values()) < 0 or sum(tasks.values()) <= 0:
        raise ValueError(f"`tasks` are {tasks}. Give weights of some of {', '.join(known)}, not all of them 0.")
    return tasks


class RuleEngineConfig(StrictModel):
    """Section `questions` without a language model."""

    engine: Literal["rule"]
    tasks: dict[str, float] = Field(
        default_factory=lambda: {name: task.weight for name, task in TASKS.items()},
        description="Weights; what cannot be asked of a document is left out for it.",
    )
    rows_per_document: int = Field(4, ge=1, description="Questions on a document.")
    lengths: tuple[int | None, ...] = Field(
        (2048,),
        min_length=1,
        description="Most tokens of a row's document and question, in turn; `null`: the whole document.",
    )
    tokens_per_near_miss: int = Field(200, ge=1, description="Tokens of a window per near miss; there are 2 to 24.")
    min_hops: int = Field(2, ge=2, description="Notes of a chain of keys, at least.")
    max_hops: int = Field(5, ge=2, le=12, description="Notes of a chain of keys, at most.")
    min_gaps: int = Field(2, ge=2, description="Blocks taken out, at least.")
    max_gaps: int = Field(4, ge=2, le=8, description="Blocks taken out, at most.")
    not_stated_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Share of the answerable questions about facts and keys that also say what to answer if the "
        "document does not, so that this does not give the unanswerable ones away.",
    )
    split: Literal["train", "test"] | None = Field(
        None, description="Use the names, places and numbers of this split."
    )
    test_share: float = Field(0.3, gt=0, lt=1, description="Share of them that are kept for `test`.")
    seed: int = Field(0, description="Seed of all choices.")

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: dict[str, float]) -> dict[str, float]:
        return checked_weights(tasks, TASKS)


@dataclass(frozen=True)
class Task:
    """A kind of question."""

    weight: float  # share of the rows, where the configuration does not say
    # Makes a draft of a window, `None` if it does not fit with these draws
    draft: "Callable[[RuleEngine, random.Random, Window], Draft | None]"
    phrase: str | None = None  # that `languages.yaml` must hold for a language; by default only English is asked
    fits: Callable[[Document], bool] = lambda document: True  # whether a document has the structure that is asked for

    def has_language(self, language: str) -> bool:
        """Whether it can be asked in a language."""
        return language == "en" if self.phrase is None else self.phrase in LANGUAGES.get(language, {})


class RuleEngine:
    """Makes questions by rule, the same ones for the same document and seed."""

    def __init__(self, config: RuleEngineConfig, count_tokens: Callable[[str], int]):
        self.config = config
        self.count_tokens = count_tokens
        self.facts = Facts(config.seed, config.test_share, config.split)

    async def rows(
        self, document: Document, blocks: list[Block], links: list[list[int]]
    ) -> tuple[list[Row], list[Drop]]:
        """Questions on one document, and those that could not be made. `links` are not used: facts decide."""
        num_tokens = self.count_tokens(document.text) if document.num_tokens is None else document.num_tokens
        rows: list[Row] = []
        drops: list[Drop] = []
        questions: set[str] = set()
        for number in range(self.config.rows_per_document):
            result = self._row(document, num_tokens, blocks, number)
            if isinstance(result, Row) and result.question in questions:
                result = Drop(STAGE, document.source, f"{document.id}:{number}", "no_fit", "the same question again")
            if isinstance(result, Row):
                questions.add(result.question)
                rows.append(result)
            else:
                drops.append(result)
        return rows, drops

    def _row(self, document: Document, num_tokens: int, blocks: list[Block], number: int) -> Row | Drop:
        def drop(reason: str, detail: str = "") -> Drop:
            return Drop(STAGE, document.source, f"{document.id}:{number}", reason, detail)

        rng = random.Random(f"{self.config.seed}:{document.id}:{number}")
        language = document.language or "en"
        weights = {
            name: weight
            for name, weight in self.config.tasks.items()
            if weight > 0 and TASKS[name].has_language(language)
        }
        if not weights:
            return drop("no_template_for_language", language)
        if len(blocks) < 3:
            return drop("too_short_for_task", f"{len(blocks)} blocks")
        weights = {name: weight for name, weight in weights.items() if TASKS[name].fits(document)}
        if not weights:
            return drop("no_fit", "the document has not the structure that the tasks need")
        task = rng.choices(list(weights), list(weights.values()))[0]
        length = self.config.lengths[number % len(self.config.lengths)]
        max_tokens = int((length or 0) * 0.9)
        for _ in range(_ATTEMPTS):
            chosen = blocks if length is None else choose_window(rng, document, num_tokens, blocks, max_tokens)
            if len(chosen) < 3:
                continue
            draft = TASKS[task].draft(self, rng, Window.of(document, num_tokens, language, chosen))
            if draft is None:
                continue
            text, row_blocks = assemble(draft)
            row_tokens = self.count_tokens(f"{text}\n\n{draft.question}")
            if length is not None and row_tokens > length:
                max_tokens -= row_tokens - length + length // 50 + 1
                continue
            return Row(
                document_id=document.id,
                source=document.source,
                language=language,
                question=draft.question,
                answer=draft.answer,
                task=task,
                evidence=tuple(
                    Evidence(row_blocks[i].id, row_blocks[i].start, row_blocks[i].end) for i in sorted(draft.evidence)
                ),
                document=text,
                start=chosen[0].start,
                end=chosen[-1].end,
            )
        return drop("no_fit", f"{task} in {length or num_tokens} tokens")

    # --- The tasks

    def ask_facts(self, rng: random.Random, window: Window, kind: "Callable[..., Case]") -> Draft | None:
        """Facts of one kind, a method of [`Facts`]."""
        return self._write(rng, window, self._case(rng, window, self._unused_facts(window), kind))

    def ask_chain(self, rng: random.Random, window: Window) -> Draft | None:
        """A chain of keys, among others."""
        return self._write(rng, window, self._chains(rng, window, self._unused_facts(window), is_broken=False))

    def ask_unanswerable(self, rng: random.Random, window: Window) -> Draft | None:
        """Facts or a chain, without the last of those needed: what led to it is a near miss now."""
        facts = self._unused_facts(window)
        if window.language == "en" and rng.randrange(2):
            case = self._case(rng, window, facts, rng.choice((Facts.lookup_number, Facts.lookup_name, Facts.two_hop)))
            if case is not None:
                near_misses = (*case.near_misses, *case.evidence[:-1])
                case = replace(case, answer=not_stated("en"), evidence=(), near_misses=near_misses)
        else:
            case = self._chains(rng, window, facts, is_broken=True)
        return self._write(rng, window, case, is_unanswerable=True)

    def reconstruct(self, rng: random.Random, window: Window) -> Draft | None:
        """Blocks that are no neighbors are taken out, and asked for in shuffled order."""
        texts = window.texts
        if any("[[GAP" in text for text in texts):  # which mark is ours would not be certain
            return None
        repeats = Counter(texts)
        inner = range(1, len(texts) - 1)
        usable = [i for i in inner if repeats[texts[i]] == 1 and len(texts[i]) >= 80]
        rng.shuffle(usable)
        # Two only where there is no room for more: "A, B" would be right half of the time
        num_gaps = rng.randint(min(max(3, self.config.min_gaps), self.config.max_gaps), self.config.max_gaps)
        gaps: list[int] = []
        for index in usable:
            is_apart = all(abs(index - other) > 2 for other in gaps)
            is_other = not any(_are_alike(texts[index], texts[other]) for other in gaps)
            if is_apart and is_other and len(gaps) < num_gaps:
                gaps.append(index)
        if len(gaps) < self.config.min_gaps:
            return None
        gaps.sort()
        order = rng.sample(gaps, len(gaps))
        letters = {index: chr(ord("A") + place) for place, index in enumerate(order)}
        pieces = list(texts)
        for number, index in enumerate(gaps, start=1):
            pieces[index] = GAP.format(number=number)
        options = "\n\n".join(f"{letters[index]}:\n{texts[index]}" for index in order)
        question = LANGUAGES[window.language]["reconstruct"].format(count=len(gaps), options=options)
        evidence = {index + step for index in gaps for step in (-1, 0, 1)}
        return Draft(pieces, window.between, evidence, question, ", ".join(letters[index] for index in gaps))

    def count(self, rng: random.Random, window: Window) -> Draft | None:
        """A word that occurs a few times in the window as it is.

        In lower case, not folded: that would ask for "strasse" where the text has "straße".
        """
        texts = window.texts
        document = "".join(map("".join, zip(window.between, texts, strict=True)))
        counts = _whole_words(document)
        words = sorted(w for w, n in counts.items() if 2 <= n <= 9 and len(w) >= 5 and w.isalpha())
        if not words:
            return None
        # First the number: most words occur twice, and "2" would be right most of the time
        number = rng.choice(sorted({counts[word] for word in words}))
        word = rng.choice([word for word in words if counts[word] == number])
        in_blocks = [re.findall(r"\w+", text.lower()).count(word) for text in texts]
        # A block may end within a word; and capitals may be those of another word too: "ſ", "İ"
        as_read = len(re.findall(rf"\b{re.escape(word)}\b", document, re.IGNORECASE))
        if not counts[word] == sum(in_blocks) == as_read:
            return None
        evidence = {i for i, number in enumerate(in_blocks) if number}
        question = LANGUAGES[window.language]["count"].format(word=word)
        return Draft(texts, window.between, evidence, question, str(counts[word]))

    # --- What the tasks share

    def _unused_facts(self, window: Window) -> Facts:
        """Facts about what the text does not name."""
        # Numbers by themselves too: no space may stand between them and the words of a text
        return self.facts.without({*re.findall(r"\w+", window.text), *re.findall(r"\d+", window.text)})

    def _case(self, rng: random.Random, window: Window, facts: Facts, kind: Callable[..., Case]) -> Case | None:
        """Facts to look up, with a question that says what form the answer has; `None` if too few names are left."""
        wanted = min(24, max(2, int(window.num_tokens / self.config.tokens_per_near_miss)))
        num_near_misses = min(wanted, facts.max_near_misses)
        if num_near_misses < 2:
            return None
        case = kind(facts, rng, num_near_misses)
        form = "number" if case.answer.isdecimal() else "name"
        return replace(case, question=f"{case.question} Answer with the {form} only.")

    def _chains(self, rng: random.Random, window: Window, facts: Facts, is_broken: bool) -> Case | None:
        """Notes of the chain that is asked for, and of two others; a broken chain lacks its last note."""
        max_hops = min(len(window.texts) - 1, self.config.max_hops)
        if max_hops < self.config.min_hops or len(facts.numbers) < 3:
            return None
        phrases = LANGUAGES[window.language]
        hops = rng.randint(self.config.min_hops, max_hops)
        keys = [[f"{rng.getrandbits(32):08x}" for _ in range(hops)] for _ in range(3)]
        values = [str(number) for number in rng.sample(facts.numbers, 3)]
        chains = [
            [
                *(phrases["next_note"].format(key=a, other=b) for a, b in itertools.pairwise(chain)),
                phrases["last_note"].format(key=chain[-1], value=value),
            ]
            for chain, value in zip(keys, values, strict=True)
        ]
        if is_broken:
            evidence, near_misses, answer = [], [*chains[0][:-1], *chains[1], *chains[2]], not_stated(window.language)
        else:
            evidence, near_misses, answer = chains[0], [*chains[1], *chains[2]], values[0]
        question = phrases["follow"].format(key=keys[0][0])
        entities = (*(key for chain in keys for key in chain), *values)
        return Case(question, answer, tuple(evidence), tuple(near_misses), entities)

    def _write(
        self, rng: random.Random, window: Window, case: Case | None, is_unanswerable: bool = False
    ) -> Draft | None:
        """Writes facts into a window; `None` where there are none, or where they are not certain there."""
        if case is None or any(count_word(window.text, entity) for entity in case.entities):
            return None
        question, document = case.question, window.document
        if is_unanswerable or rng.random() < self.config.not_stated_share:
            question = f"{question} {or_say_not_stated(window.language)}"
        prefix = f"{comment_prefix(document.source_id)} " if document.kind == "code" else None
        lines = [(fact, True) for fact in case.evidence] + [(fact, False) for fact in case.near_misses]
        rng.shuffle(lines)
        closed = _in_strings(window) if document.kind == "code" else ()
        pieces, evidence = insert_facts(rng, window.texts, window.between, lines, document.kind, prefix, closed)
        return None if pieces is None else Draft(pieces, window.between, evidence, question, case.answer)


TASKS: dict[str, Task] = {
    "lookup_number": Task(0.1, partial(RuleEngine.ask_facts, kind=Facts.lookup_number)),
    "lookup_name": Task(0.1, partial(RuleEngine.ask_facts, kind=Facts.lookup_name)),
    "two_hop": Task(0.15, partial(RuleEngine.ask_facts, kind=Facts.two_hop)),
    "multi_hop": Task(0.15, partial(RuleEngine.ask_facts, kind=Facts.multi_hop)),
    "key_chain": Task(0.2, RuleEngine.ask_chain, "follow"),
    "reconstruction": Task(0.15, RuleEngine.reconstruct, "reconstruct"),
    "counting": Task(0.1, RuleEngine.count, "count"),
    UNANSWERABLE: Task(0.05, RuleEngine.ask_unanswerable, "follow"),
    "passage_order": Task(0.1, passages.order_passages, fits=lambda document: document.kind != "code"),
    "play_speaker": Task(0.1, plays.ask_speaker, fits=plays.is_play),
    "play_reply": Task(0.1, plays.ask_reply, fits=plays.is_play),
    "play_entry": Task(0.1, plays.ask_entry, fits=plays.is_play),
    "play_most": Task(0.1, plays.ask_most, fits=plays.is_play),
    "play_speakers": Task(0.1, plays.list_speakers, fits=plays.is_play),
    "heading": Task(0.15, headings.ask_heading, fits=headings.is_headed),
    "headings": Task(0.1, headings.list_headings, fits=headings.is_headed),
    "heading_reference": Task(0.1, headings.ask_reference, fits=headings.is_headed),
    "code_caller": Task(0.2, python_code.ask_caller, fits=python_code.is_python),
    "code_callers": Task(0.2, python_code.list_callers, fits=python_code.is_python),
    "code_chain": Task(0.2, python_code.ask_chain, fits=python_code.is_python),
    "code_raiser": Task(0.2, python_code.ask_raiser, fits=python_code.is_python),
    "code_default": Task(0.05, python_code.ask_default, fits=python_code.is_python),
}


def _in_strings(window: Window) -> set[int]:
    """The pieces of a window of Python that begin within a string over several lines, such as a docstring."""
    module = python_code.parsed(window.document.text) if python_code.is_python(window.document) else None
    strings, position, found = module.strings if module else (), window.start, set()
    for number, (space, text) in enumerate(zip(window.between, window.texts, strict=True)):
        position += len(space)
        if any(start < position < end for start, end in strings):
            found.add(number)
        position += len(text)
    return found


def _whole_words(text: str) -> Counter[str]:
    """How often the words of a text occur, in lower case; only those that are certain to be whole words."""
    lower = text.lower()
    counts: Counter[str] = Counter()
    uncertain = {word for run in _JOINED.findall(lower) for word in re.findall(r"\w+", run)}
    for match in re.finditer(r"\w+", lower):
        counts[match[0]] += 1
        neighbors = lower[max(0, match.start() - 1) : match.start()], lower[match.end() : match.end() + 1]
        if any(character and unicodedata.category(character) in _MARKS for character in neighbors):
            uncertain.add(match[0])
    return Counter({word: number for word, number in counts.items() if word not in uncertain})


def _are_alike(text: str, other: str) -> bool:
    """Whether two pieces could be taken for each other: they begin alike, or share most of their pairs of words."""
    pairs, other_pairs = (set(itertools.pairwise(terms(piece))) for piece in (text, other))
    return text[:60] == other[:60] or 2 * len(pairs & other_pairs) > len(pairs | other_pairs)
