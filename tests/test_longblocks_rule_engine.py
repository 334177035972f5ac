"""Questions made by rule over long documents: each answer is worked out again from the document, by another way."""

import asyncio
import os
import random
import re
import subprocess
import sys

import pytest

from dgrpo_trl.longblocks.blocks import BlocksConfig, split_blocks
from dgrpo_trl.longblocks.questions import not_stated
from dgrpo_trl.longblocks.records import Document
from dgrpo_trl.longblocks.rule_engine import TASKS, TEMPLATES, RuleEngine, RuleEngineConfig
from dgrpo_trl.longblocks.rules import FACT_TASKS


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
        template = re.escape(TEMPLATES[language][name])
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


@pytest.mark.parametrize("language", sorted(TEMPLATES))
def test_a_chain_leads_to_its_answer_through_all_its_notes(language):
    for row in make_rows("key_chain", language, min_hops=3):
        assert solve_chain(row.document, row.question, language) == row.answer
        evidence = evidence_of(row)
        assert len(evidence) >= 3 and solve_chain("\n".join(evidence), row.question, language) == row.answer
        for index in range(len(evidence)):  # every note is needed
            rest = "\n".join(evidence[:index] + evidence[index + 1 :])
            assert solve_chain(rest, row.question, language) is None


@pytest.mark.parametrize("language", ["en", "de", "ja"])
def test_an_unanswerable_chain_is_broken(language):
    for row in make_rows("unanswerable", language):
        assert solve_chain(row.document, row.question, language) is None
        assert row.answer == not_stated(language) and row.answer in row.question and row.evidence == ()


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


@pytest.mark.parametrize("task", FACT_TASKS)
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


@pytest.mark.parametrize("task", ["key_chain", "reconstruction", "two_hop", "counting"])
def test_code_gets_its_facts_as_comments(task):
    rows = make_rows(task, text=CODE, kind="code", num_documents=1, rows_per_document=6, lengths=(900,))
    for row in rows:
        if task == "key_chain":
            assert solve_chain(row.document, row.question) == row.answer
        if task in ("key_chain", "two_hop"):
            compile(row.document, "x.py", "exec")


def test_rows_have_their_length_and_a_document_of_their_own():
    for task in TASKS:
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
print([row.id for task in TASKS for row in make_rows(task, num_documents=2)])
"""
    results = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1 and len(results.pop()) > 100


def test_the_templates_of_all_languages_take_the_same_fields():
    fields = {name: set(re.findall(r"\{(\w+)\}", text)) for name, text in TEMPLATES["en"].items()}
    for language, templates in TEMPLATES.items():
        for name, text in templates.items():
            assert set(re.findall(r"\{(\w+)\}", text)) == fields[name], (language, name)
        assert set(fields) - set(templates) <= {"count"}, language
