"""What is said in each language, see `languages.yaml`, and what models are asked, see `prompts.yaml`."""

from ...files import read_table


LANGUAGES: dict[str, dict[str, str]] = read_table(__package__, "languages.yaml")
PROMPTS: dict[str, str] = read_table(__package__, "prompts.yaml")


def not_stated(language: str) -> str:
    """The answer to a question that the document does not answer; in English where there is none in the language."""
    return LANGUAGES.get(language, LANGUAGES["en"])["not_stated"]


def or_say_not_stated(language: str) -> str:
    """What a question ends with that the document may not answer: to say so."""
    return LANGUAGES.get(language, LANGUAGES["en"])["or_say"].format(not_stated(language))


def language_name(code: str) -> str:
    """English name of a language, for a prompt."""
    return LANGUAGES[code]["name"] if code in LANGUAGES else f"the language with the ISO 639 code {code!r}"
