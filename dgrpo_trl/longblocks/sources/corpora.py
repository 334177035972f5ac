"""The paper's corpora on the Hub, and language codes.

What is known of each corpus, and its traps, is in `CORPORA`; `type: corpus` in a configuration refers to it. Data sets
write a language as `en`, `eng` or `eng_Latn`, and LongBlocks as `en`: `two_letter` is the only place that knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from ..records import Kind


# CLDR prefers codes with no two-letter form for these
_TWO_LETTER = {"fil": "tl"}


@lru_cache(maxsize=4096)
def two_letter(code: str) -> str | None:
    """The two-letter code of a language.

    Args:
        code (`str`):
            An ISO 639 code of two or three letters, alone or with a script or a region: `spa`, `eng_Latn`, `pt-BR`. A
            member of a macrolanguage counts as it: `cmn` is `zh`.

    Returns:
        `str` or `None`: `None` for what is not a language (`und`, `Python`), or has no two-letter code.
    """
    try:
        import langcodes
    except ImportError as error:
        raise ImportError(
            "Language codes need `langcodes`. It is not installed. Run `pip install 'dgrpo-trl[longblocks]'`."
        ) from error
    try:
        language = langcodes.Language.get(code.strip()).prefer_macrolanguage()
    except langcodes.LanguageTagError:
        return None
    found = language.language or ""
    found = _TWO_LETTER.get(found, found)
    return found if len(found) == 2 and langcodes.tag_is_valid(found) else None


@dataclass(frozen=True)
class Corpus:
    """A corpus on the Hub.

    Args:
        title (`str`):
            Its name in the column `source`, where the configuration gives none.
        dataset (`str`):
            Hub id.
        config, split (`str`, *optional*):
            Where its documents are; `{language}` stands for the language asked for.
        languages (`Mapping[str, str]`, *optional*):
            What `{language}` becomes, by two-letter code. Without it, the code asked for is taken as it is.
        text_column, id_column, license_column, language_column, url_column (`str`, *optional*):
            Columns; a dot goes into a struct.
        language (`str`, *optional*):
            Two-letter code, where all documents are in one language and no column says so.
        license (`str`, *optional*):
            Licence of all documents; `None` where each has its own, or none is stated.
        kind (`str`, *optional*, defaults to `"text"`):
            As in [`Document`].
        may_redistribute (`bool`, *optional*, defaults to `True`):
            Whether its texts may be published. If not, only the id of a document is.
        book_pages (`bool`, *optional*, defaults to `False`):
            Whether the text is in pages, in two transcriptions of which the better one is taken.
        notes (`str`, *optional*):
            Traps.
    """

    title: str
    dataset: str
    config: str | None = None
    split: str = "train"
    languages: Mapping[str, str] | None = None
    text_column: str = "text"
    id_column: str = "id"
    license_column: str | None = None
    language_column: str | None = None
    url_column: str | None = None
    language: str | None = None
    license: str | None = None
    kind: Kind = "text"
    may_redistribute: bool = True
    book_pages: bool = False
    notes: str = ""

    @property
    def needs_language(self) -> bool:
        """Whether a language has to be chosen to read it."""
        return "{language}" in f"{self.config}{self.split}"


_FINEWEB2_HQ_CONFIGS = (
    "arb_Arab ces_Latn cmn_Hani dan_Latn deu_Latn ell_Grek fas_Arab fra_Latn hun_Latn ind_Latn ita_Latn jpn_Jpan "
    "nld_Latn pol_Latn por_Latn rus_Cyrl spa_Latn swe_Latn tur_Latn vie_Latn"
).split()
_FINEWEB2_HQ_LANGUAGES = "ar cs zh da de el fa fr hu id it ja nl pl pt ru es sv tr vi".split()
_GUTENBERG_LANGUAGES = "de en es fr it nl pl pt ru sv zh".split()

CORPORA: Mapping[str, Corpus] = MappingProxyType(
    {
        "wikipedia": Corpus(
            title="Wikipedia",
            dataset="wikimedia/wikipedia",
            config="20231101.{language}",
            url_column="url",
            license="CC-BY-SA-3.0 and GFDL",
            notes="Languages are Wikipedia's own codes.",
        ),
        "fineweb2-hq": Corpus(
            title="FineWeb2-HQ",
            dataset="epfml/FineWeb2-HQ",
            config="{language}",
            languages=MappingProxyType(dict(zip(_FINEWEB2_HQ_LANGUAGES, _FINEWEB2_HQ_CONFIGS, strict=True))),
            language_column="language",
            url_column="url",
            license="ODC-BY-1.0",
            notes="No English, Ukrainian, Romanian, Finnish or Hindi. Common Crawl's terms of use apply too.",
        ),
        "fineweb-hq": Corpus(
            title="FineWeb-HQ",
            dataset="epfml/FineWeb-HQ",
            language="en",
            url_column="url",
            license="ODC-BY-1.0",
            notes="English. Common Crawl's terms of use apply too.",
        ),
        "fineweb-edu": Corpus(
            title="FineWeb-Edu",
            dataset="HuggingFaceFW/fineweb-edu",
            language="en",
            url_column="url",
            license="ODC-BY-1.0",
            notes="English. Common Crawl's terms of use apply too.",
        ),
        "arxiv": Corpus(
            title="arXiv",
            dataset="common-pile/arxiv_papers_filtered",
            license_column="metadata.license",
            url_column="metadata.url",
            language="en",
            notes="Only papers under CC BY, CC BY-SA and CC0: each document names its own.",
        ),
        "stackexchange": Corpus(
            title="StackExchange",
            dataset="common-pile/stackexchange_filtered",
            id_column="metadata.url",
            license_column="metadata.license",
            url_column="metadata.url",
            notes=(
                "`id` is only unique within a site. The license is the question's: answers may be under another "
                "version of CC BY-SA. Mostly English, with sites in Spanish, Japanese, Portuguese and Russian: the "
                "language has to be found out."
            ),
        ),
        "gutenberg": Corpus(
            title="Project-Gutenberg",
            dataset="manu/project_gutenberg",
            split="{language}",
            languages=MappingProxyType({language: language for language in _GUTENBERG_LANGUAGES}),
            notes="The Hub states no license. Project Gutenberg's header and footer are in the text.",
        ),
        "institutional-books": Corpus(
            title="Institutional-Books-1.0",
            dataset="institutional/institutional-books-1.0",
            id_column="barcode_src",
            language_column="language_gen",
            license="Public domain; IDI early-access terms: non-commercial, no redistribution",
            may_redistribute=False,
            book_pages=True,
            notes="The terms forbid sharing any part of it. Volumes repeat: see `likely_duplicates_barcodes_gen`.",
        ),
        "code": Corpus(
            title="Code",
            dataset="common-pile/stackv2_edu_filtered",
            license_column="metadata.license",
            url_column="metadata.url",
            language="en",
            kind="code",
            notes="Single files, most of them short. Openly licensed: each document names its own license.",
        ),
    }
)
