"""`results.json` of a run: written cell by cell, read by a comparison; and the table and the heat map made of it."""

import io
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_bytes
from .samples import Cell, Sample
from .scores import METRICS, QUESTION_METRICS, mentioned, score_interval


logger = logging.getLogger(__name__)

FORMAT = 1
# With fewer, a score or a difference is shown without a color or a mark that says whether it is good
MIN_SAMPLES = 20


def score_cell(cell: Cell, samples: Sequence[Sample], completions: Sequence[str], seconds: float) -> dict[str, Any]:
    """A cell of `results.json`: mean score, its 95 % interval, and every sample with its score."""
    if len(samples) != len(completions):
        raise ValueError(f"Needs one completion per sample, got {len(completions)} for {len(samples)} samples.")
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
        found = [mentioned(text, sample.references) for text, sample in zip(completions, samples, strict=True)]
        result["mentioned"] = sum(found) / len(found)
    result["seconds"] = seconds
    result["samples"] = [
        {
            "id": sample.id,
            "score": score,
            "completion": text,
            "references": list(sample.references),
            "num_tokens": sample.num_tokens,
            **({} if sample.document is None else {"document": sample.document}),
        }
        for sample, text, score in zip(samples, completions, scores, strict=True)
    ]
    return result


@dataclass(frozen=True)
class Run:
    """An evaluated model, as `results.json` has it."""

    name: str
    path: Path  # of the file
    results: dict[str, Any]  # its content
    cells: dict[tuple[str, int], dict[str, dict[str, Any]]]  # from task and length to samples by `id`


def read_run(path: str | Path) -> Run:
    """Reads a run: a folder with `results.json`, or the file.

    Raises:
        FileNotFoundError: If there is no such file: an evaluation writes it at its end.
        ValueError: If the file has another format, or the same id twice in a cell.
    """
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. An evaluation writes it at its end. Give the folder of a finished one, or run the "
            "same command again: it resumes."
        )
    results = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else None
        raise ValueError(
            f"{file} has format {found!r}, but format {FORMAT} is expected. Evaluate again with scripts/evaluate.py."
        )
    cells = {}
    for cell in results["cells"]:
        samples = {sample["id"]: sample for sample in cell["samples"]}
        if len(samples) != len(cell["samples"]):
            raise ValueError(
                f"{file} has an id twice in {cell['task']} at {cell['length']:,} tokens. Samples are paired by id. "
                "Give each its own."
            )
        if samples:
            cells[cell["task"], cell["length"]] = samples
    return Run(results["name"], file, results, cells)


def mean_score(cells: Iterable[Mapping[str, Any]]) -> float:
    """The score over several cells: the mean over their samples. A cell of five questions counts as five."""
    scores = [sample["score"] for cell in cells for sample in cell["samples"]]
    return math.fsum(scores) / len(scores)


def results_table(results: dict[str, Any]) -> str:
    """The Markdown of a run: one row per task and one column per length, in percent with 95 % intervals."""
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
        by_length = [[cells[task, length] for task in tasks if (task, length) in cells] for length in lengths]
        # None where a task has no cell: it would be over other tasks
        means = [f"{100 * mean_score(found):.1f}" if len(found) == len(tasks) else "" for found in by_length]
        if len(tasks) > 1 and any(means):
            text += row("mean", means)
    if results["harness"]:
        text += "\nBy lm-evaluation-harness:\n\n" + row("task", ["metric", "value"]) + row("---", ["---", "---"])
        for task, metrics in results["harness"].items():
            for metric, value in metrics.items():
                text += row(task, [metric, f"{value:.4g}"])
    return text


def _percent(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    low, high = cell["interval"]
    return f"{100 * cell['score']:.0f} ({100 * low:.0f}-{100 * high:.0f})"


def plot_heatmap(results: dict[str, Any], path: Path) -> None:
    """Draws task by length as a PNG; without matplotlib, logs that it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("No heat map is drawn: matplotlib is missing. Install it with `pip install dgrpo-trl[demo]`.")
        return
    cells = {(cell["task"], cell["length"]): cell for cell in results["cells"]}
    tasks = list(dict.fromkeys(task for task, _ in cells))
    lengths = sorted({length for _, length in cells})
    colors = [[math.nan] * len(lengths) for _ in tasks]
    figure = Figure(figsize=(2.5 + 0.8 * len(lengths), 1.6 + 0.35 * len(tasks)))
    axes = figure.subplots()
    for (task, length), cell in cells.items():
        row, column = tasks.index(task), lengths.index(length)
        if cell["num_samples"] >= MIN_SAMPLES:
            colors[row][column] = 100 * cell["score"]
        axes.text(column, row, f"{100 * cell['score']:.0f}", ha="center", va="center")
    image = axes.imshow(colors, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="length (tokens)", title=results["name"])
    figure.colorbar(image, label=f"score (%); no color below {MIN_SAMPLES} samples")
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    write_bytes(path, png.getvalue())
