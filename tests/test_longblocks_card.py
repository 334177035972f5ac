import itertools
import json
import re

import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from pydantic import ValidationError

from dgrpo_trl.longblocks.builder.card import (
    FIGURE,
    CardConfig,
    Statistics,
    draw_lengths,
    hub_license,
    render_card,
    write_card,
)
from dgrpo_trl.longblocks.builder.publish import write_parquet
from dgrpo_trl.longblocks.records import Drop


RECIPE = "# A recipe: {{ not_a_template }}\nsources:\n  - type: folder\n    # ```\n    path: texts\n"
CONTEXT = {
    "recipe": RECIPE,
    "fingerprint": "0123abcd",
    "command": "python scripts/build_longblocks.py --config recipe.yaml",
    "engine": "rule",
    "versions": {"dgrpo-trl": "0.1.0", "datasets": "5.2.0"},
}


def record(**changes):
    values = {
        "id": "a",
        "document": "text",
        "source": "jargon",
        "language": "en",
        "question": "Q?",
        "answer": "A",
        "response_Qwen3.5-27B": "R",
        "task": "two_hop",
        "evidence": [{"block": "b", "start": 0, "end": 2}, {"block": "c", "start": 2, "end": 4}],
        "document_id": "d",
        "document_start": 0,
        "document_end": 4,
        "document_sha256": "0",
        "checks": [{"name": "grounded", "passed": True, "score": 0.5, "reason": ""}],
    }
    return {**values, **changes}


@pytest.fixture
def statistics():
    statistics = Statistics()
    statistics.add(record(), num_tokens=1023, license="CC-BY-SA-4.0")
    statistics.add(record(language="de", **{"response_Qwen3.5-27B": None}), num_tokens=1024, license="CC-BY-SA-4.0")
    statistics.add(record(source="Books", document=None, evidence=[], checks=[]), num_tokens=40_000, license="MIT")
    statistics.add_drop(Drop("verification", "jargon", "x", "closed_book"))
    statistics.add_drop(Drop("verification", "jargon", "y", "closed_book"))
    statistics.add_drop(Drop("sources", "jargon", "z", "too_short"))
    return statistics


