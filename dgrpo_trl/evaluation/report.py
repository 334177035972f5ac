"""The report of a run: Markdown with figures beside it, and the same as one HTML file."""

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("The report needs matplotlib. Install it with `pip install dgrpo-trl[demo]`.") from error

from .compare.figures import html_page, html_table, markdown_table
from .compare.training import metric_points, read_log_history, trailing_means
from .scores import mentioned, wilson_interval


__all__ = ["read_log_history", "write_report"]

# Metric of `log_history` -> what the reader sees. A metric that no entry holds has no figure.
CURVES = {
    "loss": "Loss",
    "distill/grpo_loss": "GRPO part of the loss",
    "distill/loss": "Teacher part of the loss",
    "reward": "Mean reward",
    "distill/divergence": "KL(student || teacher), nats per token",
}


def write_report(
    output_dir: str | Path,
    title: str,
    accuracies: Mapping[str, dict],
    log_histories: Mapping[str, Sequence[dict]],
    settings: Mapping[str, object] | None = None,
    introduction: str = "",
) -> Path:
    """Write `report.md`, `report.html` and the folder `figures`.

    Args:
        output_dir (`str` or `Path`):
            Folder to write to; made if missing.
        title (`str`):
            Heading of the report.
        accuracies (`Mapping[str, dict]`):
            From the name of a model to the [`summarize_accuracy`] of its `results.json`, in the order to show.
        log_histories (`Mapping[str, Sequence[dict]]`):
            From the name of a training stage to the `log_history` of its `trainer_state.json`.
        settings (`Mapping[str, object]`, *optional*):
            What was run: names and values, shown as a table.
        introduction (`str`, *optional*):
            Text under the title.

    Returns:
        `Path`: path of `report.html`.
    """
    output_dir = Path(output_dir)
    figures_dir = output_dir / "figures"
    figures_dir.mkdir(parents=True, exist_ok=True)

    parts = [("heading", title), ("text", introduction)]
    if accuracies:
        parts.append(("heading", "Accuracy"))
        parts.append(("table", _accuracy_table(accuracies, "by_length", "prompt tokens")))
        parts.append(("table", _accuracy_table(accuracies, "by_task", "task")))
        parts.append(
            (
                "text",
                "Share of held-out questions answered with exactly the answer, with its 95 % Wilson interval. "
                "'Mentioned' counts every completion that holds the answer, whatever else it says: the difference "
                "is a matter of form.",
            )
        )
        path = _plot_accuracy(figures_dir / "accuracy_by_length.png", accuracies)
        parts.append(("figure", (path, "Exact answers by prompt length; bars are 95 % intervals.")))
    for stage, log_history in log_histories.items():
        curves = {metric: points for metric in CURVES if (points := metric_points(log_history, metric))}
        if curves:
            parts.append(("heading", stage))
        for metric, points in curves.items():
            name = f"{stage}_{metric}".lower().replace("/", "_").replace(" ", "_")
            path = _plot_curve(figures_dir / f"{name}.png", points, CURVES[metric])
            parts.append(("figure", (path, f"{CURVES[metric]} (`{metric}`) by optimizer step.")))
    if settings:
        parts.append(("heading", "Settings"))
        parts.append(("table", (["name", "value"], [[name, str(value)] for name, value in settings.items()])))

    parts = [(kind, content) for kind, content in parts if content]
    (output_dir / "report.md").write_text(_to_markdown(parts, output_dir), encoding="utf-8")
    html_path = output_dir / "report.html"
    html_path.write_text(_to_html(title, parts), encoding="utf-8")
    return html_path


def _percent(share: dict) -> str:
    low, high = share["interval"]
    return f"{100 * share['accuracy']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def _accuracy_table(accuracies: Mapping[str, dict], column: str, group_name: str) -> tuple[list, list]:
    groups = list(next(iter(accuracies.values()))[column])
    header = ["model", *(f"{group_name} {group}" for group in groups), "all", "all, mentioned"]
    rows = []
    for name, accuracy in accuracies.items():
        cells = [_percent(accuracy[column][group]["exact"]) for group in groups]
        overall = accuracy["overall"]
        rows.append([name, *cells, _percent(overall["exact"]), _percent(overall["mentioned"])])
    counts = next(iter(accuracies.values()))
    num_rows = counts["overall"]["num_rows"]
    rows.append(["questions", *(str(counts[column][group]["num_rows"]) for group in groups), num_rows, num_rows])
    return header, [[str(cell) for cell in row] for row in rows]


