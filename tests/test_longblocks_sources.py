"""Sources: every item becomes one document or one named drop, in the same order in every run."""

import bz2
import dataclasses
import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dgrpo_trl.longblocks.records import Document, Drop
from dgrpo_trl.longblocks.sources import files
from dgrpo_trl.longblocks.sources.corpora import CORPORA, book_pages, two_letter
from dgrpo_trl.longblocks.sources.reading import SourceConfig


ADAPTER = TypeAdapter(SourceConfig)
TEXT = "Ein Text über Füße. 日本語 🙂 עברית\r\nzweite Zeile\n"


def source(**values):
    return ADAPTER.validate_python({"name": "s", **values})


def outcomes(config, skip=0):
    """What each item became: the text of a document, or the reason of a drop."""
    return [item.text if isinstance(item, Document) else item.reason for item in config.read(skip)]


def write_jsonl(path, rows):
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def assert_resumes(config):
    items = list(config.read())
    assert items == list(config.read())
    for skip in range(len(items) + 2):
        assert list(config.read(skip)) == items[skip:]
    return items


# --- Languages and corpora


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("en", "en"), ("eng", "en"), ("eng_Latn", "en"), ("spa_Latn", "es"), ("cmn_Hani", "zh"), ("arb_Arab", "ar"),
        ("fas_Arab", "fa"), ("pes_Arab", "fa"), ("ger", "de"), ("deu", "de"), ("pt-BR", "pt"), ("EN", "en"),
        ("fil", "tl"), (" en ", "en"), ("ceb", None), ("grc", None), ("und", None), ("mul", None), ("xx", None),
        ("Python", None), ("simple", None), ("", None), ("_", None), ("e n", None), ("日本", None),
    ],
)  # fmt: skip
def test_language_codes_of_all_forms_become_two_letters(code, expected):
    assert two_letter(code) == expected


def test_languages_of_longblocks_map_to_themselves():
    for code in "en fr de es uk sv ro it ru el ja nl fi pl hu zh pt hi ar".split():
        assert two_letter(code) == code


def test_configurations_of_fineweb2_hq_are_those_of_their_language():
    languages = CORPORA["fineweb2-hq"].languages
    assert len(languages) == 20
    for code, config in languages.items():
        assert two_letter(config) == code


def test_every_corpus_is_readable_as_a_data_set_of_the_hub():
    for name, corpus in CORPORA.items():
        language = {"language": "es"} if corpus.needs_language else {}
        hub = ADAPTER.validate_python({"type": "corpus", "corpus": name, **language}).as_hub_source()
        assert "{" not in f"{hub.config}{hub.split}{hub.dataset}"
        assert hub.may_redistribute == corpus.may_redistribute


def test_corpora_resolve_to_configuration_split_and_language():
    wikipedia = source(type="corpus", corpus="wikipedia", language="uk").as_hub_source()
    assert (wikipedia.config, wikipedia.split, wikipedia.language) == ("20231101.uk", "train", "uk")
    gutenberg = source(type="corpus", corpus="gutenberg", language="zh").as_hub_source()
    assert (gutenberg.config, gutenberg.split, gutenberg.language) == (None, "zh", "zh")
    web = source(type="corpus", corpus="fineweb2-hq", language="es").as_hub_source()
    assert (web.config, web.language, web.language_column) == ("spa_Latn", None, "language")
    sample = source(type="corpus", corpus="fineweb-edu", config="sample-10BT", max_documents=3).as_hub_source()
    assert (sample.config, sample.language, sample.max_documents) == ("sample-10BT", "en", 3)


def test_corpora_have_default_names():
    def name(**values):
        return ADAPTER.validate_python({"type": "corpus", **values}).name

    assert name(corpus="institutional-books") == "Institutional-Books-1.0"  # as published
    assert name(corpus="wikipedia", language="fi") == "Wikipedia-fi"
    assert name(corpus="arxiv", name="papers") == "papers"


