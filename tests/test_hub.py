"""What goes to the Hub and comes from it, over HTTP, against the server of `hub_server`: each process is a new one."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, build_model
from hub_server import TOKEN, HubServer, Repository
from test_longblocks_build import build, rows_of, write_config, write_documents
from test_longblocks_load import book, row
from test_scripts import FLAGS

from dgrpo_trl.longblocks import load_longblocks


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python in a process whose Hub is the server; gives what it prints."""

    def run(*command, token=TOKEN, home="home", fails=False):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(tmp_path / home)}
        env |= {
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        }
        process = subprocess.run(
            [sys.executable, *map(str, command)], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert (process.returncode != 0) is fails, process.stdout + process.stderr
        return process.stdout + process.stderr if fails else process.stdout

    return run


@pytest.fixture
def built(tmp_path):
    """A finished build of a few rows."""
    config = write_config(tmp_path, write_documents(tmp_path, 6), publish={"repo_id": "me/set"})
    build(config, tmp_path / "out")
    return config, tmp_path / "out"


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


LOAD = """
import json
from dgrpo_trl.longblocks import load_longblocks
made = [list(load_longblocks("me/set", streaming=streaming)) for streaming in (False, True)]
print(json.dumps(made))
"""


def test_what_the_script_pushes_is_what_everybody_loads(hub, run, built):
    config, folder = built
    script = ROOT / "scripts" / "build_longblocks.py"
    command = [script, "--config", config, "--output_dir", folder, "--stages", "publish"]
    run(*command)
    assert not hub.requests  # a dry run, as --push is not given
    run(*command, "--push")
    repository = hub.repositories["datasets/me/set"]
    files = {path.relative_to(folder / "dataset").as_posix(): path for path in (folder / "dataset").rglob("*.*")}
    assert repository.is_private and len(repository.commits) == 1
    assert repository.branches["main"] == {name: path.read_bytes() for name, path in files.items()}
    made, streamed = json.loads(run("-c", LOAD))
    assert made == streamed == list(load_longblocks(folder / "dataset")) and len(made) == len(rows_of(folder))
    assert "DatasetNotFoundError" in run("-c", LOAD, token="hf_stranger", home="strangers", fails=True)

    # Sent again, nothing large is uploaded, and what an earlier set left goes
    repository.branches["main"]["data/train-00001-of-00002.parquet"] = b"of an earlier set"
    num_uploads = hub.num_uploads
    run(*command, "--push")
    assert hub.num_uploads == num_uploads and set(repository.branches["main"]) == set(files)


PUSH = """
import json, sys
from pathlib import Path
from dgrpo_trl.longblocks.builder.publish import PublishConfig, push
for config in json.loads(sys.argv[2]):
    try:
        print("URL", push(Path(sys.argv[1]), PublishConfig(**config), dry_run=False).url)
    except (ValueError, RuntimeError) as error:
        print("ERROR", str(error).replace(chr(10), " "))
"""


def test_branches_pull_requests_and_refusals(hub, run, built):
    _, folder = built
    hub.repositories["datasets/me/public"] = Repository(is_private=False, branches={"main": {"README.md": b"old"}})
    configs = [
        {"repo_id": "me/set", "revision": "v2"},
        {"repo_id": "me/set", "create_pr": True},
        {"repo_id": "me/public"},
        {"repo_id": "me/public", "private": False},
    ]
    lines = run("-c", PUSH, folder / "dataset", json.dumps(configs)).splitlines()
    branch, pull_request, refused, public = (line for line in lines if line.startswith(("URL", "ERROR")))
    branches = hub.repositories["datasets/me/set"].branches
    assert not branches["main"] and branches["v2"] == branches["refs/pr/2"] and len(branches["v2"]) == 3
    assert branch.startswith(f"URL {hub.url}/datasets/me/set/commit/") and pull_request.startswith("URL ")
    assert "exists and is public" in refused and public.startswith("URL ")
    assert len(hub.repositories["datasets/me/public"].commits) == 1

    hub.requests.clear()
    stranger = run("-c", PUSH, folder / "dataset", json.dumps(configs[:1]), token="hf_stranger")
    assert "ERROR The Hub refuses: Invalid user token" in stranger
    assert not [path for _, path in hub.requests if "me/set" in path]


def test_corpora_are_streamed_by_the_names_of_the_table_and_a_gated_one_is_left_out(hub, run, tmp_path):
    texts = [json.loads(line)["text"] for line in write_documents(tmp_path, 6).read_text().splitlines()]
    articles = [{"id": str(n), "url": f"u{n}", "title": "t", "text": text} for n, text in enumerate(texts)]
    wikipedia = {f"20231101.en/train-0000{n}-of-00002.parquet": parquet(articles[n::2]) for n in range(2)}
    files = b"  data_files:\n  - split: train\n    path: 20231101.en/train-*\n"
    wikipedia["README.md"] = b"---\nconfigs:\n- config_name: 20231101.en\n" + files + b"---\n"
    hub.repositories["datasets/wikimedia/wikipedia"] = Repository(False, {"main": wikipedia})
    books = {"data/train-00000-of-00001.parquet": parquet([book("B1")])}
    gated = Repository(False, {"main": books}, is_gated=True)
    hub.repositories["datasets/institutional/institutional-books-1.0"] = gated
    sources = [
        {"type": "corpus", "corpus": "wikipedia", "language": "en"},
        {"type": "corpus", "corpus": "institutional-books"},
    ]
    config = write_config(tmp_path, None, sources=sources)
    run(ROOT / "scripts" / "build_longblocks.py", "--config", config, "--output_dir", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stages"]["sources"] == {"kept": 6, "dropped": {"gated": 1}}
    rows = rows_of(tmp_path / "out")
    assert rows and {row["source"] for row in rows} == {"Wikipedia-en"}
    log = (tmp_path / "out" / "logs" / "build.log").read_text()
    assert "Accept its terms" in log and "HTTP Request" not in log


def test_the_published_set_is_joined_with_the_books_of_the_hub(hub, run, tmp_path):
    lacking = row(id="B2", document=None, source="Institutional Books", question="What comes last?")
    readme = b"---\ndata_files: data/*.parquet\n---\n"
    for name, rows in (
        ("utter-project/LongBlocks", [row(), lacking]),
        ("institutional/institutional-books-1.0", [book("B1"), book("B2", ("three", "four"))]),
    ):
        files = {"README.md": readme, "data/train-00000-of-00001.parquet": parquet(rows)}
        hub.repositories[f"datasets/{name}"] = Repository(False, {"main": files})
    script = """
import json
from dgrpo_trl.longblocks import load_longblocks
print(json.dumps(list(load_longblocks(books="institutional/institutional-books-1.0"))))
"""
    first, second = json.loads(run("-c", script).splitlines()[-1])
    assert first["prompt"][0]["content"].endswith("How many wheels?")
    assert second["prompt"] == [{"role": "user", "content": "three\n\nfour\n\nWhat comes last?"}]


def test_a_run_takes_models_and_rows_from_the_hub_and_pushes_its_model(hub, run, tokenizer, tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        build_model(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        hub.repositories[f"models/me/{name}"] = Repository(True, {"main": files})
    prompts = [[{"role": "user", "content": f"The ship has number {n}. Number?"}] for n in range(12)]
    rows = [{"prompt": prompt, "answer": str(n)} for n, prompt in enumerate(prompts)]
    files = {"data/train-00000-of-00001.parquet": parquet(rows)}
    hub.repositories["datasets/me/rows"] = Repository(True, {"main": files})
    flags = {
        "model_name_or_path": "me/student",
        "teacher_model_name_or_path": "me/teacher",
        "dataset_name": "me/rows",
        "output_dir": tmp_path / "out",
        "hub_model_id": "me/trained",
        "push_to_hub": "true",
        "hub_private_repo": "true",
    }
    recipe = ROOT / "recipes" / "smollm2-135m" / "dgrpo" / "demo.yaml"
    command = [ROOT / "scripts" / "train_dgrpo.py", "--config", recipe]
    run(*command, *FLAGS, *(part for name, value in flags.items() for part in (f"--{name}", value)))
    trained = hub.repositories["models/me/trained"]
    assert trained.is_private
    pushed = trained.branches["main"]
    assert pushed["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert pushed["model.safetensors"] != hub.repositories["models/me/student"].branches["main"]["model.safetensors"]
    card = pushed["README.md"].decode()
    assert "me/teacher" in card and "me/rows" in card and "datasets/me/rows" in card


EVALUATE = """
import json
from dgrpo_trl.config import LongBlocksArguments
from dgrpo_trl.training_data import load_training_data

def answers(name, **options):
    try:
        train, test = load_training_data(LongBlocksArguments(dataset_name=name, **options), None, with_test=True)
    except ValueError as error:
        return str(error)
    return ["".join(row["answer"] for row in rows) for rows in (train, test)]

parts = {"dataset_train_split": "train[:75%]", "dataset_test_split": "train[75%:]"}
print(json.dumps([
    answers("me/both"),
    answers("me/both", dataset_streaming=True),
    answers("me/alone"),
    answers("me/alone", dataset_streaming=True),
    answers("me/alone", dataset_test_split="train"),
    answers("me/alone", **parts),
    answers("me/alone", eval_dataset_name="me/both"),
]))
"""


def test_what_is_evaluated_on_is_a_split_of_the_hub_or_an_error(hub, run):
    def rows(answers):
        return parquet([{"prompt": f"Ship {answer}?", "answer": answer} for answer in answers])

    train, test = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"
    hub.repositories["datasets/me/both"] = Repository(False, {"main": {train: rows("abcd"), test: rows("ef")}})
    hub.repositories["datasets/me/alone"] = Repository(False, {"main": {train: rows("ghij")}})
    both, streamed, alone, streamed_alone, same, parts, other = json.loads(run("-c", EVALUATE).splitlines()[-1])
    assert both == streamed == ["abcd", "ef"] and parts == ["ghi", "j"] and other == ["ghij", "ef"]
    for error in (alone, streamed_alone):
        assert error.startswith("There are no rows to evaluate on") and "`eval_dataset_name`" in error
    assert "These are the same rows" in same


ADAPTER = """
from dgrpo_trl.models import load_config
try:
    load_config("me/adapter")
except ValueError as error:
    print(error)
"""


def test_an_adapter_on_the_hub_is_named_as_one(hub, run):
    adapter = json.dumps({"base_model_name_or_path": "me/student"}).encode()
    hub.repositories["models/me/adapter"] = Repository(False, {"main": {"adapter_config.json": adapter}})
    assert "'me/adapter' is a PEFT adapter of 'me/student', and no model" in run("-c", ADAPTER)
