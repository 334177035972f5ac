"""Downloads and prepares what the comparison of methods needs: a small real model, questions to learn and to test.

    python scripts/prepare_reproduction.py --size cpu

Writes `model/` and `data/{cold_start,teacher,train,test,short}.jsonl` to `outputs/reproduce-<size>`, as
`prepare_demo.py` does. The long questions come from the LongBlocks builder
(`recipes/longblocks/reproduce_<size>_*.yaml`); the three training files share names and texts, but no row. `short`
holds short questions without a document, which nothing is trained on: do the methods keep what the model knew?
"""

import random
from dataclasses import dataclass
from pathlib import Path

from prepare_demo import SYSTEM_MESSAGE, PreparationArguments, prepare
from transformers.hf_argparser import HfArg

from dgrpo_trl.cli.arguments import parse_arguments


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


@dataclass
class ReproductionArguments(PreparationArguments):
    """Where to write, and for which size."""

    size: str = HfArg(default="cpu", help="Size of the comparison.", metadata={"choices": list(NUM_ROWS)})
    output_dir: Path | None = HfArg(default=None, help="Folder to write to, by default outputs/reproduce-SIZE.")


def main() -> None:
    (args,) = parse_arguments((ReproductionArguments,), description=__doc__)
    train, test = (f"reproduce_{args.size}_{name}" for name in ("train", "test"))

    def split(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
        files, left = {"test": rows[test], "short": short_rows(args.seed)}, rows[train]
        for name, num_rows in NUM_ROWS[args.size].items():
            files[name], left = left[:num_rows], left[num_rows:]
        return files

    output_dir = args.output_dir or Path(f"outputs/reproduce-{args.size}")
    made_by = {"num_rows": NUM_ROWS[args.size], "short": short_rows(args.seed)}
    prepare(output_dir, args, {train: None, test: None}, split, made_by)


if __name__ == "__main__":
    main()