def test_texts_that_may_not_be_shared_are_marked_and_cannot_be_unmarked():
    assert not source(type="corpus", corpus="institutional-books").may_redistribute
    assert source(type="corpus", corpus="arxiv").may_redistribute
    with pytest.raises(ValidationError, match="forbid"):
        source(type="corpus", corpus="institutional-books", may_redistribute=True)
    with pytest.raises(ValidationError, match="may_redistribute: false"):
        source(type="hub", dataset="institutional/institutional-books-1.0")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "corpus", "corpus": "wikipaedia"}, "no corpus 'wikipaedia'. Known are wikipedia"),
        ({"type": "corpus", "corpus": ["wikipedia"]}, "valid string"),
        ({"type": "corpus", "corpus": "wikipedia"}, "Give one as `language`"),
        ({"type": "corpus", "corpus": "fineweb2-hq", "language": "en"}, "Give one of ar, cs, zh"),
        ({"type": "corpus", "corpus": "arxiv", "language": "fr"}, "is in 'en'"),
        ({"type": "corpus", "corpus": "stackexchange", "language": "fr"}, "mixes languages"),
        ({"type": "csv", "paths": ["a"]}, "does not match any of the expected tags"),
        ({"type": "jsonl", "paths": []}, "at least 1 item"),
        ({"type": "jsonl", "paths": ["a"], "test_column": "x"}, "Extra inputs"),
        ({"type": "jsonl", "paths": ["a"], "language": "und"}, "'und' has no two-letter code"),
        ({"type": "jsonl", "paths": ["a"], "language": "en", "language_column": "l"}, "both given"),
        ({"type": "jsonl", "paths": ["a"], "name": "../x"}, "pattern"),
        ({"type": "text", "paths": ["a"], "encoding": "utf-9"}, "no encoding"),
        ({"type": "text", "paths": ["a"], "encoding": "detect"}, "no encoding"),
        ({"type": "archive"}, "Give one"),
        ({"type": "archive", "path": "a", "requirement": "a==1"}, "Give one"),
        ({"type": "archive", "requirement": "a==1"}, "has to be pinned"),
        ({"type": "archive", "requirement": "a>=1", "sha256": "0" * 64}, "name==version"),
        ({"type": "archive", "requirement": "a==1\n--index-url=x", "sha256": "0" * 64}, "name==version"),
    ],
)  # fmt: skip
def test_mistakes_in_a_configuration_are_named(values, message):
    with pytest.raises(ValidationError, match=message):
        source(**values)


def test_configuration_survives_a_round_trip_through_json():
    for values in (
        {"type": "corpus", "corpus": "institutional-books"},
        {"type": "corpus", "corpus": "wikipedia", "language": "es"},
        {"type": "stdlib", "unit": "package"},
    ):
        config = source(**values)
        assert ADAPTER.validate_json(config.model_dump_json()) == config


# --- Rows


def test_row_becomes_a_document_with_its_labels(tmp_path):
    row = {"body": TEXT, "key": 7, "lang": "spa_Latn", "metadata": {"license": ["MIT", "BSD"], "url": "https://x"}}
    config = source(
        type="jsonl", paths=[str(write_jsonl(tmp_path / "a.jsonl", [row]))], text_column="body", id_column="key",
        language_column="lang", license_column="metadata.license", url_column="metadata.url", kind="markdown",
    )  # fmt: skip
    config.check()
    assert list(config.read()) == [
        Document(
            text=TEXT, source="s", source_id="7", language="es", license="MIT, BSD", url="https://x", kind="markdown"
        )
    ]


def test_fixed_labels_stand_in_for_missing_ones(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": "a", "l": None, "id": ""}, {"text": "b", "l": "MIT", "id": "x"}]
    )
    config = source(
        type="jsonl", paths=[str(path)], language="spa", license="CC0-1.0", license_column="l", id_column="id"
    )
    first, second = config.read()
    assert (first.source_id, first.license, first.language) == ("a.jsonl:0", "CC0-1.0", "es")
    assert (second.source_id, second.license) == ("x", "MIT")


def test_lines_of_all_sorts_are_one_document_or_one_named_drop_each(tmp_path):
    lines = [
        b"\xef\xbb\xbf" + json.dumps({"text": "bom"}).encode(),
        b"{not json",
        b"[1, 2]",
        b'{"text": "\xff"}',
        b'{"text": "half \\ud83d"}',
        b'{"text": "whole \\ud83d\\ude42"}',
        {"text": ""},
        {"text": " \n\t"},
        {"text": None},
        {"other": 1},
        {"text": 5},
        {"text": ["page one", None, "page three"]},
        {"text": ["a", 1]},
        {"text": []},
        {"text": ["", None]},
        b"[" * 7_000,
        b'{"text": ' + b"1" * 5000 + b"}",
        {"text": "x"},
        {"text": "a\0b"},
        {"text": "ä" * 500},
        {"text": "ä" * 501},
        b'{"text": "' + b"y" * 9000 + b'"}',
        b'{"text": "last, with a CR"}\r',
    ]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    path.write_bytes(b"\n  \n" + path.read_bytes() + b'{"text": "no newline at the end"}')
    config = source(type="jsonl", paths=[str(path)], max_document_bytes=1000)
    assert outcomes(config) == [
        "bom", "malformed_json", "malformed_json", "undecodable", "undecodable", "whole 🙂", "no_text", "no_text",
        "no_text", "no_text", "not_text", "page one\n\n\n\npage three", "not_text", "no_text", "no_text",
        "malformed_json", "malformed_json", "x", "a\0b", "ä" * 500, "too_large", "too_large", "last, with a CR",
        "no newline at the end",
    ]  # fmt: skip
    items = assert_resumes(config)
    assert items[1] == Drop("sources", "s", "a.jsonl:1", "malformed_json", items[1].detail)
    assert items[10].detail == "column 'text' holds a int"
    assert items[9].detail == "no column 'text'"
    for item in items:
        json.dumps(dataclasses.asdict(item), ensure_ascii=False).encode()  # can be written to Parquet


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda data: bytes(pa.compress(data, codec="zstd"))),
    ],
)
def test_compressed_files_are_read_by_their_suffix_and_damaged_ones_are_drops(tmp_path, suffix, compress):
    data = "".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(300)).encode()
    whole = tmp_path / f"a.jsonl{suffix}"
    whole.write_bytes(compress(data))
    config = source(type="jsonl", paths=[str(whole)])
    assert outcomes(config) == [f"{n} {TEXT}" for n in range(300)]
    assert outcomes(config, skip=298) == [f"298 {TEXT}", f"299 {TEXT}"]

    text = tmp_path / f"b.txt{suffix}"
    text.write_bytes(compress(TEXT.encode()))
    broken, fake = tmp_path / f"c.txt{suffix}", tmp_path / f"d.txt{suffix}"
    broken.write_bytes(compress(data)[:-9])
    fake.write_bytes(b"plain text")
    assert outcomes(source(type="text", paths=[str(tmp_path / "*.txt*")])) == [TEXT, "unreadable", "unreadable"]
    broken.rename(tmp_path / f"c.jsonl{suffix}")
    assert outcomes(source(type="jsonl", paths=[str(tmp_path / f"c.jsonl{suffix}")]))[-1] == "unreadable"


