"""How models end a text: student and teacher must agree, or the teacher teaches the student not to end."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ends:
    """How one model ends a completion.

    Args:
        end (`int`, *optional*):
            The token that it writes last: what its chat template puts after an answer, else the `eos_token` of its
            tokenizer. `None` where neither is known.
        stops (`frozenset[int]`):
            The tokens at which its generation stops: `eos_token_id` of its generation config, and `eos_token`.
    """

    end: int | None
    stops: frozenset[int]


def read_ends(
    tokenizer: PreTrainedTokenizerBase | None,
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Ends:
    """The ends of a model with this tokenizer; without `generation_config` those that its configuration states."""
    generation_config = generation_config or GenerationConfig.from_model_config(config)
    stated: Any = generation_config.eos_token_id
    stops = {stated} if isinstance(stated, int) else set(stated or ())
    if tokenizer is None:
        return Ends(None, frozenset(stops))
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    end = _end_of_turn(tokenizer, chat_template_kwargs or {}) if tokenizer.chat_template else None
    return Ends(tokenizer.eos_token_id if end is None else end, frozenset(stops))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> int | None:
    """The first special token that the chat template writes after an answer."""
    answer = "the answer"
    messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except Exception:  # of whatever kind: a template of such conversations is what is asked for
        return None
    after = text.rpartition(answer)[2]
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    places = {after.index(token): i for token, i in special.items() if token in after}
    return places[min(places)] if places else None


def end_warnings(student: Ends, teacher: Ends, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A warning if one of the models does not stop where the other ends, as a base and an instruct model do."""
    agree = (
        student.end == teacher.end or None in (student.end, teacher.end),
        student.end is None or student.end in teacher.stops,
        teacher.end is None or teacher.end in student.stops,
    )
    if all(agree):
        return []

    def shown(ids: Collection[int | None]) -> str:
        tokens = tokenizer.convert_ids_to_tokens(sorted(i for i in ids if i is not None))
        return " or ".join(map(repr, tokens)) or "no token"

    return [
        f"Student and teacher end differently: a completion of the student ends with {shown([student.end])} and is "
        f"stopped at {shown(student.stops)}, one of the teacher ends with {shown([teacher.end])} and is stopped at "
        f"{shown(teacher.stops)}. At the end of a completion the teacher expects another token, and the student would "
        "learn not to end. Set `distill_mask_eos: true`, which leaves that position out of the teacher term, or give "
        "both the same `eos_token_id` in `generation_config.json` and the same chat template, that of an instruct "
        "model for instance."
    ]
