"""Cleaning: a reason for each document that leaves, what is done to the others, and that twice is as good as once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrpo_trl.longblocks.builder.cleaning import Cleaner, CleaningConfig, strip_gutenberg
from dgrpo_trl.longblocks.identification import identify
from dgrpo_trl.longblocks.records import Document, Drop
from dgrpo_trl.text import break_special_tokens


ENGLISH = "The whale was seen near the harbour in the early morning, and nobody in the town had expected it."
GERMAN = "Der Wal wurde am frühen Morgen in der Nähe des Hafens gesehen, und niemand in der Stadt hatte ihn erwartet."


def words(text):
    return len(text.split())


def clean(text, document=None, special_tokens=None, **config):
    cleaner = Cleaner(CleaningConfig(**{"min_tokens": 1, **config}), words, special_tokens)
    return cleaner.clean(Document(text=text, source="s", source_id="1", **(document or {})))


@pytest.mark.parametrize(
    ("text", "document", "config", "reason", "detail"),
    [
        (" \n\x00 ", {}, {}, "no_text", ""),
        ("12 | 14 | 99 | -- | 7 " * 20, {}, {}, "mostly_symbols", "0.00"),
        ("\n".join(["buy now and here today"] * 20), {}, {}, "repetitive", "1.00"),
        (f"{ENGLISH} AKIAABCDEFGHIJKLMNOP", {}, {"secrets": "drop"}, "secret", "AKIA"),
        ("zzz", {}, {}, "unknown_language", ""),
        (ENGLISH, {}, {"identify_language": False}, "unknown_language", "none is stated"),
        (GERMAN, {"language": "en"}, {}, "wrong_language", "de"),
        (GERMAN, {}, {"languages": ("en", "fr")}, "language_not_wanted", "de"),
        (ENGLISH, {}, {"min_tokens": 20}, "too_short", "19 tokens"),
        (ENGLISH, {}, {"max_tokens": 18}, "too_long", "19 tokens"),
        (ENGLISH, {}, {"max_tokens": 18, "truncate_too_long": True}, "too_short", "0 tokens"),
    ],
)
def test_each_reason_has_its_document(text, document, config, reason, detail):
    drop = clean(text, document, **config)
    assert isinstance(drop, Drop) and (drop.stage, drop.source, drop.item) == ("sources", "s", "1")
    assert drop.reason == reason and detail in drop.detail


def test_lengths_at_the_edges_stay():
    document = clean(ENGLISH, min_tokens=19, max_tokens=19)
    assert (document.num_tokens, document.language) == (19, "en")


def test_a_long_document_is_cut_after_the_last_paragraph_that_fits():
    paragraphs = [f"{ENGLISH} Number {n}." for n in "abcdefgh"]
    document = clean("\n\n".join(paragraphs), max_tokens=70, truncate_too_long=True)
    assert document.text == "\n\n".join(paragraphs[:3]) and document.num_tokens == 63


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("sch\u00c3\u00b6n", "schön"),
        ("line\r\nline\rline\u2028line", "line\nline\nline\nline"),
        ("nu\x00ll and be\x07ll", "null and bell"),
        ("half \ud83d a pair", "half \ufffd a pair"),
        ("e\u0301tude", "étude"),
        ("write to jane.doe+x@mail.example.org now", "write to email@example.com now"),
        ("from 8.8.8.8 to 10.0.0.1, version 1.2.3.4.5", "from 192.0.2.1 to 10.0.0.1, version 1.2.3.4.5"),
        ("ghp_" + "a1" * 18, "REMOVED-SECRET"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "REMOVED-SECRET"),
        ("ends with <|im_end|> here", "ends with <\u200b|im_end|> here"),
    ],
)
def test_what_is_mended(before, after):
    document = clean(f"{ENGLISH} {before}")
    assert document.text == f"{ENGLISH} {after}"


def test_steps_can_be_switched_off():
    text = f"{ENGLISH} a@b.org 8.8.8.8 <|im_end|> AKIAABCDEFGHIJKLMNOP"
    off = {"scrub_pii": False, "break_special_tokens": False, "secrets": "keep"}
    assert clean(text, **off).text == text


def test_code_keeps_its_characters_and_its_language():
    text = 'MOJIBAKE = "sch\u00c3\u00b6n"\n' + "x = 1\n" * 40
    document = clean(text, {"kind": "code"})
    assert document.text == text.strip("\n") and document.language == "en"


def test_the_text_between_the_marks_of_gutenberg_is_kept():
    book = f"{ENGLISH}\n\n" * 30
    start, end = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK X ***" for word in ("START", "END"))
    text = f"Header\n{start}\n{book}{end}\nTerms"
    assert strip_gutenberg(text).strip() == book.strip()
    assert strip_gutenberg(book) == book


def test_special_tokens_are_broken_longest_first():
    assert break_special_tokens("<s>x<s2>", ["<s", "<s>"]) == "<\u200bs>x<\u200bs2>"
    assert break_special_tokens("a|b", ["|"]) == "a|b"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", ENGLISH),
        ("de", GERMAN),
        ("fr", "La baleine a été aperçue près du port au petit matin, et personne ne l'attendait."),
        ("es", "La ballena fue vista cerca del puerto a primera hora de la mañana y nadie la esperaba."),
        ("it", "La balena è stata vista vicino al porto la mattina presto, e nessuno se l'aspettava."),
        ("pt", "A baleia foi vista perto do porto no início da manhã, e ninguém na cidade a esperava."),
        ("nl", "De walvis werd in de vroege ochtend bij de haven gezien, en niemand had hem verwacht."),
        ("pl", "Wieloryb był widziany w pobliżu portu wczesnym rankiem i nikt się go nie spodziewał."),
        ("ru", "Кит был замечен рядом с гаванью рано утром, и никто в городе его не ждал."),
        ("uk", "Кита бачили біля гавані рано вранці, і ніхто в місті на нього не чекав."),
        ("fi", "Valas nähtiin sataman lähellä varhain aamulla, eikä kukaan kaupungissa odottanut sitä."),
        ("hu", "A bálnát kora reggel látták a kikötő közelében, és senki sem számított rá a városban."),
        ("el", "Η φάλαινα εθεάθη κοντά στο λιμάνι νωρίς το πρωί και κανείς δεν την περίμενε."),
        ("ja", "その鯨は早朝に港の近くで目撃された。町の誰もそれを予想していなかった。"),
        ("ja", "鯨は港の近くで目撃された。"),
        ("ko", "고래가 항구에 나타났다."),
        ("th", "เห็นปลาวาฬ"),
        ("km", "ជំរាបសួរអ្នកទាំងអស់"),
        ("hi", "व्हेल को सुबह-सुबह बंदरगाह के पास देखा गया, और शहर में किसी को इसकी उम्मीद नहीं थी।"),
    ],
)
def test_languages_are_recognised(code, text):
    assert identify(text)[0] == code


@pytest.mark.parametrize("text", ["", "412", "C, A, B", "Clara", "!?"])
def test_what_is_too_short_has_no_language(text):
    assert identify(text) == (None, 0.0)


@settings(max_examples=150, deadline=None)
@given(st.text(st.one_of(st.characters(), st.sampled_from("\r\n\x85<|>@.\u200b\ufeffÃ¶"))), st.booleans())
def test_cleaning_what_is_clean_changes_nothing(text, is_code):
    options = {"min_tokens": 0, "min_letter_share": 0, "identify_language": False, "max_repeated_line_share": 1}
    document = {"kind": "code" if is_code else "text", "language": "en"}
    first = clean(text, document, **options)
    if isinstance(first, Drop):
        assert first.reason in ("no_text", "too_short")
        return
    again = clean(first.text, document, **options)
    assert again == first
