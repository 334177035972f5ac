"""Accuracy of greedy answers of one model, in all, by prompt length and by task, as JSON.

    python scripts/evaluate_accuracy.py --model outputs/demo/dgrpo --data outputs/demo/data/test.jsonl \
        --output outputs/demo/accuracy_dgrpo.json
"""

import argparse
import json
import os
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from dgrpo_trl.evaluation import generate_completions, summarize_accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--data", required=True, help="JSONL file with `answer`, `length_bin`, `task` and the prompts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompt_column", default="prompt", help="'teacher_prompt' gives the teacher's accuracy")
    parser.add_argument("--num_rows", type=int, default=None, help="only the first rows of the data")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="longest completion, in tokens")
    parser.add_argument("--max_batch_tokens", type=int, default=8192, help="longest batch, in tokens")
    parser.add_argument("--bf16", action="store_true", help="load the weights in bfloat16 instead of float32")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    rows = list(load_dataset("json", data_files=args.data, split="train"))[: args.num_rows]
    completions = generate_completions(
        model,
        tokenizer,
        [row[args.prompt_column] for row in rows],
        max_new_tokens=args.max_new_tokens,
        max_batch_tokens=args.max_batch_tokens,
        description=Path(args.model).name,
    )
    result = summarize_accuracy(rows, completions)
    result["completions"] = {
        row["id"]: {"answer": row["answer"], "completion": completion}
        for row, completion in zip(rows, completions, strict=True)
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.output.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, args.output)
    overall = result["overall"]
    print(f"{args.model}: {overall['exact']['accuracy']:.1%} exact, {overall['mentioned']['accuracy']:.1%} mentioned")


if __name__ == "__main__":
    main()
