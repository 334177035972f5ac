"""
Rewards by rule: an answer is compared with references as text.

The signature is TRL's, and the same for all rewards here: see [`exact_match_reward`]. A new one is a function whose
name stands in `__all__`.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from .extraction import (
    TextOrMessages,
    completion_text,
    ends_in_thinking,
    extract_answer,
    open_thinking,
    option_parts,
)
from .text import answer_tokens


__all__ = [
    "contains_answer_reward",
    "exact_match_reward",
    "get_contains_answer_reward",
    "list_match_reward",
    "token_f1_reward",
]

# The reference of one row, or several of which any is right
References = str | list[str] | None


def check_lengths(completions: list[TextOrMessages], answer: list[References]) -> None:
    if not isinstance(answer, list | tuple):
        raise TypeError(
            f"`answer` is a {type(answer).__name__}: {answer!r:.80}. A reward needs one reference per completion. "
            "Pass a list, as the trainer does with the dataset column `answer`."
        )
    if len(answer) != len(completions):
        raise ValueError(
            f"`answer` has {len(answer)} entries but `completions` has {len(completions)}. A reward needs one "
            "reference per completion. Repeat each reference for every completion of its prompt."
        )


def accepted_references(entry: References) -> list[str]:
    """The accepted references of one row: those with something to compare. Empty if the row cannot be scored."""
    references = [] if entry is None else [entry] if isinstance(entry, str) else entry
    if not isinstance(references, list | tuple) or not all(isinstance(ref, str | None) for ref in references):
        raise TypeError(
            f"An entry of `answer` is a {type(entry).__name__}: {entry!r:.80}. References are compared as text. "
            "Convert the column to strings, or to lists of strings of which any is right."
        )
    # As data sets have them: GSM8K's end with "#### 72", MATH's hold a box
    answers = [extract_answer(reference) or reference for reference in references if reference]
    return [answer for answer in answers if answer_tokens(answer)]


def extracted_answers(completions: list[TextOrMessages], prompts: list[TextOrMessages] | None = None) -> list[str]:
    """The final answer of each completion. A prompt that ends with `<think>` has opened the thinking of its own."""
    if prompts is not None and len(prompts) == len(completions):
        completions = [
            open_thinking(completion) if isinstance(prompt, str) and ends_in_thinking(prompt) else completion
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    return [extract_answer(completion_text(completion)) for completion in completions]


# A reward function may have an attribute `can_score`: whether it compares one reference with anything. Rows that it
# cannot score are counted before training
def num_unscorable(answers: Iterable[References], can_score: Callable[[str], bool]) -> int:
    """How many rows have references of which none can be scored."""
    filled = (accepted_references(entry) for entry in answers if entry)
    return sum(not any(can_score(reference) for reference in references) for references in filled)


def score_rows(
    completions: list[TextOrMessages],
    answer: list[References],
    score: Callable[[str, str], float | None],
    prompts: list[TextOrMessages] | None = None,
) -> list[float | None]:
    """Apply `score(prediction, reference)` to each row and keep the best of its references that can be scored.

    An option of multiple choice, "(B) Paris", is also scored as its letter and as its text.
    """
    check_lengths(completions, answer)
    rewards: list[float | None] = []
    for prediction, entry in zip(extracted_answers(completions, prompts), answer, strict=True):
        scores = [
            score(*pair) for reference in accepted_references(entry) for pair in _option_pairs(prediction, reference)
        ]
        rewards.append(max((value for value in scores if value is not None), default=None))
    return rewards


def _option_pairs(prediction: str, reference: str) -> list[tuple[str, str]]:
    """Predictions and references to compare: one of two that name an option may leave out its letter or its text."""
    pairs = [(prediction, reference)]
    of_prediction, of_reference = option_parts(prediction), option_parts(reference)
    if of_prediction and not of_reference:
        pairs += [(part, reference) for part in of_prediction]
    if of_reference and not of_prediction:
        pairs += [(prediction, part) for part in of_reference]
    return pairs


def exact_match_reward(
    completions: list[TextOrMessages], answer: list[References], **kwargs: Any
) -> list[float | None]:
    r"""
    Reward 1 when the extracted answer equals the reference after normalization (see [`extract_answer`] and
    [`normalize_answer`]). The SQuAD exact match (arXiv 1606.05250), with a normalization for every script.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, as text or as messages; of messages, the last one of the assistant counts.
        answer (`list[str]` or `list[list[str]]`):
            Reference of each completion, or a list of references of which any is right.
        **kwargs:
            Other columns and what the trainer passes. Not used.

    Returns:
        `list[float | None]`:
            0.0 or 1.0; `None` where the reference is missing or has no letter, digit or symbol.

    Raises:
        ValueError: if the number of references is not the number of completions.
        TypeError: if a completion or a reference is not text.

    Example:
    ```python
    >>> exact_match_reward(["<think>...</think>The answer is: \\boxed{東京。}", "the"], ["東京", "The Hague"])
    [1.0, 0.0]
    ```
    """
    return score_rows(
        completions, answer, lambda text, ref: float(answer_tokens(text) == answer_tokens(ref)), kwargs.get("prompts")
    )


# Words that frame an answer and can hardly be one: "It was written in 1987.", "答案是東京". No "or", "and", "not" or
# "maybe": a sentence that needs them does not commit to one answer. No "no", and no letter but "a": they are answers.
_FRAME_WORDS = frozenset(
    """
    answer final correct therefore thus so hence it this that there here he she they his her its their
    is was are were be been being has had have in on at by of to from for with as during a an the which
    name named called titled known located situated based born died founded established created written published
    released built made held year date place person city country document text passage according stated mentioned
    le la les el los der die das est ist es war était fue réponse respuesta antwort risposta resposta это был ответ
    答 案 是 为 為 在 于 於 的 了 年 え は が を に で す だ た
    """.split()
)
_MAX_FRAME_TOKENS = 12


def contains_answer_reward(
    completions: list[TextOrMessages], answer: list[References], max_extra_tokens: int = 0, **kwargs: Any
) -> list[float | None]:
    """Reward 1 when the extracted answer is a short sentence around the reference, as in "It was written in 1987.".

    The reference must stand in the answer as whole tokens, so "1" is not in "1987", nor 東 an answer of 東京. What is
    left of the answer once the reference is taken out may be at most 12 words of a closed list that frame an answer
    ("the answer is", "it was written in", "答案是", ...), and `max_extra_tokens` other ones. The default of 0 is what
    makes a list of candidates score 0, with separators or without: each candidate is an extra token. With n, a list of
    n + 1 one-word candidates passes. A reference made of framing words only ("she") must stand alone, or a list of
    them would pass.

    The price is that a right answer that brings more than the reference ("Paris is the capital of France") scores 0,
    above all outside English, where the list is short. Use [`LLMJudgeReward`] where such answers are expected.

    Arguments and reward are as for [`exact_match_reward`]; [`get_contains_answer_reward`] sets `max_extra_tokens`.
    """

    def score(prediction: str, reference: str) -> float:
        reference_tokens = answer_tokens(reference)
        rest = _without_reference(answer_tokens(prediction), reference_tokens)
        if rest is None:
            return 0.0
        frame_words = _frame_words(reference_tokens)
        num_extra = sum(token not in frame_words for token in rest)
        return float(num_extra <= max_extra_tokens and len(rest) <= num_extra + _MAX_FRAME_TOKENS)

    return score_rows(completions, answer, score, kwargs.get("prompts"))


def get_contains_answer_reward(max_extra_tokens: int) -> Callable[..., list[float | None]]:
    """[`contains_answer_reward`] with room for `max_extra_tokens` >= 0 beside the reference and the framing words.

    It can be pickled, and TRL logs it as `contains_answer_reward`.
    """
    if max_extra_tokens < 0:
        raise ValueError(
            f"`max_extra_tokens` must be >= 0, got {max_extra_tokens}. It counts tokens. Set it to 0 to allow none."
        )
    return functools.partial(contains_answer_reward, max_extra_tokens=max_extra_tokens)


def _frame_words(reference_tokens: list[str]) -> frozenset[str]:
    """The words that may surround a reference: never those that could be its rivals."""
    if len(reference_tokens) == 1 and re.fullmatch("[a-z]", reference_tokens[0]):
        return _FRAME_WORDS - {"a"}  # "A" and "B" are rivals in multiple choice
    return frozenset() if _FRAME_WORDS.issuperset(reference_tokens) else _FRAME_WORDS


def _without_reference(tokens: list[str], reference: list[str]) -> list[str] | None:
    """`tokens` without any occurrence of `reference`, or `None` if there is no occurrence."""
    rest, start, size = [], 0, len(reference)
    while start < len(tokens):
        if tokens[start : start + size] == reference:
            start += size
        else:
            rest.append(tokens[start])
            start += 1
    return rest if len(rest) < len(tokens) else None


def token_f1_reward(completions: list[TextOrMessages], answer: list[References], **kwargs: Any) -> list[float | None]:
    """Harmonic mean of the precision and the recall of the answer's tokens, counted with repetition and without order.

    The SQuAD F1 (arXiv 1606.05250), on characters in scripts without spaces. It is a dense signal, and by construction
    a list of n one-word candidates with the right one among them gets 2 / (n + 1): use another reward where hedging
    must earn nothing.

    Arguments are as for [`exact_match_reward`]; the reward is between 0.0 and 1.0, the best of several references.
    """

    def score(prediction: str, reference: str) -> float:
        tokens, reference_tokens = answer_tokens(prediction), answer_tokens(reference)
        num_common = (Counter(tokens) & Counter(reference_tokens)).total()
        return 2 * num_common / (len(tokens) + len(reference_tokens))

    return score_rows(completions, answer, score, kwargs.get("prompts"))


_ITEM_BORDERS = re.compile(r"[,;\n、，；]|\band\b")
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")


def list_match_reward(
    completions: list[TextOrMessages], answer: list[References], **kwargs: Any
) -> list[float | None]:
    """Items that the answer and the reference share, as a share of those in either: the Jaccard index of two sets.

    Items are parted by commas, semicolons, lines and "and", with or without bullets; their order and repetitions make
    no difference. It is 1 only for the same set, and each wrong item costs: n candidates of which one is right get
    1 / n. A reference of one item is compared as by [`exact_match_reward`].

    Arguments are as for [`exact_match_reward`]; the reward is between 0.0 and 1.0, the best of several references.
    """

    def score(prediction: str, reference: str) -> float:
        expected, given = _items(reference), _items(prediction)
        if len(expected) == 1:
            return float(answer_tokens(prediction) == answer_tokens(reference))
        return len(expected & given) / len(expected | given)

    return score_rows(completions, answer, score, kwargs.get("prompts"))


def _items(text: str) -> set[tuple[str, ...]]:
    items = (answer_tokens(_BULLET.sub("", item)) for item in _ITEM_BORDERS.split(text))
    return {tuple(item) for item in items if item}
