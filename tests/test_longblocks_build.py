"""The builder as a whole: what comes out, what a crash, a fault or a changed configuration does, and who may share."""

import asyncio
import errno
import json
import multiprocessing
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from chat_server import FAULTS, ChatServer, Fault

from dgrpo_trl.cli.build_longblocks import main
from dgrpo_trl.longblocks import STAGES, Builder, load_config, load_longblocks, reasons
from dgrpo_trl.longblocks.builder.part_stages import ordered_map
from dgrpo_trl.longblocks.builder.store import KEPT_SCHEMA, Store
from dgrpo_trl.longblocks.records import Drop


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "dgrpo_trl.cli.build_longblocks",
        "dgrpo_trl.longblocks.builder.builder",
        "matplotlib.figure",
        "datasketch",
        "ftfy",
    ]
)
# Does not load the model that recognizes languages
QUICK = {"cleaning": {"min_tokens": 100, "identify_language": False}, "verification": {"language": False}}
SCRIPT = Path(__file__).parents[1] / "scripts" / "build_longblocks.py"
WORDS = "river stone cloud meadow lantern winter garden shadow bridge silver copper thunder harvest candle".split()


def paragraph(rng):
    sentences = []
    for _ in range(6):
        a, b, c = rng.sample(WORDS, 3)
        sentences.append(f"The {a} stood near the {b}, and in the evening nobody spoke of the {c} any more.")
    return " ".join(sentences)


def write_documents(folder, number, num_paragraphs=12):
    path = folder / "documents.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            rng = random.Random(index)
            text = "\n\n".join(f"Chapter {index}.{n}. {paragraph(rng)}" for n in range(num_paragraphs))
            file.write(json.dumps({"id": f"doc-{index}", "text": text}) + "\n")
    return path


def write_config(folder, documents, **sections):
    values = {
        "name": "test",
        "documents_per_part": 4,
        "sources": [
            {"type": "jsonl", "name": "made", "paths": [str(documents)], "id_column": "id", "language": "en"},
        ],
        "cleaning": {"min_tokens": 100},
        "questions": {"engine": "rule", "lengths": [900], "rows_per_document": 2},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def rows_of(folder):
    files = sorted((folder / "dataset" / "data").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def build(config, folder, stages=STAGES, **options):
    return Builder(load_config(config), folder).run(stages, **options)


def write_reply(request, times):
    """What a good writer says: a question on the first two blocks that it is shown."""
    prompt = request["messages"][0]["content"]
    key = sum(map(ord, prompt)) % 9973
    return json.dumps(
        {"question": f"What is told of number {key}?", "answer": f"Tale {key}.", "evidence": ["B1", "B2"]}
    )


def llm_sections(url):
    server = {
        "base_url": url,
        "model": "m",
        "max_concurrency": 16,
        "backoff_seconds": 0.001,
        "max_backoff_seconds": 0.01,
        "max_retries": 8,
    }
    return {
        "servers": {"writer": server, "teacher": {**server, "model": "family/Teacher-1"}},
        "questions": {"engine": "llm", "server": "writer", "questions_per_document": 2},
        "responses": {"teachers": [{"server": "teacher", "max_tokens": 64}]},
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """One build by rule: its folder and its summary."""
    folder = tmp_path_factory.mktemp("built")
    config = write_config(folder, write_documents(folder, 10))
    return folder, build(config, folder / "out")


def test_every_document_gives_rows_that_hold_together(built):
    folder, summary = built
    rows = rows_of(folder / "out")
    assert len(rows) == summary["stages"]["mixing"]["kept"] >= 12
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row)[:6] == ["id", "document", "source", "language", "question", "answer"]
        for evidence in row["evidence"]:
            assert row["document"][evidence["start"] : evidence["end"]].strip()
        assert all(check["passed"] and check["reason"] for check in row["checks"])


def test_nothing_is_left_out_without_a_reason(built):
    _, summary = built
    stages = summary["stages"]
    for before, after in (("sources", "deduplication"), ("verification", "responses"), ("decontamination", "mixing")):
        assert stages[before]["kept"] == stages[after]["kept"] + sum(stages[after]["dropped"].values())
    assert stages["questions"]["kept"] + sum(stages["questions"]["dropped"].values()) == 2 * 10


def test_every_reason_is_explained_and_every_explanation_has_a_reason(tmp_path):
    with pytest.raises(ValueError, match="'blocks' left something out for boredom, .*reasons.yaml"):
        Store(tmp_path).write("blocks", "a", KEPT_SCHEMA, [], [Drop("blocks", "s", "1", "boredom")], 1)
    for reason in ("truncated", "verification_truncated", "no_verdict", "verification_no_verdict"):
        assert reasons.is_known("verification", reason)
    package = Path(reasons.__file__).parent
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "reasons.py")
    explained = {reason for table in (*reasons.REASONS.values(), reasons.READING_REASONS) for reason in table}
    assert not [r for r in explained if f'"{r.removeprefix("verification_")}"' not in code and f"'{r}'" not in code]
    assert set(reasons.REASONS) == set(STAGES)


def test_the_card_and_the_loader_read_what_was_built(built):
    folder, _ = built
    card = (folder / "out" / "dataset" / "README.md").read_text(encoding="utf-8")
    assert "made" in card and "engine: rule" in card
    rows = load_longblocks(folder / "out" / "dataset")
    assert len(rows) == len(rows_of(folder / "out")) and {"prompt", "answer", "teacher_prompt"} <= set(
        rows.column_names
    )


def test_a_second_run_does_nothing_and_a_new_one_gives_the_same(built, tmp_path):
    folder, summary = built
    config = folder / "config.yaml"
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "work").rglob("rows.parquet")}
    assert build(config, folder / "out") == summary
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out" / "work").rglob("rows.parquet")}
    build(config, tmp_path / "again")
    assert rows_of(tmp_path / "again") == rows_of(folder / "out")


