"""The paper's two stages on a real model, on a CPU: data, cold start, dGRPO, evaluation, comparison.

    python scripts/demo.py --output_dir outputs/demo

Every stage is a command of its own, printed before it runs. A stage whose outputs are complete for the same command
and inputs is skipped, so that a second run costs nothing and an interrupted one resumes. The last one writes
`comparison/comparison.html`.
"""

from dataclasses import dataclass
from pathlib import Path

from stages import RECIPES, Project, Stage, has_bf16_instructions, run_stages
from transformers.hf_argparser import HfArg

from dgrpo_trl.cli.arguments import parse_arguments


SMOLLM2 = RECIPES / "smollm2-135m"
# Name of an evaluation -> the model, as the page calls it
MODELS = {"shipped": "as shipped", "sft": "cold start", "dgrpo": "dGRPO", "teacher": "teacher (evidence only)"}


def make_stages(output_dir: Path, seed: int, bf16: bool) -> list[Stage]:
    project = Project(output_dir, bf16)

    def evaluate(name: str, model: str, column: str = "prompt") -> Stage:
        flags = ["--prompt_column", column, "--max_batch_tokens", "8192"]
        return project.evaluate(name, model, "test", output_dir / f"eval_{name}", flags)

    return [
        project.prepare("prepare_demo.py", "demo_*.yaml", ["sft", "train", "test"], ["--seed", str(seed)]),
        evaluate("shipped", "model"),
        project.train(
            *("sft", "cold start: supervised fine-tuning", SMOLLM2 / "sft" / "demo.yaml"),
            **{"start": "model", "rows": "sft", "seed": seed},
        ),
        evaluate("sft", "sft"),
        evaluate("teacher", "sft", column="teacher_prompt"),
        project.train(
            *("dgrpo", "dGRPO; the teacher is the cold start, which reads the evidence only"),
            SMOLLM2 / "dgrpo" / "demo.yaml",
            **{"start": "sft", "rows": "train", "seed": seed, "teacher": "sft"},
        ),
        evaluate("dgrpo", "dgrpo"),
        project.compare(
            *("demo", "dGRPO on SmolLM2-135M-Instruct: the demo"),
            groups={label: [output_dir / f"eval_{name}"] for name, label in MODELS.items()},
            logs={MODELS[name]: [output_dir / name] for name in ("sft", "dgrpo")},
            output_dir=output_dir / "comparison",
            flags=["--baseline", MODELS["sft"]],
        ),
    ]


@dataclass
class DemoArguments:
    """Where to write, and how to compute."""

    output_dir: Path = HfArg(default=Path("outputs/demo"), help="Folder to write to.")
    seed: int = HfArg(default=0, help="Seed of the questions, of the split and of the training.")
    precision: str = HfArg(
        default="auto",
        help="Arithmetic; 'auto' takes bfloat16 where the CPU has instructions for it.",
        metadata={"choices": ["auto", "bf16", "fp32"]},
    )


def main() -> None:
    (args,) = parse_arguments((DemoArguments,), description=__doc__)
    bf16 = has_bf16_instructions() if args.precision == "auto" else args.precision == "bf16"
    stages = make_stages(args.output_dir, args.seed, bf16)
    print(f"Demo in {args.output_dir}: {len(stages)} stages in {'bfloat16' if bf16 else 'float32'}", flush=True)
    run_stages(stages, args.output_dir)
    print(f"\nPage: {(args.output_dir / 'comparison' / 'comparison.html').resolve()}")


if __name__ == "__main__":
    main()
