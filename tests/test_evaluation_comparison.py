"""Differences between runs and their intervals, curves of training, and the page, read in a browser."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from trl import TrlParser

from dgrpo_trl.cli import compare
from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.evaluation.results import Run, read_run, results_table


pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from dgrpo_trl.evaluation.compare.page import write_comparison  # noqa: E402
from dgrpo_trl.evaluation.compare.statistics import compare_runs, evaluation_command  # noqa: E402
from dgrpo_trl.evaluation.compare.training import (  # noqa: E402
    area_under_curve,
    compare_training,
    read_training,
    steps_to_reach,
)


def make_results(name, scores, **changes):
    """Results of a run; `scores` from (task, length) to a list of scores."""
    cells = [
        {
            **{"task": task, "length": length, "metric": "string_match_all", "num_samples": len(values)},
            **{"score": float(np.mean(values)), "interval": [0.0, 1.0], "seconds": 1.0},
            "samples": [
                {
                    **{"id": f"{task}-{length}-{i}", "score": float(value), "completion": "7"},
                    **{"references": [str(i)], "num_tokens": length - 9},
                }
                for i, value in enumerate(values)
            ],
        }
        for (task, length), values in scores.items()
    ]
    settings = {"model_name_or_path": f"outputs/{name}", "num_samples": len(cells[0]["samples"]), "dtype": "bfloat16"}
    results = {"format": 1, "name": name, "model": f"outputs/{name}", "revision": None, "seed": 0}
    return {**results, "settings": settings, "fingerprint": "0" * 16, "versions": {}, "cells": cells, **changes}


@pytest.fixture
def save(tmp_path):
    """Writes a run's results and returns its folder."""

    def save(name, scores, **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(make_results(name, scores, **changes)))
        return folder

    return save


def find(entries, group, task=None, length=None):
    (entry,) = [e for e in entries if (e["group"], e["task"], e["length"]) == (group, task, length)]
    return entry


def random_scores(seed, num_samples=60, share=0.5):
    rng = np.random.default_rng(seed)
    cells = [(task, length) for task in ("vt", "cwe") for length in (512, 1024)]
    return {cell: (rng.random(num_samples) < share).astype(float) for cell in cells}


def test_scores_and_differences_are_means_over_samples(save):
    a = read_run(save("a", {("vt", 512): [1, 0, 0, 0], ("vt", 1024): [0, 0]}))
    b = read_run(save("b", {("vt", 512): [1, 1, 0, 1], ("vt", 1024): [0.5, 0]}))
    found = compare_runs({"a": [a], "b": [b]}, num_resamples=200)
    assert find(found["scores"], "b", "vt", 512)["score"] == 0.75
    assert find(found["scores"], "b", "vt", 1024)["score"] == 0.25
    assert find(found["scores"], "b")["score"] == pytest.approx(3.5 / 6)  # over cells it would be 0.5
    assert find(found["scores"], "a")["score"] == pytest.approx(1 / 6)
    assert find(found["differences"], "b")["difference"] == pytest.approx(2.5 / 6)
    assert find(found["differences"], "b", length=512)["difference"] == 0.5
    assert find(found["differences"], "b", task="vt")["num_samples"] == 6
    assert not [e for e in found["differences"] if e["group"] == "a"]


def test_equal_runs_differ_by_0_with_no_width(save):
    scores = {cell: values / 3 for cell, values in random_scores(0).items()}  # thirds: sums are rounded
    groups = {name: [read_run(save(name, scores))] for name in ("a", "b", "c")}
    for entry in compare_runs(groups, num_resamples=500)["differences"]:
        assert (entry["difference"], entry["interval"], entry["excludes_zero"]) == (0.0, [0.0, 0.0], False)


def test_a_constant_shift_is_found_with_no_width(save):
    low = {cell: values / 2 for cell, values in random_scores(0).items()}
    high = {cell: values + 0.25 for cell, values in low.items()}
    groups = {"low": [read_run(save("low", low))], "high": [read_run(save("high", high))]}
    for entry in compare_runs(groups, baseline="high", num_resamples=500)["differences"]:
        assert (entry["difference"], entry["interval"], entry["excludes_zero"]) == (-0.25, [-0.25, -0.25], True)