def tables(text):
    """Rows of all tables, as a reader of the rendered card sees them."""
    rows = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in itertools.pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        elif before.type in ("th_open", "td_open"):
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_the_metadata_is_what_the_hub_and_datasets_read(statistics):
    text = render_card(statistics, CardConfig(pretty_name="LongBlocks: ours"), **CONTEXT)
    card = DatasetCard(text)
    assert card.data.to_dict() == {
        "pretty_name": "LongBlocks: ours",
        "language": ["de", "en"],
        "license": "cc-by-sa-4.0",
        "size_categories": ["n<1K"],
        "task_categories": ["question-answering", "text-generation"],
        "tags": ["long-context", "synthetic"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]
    assert yaml.safe_load(block) == card.data.to_dict() and text.count("\n---\n") == 1
    assert DatasetCard(str(card)).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(("number", "size"), [(999, "n<1K"), (1000, "1K<n<10K"), (193_894, "100K<n<1M")])
def test_the_size_category_is_that_of_the_number_of_rows(statistics, number, size):
    statistics.num_rows = number
    assert DatasetCard(render_card(statistics, CardConfig(), **CONTEXT)).data.size_categories == [size]


def test_the_tables_hold_the_counts(statistics):
    rows = tables(render_card(statistics, CardConfig(), tokenizer="HuggingFaceTB/SmolLM2-135M", **CONTEXT))
    for expected in [
        ["jargon", "2"],
        ["Books", "1"],
        ["de", "1"],
        ["en", "2"],
        ["two_hop", "3"],
        ["2", "2"],
        ["0", "1"],
        ["response_Qwen3.5-27B", "2"],
        ["< 1K", "1", "33.3%"],
        ["1K to 2K", "1", "33.3%"],
        ["32K to 64K", "1", "33.3%"],
        ["grounded", "2", "2", "0.500"],
        ["verification", "closed_book", "2"],
        ["sources", "too_short", "1"],
        ["jargon", "CC-BY-SA-4.0", "2"],
        ["Books", "MIT", "1"],
    ]:
        assert expected in rows, expected


def test_the_card_says_what_was_and_what_was_not_checked(statistics):
    text = render_card(statistics, CardConfig(summary="For *tests*."), tokenizer="a/b", **CONTEXT)
    assert "3 questions on long documents" in text and "For *tests*." in text
    assert "On average a document has 14,016 tokens, counted with `a/b`." in text
    assert "written by rule, without a language model" in text and "The questions are synthetic" in text
    assert "Overlap with evaluation sets was not looked for." in text
    assert "Rows were checked as the next table says" in text
    assert "1 rows have no `document`" in text
    assert "dgrpo-trl==0.1.0" in text and "0123abcd" in text and "2605.12227" in text

    context = {**CONTEXT, "engine": "llm", "models": {"questions": "Qwen/Qwen3"}, "evaluation_sets": ["a_b", "RULER"]}
    bare = Statistics()
    bare.add(record(checks=[]), license="MIT")
    text = render_card(bare, CardConfig(), **context)
    assert "evidence are a model's" in text and "by rule" not in text
    assert ["questions", "Qwen/Qwen3"] in tables(text)
    assert "looked for with `a_b`, RULER, and with nothing else" in text
    assert "No check was run on the rows" in text
    assert "The lengths of the documents were not counted." in text and FIGURE not in text
    assert "## What was left out\n\nNothing." in text
    assert "have no `document`" not in text


def test_recipe_and_command_are_in_the_card_as_they_are(statistics):
    text = render_card(statistics, CardConfig(), **CONTEXT)
    fences = {token.info: token.content for token in MarkdownIt().parse(text) if token.type == "fence"}
    assert fences["yaml"] == RECIPE
    assert fences["bash"] == CONTEXT["command"] + "\n"
    assert "{{" not in text.replace(RECIPE.rstrip(), "")


EVIL = [
    "a | b | c",
    "x\n\n# Heading\n- item",
    "<script>alert(1)</script>",
    "<img src=x>",
    "[click](http://evil.example)",
    "![i](http://evil.example/i.png)",
    "https://evil.example",
    "www.evil.example",
    "me@evil.example",
    "`code` **bold** _it_ ~~s~~ $x$",
    "{{ card_data }} {% raw %}",
    "back\\slash | `",
    "---\ntags: x",
    "\u202egnp.exe",
    "a\x00b\r\nc",
]


@pytest.mark.parametrize("name", EVIL)
def test_names_from_sources_are_only_text(name):
    statistics = Statistics()
    statistics.add(record(source=name, task=name, language=name), license=name)
    statistics.add_drop(Drop(name, name, "x", name))
    text = render_card(statistics, CardConfig(), **CONTEXT)
    plain = Statistics()
    plain.add(record(source="plain", task="plain", language="plain"), license="plain")
    plain.add_drop(Drop("plain", "plain", "x", "plain"))

    def structure(text):
        parser = MarkdownIt("gfm-like", {"linkify": False, "html": True})
        blocks = [token.type for token in parser.parse(text)]
        tokens = [child.type for token in parser.parse(text) for child in token.children or ()]
        return blocks, [kind for kind in tokens if kind not in ("text", "text_special")]

    assert structure(text) == structure(render_card(plain, CardConfig(), **CONTEXT))
    seen = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert [seen, "1"] in tables(text)
    # What GitHub and the Hub make a link of without any mark
    assert not re.search(r"://(?!huggingface\.co)|www\.|@evil", text)
    assert DatasetCard(text).data.to_dict().get("language") is None


def test_long_tables_say_how_much_they_leave_out():
    statistics = Statistics()
    for i in range(50):
        for _ in range(50 - i):
            statistics.add(record(source=f"s{i:02d}"))
    rows = tables(render_card(statistics, CardConfig(), **CONTEXT))
    assert ["s00", "50"] in rows and ["s39", "11"] in rows and ["and 10 more", ""] in rows
    assert ["s40", "10"] not in rows


def test_the_same_counts_give_the_same_card_in_whatever_order_they_came():
    sources = ["b", "a", "c"]
    cards = set()
    for order in (sources, sources[::-1]):
        statistics = Statistics()
        for source in order:
            statistics.add(record(source=source), num_tokens=len(source), license=source)
        cards.add(render_card(statistics, CardConfig(), **CONTEXT))
    assert len(cards) == 1


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["MIT"], "mit"),
        (["MIT", "CC0-1.0"], "mit"),
        (["Public domain", "CC BY-SA 4.0"], "cc-by-sa-4.0"),
        (["CC BY-SA 2.5", "CC-BY-SA-3.0 and GFDL", "CC BY-SA 4.0", "MIT"], "cc-by-sa-4.0"),
        (["https://creativecommons.org/licenses/by/4.0/"], "cc-by-4.0"),
        (["Creative Commons Zero - Public Domain - https://creativecommons.org/publicdomain/zero/1.0/"], "other"),
        (["ODC-BY-1.0"], "odc-by"),
        (["CC-BY-4.0", "ODC-BY-1.0"], "other"),
        (["Apache-2.0", "MIT"], "other"),
        (["GPL-3.0", "CC-BY-SA-4.0"], "other"),
        (["AGPL-3.0-only"], "agpl-3.0"),
        (["CC BY-NC-SA 4.0", "CC BY-SA 4.0"], "cc-by-nc-sa-4.0"),
        (["Public domain; IDI early-access terms: non-commercial, no redistribution", "MIT"], "other"),
        (["MIT", None], "other"),
        (["unheard of", "MIT"], "other"),
        (["limited"], "other"),
        ([], "other"),
    ],
)
def test_the_license_is_the_strictest_or_other(licenses, expected):
    assert hub_license(licenses) == expected


