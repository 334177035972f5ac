"""Questions made by rule over long documents: each answer is worked out again from the document, by another way."""

import asyncio
import os
import random
import re
import subprocess
import sys

import pytest

from dgrpo_trl.longblocks.questions.blocks import BlocksConfig, blocks_at, split_blocks
from dgrpo_trl.longblocks.questions.languages import LANGUAGES, not_stated
from dgrpo_trl.longblocks.questions.rule_engine import TASKS, RuleEngine, RuleEngineConfig, _whole_words
from dgrpo_trl.longblocks.records import Document


WORDS = "river stone cloud meadow lantern winter garden shadow bridge silver copper thunder harvest candle".split()

RARE = [f"{start}{end}" for start in ("quag", "zeph", "brack") for end in ("ane", "olin", "uster", "imor")]


def make_text(seed, num_paragraphs=40):
    rng = random.Random(seed)
    return "\n\n".join(
        " ".join(f"{rng.choice(WORDS).title()} and {' '.join(rng.sample(WORDS, 6))} rested there." for _ in range(8))
        + f" {rng.choice(RARE).title()} met {rng.choice(RARE)} again."
        for _ in range(num_paragraphs)
    )


CODE = "\n\n\n".join(
    f"def function_{n}(first, second):\n    total = first * {n} + second\n    {RARE[n % 12]} = total - {n}\n"
    f"    return [{RARE[n % 12]} for _ in range(10)] + [total] * 3 + [first + second]"
    for n in range(60)
)


NEED_NO_STRUCTURE = [task for task in TASKS if not task.startswith(("play_", "heading", "code_", "passage_"))]

ASKED = sorted(language for language, phrases in LANGUAGES.items() if "follow" in phrases)


def count_tokens(text):
    return len(text.split())


def make_rows(task, language="en", text=None, kind="text", num_documents=6, **config):
    engine = RuleEngine(
        RuleEngineConfig(**{"engine": "rule", "lengths": (700, 1500), "tasks": {task: 1}, **config}), count_tokens
    )
    rows = []
    for seed in range(num_documents):
        document = Document(
            text=text or make_text(seed), source="s", source_id="x.py", language=language, kind=kind, num_tokens=None
        )
        blocks = split_blocks(document.text, kind, BlocksConfig())
        rows += asyncio.run(engine.rows(document, blocks, [[]] * len(blocks)))[0]
    assert len(rows) >= 2 * num_documents, task
    return rows


def evidence_of(row):
    return [row.document[e.start : e.end] for e in row.evidence]


def solve_chain(text, question, language="en"):
    """Follows the notes by their templates; `None` where a note is missing."""
    numbers = {"key": "([0-9a-f]{8})", "other": "([0-9a-f]{8})", "value": r"(\d+)"}

    def pattern(name):
        template = re.escape(LANGUAGES[language][name])
        for field, group in numbers.items():
            template = template.replace(re.escape("{" + field + "}"), group)
        return template

    steps = dict(re.findall(pattern("next_note"), text))
    values = dict(re.findall(pattern("last_note"), text))
    key = re.search("[0-9a-f]{8}", question)[0]
    for _ in range(20):
        if key in values:
            return values[key]
        if key not in steps:
            return None
        key = steps[key]


@pytest.mark.parametrize("language", ASKED)
def test_a_chain_leads_to_its_answer_through_all_its_notes(language):
    for row in make_rows("key_chain", language, min_hops=3):
        assert solve_chain(row.document, row.question, language) == row.answer
        evidence = evidence_of(row)
        assert len(evidence) >= 3 and solve_chain("\n".join(evidence), row.question, language) == row.answer
        for index in range(len(evidence)):  # every note is needed
            rest = "\n".join(evidence[:index] + evidence[index + 1 :])
            assert solve_chain(rest, row.question, language) is None


@pytest.mark.parametrize("language", ASKED)
def test_an_unanswerable_chain_is_broken(language):
    for row in make_rows("unanswerable", language):
        if not re.search("[0-9a-f]{8}", row.question):
            continue  # see the next test
        assert solve_chain(row.document, row.question, language) is None
        assert row.answer == not_stated(language) and row.answer in row.question and row.evidence == ()


