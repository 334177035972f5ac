"""The paper's comparison of methods on a small real model: equal steps, equal rollouts, equal questions.

    python scripts/reproduce.py --size cpu        # or `make reproduce`; `--size gpu` for one GPU of 80 GB

From one cold-started SmolLM2-135M-Instruct: SFT, GRPO, on-policy distillation (OPD), dGRPO, and dGRPO whose teacher
reads the evidence alone; then the paper's ablations, the coefficient and the cold start. Every number is in a recipe,
`recipes/smollm2-135m/*/reproduce*_<size>.yaml`. Every stage is a command of its own, which is skipped when it is
complete, so that an interrupted run resumes.

Writes `comparison/` (long questions, curves of training) and `short/` (what the model knew before) to
`outputs/reproduce-<size>`: each a table, JSON and one page, and `comparison/curves.png`.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from stages import RECIPES, Project, Stage, has_bf16_instructions, run_stages
from transformers.hf_argparser import HfArg

from dgrpo_trl.cli.arguments import exit_with_message, parse_arguments
from dgrpo_trl.evaluation.compare.figures import draw_lines


SMOLLM2 = RECIPES / "smollm2-135m"


@dataclass(frozen=True)
class Method:
    """How a run is trained: its recipe, the models that start and teach it, and what differs from the recipe."""

    label: str
    recipe: str  # `<folder>/<stem>`, without the size
    teacher: str | None = None
    start: str = "cold_start"
    flags: tuple[str, ...] = ()


METHODS = {
    "sft": Method("SFT", "sft/reproduce"),
    "grpo": Method("GRPO", "grpo/reproduce"),
    "opd": Method("OPD", "opd/reproduce", "teacher"),
    "dgrpo": Method("dGRPO", "dgrpo/reproduce", "teacher"),
    "dgrpo_evidence": Method("dGRPO, evidence teacher", "dgrpo/reproduce_evidence", "teacher"),
}
ABLATIONS = {
    "coef_0.1": Method("dGRPO, coefficient 0.1", "dgrpo/reproduce", "teacher", flags=("--distill_coef", "0.1")),
    "coef_1.0": Method("dGRPO, coefficient 1.0", "dgrpo/reproduce", "teacher", flags=("--distill_coef", "1.0")),
    "no_cold_start": Method("dGRPO, no cold start", "dgrpo/reproduce", "teacher", start="model"),
}
# What the methods begin from and learn from, for the same tables
REFERENCES = {"model": "as shipped", "cold_start": "cold start", "teacher": "teacher"}
# Short questions ask what the model knows, in whatever form it answers
QUESTIONS = {"test": ("long questions", "exact_match"), "short": ("short questions", "mentioned")}
EVIDENCE = "teacher, reads the evidence"


class Comparison:
    """The stages of a comparison, with a number of seeds for each method and ablation; 0 leaves these out."""

    def __init__(self, size: str, output_dir: Path, seeds: int, ablation_seeds: int, bf16: bool):
        self.size = size
        self.output_dir = output_dir
        self.project = Project(output_dir, bf16, "cpu" if size == "cpu" else "single_gpu")
        self.runs = {name: (method, seeds) for name, method in METHODS.items()}
        self.runs |= {name: (method, ablation_seeds) for name, method in ABLATIONS.items() if ablation_seeds > 0}

    def stages(self) -> list[Stage]:
        rows, recipes = ["cold_start", "teacher", "train", "test", "short"], f"reproduce_{self.size}_*.yaml"
        return [
            self.project.prepare("prepare_reproduction.py", recipes, rows, ["--size", self.size]),
            self._train(
                "cold_start", Method("cold start", "sft/reproduce_cold_start", start="model"), 0, "cold_start"
            ),
            self._train("teacher", Method("teacher", "sft/reproduce_teacher"), 0, "teacher"),
            *(self._evaluate(name, data) for name in REFERENCES for data in QUESTIONS),
            self._evaluate("teacher", "test", column="teacher_prompt"),
            *(
                stage
                for seed in range(max(num_seeds for _, num_seeds in self.runs.values()))
                for name, (method, num_seeds) in self.runs.items()
                if seed < num_seeds
                for stage in self._method(f"{name}-{seed}", method, seed)
            ),
            self._compare("comparison", "test"),
            self._compare("short", "short"),
        ]

    def _method(self, run: str, method: Method, seed: int) -> list[Stage]:
        return [self._train(run, method, seed, "train"), *(self._evaluate(run, data) for data in QUESTIONS)]

    def _train(self, run: str, method: Method, seed: int, rows: str) -> Stage:
        return self.project.train(
            *(run, f"{method.label}, seed {seed}", SMOLLM2 / f"{method.recipe}_{self.size}.yaml"),
            **{"start": method.start, "rows": rows, "seed": seed, "teacher": method.teacher, "flags": method.flags},
        )

    def _results(self, run: str, data: str, column: str = "prompt") -> Path:
        return self.output_dir / "results" / data / (run if column == "prompt" else f"{run}_{column}")

    def _evaluate(self, run: str, data: str, column: str = "prompt") -> Stage:
        results = self._results(run, data, column)
        flags = ["--prompt_column", column, "--questions_metric", QUESTIONS[data][1]]
        return self.project.evaluate(f"{results.name}_{data}", run, data, results, flags)

    def _compare(self, name: str, data: str) -> Stage:
        groups = {"cold start": [self._results("cold_start", data)]}  # first: the others are compared with it
        groups |= {label: [self._results(run, data)] for run, label in REFERENCES.items()}
        if data == "test":
            groups[EVIDENCE] = [self._results("teacher", data, "teacher_prompt")]
        logs = {}
        for run, (method, num_seeds) in self.runs.items():
            members = [f"{run}-{seed}" for seed in range(num_seeds)]
            groups[method.label] = [self._results(member, data) for member in members]
            if data == "test" and not method.recipe.startswith("sft/"):  # it has neither rollouts nor a divergence
                logs[method.label] = [self.output_dir / member for member in members]
        flags = ["--reach", "0.25", "0.5"] if logs else []
        title = f"Comparison of methods: {QUESTIONS[data][0]}"
        return self.project.compare(data, title, groups, logs, self.output_dir / name, flags)


def plot_curves(comparison: dict, path: Path) -> None:
    """Reward and divergence by step (band: lowest to highest seed) and accuracy by length (band: 95 % interval)."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    labels = [method.label for method in METHODS.values() if method.label in comparison["groups"]]
    curves = {metric: found["curves"] for metric, found in comparison["training"].items()}
    panels = {
        "mean reward of the rollouts": curves.get("reward", {}),
        "KL to the teacher, nats per token": curves.get("distill/divergence", {}),
        "accuracy, held-out long questions": {
            label: sorted(
                [entry["length"], entry["score"], *entry["interval"]]
                for entry in comparison["scores"]
                if entry["group"] == label and entry["task"] is None and entry["length"] is not None
            )
            for label in labels
        },
    }
    for axes, (title, series) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        draw_lines(axes, {label: series[label] for label in labels if label in series}, labels)
        axes.set(xlabel="step", title=title)
    axes.set(xlabel="tokens of document and question", ylim=(0, 1))
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=100)


