"""Cleaning: a reason for each document that leaves, what is done to the others, and that twice is as good as once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from dgrpo_trl.llm import load_token_counter
from dgrpo_trl.longblocks.builder.cleaning import Cleaner, CleaningConfig
from dgrpo_trl.longblocks.builder.gutenberg import strip_gutenberg
from dgrpo_trl.longblocks.identification import identify, other_language
from dgrpo_trl.longblocks.records import Document, Drop
from dgrpo_trl.text import WELL_KNOWN_SPECIAL_TOKENS, break_special_tokens


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


MARKS = {
    "plain": ("*** START OF THE PROJECT GUTENBERG EBOOK X ***", "*** END OF THE PROJECT GUTENBERG EBOOK X ***"),
    "this, no space": ("***START OF THIS PROJECT GUTENBERG EBOOK X***", "***END OF THIS PROJECT GUTENBERG EBOOK X***"),
    "wrapped": (
        "*** START OF THE PROJECT GUTENBERG EBOOK A VERY LONG TITLE,\nIN TWO LINES ***",
        "*** END OF THE PROJECT GUTENBERG EBOOK A VERY LONG TITLE,\nIN TWO LINES ***",
    ),
    "wrapped before the name": (
        "*** START OF THE PROJECT\nGUTENBERG EBOOK X ***",
        "*** END OF THE PROJECT\nGUTENBERG EBOOK X ***",
    ),
    "small print": (
        "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nWhy?\n"
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
        "End of the Project Gutenberg Etext of X",
    ),
    "German": ("*** ANFANG DES PROJEKT GUTENBERG EBOOKS X ***", "Ende dieses Projekt Gutenberg Etextes X"),
    "French": ("*** DÉBUT DU PROJET GUTENBERG EBOOK X ***", "Fin du Projet Gutenberg Etext de X"),
    "Spanish": ("*** INICIO DEL PROYECTO GUTENBERG EBOOK X ***", "Fin del Proyecto Gutenberg Etext de X"),
    "Italian": ("*** INIZIO DEL PROGETTO GUTENBERG X ***", "Fine del progetto Gutenberg"),
    "Finnish": ("*** START OF THE PROJECT GUTENBERG EBOOK X ***", "*** LOPPU: PROJECT GUTENBERG X ***"),
    "possessive": ("*** START OF THIS PROJECT GUTENBERG EBOOK X ***", "End of Project Gutenberg's X, by Y"),
}
CREDITS = {
    "none": "",
    "produced by": "Produced by Jane Doe and the Online Distributed\nProofreading Team at http://www.pgdp.net\n\n",
    "e-text": "E-text prepared by Jane Doe\n\n",
    "HTML note": "Note: Project Gutenberg also has an HTML version of this\n      file which includes illustrations.\n"
    "      See 1-h.htm or 1-h.zip:\n      (https://www.gutenberg.org/files/1/1-h.zip)\n\n",
}


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("credits", CREDITS)
def test_marks_of_gutenberg_in_any_language_and_wrapping_go_with_the_credits(marks, credits):
    book = f"{ENGLISH} The end of the project was near.\n\n" * 30
    start, end = MARKS[marks]
    text = f"The Project Gutenberg EBook of X\n\n{start}\n\n{CREDITS[credits]}\n{book}\n{end}\n\nTerms of use\n" * 1
    assert strip_gutenberg(text).strip() == book.strip()


def test_a_short_text_under_a_long_header_is_found():
    start, end = MARKS["plain"]
    assert strip_gutenberg(f"{'Terms. ' * 300}\n{start}\n\n{ENGLISH}\n\n{end}\nTerms").strip() == ENGLISH


@pytest.mark.parametrize(
    "text",
    [
        f"Produced by hand, the lantern burned.\n\n{ENGLISH}",
        f"{ENGLISH}\n\nThe end of Gutenberg's press came in 1455.\n\n{ENGLISH}\n",
        f"*** START HERE ***\n\n{ENGLISH}",
    ],
)
def test_a_text_that_is_not_of_gutenberg_stays(text):
    assert strip_gutenberg(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "这艘船从威尼斯驶往伦敦。",
        "他在图书馆里找到了那本书。",
        "我不知道。",
        "今天天气很好，我们去公园散步吧。",
        "أبحرت السفينة من البندقية إلى لندن.",
        "وجد الكتاب في المكتبة القديمة.",
        "जहाज वेनिस से रवाना हुआ।",
        "کشتی از ونیز حرکت کرد.",
        "Корабль вышел из Венеции.",
        "その船はベニスを出た。",
        "Το πλοίο έφυγε από τη Βενετία.",
    ],
)
def test_another_script_on_an_english_row_is_caught_however_short(text):
    assert other_language({"answer": text}, "en", identify)
    drop = clean(f"{text} " * 40, {"language": "en"})
    assert isinstance(drop, Drop) and drop.reason == "wrong_language"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What does 我们都是好朋友 mean in this letter?", "en"),
        ("北京", "en"),
        ("Massachusetts Institute of Technology", "zh"),
        ("東京都千代田区", "ja"),
        ("日本国憲法第九条", "ja"),
        ("Брод је испловио из Венеције рано ујутро.", "sr"),
        ("कलम और किताब", "mr"),
    ],
)
def test_a_name_or_a_shared_script_is_no_other_language(text, language):
    assert other_language({"answer": text}, language, identify) is None


def test_tokens_of_a_tokenizer_add_to_the_well_known_ones_whether_special_or_not(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]"))
    tokenizer.add_special_tokens(["<|mine|>"])
    tokenizer.add_tokens(["<reason>", "◁x▷", "word", "  ", "<table>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    special = load_token_counter(str(tmp_path)).special_tokens
    assert set(special) == {"<|mine|>", "<reason>", "◁x▷"}
    cleaner = Cleaner(CleaningConfig(), words, special)
    assert set(cleaner.special_tokens) == {*special, *WELL_KNOWN_SPECIAL_TOKENS}
    text = clean(f"{ENGLISH} <|im_end|> <think> <|mine|> <reason> <table>", special_tokens=special).text
    assert text == f"{ENGLISH} <\u200b|im_end|> <\u200bthink> <\u200b|mine|> <\u200breason> <table>"


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