def test_an_unanswerable_question_on_facts_lacks_the_last_of_them_alone():
    rows = make_rows("unanswerable", rows_per_document=12)
    rows = [row for row in rows if not re.search("[0-9a-f]{8}", row.question)]
    hops = [re.search(r"where (\w+) lives", row.question) for row in rows]
    assert any(hops) and not all(hops)
    for row, hop in zip(rows, hops, strict=True):
        assert row.answer == not_stated("en") and row.answer in row.question and row.evidence == ()
        if hop:
            (place,) = re.findall(rf"{hop[1]} lives in (\w+)\.", row.document)
            thing = re.search(r"How many (\w+) does the (\w+) of", row.question)
        else:
            place = re.search(r" of ([A-Z]\w+)", row.question)[1]
            thing = re.search(r"How many (\w+) does the (\w+) of|Who is the (\w+) of", row.question)
        building = thing[2] or thing[3]
        assert not re.search(rf"The {building} of {place} (?:has|is) ", row.document)
        assert re.search(rf"The {building} of \w+ (?:has|is) ", row.document)


@pytest.mark.parametrize("language", ["en", "fr", "zh"])
def test_the_pieces_fit_into_their_gaps(language):
    for row in make_rows("reconstruction", language):
        options = dict(re.findall(r"^([A-H]):\n(.*?)(?=\n\n[A-H]:\n|\Z)", row.question, re.S | re.M))
        letters = row.answer.split(", ")
        assert sorted(letters) == sorted(options) and len(letters) >= 2
        text = row.document
        for number, letter in enumerate(letters, start=1):
            assert text.count(f"[[GAP {number}]]") == 1
            text = text.replace(f"[[GAP {number}]]", options[letter])
        assert any(text in make_text(seed) for seed in range(6))
        for number in range(1, len(letters) + 1):
            assert f"[[GAP {number}]]" in evidence_of(row)


def test_words_are_counted_in_the_text_as_it_is():
    for row in make_rows("counting"):
        word = re.search(r'"(\w+)"', row.question)[1]
        occurrences = re.findall(rf"(?<!\w){word}(?!\w)", row.document, re.I)
        assert str(len(occurrences)) == row.answer and 2 <= len(occurrences) <= 9
        assert sum(len(re.findall(rf"(?<!\w){word}(?!\w)", text, re.I)) for text in evidence_of(row)) == len(
            occurrences
        )


@pytest.mark.parametrize("task", ["lookup_number", "lookup_name", "two_hop"])
def test_facts_are_there_once_and_their_evidence_is_enough(task):
    for row in make_rows(task):
        assert len(re.findall(rf"(?<!\w){row.answer}(?!\w)", row.document)) == 1
        assert row.answer in "\n".join(evidence_of(row))
        assert len(row.evidence) == (2 if task == "two_hop" else 1)
        subject = re.search(r"of (?:the town where )?(\w+)", row.question)[1]
        if task == "two_hop":
            person = re.search(r"where (\w+) lives", row.question)[1]
            (place,) = re.findall(rf"(?<!\w){person} lives in (\w+)\.", row.document)
            thing = re.search(r"How many (\w+) does the (\w+)", row.question)
            (value,) = re.findall(rf"The {thing[2]} of {place} has (\d+) {thing[1]}\.", row.document)
            assert value == row.answer
        else:
            assert subject in "\n".join(evidence_of(row))


