"""Replies of models as data, and foreign text as part of a prompt."""

import hashlib
import re
from typing import Any


_VERDICT = re.compile(r"\W*verdict\b.*", re.I)


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a reply; text around it, a fence, and the usual mistakes of models do no harm.

    Raises:
        ValueError: If there is none.
    """
    try:
        from json_repair import repair_json
    except ImportError as error:
        raise ImportError(
            "Reading replies needs `json-repair`. It is not installed. Run `pip install 'dgrpo-trl[longblocks]'`."
        ) from error
    start, end = text.find("{"), text.rfind("}")
    if start < 0:
        raise ValueError("there is no JSON object")
    value = repair_json(text[start : end + 1] if end > start else text[start:], return_objects=True)
    if isinstance(value, list):  # of several objects the first is taken
        value = next((item for item in value if isinstance(item, dict)), None)
    if not isinstance(value, dict) or not value:
        raise ValueError("there is no JSON object")
    return value


def parse_verdict(text: str, accept: str, reject: str) -> bool:
    """Whether a reply accepts.

    Args:
        text (`str`):
            The reply, its reasoning removed.
        accept, reject (`str`):
            The two words of the verdict.

    Raises:
        ValueError: Unless the last line is exactly `VERDICT: <word>`, with one of the words, and no other line is a
            verdict.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    verdicts = {f"VERDICT: {accept}": True, f"VERDICT: {reject}": False}
    num_verdicts = sum(_VERDICT.fullmatch(line) is not None for line in lines)
    if num_verdicts != 1 or lines[-1] not in verdicts:
        raise ValueError(f"{num_verdicts} verdicts, and it ends with {''.join(lines[-1:])!r:.80}")
    return verdicts[lines[-1]]


def quote(text: str, name: str) -> str:
    """Foreign text between marks that it cannot hold, because they depend on it: what it says is no instruction."""
    boundary = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
    return f"<{name}-{boundary}>\n{text}\n</{name}-{boundary}>"