def test_bomb_is_not_unpacked(tmp_path):
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"0" * 50_000_000))
    config = source(type="text", paths=[str(tmp_path / "bomb.txt.gz")], max_document_bytes=1000)
    tracemalloc.start()
    assert outcomes(config) == ["too_large"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_huge_line_is_passed_over_without_being_held(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 30_000_000 + b'"}\n{"text": "next"}\n')
    config = source(type="jsonl", paths=[str(path)], max_document_bytes=1000)
    tracemalloc.start()
    assert outcomes(config) == ["too_large", "next"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def parquet(path, rows, rows_per_group=3):
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=rows_per_group, compression="none")
    return str(path)


def test_parquet_rows_keep_their_numbers_across_files_and_row_groups(tmp_path):
    for name, start, count in (("b", 7, 5), ("a", 0, 7)):
        parquet(tmp_path / f"{name}.parquet", [{"text": f"row {n}", "x": n} for n in range(start, start + count)])
    (tmp_path / "aa.parquet").write_bytes(b"PAR1 is not enough")
    items = assert_resumes(source(type="parquet", paths=[str(tmp_path / "*.parquet")]))
    reasons = [item.text if isinstance(item, Document) else item.reason for item in items]
    assert reasons == [f"row {n}" for n in range(7)] + ["unreadable"] + [f"row {n}" for n in range(7, 12)]
    assert [item.source_id for item in items if isinstance(item, Document)][-2:] == ["b.parquet:3", "b.parquet:4"]


def test_damaged_row_group_costs_its_rows_and_no_others(tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, [{"text": f"row {n} " + "x" * 400} for n in range(9)])
    position = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[position : position + 40] = b"\xff" * 40
    path.write_bytes(data)
    items = assert_resumes(source(type="parquet", paths=[str(path)]))
    kinds = ["text" if isinstance(item, Document) else item.reason for item in items]
    assert kinds == ["text"] * 3 + ["unreadable"] * 3 + ["text"] * 3


def test_parquet_string_that_is_not_utf8_is_a_drop(tmp_path):
    values = pa.array([b"fine", b"\xff\xfe broken", b"fine too"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    assert outcomes(source(type="parquet", paths=[str(tmp_path / "a.parquet")])) == ["fine", "undecodable", "fine too"]


def test_parquet_reads_only_the_columns_it_needs(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", [{"text": "t", "meta": {"license": "MIT", "x": 1}, "vector": [0.0] * 9}])
    chosen = []
    iter_batches = pq.ParquetFile.iter_batches

    def recorded(file, *args, columns, **kwargs):
        chosen.append(columns)
        return iter_batches(file, *args, columns=columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recorded)
    (document,) = source(type="parquet", paths=[path], license_column="meta.license").read()
    assert document.license == "MIT"
    assert chosen == [["text", "meta"]]


def test_max_documents_counts_items_whatever_became_of_them(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"text": "b"}])
    config = source(type="jsonl", paths=[str(path)], max_documents=2)
    assert outcomes(config) == ["no_text", "a"]
    assert outcomes(config, skip=1) == ["a"]
    assert outcomes(config, skip=2) == []
    assert outcomes(config, skip=5) == []


def test_check_names_the_missing_columns_and_those_there_are(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"content": "a", "id": 1, "meta": {"url": "u"}}])
    with pytest.raises(ValueError, match=r"no column 'meta\.licenses', 'text'. Its columns are content, id, meta"):
        source(type="parquet", paths=[path], license_column="meta.licenses").check()
    source(type="parquet", paths=[path], text_column="content", url_column="meta.url").check()