def solve_multi_hop(text, question):
    """Reads the facts as tables and works the answer out; `None` where one of them is missing."""
    counts = {(b, p): int(n) for b, p, n in re.findall(r"The (\w+) of (\w+) has (\d+) \w+\.", text)}
    homes = dict(re.findall(r"(\w+) lives in (\w+)\.", text))
    offices = {(role, place): person for role, place, person in re.findall(r"The (\w+) of (\w+) is (\w+)\.", text)}
    singular = {"churches": "church", "farms": "farm", "schools": "school"}
    singular |= {"harbours": "harbour", "markets": "market", "orchards": "orchard"}
    try:
        if match := re.search(r"do the (\w+) of the towns where (\w+) and (\w+) live", question):
            return str(sum(counts[singular[match[1]], homes[person]] for person in match.groups()[1:]))
        if match := re.search(r"the (\w+) of the town where (\w+) lives have than .* where (\w+) lives", question):
            return str(counts[match[1], homes[match[2]]] - counts[match[1], homes[match[3]]])
        match = re.search(r"Of the towns (\w+), (\w+) and (\w+), take the one whose (\w+) .* its (\w+)\?", question)
        largest = max(match.groups()[:3], key=lambda place: counts[match[4], place])
        return offices[match[5], largest]
    except KeyError:
        return None


def test_several_facts_together_give_the_answer_and_each_of_them_is_needed():
    rows = make_rows("multi_hop", rows_per_document=8)
    for row in rows:
        evidence = evidence_of(row)
        assert solve_multi_hop(row.document, row.question) == row.answer
        assert len(evidence) == 4 and solve_multi_hop("\n".join(evidence), row.question) == row.answer
        for index in range(4):
            assert solve_multi_hop("\n".join(evidence[:index] + evidence[index + 1 :]), row.question) is None
        kind = "number" if row.answer.isdecimal() else "name"
        assert f"Answer with the {kind} only." in row.question
    shapes = ("have together", "How many more", "take the one")
    assert all(any(shape in row.question for row in rows) for shape in shapes)


def test_what_to_say_where_nothing_is_stated_does_not_give_the_unanswerable_away():
    for share, expected in ((0, {False}), (0.5, {False, True}), (1, {True})):
        rows = make_rows("lookup_number", not_stated_share=share) + make_rows(
            "key_chain", "de", not_stated_share=share
        )
        assert {not_stated(row.language) in row.question for row in rows} == expected
        assert all(row.answer.isdecimal() for row in rows)


NESTED = "class Long:\n" + "\n\n".join(
    f"    def method_{n}(self, first):\n        if first:\n            return first + {n}000\n        return 1"
    + "0" * 150
    for n in range(60)
)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_facts_in_code_leave_every_line_of_it_as_it_was(newline):
    source = NESTED.replace("\n", newline)
    rows = make_rows("two_hop", text=source, kind="code", num_documents=1, rows_per_document=6, lengths=(None,))
    for row in rows:
        compile(row.document, "x.py", "exec")
        assert re.sub(r"^ *# .*\.\r?\n", "", row.document, flags=re.M) == source


@pytest.mark.parametrize("language", ["en", "ru", "ja"])
def test_facts_in_prose_stand_between_sentences_and_leave_them_as_they_were(language):
    sentence = {
        "en": "Dr. Weber went down to the river. ",
        "ru": "Старый мельник спустился к реке. ",
        "ja": "年老いた粉屋は川へ下りていった。",
    }[language]
    text = "\n\n".join((sentence * 20).rstrip() for _ in range(40))
    inner = 0
    for row in make_rows("key_chain", language, text, num_documents=1, rows_per_document=6, lengths=(None,)):
        notes = [LANGUAGES[language][name] for name in ("next_note", "last_note")]
        pattern = "|".join(re.sub(r"\\{\w+\\}", "[0-9a-f]+", re.escape(note)) for note in notes)
        assert re.sub(f"(?: ?(?:{pattern}))+(?=\n|$)|(?:{pattern}) ?", "", row.document) == text
        inner += len(re.findall(f"(?:{pattern}) ?{sentence[:4]}", row.document))
    assert inner > 20


def test_facts_in_markdown_are_paragraphs_outside_fenced_code():
    fence = "```\n" + "code here and there\n\n" * 150 + "```"  # longer than a block
    text = "\n\n".join(f"# Part {n}\n\n{'Some words on it. ' * 30}\n\n{fence}" for n in range(20))
    rows = make_rows("two_hop", text=text, kind="markdown", num_documents=1, rows_per_document=6, lengths=(None,))
    for row in rows:
        outside = re.sub(r"(?ms)^```$.*?^```$", "", row.document)
        facts = re.findall(r"(?m)^(?:The \w+ of \w+ has \d+ \w+|\w+ lives in \w+)\. ?$", outside)
        assert len(re.findall(r"has \d+|lives in", row.document)) == len(facts) >= 6


