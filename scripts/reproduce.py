"""The paper's comparison of methods on a small real model: equal steps, equal rollouts, equal questions.

    python scripts/reproduce.py --size cpu        # or `make reproduce`; `--size gpu` for one GPU of 80 GB

From one cold-started SmolLM2-135M-Instruct: SFT, GRPO, on-policy distillation (OPD), dGRPO, and dGRPO whose teacher
reads the evidence alone; then the paper's ablations, the coefficient and the cold start. Every
number stands in a recipe, `recipes/smollm2-135m/*/reproduce*_<size>.yaml`. Every stage is a command of its own, which
is skipped when it is complete, so that an interrupted run goes on.

Writes `comparison/` (long questions, curves of training) and `short/` (what the model knew before) to
`outputs/reproduce-<size>`: each a table, JSON and one page, and `comparison/curves.png`.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from stages import SCRIPTS, Stage, has_bf16_instructions, peak_gib, run_stages

from dgrpo_trl import longblocks


RECIPES = SCRIPTS.parent / "recipes"
SMOLLM2 = RECIPES / "smollm2-135m"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Method:
    """How a run is trained: a recipe, where it starts, who teaches it, and what differs from the recipe."""

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
TITLES = ("mean reward of the rollouts", "KL to the teacher, nats per token", "accuracy, held-out long questions")
# The short questions ask what the model knows, not in which form it says so
METRICS = {"test": "exact_match", "short": "mentioned"}
EVIDENCE = "teacher, reads the evidence"


class Comparison:
    """The commands of a comparison, in a folder.

    Args:
        size (`str`):
            `"cpu"` or `"gpu"`.
        output_dir (`Path`):
            Folder of everything.
        seeds (`int`):
            Seeds of each method.
        ablation_seeds (`int`):
            Seeds of each ablation; 0 leaves them out.
        bf16 (`bool`):
            Whether to compute in bfloat16.
    """

    def __init__(self, size: str, output_dir: Path, seeds: int, ablation_seeds: int, bf16: bool):
        self.size = size
        self.output_dir = output_dir
        self.bf16 = bf16
        self.runs = {name: (method, seeds) for name, method in METHODS.items()}
        self.runs |= {name: (method, ablation_seeds) for name, method in ABLATIONS.items() if ablation_seeds > 0}

    def stages(self) -> list[Stage]:
        return [
            self._prepare(),
            self._train("cold_start", Method("cold start", "sft/reproduce_cold_start", start="model"), 0),
            self._train("teacher", Method("teacher", "sft/reproduce_teacher"), 0),
            *(self._evaluate(name, data) for name in REFERENCES for data in ("test", "short")),
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
        return [self._train(run, method, seed), self._evaluate(run, "test"), self._evaluate(run, "short")]

    def _prepare(self) -> Stage:
        out, script = self.output_dir, SCRIPTS / "prepare_reproduction.py"
        data = [out / "data" / f"{name}.jsonl" for name in ("cold_start", "teacher", "train", "test", "short")]
        return Stage(
            name="prepare",
            purpose="fetch and convert the model, write the questions",
            command=[sys.executable, str(script), "--size", self.size, "--output_dir", str(out)],
            inputs=[
                script,
                SCRIPTS / "prepare_demo.py",
                *sorted((RECIPES / "longblocks").glob(f"reproduce_{self.size}_*.yaml")),
                *sorted(Path(longblocks.__file__).parent.rglob("*.py")),
            ],
            outputs=[out / "model" / WEIGHTS, out / "model" / "complete.json", *data],
        )

    def _train(self, run: str, method: Method, seed: int) -> Stage:
        out, recipe = self.output_dir, SMOLLM2 / f"{method.recipe}_{self.size}.yaml"
        is_sft = method.recipe.startswith("sft")
        script = SCRIPTS / ("train_sft.py" if is_sft else "train_dgrpo.py")
        rows = out / "data" / f"{run if run in ('cold_start', 'teacher') else 'train'}.jsonl"
        accelerate = "cpu" if self.size == "cpu" else "single_gpu"
        models = [method.start, *([method.teacher] if method.teacher else [])]
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(RECIPES / "accelerate_configs" / f"{accelerate}.yaml")),
            *(str(script), "--config", str(recipe), "--output_dir", str(out / run)),
            *("--model_name_or_path", str(out / method.start), "--dataset_name", str(rows)),
            *(["--teacher_model_name_or_path", str(out / method.teacher)] if method.teacher else []),
            *method.flags,
            *("--seed", str(seed), "--bf16", str(self.bf16).lower()),
        ]
        return Stage(
            name=f"train_{run}",
            purpose=f"{method.label}, seed {seed}",
            command=command,
            inputs=[script, recipe, rows, *(out / model / WEIGHTS for model in models)],
            outputs=[out / run / WEIGHTS, out / run / "trainer_state.json"],
        )

    def _results(self, run: str, data: str, column: str = "prompt") -> Path:
        return self.output_dir / "results" / data / (run if column == "prompt" else f"{run}_{column}")

    def _evaluate(self, run: str, data: str, column: str = "prompt") -> Stage:
        out, script = self.output_dir, SCRIPTS / "evaluate.py"
        questions, results = out / "data" / f"{data}.jsonl", self._results(run, data, column)
        return Stage(
            name=f"evaluate_{results.name}_{data}",
            purpose=f"{run}: answers to the {data} questions",
            command=[
                *(sys.executable, str(script), "--model_name_or_path", str(out / run)),
                *("--questions", str(questions), "--prompt_column", column, "--output_dir", str(results)),
                *(
                    "--questions_metric",
                    METRICS[data],
                    "--num_samples",
                    "1000",
                    "--max_new_tokens",
                    "16",
                    "--overwrite",
                    "true",
                ),
                *("--dtype", "bfloat16" if self.bf16 else "float32"),
            ],
            inputs=[script, questions, out / run / WEIGHTS],
            outputs=[results / "results.json"],
        )

    def _compare(self, name: str, data: str) -> Stage:
        out, script = self.output_dir, SCRIPTS / "compare.py"
        groups = {"cold start": [self._results("cold_start", data)]}  # first: the others are compared with it
        groups |= {label: [self._results(run, data)] for run, label in REFERENCES.items()}
        if data == "test":
            groups[EVIDENCE] = [self._results("teacher", data, "teacher_prompt")]
        logs = {}
        for run, (method, num_seeds) in self.runs.items():
            members = [f"{run}-{seed}" for seed in range(num_seeds)]
            groups[method.label] = [self._results(member, data) for member in members]
            if not method.recipe.startswith("sft/"):  # it has neither rollouts nor a divergence
                logs[method.label] = [out / member for member in members]
        flags = ["--groups", *(f"{label}={_joined(paths)}" for label, paths in groups.items())]
        inputs = [path / "results.json" for paths in groups.values() for path in paths]
        if data == "test":
            flags += ["--logs", *(f"{label}={_joined(paths)}" for label, paths in logs.items())]
            flags += ["--reach", "0.25", "0.5"]
            inputs += [path / "trainer_state.json" for paths in logs.values() for path in paths]
        title = {"test": "Comparison of methods: long questions", "short": "Comparison of methods: short questions"}
        return Stage(
            name=f"compare_{data}",
            purpose=f"tables and page of the {data} questions",
            command=[
                *(sys.executable, str(script), "--title", title[data], "--output_dir", str(out / name)),
                *flags,
            ],
            inputs=[script, *inputs],
            outputs=[out / name / "comparison.json", out / name / "comparison.html"],
        )


def plot_curves(comparison: dict, path: Path) -> None:
    """Reward and divergence by step (band: lowest to highest seed) and accuracy by length (band: 95 % interval)."""
    figure = Figure(figsize=(13, 4.2))
    panels = figure.subplots(1, 3)
    labels = [method.label for method in METHODS.values() if method.label in comparison["groups"]]
    colors = {label: f"C{i}" for i, label in enumerate(labels)}

    def draw(axes, label: str, points: list[tuple[float, float, float, float]]) -> None:
        xs, means, lows, highs = zip(*points, strict=True)
        axes.plot(xs, means, color=colors[label], marker=".", label=label)
        axes.fill_between(xs, lows, highs, color=colors[label], alpha=0.12, linewidth=0)

    for axes, metric, title in zip(panels, ("reward", "distill/divergence"), TITLES, strict=False):
        for label, points in comparison["training"].get(metric, {"curves": {}})["curves"].items():
            if label in colors:
                draw(axes, label, points)
        axes.set(xlabel="step", title=title)
    for label in labels:
        scores = [
            (entry["length"], entry["score"], *entry["interval"])
            for entry in comparison["scores"]
            if entry["group"] == label and entry["task"] is None and entry["length"] is not None
        ]
        draw(panels[2], label, sorted(scores))
    panels[2].set(xlabel="tokens of document and question", title=TITLES[2], ylim=(0, 1))
    panels[2].legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def _joined(paths: list[Path]) -> str:
    return ",".join(map(str, paths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["cpu", "gpu"], default="cpu", help="two cores, or one GPU of 80 GB")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: outputs/reproduce-SIZE")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each method")
    parser.add_argument("--ablation_seeds", type=int, default=1, help="seeds of each ablation; 0 leaves them out")
    args = parser.parse_args()
    if args.seeds < 1 or args.ablation_seeds < 0:
        parser.error("`--seeds` must be at least 1 and `--ablation_seeds` at least 0.")
    if args.size == "gpu" and not torch.cuda.is_available():
        parser.error("`--size gpu` needs a CUDA device, and there is none. Take `--size cpu`.")

    output_dir = args.output_dir or Path(f"outputs/reproduce-{args.size}")
    bf16 = args.size == "gpu" or has_bf16_instructions()
    stages = Comparison(args.size, output_dir, args.seeds, args.ablation_seeds, bf16).stages()
    print(
        f"{len(stages)} stages in {output_dir}, {os.cpu_count()} CPUs, {'bfloat16' if bf16 else 'float32'}", flush=True
    )
    seconds = run_stages(stages, output_dir)
    for kind in ("prepare", "train", "evaluate", "compare"):
        total = sum(value for name, value in seconds.items() if name.startswith(kind))
        print(f"{kind}: {total / 60:.1f} minutes")
    print(f"all: {sum(seconds.values()) / 60:.1f} minutes; largest process of this run {peak_gib():.1f} GiB")
    comparison = json.loads((output_dir / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    plot_curves(comparison, output_dir / "comparison" / "curves.png")
    for name in ("comparison", "short"):
        print(f"{name}: {(output_dir / name / 'comparison.html').resolve()}")


if __name__ == "__main__":
    main()
