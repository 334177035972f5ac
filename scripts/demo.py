"""The paper's two stages on a real model, on a CPU: data, cold start, dGRPO, evaluation, report.

    python scripts/demo.py --output_dir outputs/demo

Every stage is a command of its own, printed before it runs. A stage whose outputs are complete for the same command
and inputs is skipped, so that a second run costs nothing and an interrupted one goes on where it stopped.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch
from stages import SCRIPTS, Stage, has_bf16_instructions, peak_gib, run_stages

from dgrpo_trl import longblocks
from dgrpo_trl.evaluation.report import read_log_history, summarize_accuracy, write_report


RECIPES = SCRIPTS.parent / "recipes" / "smollm2-135m"

# Name of an evaluation -> the model, as the report calls it
MODELS = {
    "shipped": "SmolLM2-135M-Instruct as shipped",
    "sft": "cold-started (SFT)",
    "dgrpo": "dGRPO",
    "teacher": "teacher (SFT model, evidence only)",
}


def make_stages(output_dir: Path, seed: int, bf16: bool) -> list[Stage]:
    data, model, sft, dgrpo = (output_dir / name for name in ("data", "model", "sft", "dgrpo"))
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(RECIPES.parent / "accelerate_configs" / "cpu.yaml")]
    common = ["--seed", str(seed), "--bf16", str(bf16).lower()]
    weights = "model.safetensors"
    model_inputs = [model / "complete.json"]

    def train(name: str, script: str, recipe: Path, init: Path, rows: str, *flags: str) -> list[str]:
        return [
            *launch,
            str(SCRIPTS / script),
            *("--config", str(recipe), "--output_dir", str(output_dir / name)),
            *("--model_name_or_path", str(init), "--dataset_name", str(data / rows), *flags, *common),
        ]

    def evaluate(name: str, checkpoint: Path, inputs: list[Path], column: str = "prompt") -> Stage:
        results = output_dir / f"eval_{name}"
        command = [sys.executable, str(SCRIPTS / "evaluate.py"), "--model_name_or_path", str(checkpoint)]
        command += ["--questions", str(data / "test.jsonl"), "--prompt_column", column, "--max_new_tokens", "16"]
        command += ["--dtype", "bfloat16" if bf16 else "float32", "--max_batch_tokens", "8192"]
        return Stage(
            name=f"evaluate_{name}",
            purpose=f"accuracy of {MODELS[name]} on held-out questions",
            command=[*command, "--output_dir", str(results), "--overwrite", "true"],
            inputs=[SCRIPTS / "evaluate.py", data / "test.jsonl", *inputs],
            outputs=[results / "results.json"],
        )

    sft_recipe, dgrpo_recipe = RECIPES / "sft" / "demo.yaml", RECIPES / "dgrpo" / "demo.yaml"
    return [
        Stage(
            name="prepare",
            purpose="fetch and convert the model, write the questions",
            command=[
                *(sys.executable, str(SCRIPTS / "prepare_demo.py")),
                *("--output_dir", str(output_dir), "--seed", str(seed)),
            ],
            inputs=[
                SCRIPTS / "prepare_demo.py",
                *sorted((RECIPES.parent / "longblocks").glob("demo_*.yaml")),
                *sorted(Path(longblocks.__file__).parent.rglob("*.py")),
            ],
            outputs=[model / weights, *model_inputs, *(data / f"{rows}.jsonl" for rows in ("sft", "train", "test"))],
        ),
        evaluate("shipped", model, model_inputs),
        Stage(
            name="sft",
            purpose="cold start: supervised fine-tuning",
            command=train("sft", "train_sft.py", sft_recipe, model, "sft.jsonl"),
            inputs=[SCRIPTS / "train_sft.py", sft_recipe, data / "sft.jsonl", *model_inputs],
            outputs=[sft / weights, sft / "trainer_state.json"],
        ),
        evaluate("sft", sft, [sft / weights]),
        evaluate("teacher", sft, [sft / weights], column="teacher_prompt"),
        Stage(
            name="dgrpo",
            purpose="dGRPO; the teacher is the cold-started model, which reads the evidence only",
            command=train(
                *("dgrpo", "train_dgrpo.py", dgrpo_recipe, sft, "train.jsonl"),
                *("--teacher_model_name_or_path", str(sft)),
            ),
            inputs=[SCRIPTS / "train_dgrpo.py", dgrpo_recipe, data / "train.jsonl", sft / weights],
            outputs=[dgrpo / weights, dgrpo / "trainer_state.json"],
        ),
        evaluate("dgrpo", dgrpo, [dgrpo / weights]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions, of the split and of the training")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="arithmetic; 'auto' takes bfloat16 where the CPU has instructions for it",
    )
    args = parser.parse_args()

    bf16 = has_bf16_instructions() if args.precision == "auto" else args.precision == "bf16"
    stages = make_stages(args.output_dir, args.seed, bf16)
    print(f"Demo in {args.output_dir}: {len(stages)} stages in {'bfloat16' if bf16 else 'float32'}", flush=True)
    seconds = run_stages(stages, args.output_dir)

    report = write_report(
        args.output_dir,
        title="dGRPO on SmolLM2-135M-Instruct: the demo",
        introduction=(
            "A small real model learns to look up facts in real text, among facts of the same form about similar "
            "subjects: first by a few steps of supervised fine-tuning, then by dGRPO with itself as the teacher, "
            "which reads only the evidence. Held-out questions share no entity, answer or passage with those "
            "trained on, and the longest prompts are longer than any of the training."
        ),
        accuracies={
            label: summarize_accuracy(
                json.loads((args.output_dir / f"eval_{name}" / "results.json").read_text(encoding="utf-8"))
            )
            for name, label in MODELS.items()
        },
        log_histories={
            "Cold start": read_log_history(args.output_dir / "sft"),
            "dGRPO": read_log_history(args.output_dir / "dgrpo"),
        },
        settings={
            "seed": args.seed,
            "arithmetic": "bfloat16" if bf16 else "float32",
            "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, PyTorch {torch.__version__}",
            **{f"seconds, {name}": f"{value:.0f}" for name, value in seconds.items()},
            "seconds, all": f"{sum(seconds.values()):.0f}",
            "memory of the largest process": f"{peak_gib():.1f} GiB (stages of the last run only)",
        },
    )
    print(f"\nReport: {report.resolve()}")


if __name__ == "__main__":
    main()