def test_key_that_only_later_lines_have_is_not_missing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "license": None}])
    source(type="jsonl", paths=[str(path)], license_column="license").check()
    with pytest.raises(ValueError, match="no column 'licenses'"):
        source(type="jsonl", paths=[str(path)], license_column="licenses").check()


@pytest.mark.parametrize("values", [{"type": "jsonl"}, {"type": "parquet"}, {"type": "text"}])
def test_check_refuses_paths_that_lead_nowhere(tmp_path, values):
    with pytest.raises(ValueError, match="matches no file"):
        source(paths=[str(tmp_path / "*.x")], **values).check()
    with pytest.raises(ValueError, match="is a folder"):
        source(paths=[str(tmp_path)], **values).check()
    with pytest.raises(ValueError, match="matches no file"):
        list(source(paths=[str(tmp_path / "none")], **values).read())


def test_check_refuses_rows_of_which_none_can_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match="unusable .*malformed_json"):
        source(type="jsonl", paths=[str(tmp_path / "a.jsonl")]).check()
    with pytest.raises(ValueError, match="It is empty"):
        source(type="jsonl", paths=[str(tmp_path / "b.jsonl")]).check()


# --- The Hub


@pytest.fixture
def hub_folder(tmp_path):
    """A folder laid out like a data set of the Hub, with two splits in several files."""
    for split, start in (("train", 0), ("test", 100)):
        for part in range(2):
            rows = [
                {"text": f"{split} {start + part * 20 + n}", "key": f"k{start + part * 20 + n}", "extra": n}
                for n in range(20)
            ]
            (tmp_path / "data").mkdir(exist_ok=True)
            parquet(tmp_path / "data" / f"{split}-{part:05d}-of-00002.parquet", rows, rows_per_group=6)
    return tmp_path


def test_data_set_of_the_hub_is_streamed_in_order_and_resumes(hub_folder):
    config = source(type="hub", dataset=str(hub_folder), split="test", id_column="key", language="de", license="MIT")
    config.check()
    items = list(config.read())
    assert [item.text for item in items] == [f"test {n}" for n in range(100, 140)]
    assert items[0] == Document("test 100", "s", "k100", language="de", license="MIT")
    for skip in (0, 1, 5, 6, 19, 20, 21, 39, 40, 41):
        assert list(config.read(skip)) == items[skip:]
    assert outcomes(source(type="hub", dataset=str(hub_folder), max_documents=1)) == ["train 0"]


def test_rows_of_the_hub_without_an_id_are_numbered(hub_folder):
    config = source(type="hub", dataset=str(hub_folder))
    assert [item.source_id for item in config.read(skip=38)] == ["train:38", "train:39"]


def test_compressed_json_of_the_hub_with_metadata_is_read(tmp_path):
    rows = [{"id": str(n), "text": f"t{n}", "metadata": {"license": "CC0", "url": f"u{n}"}} for n in range(3)]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    config = source(type="corpus", corpus="arxiv", dataset=str(tmp_path))
    config.check()
    assert list(config.read(skip=1)) == [
        Document(f"t{n}", "s", str(n), language="en", license="CC0", url=f"u{n}") for n in (1, 2)
    ]


def test_check_says_why_a_data_set_of_the_hub_cannot_be_read(hub_folder, tmp_path):
    with pytest.raises(ValueError, match="validation.*train"):
        source(type="hub", dataset=str(hub_folder), split="validation").check()
    with pytest.raises(ValueError, match=r"no column 'body'. Its columns are extra, key, text"):
        source(type="hub", dataset=str(hub_folder), text_column="body").check()
    with pytest.raises(ValueError, match="cannot be read"):
        source(type="hub", dataset=str(tmp_path / "absent" / "folder")).check()


def test_hub_that_cannot_be_reached_is_a_mistake_and_not_an_empty_source(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    config = source(type="hub", dataset="a/b")
    with pytest.raises(ValueError, match="Couldn't reach.*Check `dataset`"):
        config.check()
    with pytest.raises(ValueError, match="Couldn't reach"):
        list(config.read())


def gated_error():
    """As `datasets.load.dataset_module_factory` raises it: the error of `huggingface_hub` is gone from the chain."""
    message = "Dataset 'x/y' is a gated dataset on the Hub. You must be authenticated to access it."
    return datasets.exceptions.DatasetNotFoundError(message)


def gated_chain():
    """As a reader of files would: an error of its own over that of `huggingface_hub`."""
    import httpx
    from huggingface_hub.errors import GatedRepoError

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))
    try:
        raise FileNotFoundError("no file") from GatedRepoError("403 Client Error", response=response)
    except FileNotFoundError as error:
        return error


def test_refusal_by_the_hub_itself_counts_as_gated(monkeypatch):
    class Api:
        def __init__(self, **kwargs):
            pass

        def hf_hub_download(self, repo_id, filename, **kwargs):
            raise gated_chain().__cause__

    monkeypatch.setattr(datasets.load, "HfApi", Api)
    monkeypatch.setattr(datasets.load, "_raise_if_offline_mode_is_enabled", lambda: None)
    (drop,) = source(type="hub", dataset="x/y").read()
    assert (drop.reason, drop.item) == ("gated", "x/y")


