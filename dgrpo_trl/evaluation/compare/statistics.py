"""Scores of groups of runs and their differences to a baseline, with 95 % intervals over samples and seeds.

All runs answer the same samples, so that a difference is taken sample by sample, in each cell (task and length). A
score over several cells is the mean over their samples.
"""

import json
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...extras import import_extra
from ..results import MIN_SAMPLES, Run
from ..scores import Z95, wilson_interval


stdtrit = import_extra("scipy.special", "The comparison", "demo").stdtrit

FORMAT = 1
CONFIDENCE = 0.95

Array = NDArray[np.float64]
Key = tuple[str, int]  # a cell: task and length
Groups = Mapping[str, Sequence[Run]]


def compare_runs(
    groups: Groups, baseline: str | None = None, num_resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Scores of groups of runs and their differences to a baseline, with 95 % intervals.

    A group is one method: one run, or one for each seed of its training. Of single runs an interval says how much
    other samples might change the figure: percentiles of a bootstrap that resamples each cell, in the same way for all
    runs and whatever other cells there are. With several seeds it says in addition how much other seeds might:
    estimate +- t standard errors, where the variance is that of the bootstrap plus, for each group, the variance
    between its seeds divided by their number, and t has the degrees of freedom of Welch and Satterthwaite. Seeds of
    two groups are not paired. In simulations with three seeds each these intervals contained the true difference in 96
    to 99 % of the cases, and percentiles of a bootstrap over seeds and samples in 80 to 99 %: of three seeds it sees
    2/3 of the variance.

    Args:
        groups (`Mapping[str, Sequence[Run]]`):
            From the name of a group to its runs, in the order to show.
        baseline (`str`, *optional*):
            Name of the group that the others are compared with; the first by default.
        num_resamples, seed (`int`, *optional*, default to `10_000` and `0`):
            Of the bootstrap.

    Returns:
        `dict`, as `comparison.json` has it. `scores` and `differences` are lists with `group`, `task` and `length`
        (`None` for all), `num_cells`, `num_samples`, `score` or `difference`, `interval`, and `per_run`: a group's
        scores seed by seed, on the cells compared. Scores are shares in [0, 1]; `mentioned` is the share of questions
        whose answer is mentioned. In `scores` each group has the cells that all its runs have, and `complete` says
        whether no other group has more of them; in `differences` both have the cells that both have.

    Raises:
        ValueError: If `baseline` is unknown, a group has no runs or a run no cells, two groups have no cell in common,
            or the samples of a cell differ.
    """
    baseline = _checked_baseline(groups, baseline)
    runs = [run for members in groups.values() for run in members]
    notes = _check_samples(runs) + _notes_on_settings(runs)
    table = _Table(groups, num_resamples, seed)
    scores = [entry for name in groups for entry in _scores(table, name)]
    others = [name for name in groups if name != baseline] if table.cells else []  # else only harness figures
    return {
        **{"format": FORMAT, "baseline": baseline, "num_resamples": num_resamples, "seed": seed},
        "groups": {name: [_description(run) for run in members] for name, members in groups.items()},
        "notes": notes + _notes_on_cells(table) + _notes_on_numbers(groups, table),
        "scores": scores,
        "differences": [entry for name in others for entry in _differences(table, name, baseline)],
        "harness": _harness(groups),
    }


def _checked_baseline(groups: Groups, baseline: str | None) -> str:
    for name, members in groups.items():
        for run in members:
            if not run.cells and not run.results.get("harness"):
                raise ValueError(f"{run.path} has no samples. There is nothing to compare. Evaluate it on some tasks.")
        if not members:
            raise ValueError(f"Group {name!r} has no runs. Give it at least one.")
    if not groups:
        raise ValueError("There are no runs. Give at least one.")
    baseline = next(iter(groups)) if baseline is None else baseline
    if baseline not in groups:
        raise ValueError(f"Baseline {baseline!r} is none of {', '.join(map(repr, groups))}. Name one of them.")
    return baseline


# --- Scores and differences


@dataclass(frozen=True)
class _CellScores:
    """One cell of all runs; NaN for a run that lacks it."""

    num_samples: int
    exact: Array  # (runs,), mean over the samples
    resampled: Array  # (num_resamples, runs)


class _Table:
    """The cells of all runs."""

    def __init__(self, groups: Groups, num_resamples: int, seed: int) -> None:
        self._groups = groups
        runs = [run for members in groups.values() for run in members]
        tasks = list(dict.fromkeys(task for run in runs for task, _ in run.cells))  # as the first run has them
        keys = sorted({key for run in runs for key in run.cells}, key=lambda key: (tasks.index(key[0]), key[1]))
        self.cells = {key: _resample(key, runs, num_resamples, seed) for key in keys}
        self.held = {name: [key for key in keys if all(key in run.cells for run in groups[name])] for name in groups}
        self._columns: dict[str, list[int]] = {}
        for name, members in groups.items():
            start = sum(map(len, self._columns.values()))
            self._columns[name] = list(range(start, start + len(members)))

    def num_samples(self, keys: Sequence[Key]) -> int:
        return sum(self.cells[key].num_samples for key in keys)

    def mean(self, name: str, keys: Sequence[Key]) -> tuple[Array, Array]:
        """Means over samples: exact, `(runs of the group,)`, and resampled, `(num_resamples,)`, over its runs too."""
        columns, weights = self._columns[name], [self.cells[key].num_samples for key in keys]
        per_run = np.average([self.cells[key].exact[columns] for key in keys], axis=0, weights=weights)
        resampled = [self.cells[key].resampled[:, columns].mean(axis=1) for key in keys]
        return per_run, np.average(resampled, axis=0, weights=weights)

    def mentioned(self, name: str, keys: Sequence[Key]) -> float | None:
        """Share of the questions whose answer is mentioned; `None` if a cell has another kind of score."""
        cells = [cell for run in self._groups[name] for cell in run.results["cells"]]
        found = [cell for cell in cells if (cell["task"], cell["length"]) in keys and "mentioned" in cell]
        if len(found) < len(keys) * len(self._groups[name]):
            return None
        return float(np.average([c["mentioned"] for c in found], weights=[len(c["samples"]) for c in found]))


def _resample(key: Key, runs: Sequence[Run], num_resamples: int, seed: int) -> _CellScores:
    ids = sorted(next(run.cells[key] for run in runs if key in run.cells))
    missing = [float("nan")] * len(ids)
    rows = [[run.cells[key][i]["score"] for i in ids] if key in run.cells else missing for run in runs]
    scores = np.array(rows, dtype=np.float64)  # (runs, samples)
    generator = np.random.default_rng([seed, zlib.crc32(f"{key[0]} {key[1]}".encode())])
    resampled = []
    for first in range(0, num_resamples, 1000):  # (1000, samples) at a time
        shape = min(1000, num_resamples - first), len(ids)
        drawn = generator.integers(len(ids), size=shape) + len(ids) * np.arange(shape[0])[:, None]
        counts = np.bincount(drawn.ravel(), minlength=shape[0] * shape[1]).reshape(shape)  # how often each sample
        resampled.append(counts @ scores.T / len(ids))
    return _CellScores(len(ids), scores.mean(axis=1), np.concatenate(resampled))


def _selections(keys: Sequence[Key]) -> Iterator[tuple[str | None, int | None, list[Key]]]:
    """`(task, length, cells)`: all, each length, each task."""
    if keys:
        yield None, None, list(keys)
    for length in sorted({length for _, length in keys}):
        yield None, length, [key for key in keys if key[1] == length]
    for task in dict.fromkeys(task for task, _ in keys):
        yield task, None, [key for key in keys if key[0] == task]


def _scores(table: _Table, name: str) -> Iterator[dict[str, Any]]:
    held = table.held[name]
    for task, length, keys in [*_selections(held), *((*key, [key]) for key in held)]:
        per_run, over_samples = table.mean(name, keys)
        score, num_samples = float(per_run.mean()), table.num_samples(keys)
        interval = _interval(score, over_samples, [per_run])
        if score in (0.0, 1.0):  # a bootstrap of equal scores has no width
            interval = wilson_interval(num_samples if score else 0, num_samples)
        wanted = [key for key in table.cells if task in (None, key[0]) and length in (None, key[1])]
        mentioned = table.mentioned(name, keys)
        yield {
            **{"group": name, "task": task, "length": length, "num_cells": len(keys)},
            **{"num_samples": num_samples, "complete": len(keys) == len(wanted)},
            "score": round_figure(score),
            "interval": [round_figure(min(1.0, max(0.0, end))) for end in interval],
            "per_run": [round_figure(value) for value in per_run],
            **({} if mentioned is None else {"mentioned": round_figure(mentioned)}),
        }


def _differences(table: _Table, name: str, baseline: str) -> Iterator[dict[str, Any]]:
    common = [key for key in table.held[name] if key in table.held[baseline]]
    if not common:
        raise ValueError(
            f"{name!r} and {baseline!r} have no cell in common. A difference is taken in the same task at the same "
            "length. Evaluate both on the same tasks and lengths."
        )
    for task, length, keys in _selections(common):
        (ours, our_samples), (theirs, their_samples) = table.mean(name, keys), table.mean(baseline, keys)
        difference = float(ours.mean() - theirs.mean())
        low, high = (round_figure(end) for end in _interval(difference, our_samples - their_samples, [ours, theirs]))
        yield {
            **{"group": name, "task": task, "length": length, "num_cells": len(keys)},
            "num_samples": table.num_samples(keys),
            "difference": round_figure(difference),
            "interval": [low, high],
            "excludes_zero": low > 0 or high < 0,
            "per_run": [round_figure(value) for value in ours],
            "baseline_per_run": [round_figure(value) for value in theirs],
        }


def _interval(estimate: float, resampled: Array, seeds: Sequence[Array]) -> tuple[float, float]:
    """95 % interval of a mean, or of a difference of means.

    `resampled` is the figure in each resample of the samples, with the same seeds, of shape `(num_resamples,)`;
    `seeds` has the mean of each seed, for each group in the figure.
    """
    seeds = [values for values in seeds if len(values) > 1]
    if not seeds:
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return float(low), float(high)
    between = [float(values.var(ddof=1)) / len(values) for values in seeds]
    variance = float(resampled.var()) + sum(between)
    uncertainty = sum(part**2 / (len(values) - 1) for part, values in zip(between, seeds, strict=True))
    freedom = variance**2 / uncertainty if uncertainty > 1e-24 else 1e9
    half_width = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * variance**0.5
    return estimate - half_width, estimate + half_width


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean of one value per seed, its t interval (`None` for one seed) and the values."""
    array = np.array(values, dtype=np.float64)
    mean = float(array.mean())
    interval = [round_figure(end) for end in _interval(mean, np.zeros(1), [array])] if len(values) > 1 else None
    return {"mean": round_figure(mean), "interval": interval, "per_run": [round_figure(value) for value in values]}


def round_figure(value: float) -> float:
    """Nine decimals: sums of the same scores in another order are the same figure; and no -0."""
    return round(float(value), 9) + 0.0


def _harness(groups: Groups) -> list[dict[str, Any]]:
    """Figures of lm-evaluation-harness that all runs of a group have, with a t interval over seeds.

    The interval of one run is the normal one of its standard error, if it has one.
    """
    found = []
    for name, members in groups.items():
        shared = [run.results.get("harness") or {} for run in members]
        for task, metrics in shared[0].items():
            for metric in metrics if isinstance(metrics, dict) else ():
                values = [tasks.get(task, {}).get(metric) for tasks in shared]
                if "stderr" not in metric and all(isinstance(value, int | float) for value in values):
                    figures = over_seeds([float(value) for value in values])
                    error = metrics.get(metric.replace(",", "_stderr,", 1))
                    if len(members) == 1 and isinstance(error, int | float):
                        ends = (figures["mean"] + sign * Z95 * error for sign in (-1, 1))
                        figures["interval"] = [round_figure(end) for end in ends]
                    found.append({"group": name, "task": task, "metric": metric, **figures})
    return found


# --- Notes


def _check_samples(runs: Sequence[Run]) -> list[str]:
    """Notes on samples that differ only in their numbers of tokens; raises if they differ otherwise."""
    first: dict[Key, Run] = {}
    others = set()
    for run in runs:
        wrong = []
        for cell, samples in run.cells.items():
            other = first.setdefault(cell, run)
            theirs = other.cells[cell]
            references = ({i: list(sample["references"]) for i, sample in s.items()} for s in (samples, theirs))
            if next(references) != next(references):
                wrong.append((cell, other, len(theirs), len(samples)))
            elif any(sample["num_tokens"] != theirs[i]["num_tokens"] for i, sample in samples.items()):
                others.add(f"`{run.name}` and `{other.name}`")
        if wrong:
            (task, length), other, their_count, our_count = wrong[0]
            settings = _differing_settings([other, run])
            why = "; ".join(f"`{key}` is {a} and {b}" for key, (a, b) in settings.items()) or "no setting"
            raise ValueError(
                f"{other.path} and {run.path} have different samples in {len(wrong)} of the cells that both have, "
                f"first in {task} at {length:,} tokens ({their_count} and {our_count} samples). Differences are taken "
                f"sample by sample. Settings that differ: {why}. Evaluate both with the same."
            )
    if not others:
        return []
    return [
        f"The same samples have different numbers of tokens in {', '.join(sorted(others))}: another tokenizer, chat "
        "template or prompt. They are paired by id."
    ]


def _differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings, and the seed, that are not the same in all runs; those of the model may differ."""
    found = [{"seed": run.results.get("seed"), **run.results.get("settings", {})} for run in runs]
    keys = sorted({key for settings in found for key in settings} - {"name", "output_dir"})
    values = {key: [json.dumps(settings.get(key)) for settings in found] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1 and not key.startswith("model")}


def _notes_on_settings(runs: Sequence[Run]) -> list[str]:
    differing = [
        f"`{key}` ({', '.join(dict.fromkeys(row))})"
        for key, row in _differing_settings(runs).items()
        if key not in ("tasks", "lengths")  # missing cells have a note
    ]
    return [f"Settings that are not the same in all runs: {'; '.join(differing)}."] if differing else []


def _notes_on_cells(table: _Table) -> list[str]:
    notes = []
    for name, held in table.held.items():
        missing = [f"{task} at {length:,}" for task, length in table.cells if (task, length) not in held]
        if missing:
            some = ", ".join(missing[:6]) + (" and others" if len(missing) > 6 else "")
            notes.append(
                f"`{name}` lacks {len(missing)} of {len(table.cells)} cells ({some}). Its scores marked * are over "
                "fewer cells than those of others; differences are taken on the cells that both have."
            )
    return notes


def _notes_on_numbers(groups: Groups, table: _Table) -> list[str]:
    notes = []
    single = [f"`{name}`" for name, members in groups.items() if len(members) == 1]
    if single and len(groups) > 1:
        notes.append(
            f"One run each of {', '.join(single)}: their intervals do not include what another seed would change."
        )
    if any(cell.num_samples < MIN_SAMPLES for cell in table.cells.values()):
        notes.append(
            f"Some cells have fewer than {MIN_SAMPLES} samples: their intervals are too narrow. Figures of fewer than "
            f"{MIN_SAMPLES} samples have no mark and no color."
        )
    return notes


def _description(run: Run) -> dict[str, Any]:
    keys = ("name", "model", "revision", "seed", "fingerprint", "settings", "versions")
    command = evaluation_command(run.results.get("settings", {}))
    return {"path": str(run.path), "command": command, **{key: run.results[key] for key in keys if key in run.results}}


def evaluation_command(settings: Mapping[str, Any]) -> str:
    """The command line of scripts/evaluate.py that gives these settings of a run."""
    words = ["python", "scripts/evaluate.py"]
    for key, value in settings.items():
        if (
            value in (None, {}, [], False) or key.endswith("_sha256") or key == "model_commit"
        ):  # not set, or no argument
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)]
    return shlex.join(words)
