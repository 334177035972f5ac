import hashlib
import logging
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset, load_from_disk
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from pydantic import ValidationError

from dgrpo_trl.data_loading import DropCounts
from dgrpo_trl.longblocks import load_longblocks
from dgrpo_trl.longblocks.builder.publish import (
    PublishConfig,
    published_record,
    published_schema,
    push,
    response_column,
    save_to_disk,
    write_parquet,
)
from dgrpo_trl.longblocks.records import Check, Document, Drop, Evidence, Row


MODELS = ("Qwen/Qwen3-Next-80B-A3B", "/models/Qwen3.5-27B/")
DOCUMENT = Document(text="Eins\r\n\r\nzwei 😀 שלום\x00", source="Books", source_id="B 1", language="de")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_row(document=DOCUMENT, number=0, **changes):
    values = {
        "document_id": document.id,
        "source": document.source,
        "language": document.language,
        "question": f"Was, {number}?",
        "answer": "zwei",
        "task": "lookup",
        "evidence": (Evidence("b", 8, 12),),
        "checks": (Check("grounded", True, 0.5, "stated"),),
        "responses": {MODELS[1]: "Zwei."},
    }
    return Row(**{**values, **changes})


def make_records(number, may_redistribute=True):
    return [
        published_record(make_row(number=i), DOCUMENT, MODELS, may_redistribute=may_redistribute)
        for i in range(number)
    ]


def test_columns_are_the_published_ones_in_their_order_and_then_ours():
    names = published_schema(["Qwen/Qwen3-Next-80B-A3B", "Qwen/Qwen3.5-27B", "nvidia/Nemotron-3-Nano-30B-A3B"]).names
    assert names == [
        *("id", "document", "source", "language", "question", "answer"),
        *("response_Qwen3-Next-80B-A3B", "response_Qwen3.5-27B", "response_Nemotron-3-Nano-30B-A3B"),
        *("task", "evidence", "document_id", "document_start", "document_end", "document_sha256", "checks"),
    ]
    assert all(str(published_schema().field(name).type) == "string" for name in ("id", "document", "task"))


def test_models_that_would_share_a_column_are_refused():
    assert response_column("/models/x/") == response_column("org/x") == "response_x"
    with pytest.raises(ValueError, match=r"would write column \['response_x'\]"):
        published_schema(["a/x", "b/x", "b/y"])


def test_a_row_is_published_with_its_document_evidence_and_checks():
    row = make_row()
    assert published_record(row, DOCUMENT, MODELS) == {
        "id": row.id,
        "document": DOCUMENT.text,
        "source": "Books",
        "language": "de",
        "question": "Was, 0?",
        "answer": "zwei",
        "response_Qwen3-Next-80B-A3B": None,
        "response_Qwen3.5-27B": "Zwei.",
        "task": "lookup",
        "evidence": [{"block": "b", "start": 8, "end": 12}],
        "document_id": row.document_id,
        "document_start": 0,
        "document_end": len(DOCUMENT.text),
        "document_sha256": hashlib.sha256(DOCUMENT.text.encode()).hexdigest(),
        "checks": [{"name": "grounded", "passed": True, "score": 0.5, "reason": "stated"}],
    }
    own_text = published_record(make_row(document=DOCUMENT, **{"question": "?"}), DOCUMENT)
    assert own_text["document"] == DOCUMENT.text and "response_Qwen3.5-27B" not in own_text
    window = {"document": "Other text.", "start": 3, "end": 9}
    written = published_record(Row(**{**vars(make_row()), **window}), DOCUMENT)
    assert (written["document_start"], written["document_end"]) == (3, 9)
    assert written["document"] == "Other text."
    assert written["document_sha256"] == hashlib.sha256(b"Other text.").hexdigest()


def test_a_document_that_may_not_be_passed_on_leaves_its_id_and_hash():
    record = published_record(make_row(), DOCUMENT, may_redistribute=False)
    assert (record["id"], record["document"]) == ("B 1", None)
    assert record["document_sha256"] == DOCUMENT.sha256
    changed = Row(**{**vars(make_row()), "document": "Eins. Ein Zusatz."})
    drop = published_record(changed, DOCUMENT, may_redistribute=False)
    assert isinstance(drop, Drop) and (drop.stage, drop.reason) == ("publish", "cannot_be_rejoined")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_written_is_read_as_training_rows(tmp_path, streaming):
    records = make_records(5)
    paths = write_parquet(iter(records), tmp_path, MODELS, max_shard_bytes=1)
    assert [path.name for path in paths] == ["train-00000-of-00001.parquet"]
    rows = list(load_dataset(str(tmp_path), split="train", streaming=streaming))
    assert rows == records
    made = list(load_longblocks(tmp_path, streaming=streaming))
    assert made[0]["prompt"][0]["content"] == f"{DOCUMENT.text}\n\nWas, 0?"
    assert made[0]["teacher_prompt"][0]["content"] == "zwei\n\nWas, 0?"
    cold_start = load_longblocks(tmp_path, streaming=streaming, completion_column="response_Qwen3.5-27B")
    assert next(iter(cold_start))["completion"] == [{"role": "assistant", "content": "Zwei."}]


