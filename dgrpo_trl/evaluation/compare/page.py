"""A comparison of runs as JSON, Markdown and one HTML page; the tables of both are made from the JSON's figures."""

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe

from ...files import write_text
from ..results import MIN_SAMPLES
from .figures import COLORS, NUM_COLORS, interval_figure, line_figure, sign
from .training import TRAINING_METRICS


class TableCell(NamedTuple):
    """A cell of a table that is more than a text."""

    text: str
    note: str = ""  # follows in brackets or in small print, such as an interval
    kind: str = ""  # `"better"` or `"worse"`: emphasized
    share: float | None = None  # in [0, 1]: how strong its background color is


Entry = Mapping[str, Any]
Text = str | TableCell
Rows = list[list[Text]]

_READING = (
    "Scores are in percent; a score over several cells (task and length) is the mean over their samples. Each figure "
    "has its 95 % interval. A difference is taken sample by sample on the same samples. With several seeds of a "
    "training, the interval includes the differences between seeds as well as those between samples, else only those "
    "between samples. ▲ and ▼ mark differences whose interval excludes 0; intervals are not widened for their number, "
    f"so one in twenty may do so by chance. Figures of fewer than {MIN_SAMPLES} samples have no mark and no color."
)


def write_comparison(
    output_dir: str | Path, comparison: Entry, title: str = "Comparison of runs", command: str = ""
) -> Path:
    """Writes `comparison.json`, `comparison.md` and `comparison.html`, which loads nothing and whose path is returned.

    Args:
        output_dir (`str` or `Path`):
            Folder to write to; made if missing.
        comparison (`Mapping`):
            What [`compare_runs`] returned and, as `training`, what [`compare_training`] did; either may be missing.
        title, command (`str`, *optional*):
            Heading; and the command that made it, shown at the end.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(output_dir / "comparison.json", text + "\n")
    write_text(output_dir / "comparison.md", to_markdown(comparison, title, command))
    path = output_dir / "comparison.html"
    write_text(path, to_html(comparison, title, command))
    return path


def to_markdown(comparison: Entry, title: str, command: str = "") -> str:
    """The summary, the notes and all tables as Markdown."""
    parts = [f"# {title}"]
    parts += [_summary(comparison), _READING] if comparison.get("scores") else []
    parts += ["\n".join(f"- {note}" for note in comparison["notes"])] if comparison.get("notes") else []
    for _, caption, header, rows in _tables(comparison):
        parts.append(f"## {caption}\n\n{markdown_table(header, rows)}")
    parts += [f"```bash\n{command}\n```"] if command else []
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str | TableCell]]) -> str:
    """A table in Markdown; bars in its cells are escaped."""
    lines = [[_markdown_cell(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: str | TableCell) -> str:
    if isinstance(cell, str):
        return cell
    text = f"**{cell.text}**" if cell.kind else cell.text
    return f"{text} ({cell.note})" if cell.note else text


def to_html(comparison: Entry, title: str, command: str = "") -> str:
    """The page: summary, notes, tables, figures, heat maps, curves of training, settings of the runs."""
    source = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    template = jinja2.Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    training = comparison.get("training") or {}
    trained = dict.fromkeys(name for found in training.values() for name in found["curves"])
    order = list(dict.fromkeys([*comparison.get("groups", {}), *trained]))
    figures = {
        "training": [
            line_figure(TRAINING_METRICS[m][0], found["curves"], order, "optimizer step", TRAINING_METRICS[m][0])
            for m, found in training.items()
        ]
    }
    if comparison.get("scores"):
        figures["differences"] = _difference_figures(comparison) if comparison["differences"] else []
        figures["lengths"] = _length_figures(comparison)
    return template.render(
        **{"comparison": comparison, "title": title, "command": command, "reading": _READING, "settings": _settings},
        **{"order": order, "trained": trained, "colors": COLORS, "num_colors": NUM_COLORS},
        signs=[sign(i) for i in range(len(order))],
        summary=_summary(comparison) if comparison.get("scores") else "",
        tables={name: {"caption": c, "header": header, "rows": rows} for name, c, header, rows in _tables(comparison)},
        heat_maps=_heat_maps(comparison) if comparison.get("scores") else {},
        figures={name: markupsafe.Markup("".join(found)) for name, found in figures.items()},
    )


def _summary(comparison: Entry) -> str:
    scores = comparison["scores"]
    cells = [score for score in scores if score["task"] is not None and score["length"] is not None]
    num_tasks, num_lengths = len({cell["task"] for cell in cells}), len({cell["length"] for cell in cells})
    num_runs = sum(len(runs) for runs in comparison["groups"].values())
    num_samples = sum({(cell["task"], cell["length"]): cell["num_samples"] for cell in cells}.values())
    overall = [score for score in scores if score["task"] is None and score["length"] is None and score["complete"]]
    parts = [
        f"{_count(len(comparison['groups']), 'model or method', 'models or methods')}, {_count(num_runs, 'run')}, "
        f"{_count(num_tasks, 'task')}, {_count(num_lengths, 'length')}, {num_samples:,} samples per run; baseline "
        f"`{comparison['baseline']}`."
    ]
    if len(overall) > 1:
        best = max(overall, key=lambda score: score["score"])
        parts.append(
            f"Highest score over all: `{best['group']}` with {_percent(best['score'])} % "
            f"({' to '.join(map(_percent, best['interval']))})."
        )
    return " ".join(parts)


def _count(number: int, name: str, names: str = "") -> str:
    return f"{number} {name if number == 1 else names or name + 's'}"


def _percent(share: float, sign: str = "") -> str:
    text = f"{100 * share:{sign}.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0") if float(text) == 0 else text


def _score_cell(score: Entry | None) -> Text:
    if score is None:
        return "–"
    star = "" if score["complete"] else " *"
    return TableCell(_percent(score["score"]) + star, " to ".join(map(_percent, score["interval"])))


def _difference_cell(difference: Entry | None) -> Text:
    if difference is None:
        return "–"
    kind = mark = ""
    if difference["excludes_zero"] and difference["num_samples"] >= MIN_SAMPLES:
        kind, mark = ("better", "▲ ") if difference["difference"] > 0 else ("worse", "▼ ")
    interval = " to ".join(_percent(end, "+") for end in difference["interval"])
    return TableCell(mark + _percent(difference["difference"], "+"), interval, kind)


def _seeds_cell(found: Entry | None, text: str = ".3g") -> Text:
    if found is None:
        return "–"
    interval = found["interval"]
    return TableCell(f"{found['mean']:{text}}", f"{interval[0]:{text}} to {interval[1]:{text}}" if interval else "")


def _table(
    entries: Sequence[Entry], column: str, to_cell: Callable[[Entry | None], Text], names: Sequence[str]
) -> tuple[list[str], Rows]:
    """Groups by all and `column` ("length" or "task"): its header and rows."""
    other = "task" if column == "length" else "length"
    found = {(entry["group"], entry[column]): entry for entry in entries if entry[other] is None}
    keys = list(dict.fromkeys(key for _, key in found if key is not None))
    keys = sorted(keys) if column == "length" else keys
    header = ["", "all", *(f"{key:,}" if column == "length" else key for key in keys)]
    rows: Rows = [[name, *(to_cell(found.get((name, key))) for key in (None, *keys))] for name in names]
    if column == "length" and any("mentioned" in entry for entry in found.values()):
        header.append("all, answer mentioned")
        for name, row in zip(names, rows, strict=True):
            entry = found.get((name, None), {})
            row.append(_percent(entry["mentioned"]) if "mentioned" in entry else "–")
    return header, rows


def _tables(comparison: Entry) -> list[tuple[str, str, list[str], Rows]]:
    """`(id, caption, header, rows)` of each table."""
    tables = []
    if comparison.get("scores"):
        groups = comparison["groups"]
        others = [name for name in groups if name != comparison["baseline"]]
        for column, label in (("length", "length in tokens"), ("task", "task")):
            header, rows = _table(comparison["scores"], column, _score_cell, list(groups))
            tables.append((f"scores-by-{column}", f"Score by {label}, %", header, rows))
        if any(len(runs) > 1 for runs in groups.values()):
            tables.append(("each-run", "Each run: score by length in tokens, %", *_run_table(comparison)))
        for column, label in (("length", "length in tokens"), ("task", "task")):
            if comparison["differences"]:
                header, rows = _table(comparison["differences"], column, _difference_cell, others)
                caption = f"Difference to {comparison['baseline']} by {label}, percentage points"
                tables.append((f"differences-by-{column}", caption, header, rows))
    if comparison.get("harness"):
        caption = "Task and metric; intervals over seeds, or from the standard error of one run"
        tables.append(("harness", caption, *_harness_table(comparison)))
    for metric, found in (comparison.get("training") or {}).items():
        if "reached" in found:
            tables.append((_training_id(metric), f"{TRAINING_METRICS[metric][0]}: by step", *_training_table(found)))
    return tables


def _harness_table(comparison: Entry) -> tuple[list[str], Rows]:
    found: dict[tuple[str, str], dict[str, Text]] = {}
    for entry in comparison["harness"]:
        found.setdefault((entry["task"], entry["metric"]), {})[entry["group"]] = _seeds_cell(entry)
    names = list(comparison["groups"])
    rows: Rows = [
        [f"{task}: {metric.replace(',', ', ')}", *(cells.get(name, "–") for name in names)]
        for (task, metric), cells in found.items()
    ]
    return ["", *names], rows


def _run_table(comparison: Entry) -> tuple[list[str], Rows]:
    by_length = [score for score in comparison["scores"] if score["task"] is None]
    keys = sorted({score["length"] for score in by_length} - {None})
    found = {(score["group"], score["length"]): score["per_run"] for score in by_length}
    rows: Rows = []
    for name, runs in comparison["groups"].items():
        for i, run in enumerate(runs):
            values = [found.get((name, key)) for key in (None, *keys)]
            label = name if len(runs) == 1 else f"{name}: {run['name']}"
            rows.append([label, *(_percent(v[i]) if v else "–" for v in values)])
    return ["", "all", *(f"{key:,}" for key in keys)], rows


def _training_id(metric: str) -> str:
    return f"training-{metric.replace('/', '-').replace('_', '-')}"


def _training_table(found: Entry) -> tuple[list[str], Rows]:
    values = list(dict.fromkeys(entry["value"] for entry in found["reached"]))
    first, last = found["steps"]
    header = ["", *(f"steps to {value:.3g}" for value in values)]
    header += [f"mean height, steps {first:g} to {last:g}"] if "areas" in found else []
    rows: dict[str, list[Text]] = {name: [name] for name in found["curves"]}
    for entry in found["reached"]:
        not_all = f"{entry['num_reached']} of {entry['num_runs']} reach it"
        rows[entry["group"]].append(_seeds_cell(entry["steps"], ".0f") if entry["steps"] else not_all)
    for name, area in found.get("areas", {}).items():
        rows[name].append(_seeds_cell(area))
    return header, list(rows.values())


def _difference_figures(comparison: Entry) -> list[str]:
    order = list(comparison["groups"])
    overall: dict[str, list[float]] = {}
    by_length: dict[str, list[list[float | None]]] = {}
    lengths = sorted({entry["length"] for entry in comparison["differences"]} - {None})
    for entry in comparison["differences"]:
        values = [100 * value for value in (entry["difference"], *entry["interval"])]
        if entry["task"] is None and entry["length"] is None:
            overall[entry["group"]] = values
        elif entry["task"] is None:
            by_length.setdefault(entry["group"], []).append([lengths.index(entry["length"]), *values])
    figures = [interval_figure("Over all cells", overall, order, "percentage points")]
    if len(lengths) > 1:
        ticks = list(enumerate(map(_short, lengths)))
        figures.append(line_figure("By length", by_length, order, "length, tokens", "percentage points", ticks))
    return figures


def _length_figures(comparison: Entry) -> list[str]:
    """One of all tasks and one of each; none where there is one length."""
    order = list(comparison["groups"])
    lengths = sorted({score["length"] for score in comparison["scores"]} - {None})
    ticks = list(enumerate(map(_short, lengths)))
    lines: dict[str | None, dict[str, list[list[float | None]]]] = {}
    for score in comparison["scores"] if len(lengths) > 1 else ():
        if score["length"] is not None:
            values = (100 * value for value in (score["score"], *score["interval"]))
            line = lines.setdefault(score["task"], {}).setdefault(score["group"], [])
            line.append([lengths.index(score["length"]), *values])
    return [
        line_figure(task or "all tasks", series, order, "length, tokens", "score, %", ticks, (0, 100))
        for task, series in lines.items()
    ]


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def _heat_maps(comparison: Entry) -> dict[str, tuple[list[str], Rows]]:
    """Header and rows of the heat map of each group."""
    cells = {
        (score["group"], score["task"], score["length"]): score
        for score in comparison["scores"]
        if score["task"] is not None and score["length"] is not None
    }
    tasks, lengths = list(dict.fromkeys(task for _, task, _ in cells)), sorted({length for *_, length in cells})
    return {
        group: (
            ["", *map(_short, lengths)],
            [[task, *(_heat_cell(cells.get((group, task, length))) for length in lengths)] for task in tasks],
        )
        for group in comparison["groups"]
    }


def _heat_cell(score: Entry | None) -> Text:
    if score is None:
        return "–"
    share = score["score"] if score["num_samples"] >= MIN_SAMPLES else None
    return TableCell(f"{100 * score['score']:.0f}", share=share)


def _settings(run: Entry) -> Rows:
    rows: Rows = [[key, run[key]] for key in ("path", "model", "revision", "fingerprint") if run.get(key)]
    for key in ("settings", "versions"):
        for name, value in run.get(key, {}).items():
            rows.append([f"{key}, {name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)])
    return rows
