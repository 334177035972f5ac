"""Whether two answers say the same, by rule, and whether a question gives its answer away."""

import re
from collections import Counter

from ...rewards.text import normalize_answer
from ...text import IS_UNSPACED
from .languages import LANGUAGES


# A minus sign follows no word: "1987-1990" and "covid-19" hold none
_NUMBER = re.compile(r"(?:(?<!\w)-)?\d[\d.,]*")
_THOUSANDS_MARK = re.compile(r"(?<=\d)['\u00a0\u2009\u202f\u2019](?=\d{3}(?!\d))")
# Thousands and decimals are parted one way or the other: "1.234" may be either
_SEPARATORS = ((",", r"\."), (r"\.", ","))
# An answer of at most this many words is expected whole, in a reply of at most this many. Two characters of a script
# without spaces count as a word
_SHORT_ANSWER_WORDS, _SHORT_REPLY_WORDS = 6, 30
_LETTERS = re.compile(r"[\W_]*[^\W\d_](?:[\W_]+[^\W\d_])*[\W_]*")
_OPTION_LETTER = re.compile(r"(?<![\w+#'’-])[A-Z](?![\w+#'’-])")
_YES_OR_NO = frozenset(
    "yes no true false ja nein oui non sí si sì não sim nee nej tak nie да нет ні 是 否 はい いいえ".split()
)


def answers_agree(reference: str, reply: str, min_f1: float = 0.5) -> bool:
    """Whether a reply says the same as the reference, by rule.

    Equal words agree. Of "yes" and "no", the first in the reply counts; of option letters, the only one. Numbers, and
    other short references, agree with a short reply that holds them, numbers however thousands and decimals are
    parted, the rest as whole words, if it holds no other number. A long reference agrees with a reply whose shared
    words have an F1 of at least `min_f1`; scripts without spaces are compared by characters.
    """
    expected, given = words_of(reference), words_of(reply)
    if not expected or not given:
        return False
    if expected == given:
        return True
    if expected[0] in _YES_OR_NO and len(expected) == 1:
        return next((word for word in given if word in _YES_OR_NO), None) == expected[0]
    if re.fullmatch(r"\W*[A-Za-z]\W*", reference):
        return {letter.casefold() for letter in _OPTION_LETTER.findall(reply)} == set(expected)
    numbers, given_numbers = _numbers(reference), _numbers(reply)
    is_short, has_other_numbers = _length(given) <= _SHORT_REPLY_WORDS, not _all_among(given_numbers, numbers)
    if numbers and not any(character.isalpha() for character in reference):
        return is_short and not has_other_numbers and _all_among(numbers, given_numbers)
    if _length(expected) <= _SHORT_ANSWER_WORDS:
        return is_short and bool(_find(given, expected)) and not has_other_numbers
    shared = (Counter(expected) & Counter(given)).total()
    return 2 * shared / (len(expected) + len(given)) >= min_f1


def words_of(text: str) -> list[str]:
    """Words in small letters without punctuation; single characters where no space stands between words."""
    return normalize_answer(text).split()


def _length(words: list[str]) -> float:
    return sum(0.5 if IS_UNSPACED.match(word) else 1 for word in words)


def _find(words: list[str], part: list[str]) -> list[int]:
    size = len(part)
    return [i for i in range(len(words) - size + 1) if words[i : i + size] == part] if part else []


def gives_away(question: str, answer: str, language: str) -> bool:
    """Whether the answer stands in the question, and not as one of the options to choose from."""
    words, part = words_of(question), words_of(answer)
    joined = "".join(part)
    if len(joined) <= 1 or joined in _YES_OR_NO or _LETTERS.fullmatch(answer):
        return False
    places, option = _find(words, part), LANGUAGES.get(language, {}).get("or")
    # "the red one or the blue one": an article may stand between
    near = (words[max(0, i - 2) : i] + words[i + len(part) : i + len(part) + 2] for i in places)
    # The Japanese for "from" begins with the word for "or"
    return bool(places) and not any(option in nearby and "ら" not in nearby for nearby in near)


def _numbers(text: str) -> list[set[float]]:
    """The numbers in a text, each as what it may mean."""
    numbers = []
    for literal in _NUMBER.findall(_THOUSANDS_MARK.sub("", text.replace("\u2212", "-"))):
        literal = literal.rstrip(".,")
        readings = {
            float(re.sub(thousands, "", literal).replace(",", "."))
            for thousands, decimal in _SEPARATORS
            if re.fullmatch(rf"-?(?:\d+|\d{{1,3}}(?:{thousands}\d{{3}})+)(?:{decimal}\d+)?", literal)
        }
        # "1,2,3" and "1.2.3" are neither
        numbers += [readings] if readings else [{float(part)} for part in re.findall(r"\d+", literal)]
    return numbers


def _all_among(numbers: list[set[float]], others: list[set[float]]) -> bool:
    return all(any(number & other for other in others) for number in numbers)