@pytest.mark.parametrize("pages", [["Eins\r\n\r\nzwei 😀 שלום\x00"], ["Eins\r", "\r\nzwei 😀 שלום\x00"]])
def test_withheld_documents_are_put_together_again_and_checked(tmp_path, pages):
    write_parquet(make_records(2, may_redistribute=False), tmp_path, MODELS)
    book = {"barcode_src": "B 1", "text_by_page_src": pages, "ocr_score_src": 1}
    made = load_longblocks(tmp_path, books=[book], join_pages="\n")
    assert made["document"][:] == [DOCUMENT.text] * 2
    assert made["teacher_prompt"][0][0]["content"] == "zwei\n\nWas, 0?"
    counts = DropCounts()
    load_longblocks(tmp_path, books=[{**book, "text_by_page_src": ["Drei"]}], counts=counts)
    assert counts.reasons == {"book_differs": 2}


def test_files_are_cut_by_size_in_order_and_replace_those_of_an_earlier_run(tmp_path, monkeypatch):
    monkeypatch.setattr("dgrpo_trl.longblocks.builder.publish._ROWS_PER_GROUP", 2)
    records = make_records(9)
    first = write_parquet(records, tmp_path, MODELS, max_shard_bytes=1000)
    content = [path.read_bytes() for path in first]
    assert [path.name for path in first] == [f"train-{i:05d}-of-{len(first):05d}.parquet" for i in range(len(first))]
    assert len(first) > 2
    assert [row["id"] for path in first for row in pq.read_table(path).to_pylist()] == [r["id"] for r in records]
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(content[0])
    again = write_parquet(iter(records), tmp_path, MODELS, max_shard_bytes=1000)
    assert [path.read_bytes() for path in again] == content
    (only,) = write_parquet(records[:1], tmp_path, MODELS)
    assert sorted(path.name for path in tmp_path.rglob("*.parquet")) == ["test-00000-of-00001.parquet", only.name]


def test_an_unfinished_run_leaves_the_earlier_files_and_no_others(tmp_path):
    (path,) = write_parquet(make_records(1), tmp_path, MODELS)
    before = path.read_bytes()
    (tmp_path / ".unfinished-data").mkdir()
    (tmp_path / ".unfinished-data" / "00007.parquet").write_text("of a killed run")

    def rows():
        yield from make_records(1)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_parquet(rows(), tmp_path, MODELS)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_memory_holds_one_group_of_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dgrpo_trl.longblocks.builder.publish._CHARS_PER_GROUP", 1000)
    read = []
    written = []
    write_table = pq.ParquetWriter.write_table

    def observed(writer, table, *args, **kwargs):
        written.append((len(read), table.num_rows))
        return write_table(writer, table, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", observed)
    document = Document(text="x" * 600, source="s", source_id="i", language="en")

    def rows():
        for i in range(6):
            read.append(i)
            yield published_record(make_row(document, i), document, MODELS)

    write_parquet(rows(), tmp_path, MODELS)
    assert written == [(2, 2), (4, 2), (6, 2)]


def test_a_set_without_rows_is_refused_and_replaces_nothing(tmp_path):
    (path,) = write_parquet(make_records(1), tmp_path, MODELS)
    with pytest.raises(ValueError, match="There are no rows to write"):
        write_parquet([], tmp_path, MODELS)
    assert path.exists()


def test_the_folder_of_save_to_disk_holds_the_same_rows_and_is_replaced(tmp_path):
    for number in (3, 2):
        records = make_records(number)
        save_to_disk(write_parquet(records, tmp_path, MODELS), tmp_path / "saved")
        assert list(load_from_disk(str(tmp_path / "saved"))) == records
        assert len(load_longblocks(tmp_path / "saved")) == number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "saved"]


# --- Upload


@pytest.fixture
def folder(tmp_path):
    """A finished set, with things beside it that are not to be uploaded."""
    folder = tmp_path / "dataset"
    write_parquet(make_records(2), folder, MODELS)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Set\n")
    (folder / "assets").mkdir()
    (folder / "assets" / "document_lengths.png").write_bytes(b"png")
    (folder / "saved").mkdir()
    (folder / "saved" / "data-00000.arrow").write_bytes(b"rows")
    (folder / ".unfinished-data").mkdir()
    (folder / ".unfinished-data" / "00000.parquet").write_bytes(b"half")
    (folder / "secret.env").write_text("KEY=1")
    return folder