def test_a_word_is_counted_as_it_is_spelt():
    text = "\n\n".join(f"Große Straße {n}x und große Plätze. {'aa bb cc dd ' * 60}" for n in range(4))
    for row in make_rows("counting", "de", text, num_documents=1, rows_per_document=8, lengths=(None,)):
        word = re.search(r"„(\w+)“", row.question)[1]
        assert word in text.lower() and row.answer == str(len(re.findall(rf"\b{word}\b", row.document, re.I)))


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("river River RIVER rivers", {"river": 3, "rivers": 1}),
        ("couldn't well-known docu-\nment river", {"river": 1}),
        ("'river' river- -river", {"river": 3}),
        ("İstanbul docu\u00adment cafe\u0301 river\u200d", {}),
        ("river_bed river", {"river_bed": 1, "river": 1}),
    ],
)
def test_only_words_that_are_certain_to_be_whole_are_counted(text, counts):
    assert _whole_words(text) == counts


@pytest.mark.parametrize(
    "text",
    [
        "İstanbul " * 3,  # in lower case an i with a dot of its own, and then "stanbul"
        "Congreſs congress congress ",  # a reader takes the first for the same word
    ],
)
def test_a_word_is_not_asked_for_where_its_count_depends_on_the_reader(text):
    text = "\n\n".join(f"{text} {'aa bb cc dd ' * 60}" for _ in range(3))
    document = Document(text=text, source="s", source_id="x", language="en")
    engine = RuleEngine(RuleEngineConfig(engine="rule", lengths=(None,), tasks={"counting": 1}), count_tokens)
    rows, drops = asyncio.run(engine.rows(document, split_blocks(text), []))
    assert not rows and {drop.reason for drop in drops} == {"no_fit"}


def test_a_word_that_blocks_cut_apart_is_not_counted():
    text = "harvestlantern" * 400  # no border anywhere: blocks end within it, some of them after "harvest"
    blocks = blocks_at(text, [(0, 7), (7, 2800), (2800, 2807), (2807, len(text))])
    assert [block.text for block in blocks].count("harvest") == 2
    document = Document(text=text, source="s", source_id="x", language="en")
    engine = RuleEngine(RuleEngineConfig(engine="rule", lengths=(None,), tasks={"counting": 1}), count_tokens)
    assert asyncio.run(engine.rows(document, blocks, []))[0] == []


def test_pieces_that_would_fit_into_each_others_gap_are_not_options():
    license = "river stone cloud meadow lantern winter garden shadow bridge silver copper thunder harvest candle."
    text = "\n\n".join(f"{RARE[n]} {license} {license} {license} {license}" for n in range(12))
    document = Document(text=text, source="s", source_id="x", language="en")
    engine = RuleEngine(RuleEngineConfig(engine="rule", lengths=(None,), tasks={"reconstruction": 1}), count_tokens)
    rows, drops = asyncio.run(engine.rows(document, split_blocks(text), []))
    assert not rows and {drop.reason for drop in drops} == {"no_fit"}


def test_numbers_that_no_space_parts_from_the_text_are_not_used_again():
    numbers = "".join(f"川{n}石" for n in range(101, 1000))
    text = "\n\n".join(f"{n}. {'これは長い文です。' * 60}" for n in range(20)) + "\n\n" + numbers
    document = Document(text=text, source="s", source_id="x", language="ja")
    engine = RuleEngine(RuleEngineConfig(engine="rule", lengths=(None,), tasks={"key_chain": 1}), count_tokens)
    rows, drops = asyncio.run(engine.rows(document, split_blocks(text), []))
    assert not rows and {drop.reason for drop in drops} == {"no_fit"}


