"""The builder against a real language model behind a real server: SmolLM2-135M-Instruct by `transformers serve`.

Needs PyPI, or the folder of a prepared model in DGRPO_DEMO_MODEL. As a writer this model is poor: that the checks say
so is what is tested.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dgrpo_trl.longblocks import Builder, load_config


ROOT = Path(__file__).parents[1]

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


def test_a_poor_writer_is_found_out(server, model_dir, tmp_path):
    path = tmp_path / "config.yaml"
    model = {
        "base_url": server,
        "model": str(model_dir),
        "max_concurrency": 2,
        "max_retries": 1,
        "max_model_tokens": 8192,
        "tokenizer": str(model_dir),
        "temperature": 0.0,
    }
    path.write_text(
        yaml.safe_dump(
            {
                "name": "poor",
                "tokenizer": str(model_dir),
                "sources": [{"type": "stdlib", "max_documents": 8}],
                "cleaning": {"min_tokens": 1000, "max_tokens": 20000},
                "servers": {"small": model},
                "questions": {
                    "engine": "llm",
                    "server": "small",
                    "questions_per_document": 2,
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
        )
    )
    summary = Builder(load_config(path), tmp_path / "out").run(
        ["sources", "deduplication", "blocks", "questions", "verification"]
    )
    stages = summary["stages"]
    asked = 2 * stages["deduplication"]["kept"]
    lost = Counter(stages["questions"]["dropped"]) + Counter(stages["verification"]["dropped"])
    print(stages)
    assert asked >= 8 and stages["verification"]["kept"] + lost.total() == asked
    assert stages["verification"]["kept"] <= 0.1 * asked
