"""How a reply ends, and where its reasoning ends: what is not known to be an answer is none."""

import re
from collections.abc import Iterable

from .failures import Retryable


# Normal ends as OpenAI, vLLM, SGLang, Ollama, TGI, Anthropic, Cohere, Gemini and gateways name them. Any other reason,
# and none, is a reply that was cut: `length`, `max_tokens`, `model_length`, `abort`, `error`, `load`, ...
_NORMAL_ENDS = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed", "endoftext", "eod"}
_REFUSALS = {"content_filter", "content_filtered", "refusal", "safety", "sensitive", "recitation", "blocklist"}
_REFUSALS |= {"prohibited_content", "spii", "guardrail_intervened", "error_toxic"}

# Reasoning between tags, as Qwen and DeepSeek, EXAONE, Seed, Magistral, Kimi, Cohere, Sky-T1 and Gemma write it
_TAGS = [(f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "thoughts", "seed:think")]
_TAGS += [
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<unused94>", "<unused95>"),
    ("<|channel>", "<channel|>"),
]
# Tags that an answer may hold as well: only at the start of a reply are they reasoning
_NAMES_AT_START = ("reasoning", "reason", "analysis", "scratchpad", "reflection", "inner_monologue", "cot")
_TAGS_AT_START = _TAGS + [(f"<{name}>", f"</{name}>") for name in _NAMES_AT_START]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)), re.I)


_OPENING, _CLOSING = (_any_of(tags) for tags in zip(*_TAGS, strict=True))
_OPENING_AT_START, _CLOSING_AT_START = (_any_of(tags) for tags in zip(*_TAGS_AT_START, strict=True))
_AROUND_ANSWERS = re.compile(
    r"^(?:<\|begin_of_solution\|>|<\|START_RESPONSE\|>)\s*|\s*(?:<\|end_of_solution\|>|<\|END_RESPONSE\|>)$"
)

# Harmony, of gpt-oss: channels of messages, of which `final` is the answer
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)(?:(?!<\|(?:message|channel)\|>).){0,200}<\|message\|>", re.S | re.I)
_END_OF_MESSAGE = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
# The same with its control tokens left out: "analysisWe need ...assistantfinalThe answer ..."
_BARE_ANALYSIS = re.compile(r"(?:assistant)?(?:analysis|commentary)(?=[A-Z\d\"'*])")
_BARE_FINAL = re.compile(r"assistant\s?final(?=\S)")

# A heading that models write above their reasoning when no tag is around it
_HEADING = re.compile(
    r"[\W_]*(?:here(?:'|’)?s?(?: is)? (?:a|my|the) )?"
    r"(?:(?:[\w-]+ )?(?:thinking|thought|reasoning) (?:process|steps|trace)"
    r"|thinking|chain[ -]of[ -]thought|internal monologue)"
    r"(?: (?:that leads|for|to)\b[^\n:]*)?[*_ ]*(?::|\.\.\.|…|\n)",
    re.I,
)
# Where reasoning under a heading ends: at Ollama's and Granite's words
_END_OF_HEADED = re.compile(r"^\W*\.\.\.\s?done thinking\.\W*$|^\W*here is my response:\W*", re.M | re.I)


def is_normal_end(finish_reason: str) -> bool:
    """Whether a reply is known to have ended by itself."""
    return finish_reason.lower() in _NORMAL_ENDS


def is_refusal(finish_reason: str) -> bool:
    """Whether a filter ended the reply."""
    return finish_reason.lower() in _REFUSALS


def split_reasoning(text: str, thinking: str) -> tuple[str, str | None]:
    """The answer and the reasoning of a reply; `thinking` is what the server has split off.

    Raises:
        Retryable: If the reply ends within its reasoning, or reasoning and answer cannot be told apart.
    """
    text, is_split = text.strip(), bool(thinking.strip())
    if "<|channel|>" in text or "<|message|>" in text or (_BARE_ANALYSIS.match(text) and not is_split):
        answer, shown = _split_channels(text)
    elif _OPENING_AT_START.match(text):
        answer, shown = _split_tags(text, _OPENING_AT_START, _CLOSING_AT_START)
    elif is_split:  # a tag within the answer is the answer's
        answer, shown = text, ""
    else:
        answer, shown = _split_tags(text, _OPENING, _CLOSING)
    if _HEADING.match(answer):
        end = _END_OF_HEADED.search(answer)
        if end is None:
            raise Retryable("reasoning_only", f"reasoning without an end: {answer[:200]}")
        shown, answer = shown or answer[: end.start()].strip(), answer[end.end() :].strip()
    return _AROUND_ANSWERS.sub("", answer), thinking.strip() or shown or None


def _split_tags(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> tuple[str, str]:
    """The text after the last closing tag, and the reasoning before; the opening one may stand in the template."""
    *_, last = [None, *closing.finditer(text)]
    if opening.search(text, last.end() if last else 0):
        raise Retryable("truncated", "ends within its reasoning")
    if last is None:
        return text, ""
    return text[last.end() :].strip(), opening.sub("", text[: last.start()], count=1).strip()


def _split_channels(text: str) -> tuple[str, str]:
    """The last message of the channel `final`, and those before it."""
    finals = [match for match in _CHANNEL.finditer(text) if match[1].lower() == "final"]
    finals = finals or list(_BARE_FINAL.finditer(text))
    if not finals:
        raise Retryable("truncated", "ends within its reasoning")
    shown = re.sub(r"<\|[a-z]+\|>", " ", text[: finals[-1].start()]).strip()
    return _END_OF_MESSAGE.split(text[finals[-1].end() :])[0].strip(), shown