@pytest.mark.parametrize("error", [gated_error, gated_chain])
@pytest.mark.parametrize("when", ["on opening", "on reading"])
def test_gated_data_set_is_left_out_with_one_line_that_says_what_to_do(monkeypatch, caplog, error, when):
    class Stream:
        column_names = None

        def skip(self, n):
            return self

        def __iter__(self):
            raise error()

    def load_dataset(*args, **kwargs):
        if when == "on opening":
            raise error()
        return Stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = source(type="corpus", corpus="institutional-books")
    config.check()
    (drop,) = config.read()
    assert (drop.reason, drop.item) == ("gated", "institutional/institutional-books-1.0")
    assert len(caplog.records) == 1
    assert "Accept its terms at https://huggingface.co/datasets/institutional/" in caplog.text
    assert "hf auth login" in caplog.text
    assert list(config.read(skip=1)) == []


def test_stream_that_breaks_off_raises_and_goes_on_from_the_same_row(monkeypatch):
    class Stream:
        column_names = None

        def __init__(self, start=0):
            self.start = start

        def skip(self, n):
            return Stream(n)

        def __iter__(self):
            for n in range(self.start, 5):
                if n == 3 and self.start == 0:
                    raise OSError("connection reset")
                yield {"text": f"row {n}"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Stream())
    config = source(type="hub", dataset="a/b")
    items = []
    with pytest.raises(RuntimeError, match="broke off after row 2.*connection reset.*Run again"):
        items.extend(item.text for item in config.read())
    items = ["row 0", "row 1", "row 2"]
    assert items + outcomes(config, skip=3) == [f"row {n}" for n in range(5)]


# --- Institutional Books


@pytest.mark.parametrize(
    ("src", "gen", "expected"),
    [
        (90, 90, "src"),
        (91, 90, "src"),
        (89, 90, "gen"),
        (0, 1, "gen"),
        (90, None, "src"),
        (None, 90, "gen"),
        (None, None, "src"),
    ],
)
def test_pages_come_from_the_transcription_that_scored_better(src, gen, expected):
    row = {"ocr_score_src": src, "ocr_score_gen": gen, "text_by_page_src": ["src", None], "text_by_page_gen": ["gen"]}
    assert book_pages(row)[0] == expected


def test_volume_without_a_second_transcription_has_the_original_pages():
    row = {"ocr_score_src": 10, "ocr_score_gen": 99, "text_by_page_src": ["a", None, "c"]}
    for generated in (None, []):
        assert book_pages({**row, "text_by_page_gen": generated}) == ["a", "", "c"]
    assert book_pages({}) == []


def test_books_are_joined_from_a_users_own_copy(tmp_path):
    rows = [
        {"barcode_src": "B1", "ocr_score_src": 80, "ocr_score_gen": 95, "text_by_page_src": ["bad"],
         "text_by_page_gen": ["page one", "page two"], "language_gen": "eng", "title_src": "T"},
        {"barcode_src": "B2", "ocr_score_src": 80, "ocr_score_gen": 0, "text_by_page_src": [],
         "text_by_page_gen": None, "language_gen": "lat", "title_src": "T"},
    ]  # fmt: skip
    parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    config = source(type="corpus", corpus="institutional-books", dataset=str(tmp_path), join_pages="\n")
    config.check()
    book, drop = config.read()
    assert (book.text, book.source_id, book.language) == ("page one\npage two", "B1", "en")
    assert (drop.reason, drop.item) == ("no_text", "B2")

    local = source(type="parquet", paths=[str(tmp_path / "*.parquet")], book_pages=True, id_column="barcode_src")
    local.check()
    assert outcomes(local) == ["page one\n\npage two", "no_text"]
    other = write_jsonl(tmp_path / "a.jsonl", [{"text": "no book"}])
    with pytest.raises(ValueError, match="no column 'ocr_score_gen', 'ocr_score_src', 'text_by_page_gen'"):
        source(type="jsonl", paths=[str(other)], book_pages=True).check()