def test_the_order_of_the_samples_does_not_matter(save):
    a, b = random_scores(1), random_scores(2)
    groups = {"a": [read_run(save("a", a))], "b": [read_run(save("b", b))]}
    expected = compare_runs(groups, num_resamples=300)
    shuffled = make_results("b", b)
    for cell in shuffled["cells"]:
        np.random.default_rng(3).shuffle(cell["samples"])
    groups["b"][0].path.write_text(json.dumps(shuffled))
    found = compare_runs({"a": groups["a"], "b": [read_run(groups["b"][0].path)]}, num_resamples=300)
    assert found == expected


def test_a_cell_is_resampled_alike_whatever_other_cells_there_are(save):
    scores = [random_scores(seed) for seed in (1, 2)]
    whole = {f"whole{i}": [read_run(save(f"whole{i}", s))] for i, s in enumerate(scores)}
    part = {f"part{i}": [read_run(save(f"part{i}", {("vt", 512): s["vt", 512]}))] for i, s in enumerate(scores)}
    all_scores, few_scores = (compare_runs(groups, num_resamples=300)["scores"] for groups in (whole, part))
    assert find(all_scores, "whole1", "vt", 512)["interval"] == find(few_scores, "part1", "vt", 512)["interval"]


def test_scores_that_are_all_right_have_the_wilson_interval(save):
    run = read_run(save("a", {("vt", 512): [1] * 10}))
    assert find(compare_runs({"a": [run]}, num_resamples=50)["scores"], "a")["interval"] == pytest.approx(
        [0.7225, 1.0], abs=1e-4
    )


def coverage(make_data, truth, num_data_sets):
    """Share of simulated data sets whose interval holds the truth; `make_data` gives the seeds' scores by cell."""
    hits = 0
    for i in range(num_data_sets):
        groups = {}
        for name, members in make_data(np.random.default_rng(i)).items():
            groups[name] = []
            for j, scores in enumerate(members):
                results = make_results(f"{name}{j}", scores)
                cells = {(c["task"], c["length"]): {s["id"]: s for s in c["samples"]} for c in results["cells"]}
                groups[name].append(Run(f"{name}{j}", None, results, cells))
        low, high = find(compare_runs(groups, num_resamples=400, seed=i)["differences"], "b")["interval"]
        hits += low <= truth <= high
    return hits / num_data_sets


def test_intervals_of_two_runs_hold_the_true_difference_in_95_of_100_data_sets():
    cells = [("vt", 512), ("vt", 1024)]

    def make_data(rng):
        difficulty = {cell: rng.normal(0, 1, 50) for cell in cells}  # shared: scores of a sample go together

        def scores(shift):
            return {cell: 0.3 + shift + 0.1 * d + rng.normal(0, 0.1, 50) for cell, d in difficulty.items()}

        return {"a": [scores(0)], "b": [scores(0.05)]}

    assert abs(coverage(make_data, 0.05, 600) - 0.95) < 3.3 * (0.95 * 0.05 / 600) ** 0.5  # 3.3 standard errors


def test_intervals_of_three_seeds_each_hold_the_true_difference_in_95_of_100_data_sets():
    def make_data(rng):
        difficulty = rng.normal(0, 0.1, 30)

        def scores(mean):
            return {("vt", 512): mean + rng.normal(0, 0.05) + difficulty + rng.normal(0, 0.1, 30)}

        return {name: [scores(mean) for _ in range(3)] for name, mean in (("a", 0.5), ("b", 0.6))}

    # Not narrower than it says; a little wider is right, as seeds and samples are not told apart wholly
    assert -3.3 * (0.95 * 0.05 / 600) ** 0.5 < coverage(make_data, 0.1, 600) - 0.95 < 0.035


def test_the_interval_of_seeds_is_that_of_welch(save):
    # All samples of a run score the same, so that other samples would change nothing
    groups = {
        name: [read_run(save(f"{name}{i}", {("vt", 512): [mean] * 9})) for i, mean in enumerate(means)]
        for name, means in (("a", (0.1, 0.2, 0.3)), ("b", (0.6, 0.6, 0.9)))
    }
    # By hand: s2/n = 0.01/3 and 0.03/3; se = sqrt(0.04/3) = 0.11547; df = (4/3)^2 / ((1/9 + 1) / 2) = 3.2
    low, high = find(compare_runs(groups, num_resamples=50)["differences"], "b")["interval"]
    assert ((high - low) / 2, (high + low) / 2) == pytest.approx((0.11547 * 3.0731, 0.5), rel=1e-3)