def test_a_set_of_several_licenses_says_so_and_one_that_is_given_stays():
    statistics = Statistics()
    for license in ("GPL-3.0", "CC-BY-SA-4.0", None):
        statistics.add(record(), license=license)
    text = render_card(statistics, CardConfig(), **CONTEXT)
    assert (DatasetCard(text).data.license, DatasetCard(text).data.license_name) == ("other", "see-card")
    assert "No single license covers the set" in text and ["jargon", "not known", "1"] in tables(text)
    text = render_card(statistics, CardConfig(license="cc-by-sa-4.0"), **CONTEXT)
    assert DatasetCard(text).data.license == "cc-by-sa-4.0" and "under `cc-by-sa-4.0`" in text


@pytest.mark.parametrize("license", ["CC BY", "x\ny: z", ""])
def test_a_license_that_is_no_identifier_is_refused(license):
    with pytest.raises(ValidationError):
        CardConfig(license=license)


def test_lengths_fall_into_bins_that_double():
    statistics = Statistics()
    for length in (0, 1023, 1024, 2047, 2048, 131_071, 131_072):
        statistics.add(record(), num_tokens=length)
    statistics.add(record())
    assert statistics.length_bins == {0: 2, 1: 2, 2: 1, 7: 1, 8: 1}
    text = render_card(statistics, CardConfig(), **CONTEXT)
    assert ["64K to 128K", "1", "14.3%"] in tables(text) and ["128K to 256K", "1", "14.3%"] in tables(text)
    assert "Of 1 rows the length is not known." in text


def test_the_figure_shows_every_bin_between_the_shortest_and_the_longest(tmp_path, statistics, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    bar = Axes.bar
    monkeypatch.setattr(Axes, "bar", lambda axes, x, height: drawn.append((x, height)) or bar(axes, x, height))
    draw_lengths(statistics, tmp_path / "a" / "lengths.png")
    labels = ["< 1K", "1K to 2K", "2K to 4K", "4K to 8K", "8K to 16K", "16K to 32K", "32K to 64K"]
    assert drawn == [(labels, [1, 1, 0, 0, 0, 0, 1])]
    assert (tmp_path / "a" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_card_figure_and_rows_make_a_set_that_datasets_reads(tmp_path, statistics):
    path = write_card(tmp_path, statistics, CardConfig(), **CONTEXT)
    text = path.read_text(encoding="utf-8")
    images = re.findall(r"!\[[^\]]*\]\((.*?)\)", text)
    assert images == [FIGURE] and (tmp_path / FIGURE).read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / FIGURE).read_bytes()
    write_card(tmp_path, statistics, CardConfig(), **CONTEXT)
    assert (tmp_path / FIGURE).read_bytes() == before and path.read_text(encoding="utf-8") == text
    write_parquet([record()], tmp_path, ["Qwen/Qwen3.5-27B"])
    rows = load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert json.dumps(rows[0]) == json.dumps(record())


def test_versions_are_those_installed(statistics):
    context = {name: value for name, value in CONTEXT.items() if name != "versions"}
    assert re.search(r"with `dgrpo-trl==\S+`, `datasets==\S+`", render_card(statistics, CardConfig(), **context))
