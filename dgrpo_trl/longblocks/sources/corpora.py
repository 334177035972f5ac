"""The paper's corpora on the Hub, the pages of its books, and language codes.

What is known of each corpus, and its traps, is in `corpora.yaml`; `type: corpus` in a configuration refers to it. Data
sets write a language as `en`, `eng` or `eng_Latn`, and LongBlocks as `en`: `two_letter` is the only place that knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...extras import import_extra
from ...files import read_table
from ..records import Kind


# CLDR prefers codes with no two-letter form for these
_TWO_LETTER = {"fil": "tl"}


@lru_cache(maxsize=4096)
def two_letter(code: str) -> str | None:
    """The two-letter code of a language; `None` for what is not one (`und`, `Python`), or has no such code.

    It is given as an ISO 639 code of two or three letters, alone or with a script or a region: `spa`, `eng_Latn`,
    `pt-BR`. A member of a macrolanguage counts as it: `cmn` is `zh`.
    """
    langcodes = import_extra("langcodes", "Reading language codes")
    try:
        language = langcodes.Language.get(code.strip()).prefer_macrolanguage()
    except langcodes.LanguageTagError:
        return None
    found = language.language or ""
    found = _TWO_LETTER.get(found, found)
    return found if len(found) == 2 and langcodes.tag_is_valid(found) else None


@dataclass(frozen=True)
class Corpus:
    """A corpus on the Hub. Of a column's name, a dot goes into a struct."""

    title: str  # in the column `source`, where the configuration gives none
    dataset: str  # Hub id
    config: str | None = None  # `{language}` stands for the language asked for
    split: str = "train"  # so too
    languages: Mapping[str, str] | None = None  # what `{language}` becomes, by two-letter code; by default that code
    text_column: str = "text"
    id_column: str = "id"
    license_column: str | None = None
    language_column: str | None = None
    url_column: str | None = None
    language: str | None = None  # of all documents, where no column says it; two-letter code
    license: str | None = None  # of all documents; `None` where each has its own, or none is stated
    kind: Kind = "text"
    may_redistribute: bool = True  # whether its texts may be published; if not, only the id of a document is
    book_pages: bool = False  # whether the text is in pages, in two transcriptions of which the better one is taken
    notes: str = ""  # traps

    @property
    def needs_language(self) -> bool:
        """Whether a language has to be chosen to read it."""
        return "{language}" in f"{self.config}{self.split}"


CORPORA = {name: Corpus(**values) for name, values in read_table(__package__, "corpora.yaml").items()}

BOOK_COLUMNS = ("text_by_page_src", "text_by_page_gen", "ocr_score_src", "ocr_score_gen")  # of Institutional Books


def book_pages(row: dict[str, Any]) -> list[str]:
    """The pages of a volume of Institutional Books, in the transcription that scored better; a missing page is empty.

    LongBlocks (arXiv:2605.12227) takes `text_by_page_src`, the original OCR, if `ocr_score_src >= ocr_score_gen`, else
    `text_by_page_gen`. Most languages have no second transcription: then it is the original.
    """
    scores = row.get("ocr_score_src"), row.get("ocr_score_gen")
    original, generated = row.get("text_by_page_src"), row.get("text_by_page_gen")
    is_original = not generated or scores[1] is None or (scores[0] is not None and scores[0] >= scores[1])
    return [page or "" for page in (original if is_original else generated) or []]