def test_seeds_that_differ_widen_the_interval_and_are_shown(save):
    rights = {("vt", 512): [0.0] * 30 + [1.0] * 30}
    a = read_run(save("a", rights))
    same = [read_run(save(f"same{i}", rights)) for i in range(3)]
    apart = [
        read_run(save(f"apart{i}", {("vt", 512): [0.0] * (30 - 10 * i) + [1.0] * (30 + 10 * i)})) for i in (-1, 0, 1)
    ]
    found = compare_runs({"a": [a], "same": same, "apart": apart}, num_resamples=500)
    same, apart = find(found["differences"], "same"), find(found["differences"], "apart")
    assert same["interval"] == [0.0, 0.0] and same["difference"] == apart["difference"] == 0.0
    assert apart["per_run"] == pytest.approx([1 / 3, 1 / 2, 2 / 3])
    assert apart["interval"][1] > 0.3 and not apart["excludes_zero"]


def test_missing_cells_are_told_and_only_common_cells_are_compared(save):
    whole, part = random_scores(1), random_scores(2)
    del part["cwe", 1024]
    groups = {"whole": [read_run(save("whole", whole))], "part": [read_run(save("part", part))]}
    found = compare_runs(groups, num_resamples=100)
    assert any("`part` lacks 1 of 4 cells (cwe at 1,024)" in note for note in found["notes"])
    expected = np.mean([part[cell].mean() - whole[cell].mean() for cell in part])  # of equally many samples
    assert find(found["differences"], "part")["difference"] == pytest.approx(expected)
    assert find(found["differences"], "part")["num_cells"] == 3
    assert not find(found["scores"], "part")["complete"] and find(found["scores"], "part", length=512)["complete"]
    assert find(found["scores"], "whole")["complete"]


