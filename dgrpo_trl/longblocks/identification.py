"""Which language a text is in: its script decides first, and py3langid among the languages of a script.

The model of py3langid knows varieties too, and divides its certainty among them ("zh", "wuu", "yue"): they count as
one language here.
"""

import functools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from ..extras import import_extra


# From a text to its language, `None` where it is not certain, and the confidence
Identify = Callable[[str], tuple[str | None, float]]

# Languages by script, by the first word of the Unicode names of its letters. All others are written in Latin letters
_LANGUAGES = {
    "CYRILLIC": "ru uk be bg mk sr mn kk ky tg tt ba uz",
    "ARABIC": "ar fa ur ps ug ku sd pa",
    "DEVANAGARI": "hi mr ne sa gom",
    "BENGALI": "bn as",
    "HEBREW": "he yi",
    "CJK": "zh ja ko",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "ETHIOPIC": "am ti",
    "TIBETAN": "bo dz",
    **{"GREEK": "el", "HANGUL": "ko", "THAI": "th", "LAO": "lo", "KHMER": "km", "MYANMAR": "my", "GEORGIAN": "ka"},
    **{"ARMENIAN": "hy", "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml", "SINHALA": "si"},
    **{"GUJARATI": "gu", "GURMUKHI": "pa", "ORIYA": "or"},
}
_SCRIPTS = {script: frozenset(languages.split()) for script, languages in _LANGUAGES.items()}
# Languages that are written in Latin letters as well
_ALSO_LATIN = {"sr", "uz", "kk", "ku", "tt", "mn"}
_ONLY_ELSEWHERE = frozenset().union(*_SCRIPTS.values()) - _ALSO_LATIN
_OF_VARIETY = {"wuu": "zh", "yue": "zh", "ary": "ar", "arz": "ar", "uzs": "uz", "hbo": "he", "grc": "el", "nn": "no"}
_OF_VARIETY |= {"sdh": "ku"}
# A character is a syllable or a word: fewer of them tell as much
_DENSE = {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "ETHIOPIC", "TIBETAN"}

# Below this number of letters, language identification guesses, and a script may be that of a name
_MIN_LETTERS, _MIN_DENSE_LETTERS = 20, 8
_MIN_LETTERS_OF_SCRIPT, _MIN_DENSE_LETTERS_OF_SCRIPT = 8, 4
_MIN_CONFIDENCE = 0.7
# A short text may look like a sister language: only what is certain counts
_MIN_OTHER_LANGUAGE_CONFIDENCE = 0.95
# The script of a text is that of its beginning
_MAX_CHARS = 10_000


@functools.lru_cache(maxsize=4096)
def _script(character: str) -> str | None:
    """The script of a letter; `None` for what all scripts share."""
    if not character.isalpha():
        return None
    words = unicodedata.name(character, "").replace("-", " ").split()
    word = next((word for word in words if word not in ("HALFWIDTH", "FULLWIDTH")), "")
    if word in ("IDEOGRAPHIC", "BOPOMOFO"):
        return "CJK"
    return word if word in _SCRIPTS or word == "LATIN" else None


def script_of(text: str) -> tuple[str | None, int]:
    """The script of most letters of a text, `None` where there is none of most, and how many letters it has in it."""
    counts = Counter(map(_script, text[:_MAX_CHARS]))
    del counts[None]
    kana = counts["HIRAGANA"] + counts["KATAKANA"]
    if kana and 10 * kana >= counts["CJK"]:  # Japanese has both; a few kana in Chinese are a quotation
        counts["HIRAGANA"] = kana + counts.pop("CJK", 0)
        del counts["KATAKANA"]
    script, number = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    return (script, number) if 2 * number > counts.total() else (None, 0)


def foreign_script(text: str, language: str) -> str | None:
    """The script of a text, if its language is not written in it. Latin letters, as in names, are foreign to none."""
    script, number = script_of(text)
    if script is None or script == "LATIN" or language in _SCRIPTS[script]:
        return None
    least = _MIN_DENSE_LETTERS_OF_SCRIPT if script in _DENSE else _MIN_LETTERS_OF_SCRIPT
    return ("Chinese" if script == "CJK" else script.capitalize()) if number >= least else None


def identify(text: str) -> tuple[str | None, float]:
    """The language of some sentences, as its two-letter code, and the confidence in [0, 1].

    It is `None` where a text is too short or could be in several languages.
    """
    script, number = script_of(text)
    if number < (_MIN_DENSE_LETTERS if script in _DENSE else _MIN_LETTERS):
        return None, 0.0
    if script in _SCRIPTS and len(_SCRIPTS[script]) == 1:
        return next(iter(_SCRIPTS[script])), 1.0
    if script == "CJK":  # no Japanese sentence is without kana, but names are
        return ("zh", 1.0) if number >= _MIN_LETTERS else (None, 0.0)
    shares: dict[str, float] = defaultdict(float)
    for code, share in _identifier().rank(text):
        code = _OF_VARIETY.get(str(code), str(code))
        if code in _SCRIPTS[script] if script in _SCRIPTS else code not in _ONLY_ELSEWHERE:
            shares[code] += float(share)
    code, share = max(shares.items(), key=lambda item: item[1])
    confidence = share / max(sum(shares.values()), 1e-9)
    return (code if confidence >= _MIN_CONFIDENCE else None), confidence


@functools.cache
def _identifier() -> Any:
    langid = import_extra("py3langid.langid", "Recognizing languages")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def other_language(texts: dict[str, str], language: str, identify: Identify) -> tuple[str, float] | None:
    """Says which of some texts, by name, is in another language, as "the question is in fr", and how certainly."""
    for name, text in texts.items():
        if script := foreign_script(text, language):
            return f"the {name} is in {script} letters", 1.0
        found, confidence = identify(text)
        if found not in (None, language) and confidence > _MIN_OTHER_LANGUAGE_CONFIDENCE:
            return f"the {name} is in {found}", confidence
    return None
