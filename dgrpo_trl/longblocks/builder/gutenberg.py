"""What Project Gutenberg puts around its books: headers, licenses and credits, in the forms of fifty years."""

import re


# A mark may be wrapped, but no blank line is in it
_WRAPPED = r"(?:(?!\n[ \t]*\n)[^*]){0,400}?"
_NAME = r"(?:PRO[JY]E[CKT]+\w*|PROGETTO) GUTENBERG|GUTENBERG(?:[ -]PROJE[CK]T)?"
_BEGIN = r"START|BEGIN\w*|ANFANG|D[ÉE]BUT|COMIENZO|IN[IÍ]CIO|INIZIO|ALKU|BÖRJAN|POCZĄTEK|KEZDET|НАЧАЛО"
_FINISH = r"END|ENDE|FIN|FINAL|FINE|FIM|EINDE|SLUT|SLUTET|LOPPU|KONIEC|VÉGE|КОНЕЦ"
_START = re.compile(
    rf"^.*\*\*\* ?(?:{_BEGIN})\b{_WRAPPED}(?:{_NAME}){_WRAPPED}\*\*\*.*$"
    rf"|^.*\*\*\* ?(?:{_BEGIN})\b.*(?:{_NAME}).*$"
    r"|^.*\*END\*? ?THE SMALL PRINT.*$",
    re.I | re.M,
)
_END = re.compile(
    rf"^.*\*\*\* ?(?:{_FINISH})\b{_WRAPPED}(?:{_NAME}).*$"
    rf"|^[ \t*]*(?:THE )?(?:{_FINISH})\b[^\n*]{{0,40}}\b(?:{_NAME})(?:['’]S?)?\b.*$",
    re.I | re.M,
)
# The small print of the first etexts, where it stands at the end
_SMALL_PRINT = re.compile(r"^.*\*\*\* ?START\*{0,2} ?THE SMALL PRINT.*$", re.I | re.M)
# Paragraphs below the header that are not the book's: who made the file, and where other files of it are
_CREDITS = re.compile(
    r"(?:(?:this |the )?(?:e-?text|e-?book|file|text|updated edition)s? (?:was |were )?)?"
    r"(?:produced|prepared|transcribed|digiti[sz]ed|scanned|created|updated) (?:for project gutenberg )?by\b"
    r"|produit par\b|note: project gutenberg (?:also )?has an? \w+"
    r"|(?:and )?the (?:online )?distributed proofread\w+|images? (?:of the original pages )?(?:are|is) available"
    r"|(?:see|or) (?:\d+-h\.(?:htm|zip)|https?://www\.gutenberg)|\(?https?://(?:www\.)?(?:gutenberg|pgdp|archive)\S*\)?\s*$",
    re.I,
)
_MAX_CREDIT_CHARS = 1500


def strip_gutenberg(text: str) -> str:
    """The book between the marks of Project Gutenberg, without its credits; all of it where there are no marks."""
    half = len(text) // 2
    starts = list(_START.finditer(text))
    # The last mark of a header; one below the middle is that of a short text under a long header
    start = next((mark for mark in reversed(starts) if mark.start() < half), starts[0] if starts else None)
    if start is not None:
        text = text[start.end() :]
    ends = [mark.start() for mark in _END.finditer(text) if mark[0].lstrip().startswith("***")]
    weak = [mark.start() for pattern in (_END, _SMALL_PRINT) for mark in pattern.finditer(text, len(text) // 2)]
    end = min(ends + weak, default=None)
    text = text if end is None else text[:end]
    return text if start is None and end is None else _without_credits(text)


def _without_credits(text: str) -> str:
    """The text without the paragraphs at its beginning that tell of the file."""
    while True:
        body = text.lstrip("\n \t")
        paragraph, _, rest = body.partition("\n\n")
        if not rest or len(paragraph) > _MAX_CREDIT_CHARS or not _CREDITS.match(paragraph.lstrip("[( \t")):
            return body if body is not text else text
        text = rest
