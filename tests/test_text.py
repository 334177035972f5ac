"""Which scripts have no spaces between words, against the properties of Unicode; what words and n-grams are."""

import sys
import unicodedata

import pytest
import regex

from dgrpo_trl.text import HANGUL, UNSPACED, hash_ngram, iter_ngrams, tokenize


IS_UNSPACED = regex.compile(f"[{UNSPACED}]")
SCRIPTS = ("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Javanese", "Balinese")


def test_the_table_is_that_of_unicode():
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] != "C"]
    characters = "".join(map(chr, codes))
    letters = set(regex.findall(r"[\p{Letter}\p{Mark}\p{Letter_Number}]", characters))
    shared = set(regex.findall(r"[\u0000-\u0dff]", characters))  # marks that Latin has too
    scripts = "".join(rf"\p{{Script_Extensions={script}}}" for script in SCRIPTS)
    expected = set(regex.findall(rf"[\p{{Line_Break=SA}}{scripts}]", characters)) & letters - shared
    assert sorted(expected) == sorted(regex.findall(f"[{UNSPACED}]", characters))


@pytest.mark.parametrize(
    ("text", "is_unspaced"),
    [
        ("ก", True),  # Thai
        ("\u0e31", True),  # a mark of Thai
        ("๔", False),
        ("฿", False),
        ("ລ", True),  # Lao
        ("မ", True),  # Burmese
        ("ក", True),  # Khmer
        ("។", False),
        ("字", True),
        ("\U00020000", True),  # extension B of Han
        ("\U00031350", True),  # extension H
        ("々", True),
        ("〇", True),
        ("。", False),
        ("ー", True),
        ("・", False),
        ("ｶ", True),  # half-width
        ("Ａ", False),  # full-width
        ("ㄅ", True),  # Bopomofo
        ("한", False),
        ("བ", False),  # Tibetan
        ("अ", False),
        ("a", False),
    ],
)
def test_scripts_without_spaces(text, is_unspaced):
    assert bool(IS_UNSPACED.fullmatch(text)) is is_unspaced


def test_hangul_has_spaces_and_is_known():
    assert all(regex.match(f"[{HANGUL}]", character) for character in "가힣")
    assert not any(IS_UNSPACED.match(chr(code)) for code in range(0xAC00, 0xD7FC))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Mill's 12 wheels!", ["the", "mill", "s", "12", "wheels"]),
        ("서울은 한국의 수도이다", ["서울은", "한국의", "수도이다"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("ｶﾞ", ["ガ"]),  # compatibility forms are one with the usual ones
        ("ปี ๒๕๖๐", ["ป", "ี", "๒๕๖๐"]),
        ("𠀀a𠀁", ["𠀀", "a", "𠀁"]),
    ],
)
def test_words_of_a_text(text, tokens):
    assert tokenize(text) == tokens


def test_ngrams_and_their_hashes():
    assert list(iter_ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]
    assert list(iter_ngrams(["a"], 2)) == []
    assert len({hash_ngram(("a", "b")), hash_ngram(("b", "a")), hash_ngram(("ab",))}) == 3
