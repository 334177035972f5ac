"""Duplicates of documents, exact and near; rows that hold evaluation sets; which rows stay in a mix."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrpo_trl.longblocks.builder.decontamination import DecontaminationConfig, Decontaminator
from dgrpo_trl.longblocks.builder.deduplication import (
    DeduplicationConfig,
    Deduplicator,
    normalize_question,
    signature,
)
from dgrpo_trl.longblocks.builder.mixing import Mixer, MixingConfig
from dgrpo_trl.longblocks.records import Row


CONFIG = DeduplicationConfig()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_text(seed, num_words=2000):
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(LETTERS, k=5)) for _ in range(num_words))


def edit(text, share, seed=0):
    """`text` with this share of its words replaced, in runs as an editor would."""
    words, rng = text.split(), random.Random(seed)
    for start in range(0, len(words), 100):
        stop = start + int(100 * share)
        words[start:stop] = make_text(rng.random(), stop - start).split()
    return " ".join(words)


def record(document_id, text, config=CONFIG):
    return {"id": document_id, "source": "s", "source_id": f"{document_id}.txt", "signature": signature(text, config)}


def similarity(a, b):
    values = [pa.array(memoryview(signature(text, CONFIG))[8:].cast("I").tolist()) for text in (a, b)]
    return sum(x == y for x, y in zip(*values, strict=True)) / len(values[0])


def test_duplicates_are_named_and_the_first_stays(tmp_path):
    text = make_text(1)
    with Deduplicator(tmp_path / "d.sqlite", CONFIG) as deduplicator:
        assert deduplicator.add(record("a", text), "0") is None
        assert deduplicator.add(record("b", make_text(2)), "0") is None
        same = deduplicator.add(record("c", text.upper().replace(" ", "\n ")), "1")
        near = deduplicator.add(record("d", edit(text, 0.05)), "1")
        other = deduplicator.add(record("e", edit(text, 0.5)), "1")
    assert (same.reason, same.detail, same.item) == ("exact_duplicate", "of a", "c.txt")
    assert near.reason == "near_duplicate" and near.detail.startswith("of a (0.")
    assert other is None


def test_the_estimate_follows_the_share_of_what_is_equal():
    text = make_text(3)
    estimates = [similarity(text, edit(text, share)) for share in (0.0, 0.05, 0.2, 0.5)]
    assert estimates[0] == 1 and estimates == sorted(estimates, reverse=True)
    shared = 0.8 * 0.96  # a replaced run of 20 in 100 also touches the 4 shingles before it
    assert estimates[2] == pytest.approx(shared / (2 - shared), abs=0.12)


def test_texts_without_spaces_are_compared_by_characters(tmp_path):
    rng = random.Random(0)
    text = "".join(chr(rng.randint(0x4E00, 0x9000)) for _ in range(3000))
    with Deduplicator(tmp_path / "d.sqlite", CONFIG) as deduplicator:
        assert deduplicator.add(record("a", text), "0") is None
        assert deduplicator.add(record("b", text[:1500] + "新" + text[1501:]), "0").reason == "near_duplicate"
        assert deduplicator.add(record("c", text[::-1]), "0") is None


def test_korean_is_compared_by_words(tmp_path):
    rng = random.Random(0)
    words = ["".join(chr(rng.randint(0xAC00, 0xD7A3)) for _ in range(rng.randint(2, 5))) for _ in range(600)]
    edited = [word if index % 30 else word[:-1] + "가" for index, word in enumerate(words)]
    by_words, other = (DeduplicationConfig(shingle_chars=chars) for chars in (10, 3))
    assert signature(" ".join(words), by_words) == signature(" ".join(words), other)
    with Deduplicator(tmp_path / "d.sqlite", CONFIG) as deduplicator:
        assert deduplicator.add(record("a", " ".join(words)), "0") is None
        assert deduplicator.add(record("b", " ".join(edited)), "0").reason == "near_duplicate"
        assert deduplicator.add(record("c", " ".join(words[::-1])), "0") is None


def test_what_an_unfinished_part_added_can_be_forgotten(tmp_path):
    with Deduplicator(tmp_path / "d.sqlite", CONFIG) as deduplicator:
        for name, seed in (("a", 1), ("b", 2)):
            decisions = deduplicator.decisions([record(name, make_text(seed))], f"part-{seed}")
            assert [drop for *_, drop in decisions] == [None]
    with Deduplicator(tmp_path / "d.sqlite", CONFIG) as deduplicator:
        deduplicator.forget_from("part-2")
        assert deduplicator.add(record("b", make_text(2)), "part-2") is None
        assert deduplicator.add(record("c", make_text(1)), "part-2").detail == "of a"


def test_only_what_is_switched_on_is_looked_for(tmp_path):
    text = make_text(1)
    for number, (options, found) in enumerate(
        (({"enabled": False}, [None, None]), ({"near": False}, ["exact_duplicate", None]))
    ):
        config = DeduplicationConfig(**options)
        with Deduplicator(tmp_path / str(number), config) as deduplicator:
            deduplicator.add(record("a", text, config), "0")
            drops = [deduplicator.add(record("b", other, config), "0") for other in (text, edit(text, 0.01))]
        assert [drop and drop.reason for drop in drops] == found


@pytest.mark.parametrize("text", ["", "a", "\U0001f600", "a b", "\x00"])
def test_any_text_has_a_signature(text):
    assert len(signature(text, CONFIG)) == 8 + 4 * CONFIG.num_bands * CONFIG.rows_per_band


def test_signatures_are_the_same_in_every_process():
    imports = "from dgrpo_trl.longblocks.builder.deduplication import *"
    code = f"{imports}; print(signature('a b c d', DeduplicationConfig()).hex())"
    results = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1


def test_questions_are_the_same_but_for_form():
    assert normalize_question(" Who IS he?\n") == normalize_question("who is he") != normalize_question("who is she")
    assert normalize_question("東京は？") == normalize_question("東京 は")


# --- Evaluation sets

SENTENCE = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix potions"


def make_row(question="What is it?", answer="It.", **options):
    values = {"document_id": "d", "source": "s", "language": "en", "task": "t", "evidence": (), **options}
    return Row(question=question, answer=answer, **values)


def make_decontaminator(folder, texts, **config):
    path = folder / "evaluation.jsonl"
    path.write_text("\n".join(json.dumps({"question": text}) for text in texts), encoding="utf-8")
    return Decontaminator(DecontaminationConfig(against=[{"name": "bench", "path": str(path)}], **config))


def test_a_row_with_a_piece_of_an_evaluation_set_leaves(tmp_path):
    decontaminator = make_decontaminator(tmp_path, [SENTENCE])
    piece = " ".join(SENTENCE.split()[1:14])
    drop = decontaminator.check(make_row(f"Is it true: {piece.upper()}!?"), "")
    assert (drop.stage, drop.reason, drop.detail) == ("decontamination", "contaminated", f"bench: {piece}")
    assert decontaminator.check(make_row(" ".join(SENTENCE.split()[:12])), "") is None
    assert decontaminator.check(make_row(responses={"m": SENTENCE}), "").reason == "contaminated"


def test_documents_are_looked_at_only_where_wanted(tmp_path):
    assert make_decontaminator(tmp_path, [SENTENCE]).check(make_row(), SENTENCE) is None
    assert make_decontaminator(tmp_path, [SENTENCE], check_documents=True).check(make_row(), SENTENCE) is not None


def test_a_short_item_is_found_whole_and_a_tiny_one_is_not(tmp_path):
    decontaminator = make_decontaminator(tmp_path, ["Who painted the red house?", "yes"])
    assert decontaminator.find("tell me: who painted  the RED house") == ("bench", "who painted the red house")
    assert decontaminator.find("who painted the house") is None and decontaminator.find("yes") is None


def test_scripts_without_spaces_are_compared_by_characters(tmp_path):
    text = "その鯨は早朝に港の近くで目撃された町の誰もそれを予想していなかった"
    decontaminator = make_decontaminator(tmp_path, [text])
    assert decontaminator.find(f"質問：{text[3:29]}。")[0] == "bench"
    assert decontaminator.find(text[3:28]) is None


def test_korean_is_compared_by_words_in_questions_too(tmp_path):
    words = "어느 겨울 아침 항구 근처에서 고래가 한 마리 나타났고 마을 사람들은 아무도 그것을 예상하지 못했다".split()
    decontaminator = make_decontaminator(tmp_path, [" ".join(words)])
    assert decontaminator.find(" ".join(words[1:14])) == ("bench", " ".join(words[1:14]))
    assert decontaminator.find(" ".join(words[1:13])) is None


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_a_planted_piece_is_always_found(tmp_path_factory, before, after):
    decontaminator = make_decontaminator(tmp_path_factory.mktemp("planted"), [SENTENCE])
    assert decontaminator.find(f"{before} {SENTENCE} {after}") is not None
    assert decontaminator.find(f"{before} {after}") is None


def test_parquet_text_and_nested_columns_are_read(tmp_path):
    pq.write_table(pa.table({"texts": [[SENTENCE]]}), tmp_path / "e.parquet")
    (tmp_path / "e.txt").write_text(SENTENCE)
    for name, columns in (("e.parquet", ["texts"]), ("e.txt", [])):
        evaluation_set = {"name": name, "path": str(tmp_path / name), "columns": columns}
        assert Decontaminator(DecontaminationConfig(against=[evaluation_set])).find(SENTENCE)[0] == name


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (None, ["question"], "No such file"),
        ('{"text": "x"}', ["question"], "no column 'question'; its columns are"),
        ("", ["question"], "holds no row"),
        ("{", ["question"], "cannot be read"),
    ],
)
def test_an_evaluation_set_that_cannot_be_read_is_named(content, columns, message, tmp_path):
    path = tmp_path / "e.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"'bench' cannot be read: .*{message}|{message}"):
        Decontaminator(DecontaminationConfig(against=[{"name": "bench", "path": str(path), "columns": columns}]))


# --- Mixing


def mix(tmp_path, rows, **config):
    mixer = Mixer(tmp_path / "mix.sqlite", MixingConfig(**config))
    mixer.select(("part", position, row) for position, row in enumerate(rows))
    return [drop and drop.reason for _, _, drop in mixer.decisions("part")]


@pytest.mark.parametrize(
    ("config", "num_code", "num_other"),
    [({}, 20, 20), ({"max_code_share": 0.2}, 5, 20), ({"max_code_share": 1}, 60, 20), ({"max_code_share": 0}, 0, 20)],
)
def test_at_most_a_share_of_the_rows_is_on_code(config, num_code, num_other, tmp_path):
    rows = [make_row(f"Q{n}?", str(n), source="code" if n % 4 else "books", document_id=str(n)) for n in range(80)]
    for some, expected in ((rows, (num_code, num_other)), ([r for r in rows if r.source == "code"], (60, 0))):
        mixer = Mixer(tmp_path / "mix.sqlite", MixingConfig(**config))
        mixer.select((("part", n, row) for n, row in enumerate(some)), is_code=lambda row: row.source == "code")
        kept = Counter(some[n].source for n, _, drop in mixer.decisions("part") if drop is None)
        assert (kept["code"], kept["books"]) == expected


def test_a_limit_of_rows_keeps_the_share_of_code(tmp_path):
    rows = [make_row(f"Q{n}?", str(n), source="code" if n % 4 else "books", document_id=str(n)) for n in range(800)]
    mixer = Mixer(tmp_path / "mix.sqlite", MixingConfig(max_rows=200))
    mixer.select((("part", n, row) for n, row in enumerate(rows)), is_code=lambda row: row.source == "code")
    kept = Counter(rows[n].source for n, _, drop in mixer.decisions("part") if drop is None)
    assert kept.total() == 200 and 40 <= kept["code"] <= 100


def test_equal_questions_stay_once(tmp_path):
    rows = [
        make_row("Who?", "A"),
        make_row("who", "B"),  # on the same document
        make_row("Who?", "A", document_id="other"),  # the same answer
        make_row("Who?", "C", document_id="third"),
    ]
    assert mix(tmp_path, rows) == [None, "duplicate_question", "duplicate_question", None]


def test_limits_and_shares_are_exact_and_repeatable(tmp_path):
    rows = [make_row(f"Q{n}?", str(n), document_id=str(n % 10), task="ab"[n % 4 == 0]) for n in range(200)]
    kept = mix(tmp_path, rows, max_rows_per_document=3)
    assert Counter(row.document_id for row, why in zip(rows, kept, strict=True) if why is None) == {
        str(n): 3 for n in range(10)
    }
    reasons = mix(tmp_path, rows, shares={"a": 0.5, "b": 0.5}, max_rows=60)
    assert Counter(row.task for row, why in zip(rows, reasons, strict=True) if why is None) == {"a": 30, "b": 30}
    assert reasons == mix(tmp_path, rows, shares={"a": 0.5, "b": 0.5}, max_rows=60)
    assert reasons != mix(tmp_path, rows, shares={"a": 0.5, "b": 0.5}, max_rows=60, seed=1)
    assert mix(tmp_path, rows, shares={"a": 1.0}).count("not_in_shares") == 50
    assert mix(tmp_path, rows, max_rows=7).count(None) == 7