# --- Files


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (TEXT.encode(), {}, TEXT),
        (TEXT.encode("utf-8-sig"), {}, TEXT),
        (TEXT.encode("utf-16"), {}, TEXT),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), {}, TEXT),
        (TEXT.encode("utf-32"), {}, TEXT),
        ("Füße".encode("latin-1"), {}, "undecodable"),
        ("Füße".encode("latin-1"), {"encoding": "latin-1"}, "Füße"),
        ("Füße".encode("latin-1"), {"fallback_encoding": "cp1252"}, "Füße"),
        ("Füße".encode(), {"fallback_encoding": "cp1252"}, "Füße"),
        ("Füße".encode(), {"encoding": "ascii"}, "undecodable"),
        (b"\x81\x8d", {"fallback_encoding": "cp1252"}, "undecodable"),
        (("Привет, как дела? Это русский текст. " * 20).encode("cp1251"), {"fallback_encoding": "detect"},
         "Привет, как дела? Это русский текст. " * 20),
        (bytes(range(1, 256)) * 7, {"fallback_encoding": "detect"}, "undecodable"),
        (b"text\0with NUL", {}, "undecodable"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", {"fallback_encoding": "latin-1"}, "undecodable"),
        (b"\xff\xfea\0\0\xd8", {}, "undecodable"),
        (b"\xff\xfe" + "a\0b".encode("utf-16-le"), {}, "undecodable"),
        (b"", {}, "no_text"),
        (b"\xef\xbb\xbf", {}, "no_text"),
        (b" \r\n", {}, "no_text"),
        (b"x", {}, "x"),
        (b"x" * 2001, {}, "too_large"),
        (b"x" * 2000, {}, "x" * 2000),
    ],
)  # fmt: skip
def test_encodings_are_read_or_refused_and_never_patched(tmp_path, caplog, data, options, expected):
    (tmp_path / "a.txt").write_bytes(data)
    config = source(type="text", paths=[str(tmp_path / "a.txt")], max_document_bytes=2000, **options)
    assert outcomes(config) == [expected]
    is_fallback = "fallback_encoding" in options and expected not in ("undecodable",) and b"\xc3" not in data[:3]
    assert ("is not UTF-8, and was read as" in caplog.text) == is_fallback


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_text_or_a_named_reason(data):
    try:
        text, fallback = files.decode_text(data, fallback_encoding="detect")
    except files.BadItem as bad:
        assert bad.reason == "undecodable"
    else:
        assert "\0" not in text
        assert fallback is None or text == data.decode(fallback)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_line_of_json_is_a_document_or_a_drop(tmp_path_factory, text):
    path = write_jsonl(tmp_path_factory.mktemp("json") / "a.jsonl", [{"text": text}, {"text": "end"}])
    first, last = source(type="jsonl", paths=[str(path)]).read()
    assert last.text == "end"
    if isinstance(first, Document):
        assert first.text == text and len(first.id) == 16


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name, text in {
        "b.md": "# Markdown",
        "a.txt": "plain",
        "a/z.py": "print('z')",
        "a/deep/er/x.TXT": "deep",
        "a/empty.txt": "",
        "a/image.png": "no text",
        ".git/config.txt": "hidden",
        "node_modules/m.js": "excluded",
        "c.rs": "fn main() {}",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "d.txt.gz").write_bytes(gzip.compress(b"compressed"))
    return root


def test_folder_is_read_in_the_order_of_names_and_by_known_suffixes(tree):
    items = assert_resumes(source(type="folder", path=str(tree)))
    assert [(item.source_id, item.kind, item.text) for item in items if isinstance(item, Document)] == [
        ("a/deep/er/x.TXT", "text", "deep"),
        ("a/z.py", "code", "print('z')"),
        ("a.txt", "text", "plain"),
        ("b.md", "markdown", "# Markdown"),
        ("c.rs", "code", "fn main() {}"),
        ("d.txt.gz", "text", "compressed"),
    ]
    assert [(item.item, item.reason) for item in items if isinstance(item, Drop)] == [("a/empty.txt", "no_text")]


def test_patterns_choose_files(tree):
    assert outcomes(source(type="folder", path=str(tree), include=["*.md", "a/deep/*"])) == ["deep", "# Markdown"]
    assert outcomes(source(type="folder", path=str(tree), include=["*.txt"], exclude=["a"])) == ["hidden", "plain"]
    assert outcomes(source(type="folder", path=str(tree), include=["*.py"], kind="text")) == ["print('z')"]


def test_links_pipes_and_odd_names_are_safe(tree, tmp_path):
    (tree / "loop").symlink_to(tree)
    (tree / "a" / "up.txt").symlink_to(tree / "a" / "up.txt")
    (tree / "dangling.txt").symlink_to(tree / "nowhere")
    (tmp_path / "outside.txt").write_text("linked")
    (tree / "linked.txt").symlink_to(tmp_path / "outside.txt")
    os.mkfifo(tree / "pipe.txt")
    odd = os.fsdecode(b"odd\xff.txt")
    (tree / odd).write_text("odd")
    items = assert_resumes(source(type="folder", path=str(tree), include=["*.txt"], exclude=["a.txt", ".git"]))
    assert [
        (item.source_id, item.text) if isinstance(item, Document) else (item.item, item.reason) for item in items
    ] == [
        ("a/empty.txt", "no_text"),
        ("a/up.txt", "unreadable"),
        ("dangling.txt", "unreadable"),
        ("linked.txt", "linked"),
        ("odd\\udcff.txt", "odd"),
        ("pipe.txt", "unreadable"),
    ]