def test_a_document_that_holds_a_mark_of_a_gap_is_left_out():
    text = make_text(0) + "\n\nThis has [[GAP 1]] in it."
    engine = RuleEngine(RuleEngineConfig(engine="rule", lengths=(None,), tasks={"reconstruction": 1}), count_tokens)
    document = Document(text=text, source="s", source_id="1", language="en")
    rows, drops = asyncio.run(engine.rows(document, split_blocks(text), []))
    assert not rows and {drop.reason for drop in drops} == {"no_fit"}


@pytest.mark.parametrize("name", ["hops", "gaps"])
def test_ranges_that_hold_no_number_are_refused(name):
    with pytest.raises(ValueError, match=f"`min_{name}` is 6 and `max_{name}` 3"):
        RuleEngineConfig(engine="rule", **{f"min_{name}": 6, f"max_{name}": 3})


@pytest.mark.parametrize("task", ["key_chain", "reconstruction", "two_hop", "multi_hop", "counting"])
def test_code_gets_its_facts_as_comments(task):
    rows = make_rows(task, text=CODE, kind="code", num_documents=1, rows_per_document=6, lengths=(900,))
    for row in rows:
        if task == "key_chain":
            assert solve_chain(row.document, row.question) == row.answer
        if task in ("key_chain", "two_hop", "multi_hop"):
            compile(row.document, "x.py", "exec")


def test_rows_have_their_length_and_a_document_of_their_own():
    for task in NEED_NO_STRUCTURE:
        for row in make_rows(task):
            assert 300 <= count_tokens(f"{row.document}\n\n{row.question}") <= 1500
            for evidence in row.evidence:
                assert row.document[evidence.start : evidence.end].strip()


def test_questions_of_a_document_differ():
    rows = make_rows("key_chain", num_documents=1, rows_per_document=10)
    assert len({row.question for row in rows}) == len({row.id for row in rows}) == len(rows)


def test_splits_share_no_name_number_or_place():
    def entities(split):
        rows = make_rows("two_hop", split=split, rows_per_document=6)
        return {word for row in rows for word in re.findall(r"(?:of|in|where) ([A-Z]\w+)|has (\d+)", row.document)}

    assert not {e for e in entities("train") if any(e)} & {e for e in entities("test") if any(e)}


@pytest.mark.parametrize(
    ("language", "text", "reason"),
    [("sw", make_text(0), "no_template_for_language"), ("en", "One.\n\nTwo.", "too_short_for_task")],
)
def test_what_cannot_be_asked_is_counted(language, text, reason):
    engine = RuleEngine(RuleEngineConfig(engine="rule"), count_tokens)
    document = Document(text=text, source="s", source_id="1", language=language)
    rows, drops = asyncio.run(engine.rows(document, split_blocks(text), []))
    assert not rows and {drop.reason for drop in drops} == {reason} and len(drops) == 4


def test_windows_in_which_nothing_fits_are_counted():
    engine = RuleEngine(RuleEngineConfig(engine="rule", lengths=(10,)), count_tokens)
    document = Document(text=make_text(0), source="s", source_id="1", language="en")
    rows, drops = asyncio.run(engine.rows(document, split_blocks(document.text), []))
    assert not rows and {drop.reason for drop in drops} == {"no_fit"}


def test_rows_are_the_same_in_every_process():
    code = """
import sys; sys.path.insert(0, "tests")
from test_longblocks_rule_engine import *
print([row.id for task in NEED_NO_STRUCTURE for row in make_rows(task, num_documents=2)])
"""
    results = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1 and len(results.pop()) > 100


def test_the_phrases_of_all_languages_take_the_same_fields():
    fields = {name: set(re.findall(r"\{(\w*)\}", text)) for name, text in LANGUAGES["en"].items()}
    for language, phrases in LANGUAGES.items():
        for name, text in phrases.items():
            assert set(re.findall(r"\{(\w*)\}", text)) == fields[name], (language, name)
        of_engine = {"next_note", "last_note", "follow", "reconstruct"}
        assert set(fields) - set(phrases) <= {"count", "or"} | (set() if language in ASKED else of_engine), language
