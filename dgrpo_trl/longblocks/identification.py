"""Which language a text is in."""

import functools
import re
from collections.abc import Callable
from typing import Any

from ..extras import import_extra
from ..text import HANGUL, UNSPACED


# From a text to its language, `None` where it is not certain, and the confidence
Identify = Callable[[str], tuple[str | None, float]]

# Below this number of letters, language identification guesses
_MIN_LETTERS = 20
_MIN_DENSE_LETTERS = 8  # of scripts whose characters are syllables or words, or that few languages share
_DENSE = re.compile(f"[{UNSPACED}{HANGUL}]")
_MIN_CONFIDENCE = 0.7
# A short text may look like a sister language: only what is certain counts
_MIN_OTHER_LANGUAGE_CONFIDENCE = 0.95


def identify(text: str) -> tuple[str | None, float]:
    """The language of some sentences, as its two-letter code, and the confidence in [0, 1].

    It is `None` where a text is too short or could be in several languages.
    """
    letters = [character for character in text if character.isalpha()]
    if len(letters) < _MIN_LETTERS and len(_DENSE.findall(text)) < _MIN_DENSE_LETTERS:
        return None, 0.0
    code, confidence = _identifier().classify(text)
    confidence = float(confidence)
    return (str(code) if confidence >= _MIN_CONFIDENCE else None), confidence


@functools.cache
def _identifier() -> Any:
    langid = import_extra("py3langid.langid", "Recognizing languages")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def other_language(texts: dict[str, str], language: str, identify: Identify) -> tuple[str, float] | None:
    """Says which of some texts, by name, is in another language, as "the question is in fr", and how certainly."""
    for name, text in texts.items():
        found, confidence = identify(text)
        if found not in (None, language) and confidence > _MIN_OTHER_LANGUAGE_CONFIDENCE:
            return f"the {name} is in {found}", confidence
    return None
