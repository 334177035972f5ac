"""The tokens of student and teacher: which ids mean the same to both, and what a run refuses of those that do not."""

from collections.abc import Collection, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat import escape_messages
from .text import iter_strings


_MAX_SHOWN = 8


def unshared_tokens(first: dict[str, int], second: dict[str, int] | None) -> dict[str, int]:
    """Tokens of `first` whose ids mean nothing to `second`; none where `second` is not known."""
    if second is None:
        return {}
    taken = set(second.values())
    return {token: i for token, i in first.items() if token not in second and i not in taken}


def unshared_ids(student_vocab: dict[str, int], teacher_vocab: dict[str, int] | None) -> tuple[int, ...]:
    """Ids that are a token of one of the two models alone, in ascending order: they are not compared."""
    if teacher_vocab is None:
        return ()
    both = unshared_tokens(student_vocab, teacher_vocab), unshared_tokens(teacher_vocab, student_vocab)
    return tuple(sorted(i for tokens in both for i in tokens.values()))


def vocabulary_problems(
    student_vocab: dict[str, int],
    teacher_vocab: dict[str, int] | None,
    student_vocab_size: int,
    teacher_vocab_size: int,
    added_tokens: Collection[str] = (),
) -> list[str]:
    """Shared ids must mean the same strings, all ids of ordinary text must be shared, and the heads must cover them.

    A teacher whose tokens are not known is trusted. The numbers of rows of the heads (`..._vocab_size`) may differ:
    families pad them differently, and the divergence is taken over the ids that both have. `added_tokens` are those of
    the student that do not come out of ordinary text; the teacher may lack them.
    """
    theirs = student_vocab if teacher_vocab is None else teacher_vocab
    lacking = unshared_tokens(student_vocab, theirs)
    allowed = {token for token in lacking if token in added_tokens} | set(unshared_tokens(theirs, student_vocab))
    differing = [item for item in student_vocab.items() ^ theirs.items() if item[0] not in allowed]
    problems = []
    if differing:
        token = min(differing, key=lambda item: (item[1], item[0]))[0]
        student_id, teacher_id = (vocab.get(token, "none") for vocab in (student_vocab, theirs))
        problems.append(
            "Student and teacher have different vocabularies: the first of "
            f"{len({token for token, _ in differing})} differing tokens, {token!r}, has id {student_id} for the "
            f"student and {teacher_id} for the teacher. The divergence compares probabilities of the same ids. Choose "
            "a teacher that shares the student's tokenizer; either may have tokens that were added to it."
        )
    largest_shared = max((i for token, i in student_vocab.items() if token not in lacking), default=0)
    if (
        largest_shared >= min(student_vocab_size, teacher_vocab_size)
        or max(student_vocab.values()) >= student_vocab_size
    ):
        problems.append(
            f"The tokenizer has ids up to {max(student_vocab.values())}, but the LM heads have {student_vocab_size} "
            f"(student) and {teacher_vocab_size} (teacher) rows. Both must have a row for every id that they share. "
            "Resize the smaller model's embeddings, or choose a teacher of the student's family."
        )
    return problems


def vocabulary_warnings(student_vocab: dict[str, int], teacher_vocab: dict[str, int] | None) -> list[str]:
    """A warning that names the tokens that only one of the models has."""
    if teacher_vocab is None:
        return []
    warnings = []
    ours, theirs = unshared_tokens(student_vocab, teacher_vocab), unshared_tokens(teacher_vocab, student_vocab)
    if ours:
        warnings.append(
            f"The teacher lacks {_shown(ours)} of the student's tokenizer. The divergence leaves them out, and where "
            "the student writes one of them, the teacher reads padding."
        )
    if theirs:
        warnings.append(
            f"The student lacks {_shown(theirs)} of the teacher's tokenizer. The divergence leaves them out."
        )
    return warnings


def _shown(tokens: dict[str, int]) -> str:
    shown = [f"{token!r} (id {i})" for token, i in sorted(tokens.items(), key=lambda item: item[1])]
    more = f" and {len(shown) - _MAX_SHOWN} more" if len(shown) > _MAX_SHOWN else ""
    return f"{len(shown)} tokens ({', '.join(shown[:_MAX_SHOWN])}{more})"


def unreadable_problems(
    prompts: Iterable[Any],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    lacking: dict[str, int],
    chat_template_kwargs: dict[str, Any] | None = None,
    keep_special_tokens: Collection[str] = (),
) -> list[str]:
    """A problem if prompts that the teacher reads, or the chat template, hold tokens of `lacking`."""
    prompts = list(prompts) if lacking else []
    rows = [row for row, prompt in enumerate(prompts) if _held(prompt, tokenizer, lacking, keep_special_tokens)]
    if rows:
        return [unreadable_problem(name, f"{len(rows)} rows, first in row {rows[0]} (from 0),", lacking)]
    if any(isinstance(prompt, list) for prompt in prompts) and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}],
            tokenize=False,
            add_generation_prompt=True,
            **chat_template_kwargs or {},
        )
        if written := [token for token in lacking if token in text]:
            return [unreadable_problem(name, "every row, by the chat template,", written)]
    return []


def unreadable_problem(name: str, where: str, tokens: Iterable[str | int]) -> str:
    """The message for prompts with tokens, or token ids, that the teacher lacks."""
    shown = ", ".join(map(repr, list(tokens)[:_MAX_SHOWN]))
    return (
        f"{name}: in {where} the prompt has a token that the teacher does not have ({shown}). It cannot read the "
        "prompt. Give these rows a `teacher_prompt` without it, or choose a teacher that has it."
    )


def _held(prompt: Any, tokenizer: PreTrainedTokenizerBase, lacking: dict[str, int], keep: Collection[str]) -> bool:
    def holds(value: Any) -> bool:
        return any(token in text for text in iter_strings(value) for token in lacking)

    if not holds(prompt):
        return False
    return isinstance(prompt, str) or holds(escape_messages(prompt, tokenizer, keep))