def test_files_and_folders_without_permission_are_drops(tree, monkeypatch):
    listdir, real_open = os.listdir, open

    def deny(path, *args, **kwargs):
        if str(path).endswith(("deep", "a.txt")):
            raise PermissionError(13, "Permission denied", str(path))
        return (listdir if kwargs.pop("list", False) else real_open)(path, *args, **kwargs)

    monkeypatch.setattr(files.os, "listdir", lambda path: deny(path, list=True))
    monkeypatch.setattr(files, "open", deny, raising=False)
    items = assert_resumes(source(type="folder", path=str(tree), include=["*.txt", "*.TXT"]))
    assert [(item.item, item.reason) for item in items if isinstance(item, Drop)] == [
        ("a/deep", "unreadable"),
        ("a/empty.txt", "no_text"),
        ("a.txt", "unreadable"),
    ]


def test_same_file_under_two_patterns_is_read_once(tmp_path):
    for name in ("b.txt", "a.txt", "[x].txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    config = source(type="text", paths=[str(tmp_path / "[x].txt"), str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])
    assert outcomes(config) == ["[x].txt", "a.txt", "b.txt"]
    assert [item.source_id for item in config.read()] == ["[x].txt", "a.txt", "b.txt"]


def test_empty_folder_and_missing_folder_are_mistakes(tmp_path):
    with pytest.raises(ValueError, match="no file that is wanted"):
        source(type="folder", path=str(tmp_path)).check()
    with pytest.raises(ValueError, match="no folder"):
        source(type="code", path=str(tmp_path / "absent")).check()


@pytest.fixture
def code_tree(tmp_path):
    for name, text in {
        "setup.py": "setup()\n",
        "zebra/__init__.py": "",
        "zebra/core.py": "\n\nimport os\n",
        "zebra/sub/fast.c": "int main;\n",
        "zebra/query.sql": "SELECT 1",
        "zebra/notes.md": "# not code",
        "empty/__init__.py": "\n",
        "docs/a.md": "# no code here",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_code_is_a_document_a_file(code_tree):
    items = assert_resumes(source(type="code", path=str(code_tree), license="MIT", language="en"))
    documents = [item for item in items if isinstance(item, Document)]
    assert [item.source_id for item in documents] == [
        "setup.py",
        "zebra/core.py",
        "zebra/query.sql",
        "zebra/sub/fast.c",
    ]
    assert {(item.kind, item.license, item.language) for item in documents} == {("code", "MIT", "en")}


def test_package_is_a_document_with_a_line_of_comment_before_each_file(code_tree, caplog):
    (code_tree / "zebra" / "broken.py").write_bytes(b"\xff\0")
    config = source(type="code", path=str(code_tree), unit="package")
    assert [getattr(item, "source_id", None) or (item.item, item.reason) for item in assert_resumes(config)] == [
        ("empty", "no_text"),
        "setup.py",
        "zebra",
    ]
    assert outcomes(config)[1:] == [
        "setup()\n",
        "# zebra/core.py\n\nimport os\n\n\n-- zebra/query.sql\n\nSELECT 1\n\n\n// zebra/sub/fast.c\n\nint main;\n",
    ]
    assert "zebra/broken.py is left out of its package: undecodable" in caplog.text
    assert outcomes(source(type="code", path=str(code_tree), unit="package", max_document_bytes=15))[-1] == "too_large"


def test_standard_library_is_real_code_and_resumes():
    config = source(type="stdlib", max_documents=40)
    config.check()
    documents = [item for item in config.read() if isinstance(item, Document)]
    assert {(item.kind, item.language, item.license) for item in documents} == {("code", "en", "PSF-2.0")}
    assert list(config.read(skip=37)) == list(config.read())[37:]
    packages = {item.source_id: item for item in source(type="stdlib", unit="package").read()}
    assert packages["json"].text.startswith("# json/__init__.py\n\n")
    assert "\n# json/decoder.py\n" in packages["json"].text
    assert packages["argparse.py"].num_tokens is None and len(packages["argparse.py"].text) > 50_000
    assert not {"test", "site-packages", "__pycache__"} & set(packages)


# --- Archives


def tar_of(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


MEMBERS = [
    ("p/b.txt", b"b"),
    ("p/a.md", b"# a"),
    ("/etc/absolute.txt", b"absolute"),
    ("../../outside.txt", b"outside"),
    ("p/link.txt", "/etc/passwd"),
    ("p/c.txt.gz", gzip.compress(b"inner")),
    ("p/bad.txt", b"\xff\0"),
    ("p/binary.bin", b"no"),
]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_tar_is_read_in_its_order_and_nothing_is_written(tmp_path, monkeypatch, mode):
    path = tar_of(tmp_path / "a.archive", MEMBERS, mode)
    monkeypatch.chdir(tmp_path)
    items = assert_resumes(source(type="archive", path=str(path)))
    assert [getattr(item, "text", None) or item.reason for item in items] == [
        "b", "# a", "absolute", "outside", "inner", "undecodable",
    ]  # fmt: skip
    assert items[1] == Document("# a", "s", "p/a.md", kind="markdown")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.archive"]
    assert outcomes(source(type="archive", path=str(path), members=["p/*.txt"])) == ["b", "undecodable"]


def test_zip_is_read_and_links_and_encrypted_members_are_safe(tmp_path):
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in MEMBERS:
            info = zipfile.ZipInfo(name)
            if isinstance(content, str):
                info.external_attr = 0o120777 << 16
            archive.writestr(info, content)
        archive.writestr("p/", b"")
        archive.writestr("p/secret.txt", b"secret")
    data = path.read_bytes()
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):  # set the flag of encryption of the last member
        position = data.rindex(signature) + offset
        data = data[:position] + b"\x01" + data[position + 1 :]
    path.write_bytes(data)
    items = assert_resumes(source(type="archive", path=str(path)))
    assert [getattr(item, "text", None) or item.reason for item in items] == [
        "b", "# a", "absolute", "outside", "inner", "undecodable", "unreadable",
    ]  # fmt: skip


def test_members_have_a_limit_and_broken_archives_an_end(tmp_path):
    big = tar_of(
        tmp_path / "big.tar.gz",
        [("a.txt", b"x" * 3_000_000), ("b.txt", b"b"), ("c.txt.gz", gzip.compress(b"0" * 9999))],
    )
    assert outcomes(source(type="archive", path=str(big), max_document_bytes=100)) == ["too_large", "b", "too_large"]
    noise = os.urandom(4000).hex().encode()
    whole = tar_of(tmp_path / "whole.tar.gz", [("a.txt", b"a"), ("b.txt", noise), ("c.txt", b"c")])
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(whole.read_bytes()[:2000])
    items = assert_resumes(source(type="archive", path=str(broken)))
    assert items[0].text == "a"
    assert [item.reason for item in items[1:]] == ["unreadable"] * (len(items) - 1) and len(items) > 1
    (tmp_path / "no.tar").write_text("plain")
    with pytest.raises(ValueError, match="neither a tar nor a zip"):
        source(type="archive", path=str(tmp_path / "no.tar")).check()
    with pytest.raises(ValueError, match="no archive"):
        source(type="archive", path=str(tmp_path / "absent.tar")).check()


def test_archive_with_another_hash_is_refused(tmp_path):
    path = tar_of(tmp_path / "a.tar.gz", MEMBERS)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source(type="archive", path=str(path), sha256=digest).check()
    with pytest.raises(ValueError, match=f"has SHA-256 {digest}, not {'0' * 64}"):
        source(type="archive", path=str(path), sha256="0" * 64).check()


def test_package_is_downloaded_once_with_its_hash(tmp_path, monkeypatch):
    archive = tar_of(tmp_path / "shelf-1.0.tar.gz", MEMBERS)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        assert f"shelf==1.0 --hash=sha256:{digest}\n" == open(command[command.index("--requirement") + 1]).read()
        folder = command[command.index("--dest") + 1]
        os.mkdir(folder)
        os.link(archive, f"{folder}/{archive.name}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(files.subprocess, "run", run)
    config = source(
        type="archive", requirement="shelf==1.0", sha256=digest, cache_dir=str(tmp_path / "cache"), members=["*/b.txt"]
    )
    assert outcomes(config) == outcomes(config) == ["b"]
    assert len(commands) == 1
    assert {"--no-deps", "--require-hashes"} < set(commands[0])
    kept = tmp_path / "cache" / digest / archive.name
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [digest]
    kept.unlink()
    kept.write_bytes(b"tampered")
    with pytest.raises(ValueError, match="It is another file"):
        config.check()


def test_failed_download_is_explained_and_leaves_nothing(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution")
    monkeypatch.setattr(files.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ValueError, match="No matching distribution.*give a local file as `path`"):
        files.fetch_from_pypi("shelf==1.0", "0" * 64, tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_importing_sources_loads_neither_torch_nor_the_readers():
    code = (
        "import sys, dgrpo_trl.longblocks.sources.reading; "
        "assert not {'torch', 'trl', 'transformers', 'datasets', 'pyarrow', 'langcodes'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("value", "what"),
    [(3, "int"), (1.5, "float"), (b"abc", "bytes"), ({"a": 1}, "dict"), ([1, 2], "list"), (True, "bool")],
)
def test_a_column_that_cannot_be_text_is_refused_at_the_check(value, what, tmp_path):
    rows = [{"text": value, "body": "A text."}, {"text": None, "body": "B"}, {"text": value, "body": "C"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    paths = {"parquet": tmp_path / "rows.parquet"}
    if what != "bytes":
        paths["jsonl"] = tmp_path / "rows.jsonl"
        paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind, path in paths.items():
        with pytest.raises(ValueError, match=f"'text' holds a {what}.*`text_column`.*body, text"):
            source(type=kind, name="s", paths=[str(path)]).check()
        source(type=kind, name="s", paths=[str(path)], text_column="body").check()


def test_rows_without_text_at_first_are_no_column_that_cannot_be_text(tmp_path):
    lines = [{"text": None}, {"text": ""}, {"text": 3}, {"text": "A text."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    source(type="jsonl", name="s", paths=[str(tmp_path / "rows.jsonl")]).check()