def test_stages_run_one_by_one_give_the_same(built, tmp_path):
    folder, _ = built
    for stage in STAGES:
        build(folder / "config.yaml", tmp_path / "out", [stage])
    assert rows_of(tmp_path / "out") == rows_of(folder / "out")


def test_a_stage_without_the_one_before_is_refused(built, tmp_path):
    folder, _ = built
    with pytest.raises(ValueError, match="'made' has not been read to its end.*'sources' first"):
        build(folder / "config.yaml", tmp_path, ["blocks"])
    build(folder / "config.yaml", tmp_path, ["sources"])
    with pytest.raises(ValueError, match="has not been through the stage 'deduplication'"):
        build(folder / "config.yaml", tmp_path, ["blocks"])


def test_a_changed_configuration_is_refused_unless_told(tmp_path):
    documents = write_documents(tmp_path, 4)
    build(write_config(tmp_path, documents), tmp_path / "out")
    changed = write_config(tmp_path, documents, questions={"engine": "rule", "lengths": [900], "rows_per_document": 1})
    with pytest.raises(ValueError, match="stage 'questions' differs .* in `questions`.*--restart_from questions"):
        build(changed, tmp_path / "out")
    summary = build(changed, tmp_path / "out", restart_from="questions")
    assert summary["stages"]["questions"]["kept"] + sum(summary["stages"]["questions"]["dropped"].values()) == 4