@dataclass
class ReproduceArguments:
    """Where to write, and what to compare."""

    size: str = HfArg(default="cpu", help="Two CPU cores, or one GPU of 80 GB.", metadata={"choices": ["cpu", "gpu"]})
    output_dir: Path | None = HfArg(default=None, help="Folder to write to, by default outputs/reproduce-SIZE.")
    seeds: int = HfArg(default=3, help="Seeds of each method.")
    ablation_seeds: int = HfArg(default=1, help="Seeds of each ablation; 0 leaves them out.")

    def __post_init__(self):
        if self.seeds < 1 or self.ablation_seeds < 0:
            raise ValueError(
                f"`seeds` is {self.seeds} and `ablation_seeds` {self.ablation_seeds}. Give at least 1 and at least 0."
            )
        if self.size == "gpu" and not torch.cuda.is_available():
            raise ValueError("`size` is 'gpu', and this machine has no CUDA device. Choose 'cpu'.")


def main() -> None:
    with exit_with_message(ValueError):
        (args,) = parse_arguments((ReproduceArguments,), description=__doc__)
    output_dir = args.output_dir or Path(f"outputs/reproduce-{args.size}")
    bf16 = args.size == "gpu" or has_bf16_instructions()
    stages = Comparison(args.size, output_dir, args.seeds, args.ablation_seeds, bf16).stages()
    print(
        f"{len(stages)} stages in {output_dir}, {os.cpu_count()} CPUs, {'bfloat16' if bf16 else 'float32'}", flush=True
    )
    run_stages(stages, output_dir)
    comparison = json.loads((output_dir / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    plot_curves(comparison, output_dir / "comparison" / "curves.png")
    for name in ("comparison", "short"):
        print(f"{name}: {(output_dir / name / 'comparison.html').resolve()}")


if __name__ == "__main__":
    main()
