"""Where an answer is announced, in the languages of the builder: "The final answer is: 5"."""

import re
from typing import Any

from ..files import read_table


_TABLE: dict[str, dict[str, list[str]]] = read_table(__package__, "announcements.yaml")
_NO_SPACES = ("ja", "zh", "ko")
_OPENING = r"[\s*_>#\-\"“„«「『(]{0,8}"
_COLON = r"[\s*_]{0,4}(?:[:：﹕︓꞉=]|-->?|→|(?<=\s)[-–—](?=\s))[\s*_]{0,8}"
_END = r"[\s.。．!！।*_]*"


def _alternatives(words: list[str]) -> str:
    return "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in sorted(words, key=len, reverse=True))


def _patterns(language: str, table: dict[str, Any]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """An announcement with a colon, or as a heading; and one with a verb, at the start of a sentence."""
    gap = "" if language in _NO_SPACES else r"(?=[\s*_:：﹕︓꞉=—–-]|\Z)"
    space = r"[\s*_]*" if language in _NO_SPACES else r"[\s*_,،]+"
    start = "" if language in ("ja", "zh") else r"(?<!\w)"
    noun = f"{start}(?:{_alternatives(table['noun'])}){gap}"
    word = f"(?:{_alternatives(table['before'])})"
    around = f"(?:{space}{word}{gap}){{0,3}}"
    # An empty copula stands for none: then a space is all there is between noun and answer
    verbs = [copula for copula in table["copula"] if copula]
    verb = rf"[\s*_]*(?:{_alternatives(verbs)}){gap}" if verbs else r"(?!)"
    if "" in table["copula"]:
        verb = rf"(?:{verb}|(?=\s+\S))"
    beginning = rf"(?:\A|[\n.!?。！？؟।:：,，、;])\s*{_OPENING}(?:{word}{space}){{0,4}}"
    filler = "(?:that |dass |que |że |että |hogy |att |at )?"
    heading = rf"(?:\A|\n)[ \t]*[#*_]{{1,6}}[ \t]*(?:{word}{space}){{0,4}}{noun}[ \t*_]*\n"
    with_colon = rf"{noun}{around}(?:{verb})?{_COLON}|{heading}"
    with_verb = rf"{beginning}{noun}{around}{verb}[\s*_]*{filler}"
    return re.compile(with_colon, re.IGNORECASE), re.compile(with_verb, re.IGNORECASE)


_PATTERNS = [(*_patterns(language, table), table.get("end", [])) for language, table in _TABLE.items()]
_BLANKS = re.compile(r"\s{3,}")  # a run of them is tried at each of its positions
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_MAX_CHARS = 4_000  # of the end of a text, in which its last announcement is looked for


def _short_blank(match: re.Match[str]) -> str:
    return "\n\n" if match[0].count("\n") > 1 else "\n" if "\n" in match[0] else "  "


def announced_answer(text: str) -> str | None:
    """What follows the last announcement of an answer, to the end of its paragraph; `None` where there is none."""
    tail = _BLANKS.sub(_short_blank, text[-_MAX_CHARS:])
    found: tuple[int, bool, list[str]] | None = None
    for with_colon, with_verb, ends in _PATTERNS:
        for pattern in (with_colon, with_verb):
            for match in pattern.finditer(tail):
                if found is None or (match.end(), pattern is with_colon) > found[:2]:
                    found = (match.end(), pattern is with_colon, ends)
    if found is None:
        return None
    rest = _PARAGRAPH.split(tail[found[0] :].strip(), maxsplit=1)[0].strip()
    return rest if found[1] else _without_end(rest, found[2])


def _without_end(text: str, ends: list[str]) -> str:
    """`text` without what ends its sentence: a mark, and the verb in languages whose verb comes last."""
    stripped = re.sub(f"(?:{_alternatives(ends)})?{_END}\\Z", "", text)
    return stripped.strip() or text