def _plot_accuracy(path: Path, accuracies: Mapping[str, dict]) -> Path:
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    groups = list(next(iter(accuracies.values()))["by_length"])
    width = 0.8 / len(accuracies)
    for i, (name, accuracy) in enumerate(accuracies.items()):
        shares = [accuracy["by_length"][group]["exact"] for group in groups]
        heights = [share["accuracy"] for share in shares]
        below = [height - share["interval"][0] for height, share in zip(heights, shares, strict=True)]
        above = [share["interval"][1] - height for height, share in zip(heights, shares, strict=True)]
        positions = [group + (i - (len(accuracies) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(positions, heights, width, yerr=(below, above), capsize=3, label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.set(xlabel="prompt length bin (tokens)", ylabel="exact answers", ylim=(0, 1))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)  # above: inside, it hides the bars of the best
    return _save(figure, path)


def _plot_curve(path: Path, points: Sequence[tuple[int, float]], label: str) -> Path:
    steps, values = zip(*points, strict=True)
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.35, label="logged")
    window = max(1, len(values) // 10)
    axes.plot(steps, trailing_means(values, window), color="tab:blue", label=f"mean of last {window}")
    axes.set(xlabel="step", ylabel=label)
    axes.legend()
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


def _to_markdown(parts: Sequence[tuple], output_dir: Path) -> str:
    lines = []
    for i, (kind, content) in enumerate(parts):
        if kind == "heading":
            lines.append(f"{'#' if i == 0 else '##'} {content}")
        elif kind == "text":
            lines.append(content)
        elif kind == "table":
            lines.append(markdown_table(*content))
        else:
            path, caption = content
            lines.append(f"![{caption}]({path.relative_to(output_dir).as_posix()})\n\n{caption}")
    return "\n\n".join(lines) + "\n"


def _to_html(title: str, parts: Sequence[tuple]) -> str:
    lines = []
    for i, (kind, content) in enumerate(parts):
        if kind == "heading":
            level = 1 if i == 0 else 2
            lines.append(f"<h{level}>{html.escape(content)}</h{level}>")
        elif kind == "text":
            lines.append(f"<p>{html.escape(content)}</p>")
        elif kind == "table":
            lines.append(html_table(*content))
        else:
            path, caption = content
            image = base64.b64encode(path.read_bytes()).decode()
            caption = html.escape(caption)
            lines.append(
                f'<figure><img src="data:image/png;base64,{image}" alt="{caption}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
    return html_page(title, lines)


def summarize_accuracy(results: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of the answers to questions, in all, by length and by task.

    Args:
        results (`dict[str, Any]`):
            A run's `results.json`. Its cells with the metric `exact_match` count.

    Returns:
        `dict`: `overall`, `by_length` and `by_task` (both from group to the same), each with `num_rows`, and for
        `exact` and `mentioned` the `accuracy` and the 95 % Wilson `interval`.

    Raises:
        ValueError: if there are no questions.
    """
    cells = [cell for cell in results["cells"] if cell["metric"] == "exact_match"]
    if not cells:
        raise ValueError(f"The run {results['name']!r} has no questions. Accuracy is of them. Set `questions`.")

    def grouped(column: str) -> dict[str, dict]:
        groups: dict = {}
        for cell in cells:
            groups.setdefault(cell[column], []).extend(cell["samples"])
        return {str(group): _summarize(groups[group]) for group in sorted(groups)}

    overall = _summarize([sample for cell in cells for sample in cell["samples"]])
    return {"overall": overall, "by_length": grouped("length"), "by_task": grouped("task")}


def _summarize(samples: Sequence[dict]) -> dict:
    def share(is_correct: Callable[[dict], bool]) -> dict:
        num_correct = sum(map(is_correct, samples))
        return {"accuracy": num_correct / len(samples), "interval": wilson_interval(num_correct, len(samples))}

    def mentions(sample: dict) -> bool:
        return mentioned(sample["completion"], sample["references"]) == 1

    exact = share(lambda sample: sample["score"] == 1)
    return {"num_rows": len(samples), "exact": exact, "mentioned": share(mentions)}
