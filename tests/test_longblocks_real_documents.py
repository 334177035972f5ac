"""The builder on real texts: source code that is always there, and books and manuals where they can be had."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

from dgrpo_trl.longblocks import Builder, load_config


JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
MANUALS = sorted(Path("/usr/share/debian-reference").glob("debian-reference.*.txt.gz"))


def build(config, folder):
    summary = Builder(config, folder).run()
    files = sorted((folder / "dataset" / "data").glob("*.parquet"))
    return summary, [row for file in files for row in pq.read_table(file).to_pylist()]


def write_config(folder, **sections):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "real", **sections}), encoding="utf-8")
    return load_config(path)


def check(rows):
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        spans = [row["document"][e["start"] : e["end"]] for e in row["evidence"]]
        assert all(span.strip() for span in spans) and bool(spans) == (row["task"] != "unanswerable")
        if row["task"] in ("lookup_number", "lookup_name", "two_hop", "key_chain"):
            assert row["answer"] in "\n".join(spans)


def test_the_standard_library_gives_rows_of_code(tmp_path):
    sources = [{"type": "stdlib", "max_documents": 60}]
    questions = {"engine": "rule", "lengths": [2048], "rows_per_document": 4}
    summary, rows = build(write_config(tmp_path, sources=sources, questions=questions), tmp_path / "out")
    check(rows)
    assert len(rows) >= 100 and len({row["task"] for row in rows}) >= 6
    assert summary["stages"]["blocks"]["kept"] == summary["stages"]["deduplication"]["kept"]


@pytest.mark.slow
def test_the_quickstart_makes_a_thousand_rows(tmp_path):
    config = load_config(ROOT / "recipes" / "longblocks" / "quickstart.yaml")
    summary, rows = build(config, tmp_path)
    check(rows)
    assert len(rows) == 1000 == summary["stages"]["mixing"]["kept"]
    assert set(Counter(row["source"] for row in rows)) == {"shakespeare", "python-stdlib"}


@pytest.mark.skipif(not (JARGON.exists() and MANUALS), reason="needs Debian's jargon-text and debian-reference-*")
def test_manuals_are_asked_about_in_their_own_language(tmp_path):
    sources = [
        {"type": "text", "name": "jargon", "paths": [str(JARGON)], "fallback_encoding": "cp1252"},
        {"type": "text", "name": "manuals", "paths": [str(path) for path in MANUALS]},
    ]
    questions = {"engine": "rule", "lengths": [1024], "rows_per_document": 10}
    _, rows = build(write_config(tmp_path, sources=sources, questions=questions), tmp_path / "out")
    check(rows)
    named = {path.name.split(".")[1].split("-")[0] for path in MANUALS}
    assert {row["language"] for row in rows if row["source"] == "manuals"} >= named & {"de", "fr", "es", "it", "ja"}
