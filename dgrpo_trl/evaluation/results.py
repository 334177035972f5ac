"""`results.json` of a run: how a cell is scored, and the table and the heat map made of it."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .samples import Cell, Sample
from .scores import METRICS, QUESTION_METRICS, mentioned, score_interval


logger = logging.getLogger(__name__)

FORMAT = 1


def score_cell(cell: Cell, samples: Sequence[Sample], completions: Sequence[str], seconds: float) -> dict[str, Any]:
    """A cell of `results.json`: mean score, its 95 % interval, and every sample with its score."""
    if len(samples) != len(completions):
        raise ValueError(f"Needs one completion for each sample, got {len(completions)} for {len(samples)} samples.")
    metric = METRICS[cell.metric]
    scores = [metric(text, sample.references) for text, sample in zip(completions, samples, strict=True)]
    result = {
        "task": cell.task,
        "length": cell.length,
        "metric": cell.metric,
        "num_samples": len(samples),
        "score": math.fsum(scores) / len(scores),
        "interval": list(score_interval(scores)),
    }
    if cell.metric in QUESTION_METRICS:
        said = [mentioned(text, sample.references) for text, sample in zip(completions, samples, strict=True)]
        result["mentioned"] = sum(said) / len(said)
    result["seconds"] = seconds
    result["samples"] = [
        {
            "id": sample.id,
            "score": score,
            "completion": text,
            "references": list(sample.references),
            "num_tokens": sample.num_tokens,
        }
        for sample, text, score in zip(samples, completions, scores, strict=True)
    ]
    return result


def results_table(results: dict[str, Any]) -> str:
    """The Markdown of a run: a row a task and a column a length, in per cent with 95 % intervals."""
    cells = {(cell["task"], cell["length"]): cell for cell in results["cells"]}
    lengths = sorted({length for _, length in cells})
    tasks = list(dict.fromkeys(task for task, _ in cells))

    def row(name: str, values: Sequence[str]) -> str:
        return f"| {' | '.join([name.replace('|', chr(92) + '|'), *values])} |\n"

    text = f"# {results['name']}\n\nModel `{results['model']}`, fingerprint `{results['fingerprint']}`.\n"
    if cells:
        text += "\nScores in %, with 95 % intervals, by length in tokens.\n\n"
        text += row("task", [f"{length:,}" for length in lengths]) + row("---", ["---"] * len(lengths))
        for task in tasks:
            text += row(task, [_percent(cells.get((task, length))) for length in lengths])
        means = [_mean([cells.get((task, length)) for task in tasks]) for length in lengths]
        if len(tasks) > 1 and any(means):
            text += row("mean", means)
    if results["harness"]:
        text += "\nBy lm-evaluation-harness:\n\n" + row("task", ["metric", "value"]) + row("---", ["---", "---"])
        for task, metrics in results["harness"].items():
            for metric, value in metrics.items():
                text += row(task, [metric, f"{value:.4g}"])
    return text


def _percent(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    low, high = cell["interval"]
    return f"{100 * cell['score']:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def _mean(cells: Sequence[dict[str, Any] | None]) -> str:
    """Of all tasks; a length at which one is missing has none, as it would be of other tasks."""
    if any(cell is None for cell in cells):
        return ""
    return f"{100 * math.fsum(cell['score'] for cell in cells) / len(cells):.1f}"


def plot_heatmap(results: dict[str, Any], path: Path) -> None:
    """Draws task by length as a PNG; without matplotlib, logs that it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No heat map is drawn: matplotlib is missing. Install it with `pip install dgrpo-trl[demo]`.")
        return
    cells = {(cell["task"], cell["length"]): cell["score"] for cell in results["cells"]}
    tasks = list(dict.fromkeys(task for task, _ in cells))
    lengths = sorted({length for _, length in cells})
    values = [[100 * cells.get((task, length), math.nan) for length in lengths] for task in tasks]
    figure = Figure(figsize=(2.5 + 0.8 * len(lengths), 1.6 + 0.35 * len(tasks)))
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            if not math.isnan(value):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="length (tokens)", title=results["name"])
    figure.colorbar(image, label="score (%)")
    figure.tight_layout()
    unfinished = path.with_suffix(".tmp.png")
    figure.savefig(unfinished, dpi=110)
    os.replace(unfinished, path)