def test_runs_without_a_common_cell_cannot_be_compared(save):
    a, b = read_run(save("a", {("vt", 512): [1]})), read_run(save("b", {("vt", 1024): [1]}))
    with pytest.raises(ValueError, match="no cell in common"):
        compare_runs({"a": [a], "b": [b]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda results: results.update(seed=7), "`seed` is 0 and 7"),
        (lambda results: results["settings"].update(num_samples=3), "`num_samples` is 4 and 3"),
        (lambda results: results["settings"].update(tokenizer="other"), "`tokenizer` is null and \"other\""),
        (lambda results: None, "differ: no setting"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fewer", "other id", "other reference"])
def test_runs_with_other_samples_are_refused_and_what_differs_is_named(save, tmp_path, change, message, kind):
    a = read_run(save("a", {("vt", 512): [1, 0, 1, 0]}))
    results = make_results("b", {("vt", 512): [1, 0, 1, 0]})
    samples = results["cells"][0]["samples"]
    if kind == "fewer":
        del samples[-1]
    else:
        samples[0].update({"id": "new"} if kind == "other id" else {"references": ["8"]})
    change(results)
    (tmp_path / "b.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="different samples in 1 .* vt at 512") as error:
        compare_runs({"a": [a], "b": [read_run(tmp_path / "b.json")]})
    assert message in str(error.value)


def test_the_same_samples_in_other_tokens_are_compared_and_told(save, tmp_path):
    a = read_run(save("a", {("vt", 512): [1, 0]}))
    results = make_results("b", {("vt", 512): [1, 0]})
    results["cells"][0]["samples"][0]["num_tokens"] += 1
    (tmp_path / "b.json").write_text(json.dumps(results))
    notes = compare_runs({"a": [a], "b": [read_run(tmp_path / "b.json")]}, num_resamples=50)["notes"]
    assert any("different numbers of tokens" in note for note in notes)


def test_other_settings_are_told_but_not_the_model(save):
    a = read_run(save("a", {("vt", 512): [1, 0]}))
    b = read_run(
        save("b", {("vt", 512): [1, 0]}, settings={"model_name_or_path": "b", "num_samples": 2, "dtype": "x"})
    )
    (note,) = [n for n in compare_runs({"a": [a], "b": [b]}, num_resamples=50)["notes"] if "Settings" in n]
    assert note == 'Settings that are not the same in all runs: `dtype` ("bfloat16", "x").'


def test_what_cannot_be_read_says_so(save, tmp_path):
    with pytest.raises(FileNotFoundError, match="it resumes"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="has format 2, but format 1"):
        read_run(save("new", {("vt", 512): [1]}, format=2))
    cell = copy.deepcopy(make_results("x", {("vt", 512): [1, 0]})["cells"])
    cell[0]["samples"][1]["id"] = cell[0]["samples"][0]["id"]
    with pytest.raises(ValueError, match="an id twice in vt at 512"):
        read_run(save("twice", {("vt", 512): [1]}, cells=cell))
    with pytest.raises(ValueError, match="no samples"):
        compare_runs({"empty": [read_run(save("empty", {("vt", 512): [1]}, cells=[]))]})
    run = read_run(save("a", {("vt", 512): [1]}))
    with pytest.raises(ValueError, match="Baseline 'b' is none of 'a'"):
        compare_runs({"a": [run]}, baseline="b")


def test_figures_of_the_harness_alone_are_compared(save):
    def run(name, value):
        harness = {"gsm8k": {"exact_match,strict": value, "exact_match_stderr,strict": 0.01, "alias": "gsm8k"}}
        return read_run(save(name, {("vt", 512): [1]}, cells=[], harness=harness))

    found = compare_runs({"a": [run("a", 0.5)], "b": [run("b0", 0.3), run("b1", 0.4)]})
    assert (found["scores"], found["differences"]) == ([], [])
    a, b = found["harness"]
    assert (a["metric"], a["mean"]) == ("exact_match,strict", 0.5) and b["per_run"] == [0.3, 0.4]
    assert a["interval"] == pytest.approx([0.4804, 0.5196], abs=1e-4)
    assert b["interval"] == pytest.approx([0.35 - 12.706 * 0.05, 0.35 + 12.706 * 0.05], rel=1e-3)  # t of 1 degree


def test_the_command_shown_gives_the_settings_of_the_run():
    given = EvaluationArguments(
        **{"model_name_or_path": "a b", "tasks": ["vt", "cwe"], "lengths": [512, 1024], "num_samples": 7, "seed": 3},
        **{"chat_template_kwargs": {"enable_thinking": False}, "output_dir": "out", "overwrite": True},
    )
    settings = {**asdict(given), "model_sha256": "0", "model_commit": "1", "haystack_sha256": None}
    words = shlex.split(evaluation_command(settings))
    (read,) = TrlParser((EvaluationArguments,)).parse_args_and_config(words[2:])
    assert read == given and words[:2] == ["python", "scripts/evaluate.py"]


def test_a_training_without_a_log_has_no_curve(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no curve"):
        read_training(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    assert read_training(tmp_path) == {"loss": [(1, 2.0)]}


@pytest.mark.parametrize(
    ("value", "steps"), [(0.2, 10.0), (0.1, 10.0), (0.5, 20.0), (0.4, 30 - 10 * 0.1 / 0.3), (0.9, None)]
)
def test_steps_to_reach_a_value_are_read_off_straight_lines(value, steps):
    points = [(10, 0.2), (20, 0.5 if value == 0.5 else 0.2), (30, 0.5), (40, 0.3), (50, 0.8)]
    assert steps_to_reach(points, value) == (None if steps is None else pytest.approx(steps))


def test_the_area_under_a_curve_is_its_mean_height():
    # By hand: 10 x (0 + 1)/2 + 30 x (1 + 0.5)/2 = 5 + 22.5, over 40 steps
    assert area_under_curve([(0, 0.0), (10, 1.0), (40, 0.5)]) == pytest.approx(27.5 / 40)
    assert area_under_curve([(7, 0.3)]) == 0.3
    with pytest.raises(ValueError, match="without points"):
        area_under_curve([])


def save_log(folder, rewards, stride=1):
    folder.mkdir(parents=True)
    log = [{"step": stride * i, "reward": r, "distill/divergence": 1 - r} for i, r in enumerate(rewards, start=1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def test_training_curves_have_a_band_over_seeds_areas_and_steps(tmp_path):
    slow = [save_log(tmp_path / "slow0", [0.0, 0.1, 0.2, 0.3]), save_log(tmp_path / "slow1", [0.0, 0.2, 0.4, 0.5])]
    fast = [save_log(tmp_path / "fast0", [0.4, 0.6, 0.8, 0.8, 0.8])]
    found = compare_training({"slow": slow, "fast": fast})
    assert found["reward"]["steps"] == [1, 4]
    assert found["reward"]["curves"]["slow"][1] == [2, 0.15, 0.1, 0.2]
    assert found["distill/divergence"]["curves"]["fast"][-1] == pytest.approx([5, 0.2, 0.2, 0.2])
    assert "reached" not in found["distill/divergence"]  # less of it is better
    areas = found["reward"]["areas"]
    assert areas["slow"]["per_run"] == pytest.approx([0.15, 0.85 / 3])
    assert areas["fast"]["mean"] == pytest.approx(2.0 / 3) and areas["fast"]["interval"] is None  # its step 5 left out
    # t of 1 degree of freedom 12.706, s / sqrt(2) = |difference| / 2
    width = 12.706 * (0.85 / 3 - 0.15) / 2
    assert areas["slow"]["interval"] == pytest.approx([0.65 / 3 - width, 0.65 / 3 + width], rel=1e-3)
    reached = {entry["group"]: entry for entry in found["reward"]["reached"]}
    assert reached["slow"]["value"] == 0.4  # the lowest of the last values
    assert reached["slow"]["num_reached"] == 1 and reached["slow"]["steps"] is None
    assert reached["slow"]["per_run"] == [None, pytest.approx(3.0)] and reached["fast"]["steps"]["mean"] == 1.0


def test_training_is_read_from_the_newest_checkpoint_and_from_evaluated_checkpoints(tmp_path, save):
    save_log(tmp_path / "run" / "checkpoint-9", [0.1])
    save_log(tmp_path / "run" / "checkpoint-10", [0.1, 0.2])
    for step, scores in ((9, [1, 0]), (10, [1, 1])):
        cells = {("vt", 512): scores, ("cwe", 512): [1] * 6}
        results = make_results("x", {**cells, **({("vt", 1024): [0]} if step == 10 else {})})
        (tmp_path / "run" / f"checkpoint-{step}" / "results.json").write_text(json.dumps(results))
    curves = read_training(tmp_path / "run")
    assert curves["reward"] == [(1, 0.1), (2, 0.2)] and curves["accuracy"] == [(9, 7 / 8), (10, 1.0)]
    with pytest.raises(FileNotFoundError, match="has no curve"):
        read_training(tmp_path)


def test_the_page_and_the_table_of_a_run_give_the_share_of_all_questions(save, tmp_path):
    """A cell of 5 questions and one of 33 do not count alike, whichever text shows their mean."""
    scores = {("lookup", 128): [1] * 5, ("two_hop", 128): [0] * 23 + [1] * 10, ("lookup", 256): [1, 0, 0, 0]}
    run = read_run(save("demo", scores))
    write_comparison(tmp_path, compare_runs({"demo": [run]}, num_resamples=200))
    row = next(line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("| demo |"))
    cells = [cell.split(" (")[0] for cell in row.strip("| ").split(" | ")]
    assert cells == ["demo", "38.1", "39.5", "25.0"]  # 16 of 42, 15 of 38, 1 of 4; over cells it would be 51.8, 65.2
    assert "| mean | 39.5 |  |" in results_table({**run.results, "harness": {}})


def test_figures_of_few_samples_have_neither_mark_nor_color(save, tmp_path):
    groups = {
        name: [read_run(save(name, {("vt", 512): [score] * 20, ("vt", 1024): [score] * 19}))]
        for name, score in (("low", 0.25), ("high", 0.75))
    }
    found = compare_runs(groups, num_resamples=50)
    assert all(entry["excludes_zero"] for entry in found["differences"])
    page = write_comparison(tmp_path, found).read_text()
    assert (
        "| high | **▲ +50.0** (+50.0 to +50.0) | **▲ +50.0** (+50.0 to +50.0) | +50.0 (+50.0 to +50.0) |"
        in (tmp_path / "comparison.md").read_text()
    )
    heat = re.search(r'<table id="heat-1".*?</table>', page, re.S)[0]
    assert re.findall(r"<td.*?</td>", heat) == ['<td style="--share: 0.750">75</td>', "<td>75</td>"]
    assert any("fewer than 20 samples have no mark and no color" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to compare"),
        (["--runs", "{a}", "{a}"], "Two runs are named 'a'"),
        (["--runs", "{a}", "--groups", "a={a}"], "A run is named 'a' too"),
        (["--groups", "a={a}", "--groups", "b={a}"], "`--groups` is given twice"),
    ],
)
def test_the_command_refuses_what_it_cannot_tell_apart(save, flags, message):
    folder = save("a", {("vt", 512): [1]})
    with pytest.raises(SystemExit, match=message):
        compare.main([flag.format(a=folder) for flag in flags])


class Page(HTMLParser):
    """Tables by id as rows of texts, images without a text, and what would be loaded."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.loaded, self.unnamed, self.in_cell, self.rows = {}, [], [], False, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loaded += [attributes[key] for key in ("src", "href", "action", "data", "srcset") if attributes.get(key)]
        if tag == "table":
            self.rows = self.tables[attributes.get("id", len(self.tables))] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")
        elif tag in ("svg", "img") and not {"aria-label", "aria-hidden", "alt"} & attributes.keys():
            self.unnamed.append(attributes)

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        complain = pytest.fail if os.environ.get("DGRPO_REQUIRE_CHROMIUM") else pytest.skip
        complain("no chromium, chromium-browser or google-chrome on PATH (Debian: apt-get install chromium)")
    return path


@pytest.fixture
def browse(chromium, tmp_path):
    """Opens a file in headless Chromium, with no network; returns its DOM after scripts, and Chromium's log."""

    def browse(path):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [chromium, *flags, "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, done.stderr

    return browse


def test_a_browser_logs_an_error_of_a_page_that_has_one(browse, tmp_path):
    """The control of the test below."""
    (tmp_path / "bad.html").write_text("<script>console.error('no good'); undefined_function()</script>")
    _, log = browse(tmp_path / "bad.html")
    assert log.count("CONSOLE") == 2


def test_the_page_in_a_browser_shows_the_figures_of_the_json_and_loads_nothing(save, browse, tmp_path):
    def seeds(name, share, **changes):
        folders = [save(f"{name}{i}", random_scores((i, int(100 * share)), 40, share), **changes) for i in range(2)]
        return f"{name}={','.join(map(str, folders))}"

    harness = {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.01, "alias": "gsm8k"}}
    flags = ["--runs", str(save("start", random_scores(9, 40, 0.3)))]
    flags += ["--groups", seeds("b <i>|", 0.8, harness=harness), seeds("worse", 0.1)]
    flags += ["--logs", f"b <i>|={save_log(tmp_path / 'log', [0.1, 0.4, 0.8])}", "--title", "A <title>"]
    compare.main([*flags, "--output_dir", str(tmp_path / "out"), "--num_resamples", "300"])
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    dom, log = browse(tmp_path / "out" / "comparison.html")
    page = Page(dom)
    assert "CONSOLE" not in log, log
    assert all(url.startswith("data:") for url in page.loaded) and not page.unnamed
    assert not re.search(r"@import|url\((?!&quot;#|#)|https?://", dom) and "<i>" not in dom

    def percent(share, sign=""):
        return re.sub(r"^[+-]0\.0$", "0.0", f"{100 * share:{sign}.1f}")

    table = page.tables["scores-by-length"]
    assert table[0] == ["", "all", "512", "1,024"] and [row[0] for row in table[1:]] == ["start", "b <i>|", "worse"]
    for name, *cells in table[1:]:
        for length, cell in zip((None, 512, 1024), cells, strict=True):
            score = find(found["scores"], name, length=length)
            assert cell == f"{percent(score['score'])} {' to '.join(map(percent, score['interval']))}"
    marks = set()
    for table, column in (("differences-by-length", "length"), ("differences-by-task", "task")):
        header, *rows = page.tables[table]
        keys = [None, *(int(key.replace(",", "")) if column == "length" else key for key in header[2:])]
        for name, *cells in rows:
            for key, cell in zip(keys, cells, strict=True):
                entry = find(found["differences"], name, **{column: key})
                low, high = entry["interval"]
                mark = "▲ " if low > 0 else "▼ " if high < 0 else ""
                marks.add(mark)
                interval = f"{percent(low, '+')} to {percent(high, '+')}"
                assert cell == f"{mark}{percent(entry['difference'], '+')} {interval}"
    assert {"▲ ", "▼ "} <= marks
    for row in page.tables["heat-1"][1:]:
        scores = [find(found["scores"], "b <i>|", row[0], length)["score"] for length in (512, 1024)]
        assert row[1:] == [f"{100 * score:.0f}" for score in scores]
    assert page.tables["harness"][1] == ["gsm8k: exact_match, strict-match", "–", "0.25 0.25 to 0.25", "–"]
    area = found["training"]["reward"]["areas"]["b <i>|"]["mean"]
    assert page.tables["training-reward"][1] == ["b <i>|", "3", f"{area:.3g}"]
    assert dom.count("<svg") == dom.count('role="img"') == 2 + 3 + 2  # differences; all, two tasks; reward, divergence
    text = (tmp_path / "out" / "comparison.md").read_text()
    overall = find(found["scores"], "start")
    interval = " to ".join(map(percent, overall["interval"]))
    assert f"| start | {percent(overall['score'])} ({interval}) |" in text and "b <i>\\|" in text