FILES = ["README.md", "assets/document_lengths.png", "data/train-00000-of-00001.parquet"]


def http_error(kind, status):
    import httpx

    return kind("refused", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub; `calls` are those that would change something there."""
    hub = SimpleNamespace(calls=[], token="hf_x", role="write", repo=None, whoami_error=None)

    def whoami(self):
        if hub.whoami_error is not None:
            raise hub.whoami_error
        return {"name": "me", "auth": {"accessToken": {"role": hub.role}}}

    def repo_info(self, repo_id, *, repo_type):
        if hub.repo is None:
            raise http_error(RepositoryNotFoundError, 404)
        return hub.repo

    def recorded(name):
        def call(self, *args, **kwargs):
            hub.calls.append((name, args, kwargs))
            return SimpleNamespace(commit_url="https://hub/commit/1")

        return call

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: hub.token)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    for name in ("create_repo", "create_branch", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, recorded(name))
    return hub


def test_a_dry_run_says_what_would_be_uploaded_and_asks_nobody(folder, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the Hub was asked"))
    with caplog.at_level(logging.INFO):
        plan = push(folder, PublishConfig(repo_id="me/set", private=False, revision="v1"))
    assert list(plan.files) == FILES and plan.url is None
    assert plan.files["assets/document_lengths.png"] == 3
    size = sum(plan.files.values())
    assert f"Would upload 3 files, {size:,} bytes, to me/set (PUBLIC), branch v1" in caplog.text
    assert "(no `repo_id` given) (private), branch main" in push(folder, PublishConfig()).summary()


def test_an_upload_is_private_and_of_the_set_alone(folder, hub):
    plan = push(folder, PublishConfig(repo_id="me/set"), dry_run=False)
    assert plan.url == "https://hub/commit/1" and plan.summary().startswith("Uploaded 3 files")
    (created, uploaded) = hub.calls
    assert created == ("create_repo", ("me/set",), {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert uploaded[0] == "upload_folder"
    arguments = uploaded[2]
    assert (arguments["repo_id"], arguments["repo_type"]) == ("me/set", "dataset")
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    sent = huggingface_hub.utils.filter_repo_objects(names, allow_patterns=arguments["allow_patterns"])
    assert list(sent) == FILES
    assert arguments["delete_patterns"] == ["data/*.parquet"]


def test_a_branch_is_made_before_it_is_uploaded_to(folder, hub):
    push(folder, PublishConfig(repo_id="me/set", revision="v2"), dry_run=False)
    assert [call[0] for call in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[1][2]["branch"] == hub.calls[2][2]["revision"] == "v2"


@pytest.mark.parametrize(
    ("changes", "config", "error", "message"),
    [
        ({}, {}, ValueError, "`repo_id` is None"),
        ({}, {"repo_id": "set"}, ValueError, "`repo_id` is 'set'. An upload needs a name"),
        ({}, {"repo_id": "me/a set"}, ValueError, "is no name on the Hub"),
        ({"token": None}, {"repo_id": "me/set"}, ValueError, "There is no token of the Hub"),
        ({"role": "read"}, {"repo_id": "me/set"}, ValueError, "may only read"),
        ({"whoami_error": http_error(HfHubHTTPError, 401)}, {"repo_id": "me/set"}, RuntimeError, "The Hub refuses"),
        ({"repo": SimpleNamespace(private=False)}, {"repo_id": "me/set"}, ValueError, "exists and is public"),
    ],
)
def test_what_would_go_wrong_is_found_before_anything_is_changed(folder, hub, changes, config, error, message):
    vars(hub).update(changes)
    with pytest.raises(error, match=message):
        push(folder, PublishConfig(**config), dry_run=False)
    assert hub.calls == []


def test_nothing_is_uploaded_offline(folder, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push(folder, PublishConfig(repo_id="me/set"), dry_run=False)
    assert hub.calls == []


def test_a_public_set_can_be_uploaded_to_again_where_that_is_meant(folder, hub):
    hub.repo = SimpleNamespace(private=False)
    push(folder, PublishConfig(repo_id="me/set", private=False), dry_run=False)
    assert hub.calls[0][2]["private"] is False


@pytest.mark.parametrize(("name", "stage"), [("README.md", "card"), (FILES[2], "publish")])
def test_a_set_without_card_or_rows_is_not_published(folder, name, stage):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"Run the stage `{stage}` first"):
        push(folder, PublishConfig(repo_id="me/set"))


def test_a_configuration_that_cannot_be_honoured_is_refused():
    with pytest.raises(ValidationError, match="against the main branch"):
        PublishConfig(create_pr=True, revision="v1")
    with pytest.raises(ValidationError):
        PublishConfig(repo="me/set")