@pytest.mark.parametrize("option", [{"restart_from": "questions"}, {"retry_failed": True}])
def test_killed_while_parts_are_removed_nothing_stays_that_was_made_of_them(option, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    works, remove = threading.Event(), Store.remove

    def reply(request, times):
        return write_reply(request, times) if works.is_set() else FAULTS["server_error"]

    with ChatServer(reply) as server:
        sections = llm_sections(server.url)
        sections["servers"]["writer"]["max_retries"] = 0
        config = write_config(tmp_path, write_documents(tmp_path, 3), **sections)
        build(config, tmp_path / "out", STAGES[:7])
        works.set()
        kept = []
        for max_removals in (1, 6, 10):
            folder, num_removals = tmp_path / str(max_removals), 0
            shutil.copytree(tmp_path / "out", folder)

            def remove_or_die(self, stage, part=None, limit=max_removals):
                nonlocal num_removals
                remove(self, stage, part)
                num_removals += 1
                if num_removals == limit:
                    raise Killed

            monkeypatch.setattr(Store, "remove", remove_or_die)
            with suppress(Killed):
                build(config, folder, STAGES[:7], **option)
            monkeypatch.setattr(Store, "remove", remove)
            stages = build(config, folder, STAGES[:7])["stages"]
            kept.append([stages[stage]["kept"] for stage in STAGES[3:7]])
    assert [0] * 4 in kept and [6] * 4 in kept and all(len(set(numbers)) == 1 for numbers in kept)


def test_a_stage_is_removed_whole_or_not_at_all(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write("blocks", "a", KEPT_SCHEMA, [], [], 0)
    (tmp_path / "blocks" / "complete").touch()
    monkeypatch.setattr(
        "dgrpo_trl.longblocks.builder.store.shutil.rmtree", lambda path, **options: None
    )  # killed before it
    store.remove("blocks")
    assert store.parts("blocks") == [] and not (tmp_path / "blocks").exists()


def test_shards_together_give_what_one_process_gives(built, tmp_path):
    folder, _ = built
    config = load_config(folder / "config.yaml")
    for stages in (["sources"], ["deduplication"], STAGES[2:7], STAGES[7:]):
        if stages[0] in ("deduplication", "mixing"):
            Builder(config, tmp_path).run(stages)
            continue
        for shard in range(3):
            Builder(config, tmp_path, shard, 3).run(stages)
    assert rows_of(tmp_path) == rows_of(folder / "out")
    with pytest.raises(ValueError, match="'mixing' sees all parts at once"):
        Builder(config, tmp_path, 0, 3).run(["mixing"])
    with pytest.raises(ValueError, match="`shard` is 3 of 3"):
        Builder(config, tmp_path, 3, 3)


@pytest.mark.distributed
def test_datatrove_shares_the_work_out(built, tmp_path):
    folder, _ = built
    pytest.importorskip("datatrove")
    command = [sys.executable, str(SCRIPT.with_name("build_longblocks_cluster.py")), "--tasks", "2"]
    command += ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert rows_of(tmp_path / "out") == rows_of(folder / "out")


def test_two_builders_do_not_share_a_folder(built):
    folder, _ = built
    builder = Builder(load_config(folder / "config.yaml"), folder / "out")
    other = f"""
import sys, time
from filelock import FileLock
with FileLock({str(builder.store.folder / ".lock-0-of-1")!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(RuntimeError, match="Another process builds in"):
        builder.run()
    process.communicate()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"qestions": 1}, "`qestions`"),
        ({"questions": {"engine": "rule", "lenghts": [1]}}, "lenghts"),
        ({"questions": {"engine": "llm", "server": "nobody"}}, "'nobody', which is not among `servers`"),
        ({"verification": {"grounded": True}}, "`answerer` is not given"),
        ({"mixing": {"shares": {"counting": 0.5}}}, "add up to 0.5"),
        ({"sources": []}, "`sources`"),
        ({"name": "../elsewhere"}, "`name`"),
        ({"questions": {"engine": "rule", "tasks": {"counting": float("inf")}}}, "counting"),
        ({"verification": {"min_f1": float("nan")}}, "min_f1"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(sections, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_config(write_config(tmp_path, tmp_path / "none", **sections))


def test_a_repeated_key_is_refused(tmp_path):
    config = write_config(tmp_path, tmp_path / "none")
    config.write_text(config.read_text() + "cleaning: {min_tokens: 7}\n")
    with pytest.raises(ValueError, match="the key 'cleaning' is given twice"):
        load_config(config)


def test_keys_can_be_set_from_the_command_line(tmp_path):
    config = write_config(tmp_path, tmp_path / "none")
    loaded = load_config(config, {"questions.seed": 7, "sources.0.max_documents": 3, "mixing.max_rows": 2})
    assert (loaded.questions.seed, loaded.sources[0].max_documents, loaded.mixing.max_rows) == (7, 3, 2)
    for key in ("sources.9.name", "sources.first.name", "name.x"):
        with pytest.raises(ValueError, match=f"`{key}` names no value"):
            load_config(config, {key: 1})


def test_a_source_that_is_not_there_is_seen_before_anything_is_built(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        build(write_config(tmp_path, tmp_path / "nowhere.jsonl"), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.parquet"))


def test_only_some_rows_stay_where_the_mix_says_so(tmp_path):
    documents = write_documents(tmp_path, 12)
    shares = {"counting": 0.5, "key_chain": 0.5}
    questions = {"engine": "rule", "lengths": [900], "rows_per_document": 3, "tasks": {"counting": 1, "key_chain": 1}}
    config = write_config(tmp_path, documents, questions=questions, mixing={"shares": shares, "max_rows": 10})
    build(config, tmp_path / "out")
    assert Counter(row["task"] for row in rows_of(tmp_path / "out")) == {"counting": 5, "key_chain": 5}


def test_duplicates_and_contaminated_rows_leave_by_name(tmp_path):
    documents = write_documents(tmp_path, 6)
    lines = documents.read_text(encoding="utf-8").splitlines()
    documents.write_text("\n".join([*lines, lines[0]]), encoding="utf-8")
    config = write_config(tmp_path, documents)
    build(config, tmp_path / "first")
    leaked = rows_of(tmp_path / "first")[0]["question"]
    (tmp_path / "evaluation.txt").write_text(leaked.replace("\n", " "), encoding="utf-8")
    against = [{"name": "leaked", "path": str(tmp_path / "evaluation.txt")}]
    tight = write_config(tmp_path, documents, decontamination={"against": against, "ngram_words": 200})
    summary = build(tight, tmp_path / "second")
    assert summary["stages"]["deduplication"]["dropped"] == {"exact_duplicate": 1}
    assert summary["stages"]["decontamination"]["dropped"] == {"contaminated": 1}
    assert leaked not in {row["question"] for row in rows_of(tmp_path / "second")}


def test_texts_that_may_not_be_shared_are_not_published(tmp_path):
    documents = write_documents(tmp_path, 4)
    source = {
        "type": "jsonl",
        "name": "books",
        "paths": [str(documents)],
        "id_column": "id",
        "language": "en",
        "may_redistribute": False,
    }
    tasks = {"counting": 1.0}  # changes no text, so that the reader can put it together
    with ChatServer(write_reply) as server:
        config = write_config(tmp_path, documents, sources=[source], **llm_sections(server.url))
        build(config, tmp_path / "llm")
    rows = rows_of(tmp_path / "llm")
    assert rows and all(row["document"] is None and row["id"].startswith("doc-") for row in rows)
    assert all(len(row["document_sha256"]) == 64 for row in rows)
    cut = {"min_tokens": 100, "max_tokens": 500, "truncate_too_long": True}
    config = write_config(tmp_path, documents, sources=[source], cleaning=cut)
    summary = build(config, tmp_path / "cut", ["sources"])  # a text that its reader puts together cannot be cut
    assert summary["stages"]["sources"] == {"kept": 0, "dropped": {"too_long": 4}}
    questions = {"engine": "rule", "lengths": [900], "tasks": tasks}
    with pytest.raises(ValueError, match="no row"):  # a window is a text of its own
        build(write_config(tmp_path, documents, sources=[source], questions=questions), tmp_path / "rule")


# --- With a server


def test_faults_are_survived_counted_and_never_silent(tmp_path):
    """A server that fails in every way it can, for each request once, and for some always."""
    names = list(FAULTS)

    def reply(request, times):
        prompt = request["messages"][0]["content"]
        if request["model"] == "m" and sum(map(ord, prompt)) % 11 == 0:
            return FAULTS["server_error"]  # this one never works
        return FAULTS[names[sum(map(ord, prompt)) % len(names)]] if times == 0 else write_reply(request, times)

    with ChatServer(reply) as server:
        config = write_config(tmp_path, write_documents(tmp_path, 12), **llm_sections(server.url))
        summary = build(config, tmp_path / "out")
    questions = summary["stages"]["questions"]
    assert questions["kept"] + sum(questions["dropped"].values()) == 24
    assert questions["dropped"].get("server_error", 0) >= 1
    assert all(row["response_Teacher-1"] for row in rows_of(tmp_path / "out"))


def test_a_question_in_another_language_is_asked_again_and_then_counted(tmp_path):
    german = {
        "question": "Was wird am Abend über den Fluss und die Wiese erzählt, und wer sprach davon?",
        "answer": "Niemand sprach am Abend noch von dem Fluss oder von der Wiese.",
        "evidence": ["B1", "B2"],
    }
    asked = Counter()

    def reply(request, times):
        prompt = request["messages"][0]["content"]
        with lock:
            asked[prompt] += 1
            is_first = asked[prompt] == 1
        is_stubborn = sum(map(ord, prompt)) % 3 == 0
        return json.dumps(german) if is_first or is_stubborn else write_reply(request, times)

    lock = threading.Lock()
    with ChatServer(reply) as server:
        documents, sections = write_documents(tmp_path, 12), llm_sections(server.url)
        config = write_config(tmp_path, documents, **sections)
        summary = build(config, tmp_path / "out", STAGES[:4])["stages"]["questions"]
        assert sum(asked.values()) == 2 * summary["kept"] + 3 * summary["dropped"]["wrong_language"]
        assert summary["kept"] and summary["kept"] + summary["dropped"]["wrong_language"] == 24
        config = write_config(tmp_path, documents, verification={"language": False}, **sections)
        with pytest.raises(ValueError, match="`verification.language`"):
            build(config, tmp_path / "out", STAGES[:4])
        again = build(config, tmp_path / "out", STAGES[:4], restart_from="questions")
        assert again["stages"]["questions"] == {"kept": 24, "dropped": {}}


@pytest.mark.parametrize("fault", ["server_error", "truncated"])
def test_what_a_fault_left_out_can_be_asked_again(fault, tmp_path):
    works = threading.Event()

    def reply(request, times):
        return write_reply(request, times) if works.is_set() or times % 2 else FAULTS[fault]

    with ChatServer(reply) as server:
        sections = llm_sections(server.url)
        sections["servers"]["writer"]["max_retries"] = 0
        sections["servers"]["teacher"]["max_retries"] = 0
        config = write_config(tmp_path, write_documents(tmp_path, 6), **sections)
        first = build(config, tmp_path / "out", STAGES[:4])
        assert first["stages"]["questions"]["dropped"] == {fault: 12}
        num_asked = len(server.requests)
        if fault == "truncated":  # a reply that was cut off was paid for, and is not asked for again after a kill
            shutil.rmtree(tmp_path / "out" / "work" / "questions")
            assert build(config, tmp_path / "out", STAGES[:4]) == first and len(server.requests) == num_asked
        works.set()
        second = build(config, tmp_path / "out", STAGES[:4], retry_failed=True)
        assert second["stages"]["questions"] == {"kept": 12, "dropped": {}}
        assert len(server.requests) == num_asked + 12


@pytest.mark.parametrize("status", [402, 401, 400])
def test_a_build_that_a_server_refuses_to_go_on_with_resumes_all_of_it(status, tmp_path):
    """Money, key, or a parameter that the server no longer takes: no row is lost, and what was answered is kept."""
    max_answers, answered = 0, Counter()

    def reply(request, times):
        with lock:
            if len(answered) >= max_answers:
                return Fault(status, b'{"error": {"message": "no"}}')
            answered[json.dumps(request, sort_keys=True)] += 1
        return write_reply(request, times)

    lock = threading.Lock()
    with ChatServer(reply) as server:
        config = write_config(tmp_path, write_documents(tmp_path, 12), **{**QUICK, **llm_sections(server.url)})
        for number in (10, 40):  # in `questions`, then in `responses`
            max_answers = number
            with pytest.raises(RuntimeError, match=f"status {status}.*run again"):
                build(config, tmp_path / "out", STAGES[:6])
        max_answers = 1000
        stages = build(config, tmp_path / "out", STAGES[:6])["stages"]
    assert stages["questions"] == {"kept": 24, "dropped": {}} and stages["responses"] == {"kept": 24, "dropped": {}}
    assert len(answered) == 48 and answered.total() <= 48 + 2 * 16  # those in flight at a stop are asked again


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("[Errno 28] Error writing bytes to file. Detail: No space left on device"),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_a_full_disk_says_what_to_do_and_the_build_resumes(error, tmp_path, monkeypatch):
    config, write_table, num_writes = write_config(tmp_path, write_documents(tmp_path, 6)), pq.write_table, 0

    def write_until_full(*arguments, **options):
        nonlocal num_writes
        num_writes += 1
        if num_writes == 7:
            raise error
        write_table(*arguments, **options)

    monkeypatch.setattr("dgrpo_trl.longblocks.builder.store.pq.write_table", write_until_full)
    with pytest.raises(OSError, match="disk of .* is full.*bytes left.*Free some space.*run again"):
        build(config, tmp_path / "out")
    build(config, tmp_path / "out")
    build(config, tmp_path / "whole")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


def test_a_poor_writer_is_rejected_row_by_row(tmp_path):
    def reply(request, times):
        prompt = request["messages"][0]["content"]
        if request["model"] == "judge":
            return "It is not clear.\nVERDICT: REJECT"
        if "Reply with one JSON object" in prompt:
            return json.dumps(
                {"question": "What is the answer to the question?", "answer": "the question", "evidence": ["B1", "B2"]}
            )
        return "The answer to the question is the answer to the question."

    with ChatServer(reply) as server:
        sections = llm_sections(server.url)
        sections["servers"]["judge"] = {**sections["servers"]["writer"], "model": "judge"}
        verification = {
            "answerer": "writer",
            "judge": "judge",
            "grounded": True,
            "judged": True,
            "not_closed_book": True,
        }
        config = write_config(tmp_path, write_documents(tmp_path, 6), verification=verification, **sections)
        summary = build(config, tmp_path / "out", STAGES[:5])
    verification = summary["stages"]["verification"]
    assert (
        verification["kept"] == 0 and sum(verification["dropped"].values()) == summary["stages"]["questions"]["kept"]
    )
    reasons = {"answer_in_question", "not_grounded", "closed_book", "judge_rejected"}
    assert set(verification["dropped"]) <= reasons


def start_build(config, folder):
    """The command in a process of its own, forked from one that has its modules loaded: it starts at once."""
    process = FORKS.Process(target=main, args=(["--config", str(config), "--output_dir", str(folder)],))
    process.start()
    return process


def build_undisturbed(config, folder):
    """Seconds that a build takes."""
    warm_up = FORKS.Process(target=len, args=("",))
    warm_up.start()
    warm_up.join()
    started = time.monotonic()
    process = start_build(config, folder)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - started


def is_killed(config, folder, seconds):
    """Starts a build and kills it after some time; `False` if it had finished."""
    process = start_build(config, folder)
    process.join(seconds)
    if process.exitcode is not None:
        assert process.exitcode == 0
        return False
    process.kill()
    process.join()
    return True


@pytest.mark.parametrize(("num_kills", "num_documents"), [(8, 24), pytest.param(30, 60, marks=pytest.mark.slow)])
def test_a_build_killed_again_and_again_is_the_undisturbed_one(num_kills, num_documents, tmp_path):
    """Kill -9 at random moments: the same rows, none twice, and no finished request paid for twice."""
    lock = threading.Lock()
    sent_whole = Counter()

    def reply(request, times):
        time.sleep(0.002)
        answer = write_reply(request, times)
        with lock:
            sent_whole[json.dumps(request, sort_keys=True)] += 1
        return answer

    with ChatServer(reply) as server:
        documents = write_documents(tmp_path, num_documents, num_paragraphs=8)
        config = write_config(tmp_path, documents, **{**QUICK, **llm_sections(server.url)})
        seconds = build_undisturbed(config, tmp_path / "whole")
        num_requests = len(sent_whole)
        sent_whole.clear()
        rng, num_killed = random.Random(0), 0
        while num_killed < num_kills:
            if is_killed(config, tmp_path / "killed", rng.uniform(0, seconds)):
                num_killed += 1
                continue
            # Finished: take parts of some stages away
            folder = tmp_path / "killed" / "work"
            for stage in rng.sample(["questions", "responses", "verification", "mixing", "blocks"], 2):
                parts = sorted((folder / stage).iterdir())
                for part in rng.sample(parts, len(parts) // 2):
                    os.rename(part, part.with_name(f".{part.name}"))  # as a kill leaves it
        build_undisturbed(config, tmp_path / "killed")
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert len(sent_whole) == num_requests
    # What was in flight when a process died was not finished; nothing else is asked again
    assert sum(sent_whole.values()) - num_requests <= 16 * num_kills


def test_a_build_by_rule_killed_again_and_again_is_the_undisturbed_one(tmp_path):
    config = write_config(tmp_path, write_documents(tmp_path, 60, num_paragraphs=10), **QUICK)
    seconds = build_undisturbed(config, tmp_path / "whole")
    rng = random.Random(1)
    kills = [is_killed(config, tmp_path / "killed", rng.uniform(0, 0.6 * seconds)) for _ in range(4)]
    build_undisturbed(config, tmp_path / "killed")
    assert any(kills) and rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_results_come_in_order_with_so_many_under_way():
    under_way = most = 0

    async def work(number):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001 * (number % 3))
        under_way -= 1
        return number

    async def run():
        return [result async for result in ordered_map(work, range(40), 5)]

    assert asyncio.run(run()) == list(range(40))
    assert most == 5


def message_of(*arguments):
    """What the command ends with, instead of a traceback."""
    with pytest.raises(SystemExit) as error:
        main([*map(str, arguments)])
    return error.value.code


def test_the_command_takes_every_key_that_is_set(tmp_path):
    config = write_config(tmp_path, tmp_path / "none")
    keys = ["--cleaning.first", "1", "--mixing.second=1", "--sources.0.max_document", "1"]
    message = message_of("--config", config, *keys)
    assert all(f"{key}`" in message for key in ("cleaning.first", "mixing.second", "jsonl.max_document"))
    assert "Did you mean `max_documents`?" in message


def test_the_command_names_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    config = write_config(tmp_path, write_documents(tmp_path, 2))
    assert "Not a directory" in message_of("--config", config, "--output_dir", tmp_path / "file" / "out")


def test_the_command_names_a_mistake(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: x\nquestions: {engine: none}\n")
    message = message_of("--config", tmp_path / "bad.yaml", "--dry_run")
    assert "mistakes" in message and "`questions" in message and "`sources`" in message
