"""Accuracy, its intervals, and the report."""

import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dgrpo_trl.evaluation import generate_completions, wilson_interval
from dgrpo_trl.evaluation.generation import _batches
from dgrpo_trl.evaluation.report import summarize_accuracy
from dgrpo_trl.evaluation.results import score_cell
from dgrpo_trl.evaluation.samples import Cell, Sample
from dgrpo_trl.evaluation.scores import exact_match, mentioned


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<end>", "<unk>", "<user>", "<bot>", *(f"w{i}" for i in range(27))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}<bot>"
    return tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def prompts():
    return [
        [{"role": "user", "content": " ".join(f"w{(7 * i + j) % 27}" for j in range(1 + i % 5))}] for i in range(9)
    ]


def greedy(model, tokenizer, prompt, max_new_tokens):
    """Greedy decoding written out: one prompt, no padding, no cache."""
    ids = tokenizer(tokenizer.apply_chat_template(prompt, tokenize=False))["input_ids"]
    new = []
    while len(new) < max_new_tokens and (not new or new[-1] != tokenizer.eos_token_id):
        new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("max_batch_tokens", [1, 24, 10_000])
def test_batching_and_padding_do_not_change_a_completion(model, tokenizer, prompts, max_batch_tokens):
    model.eval()
    expected = [greedy(model, tokenizer, prompt, 6) for prompt in prompts]
    assert len(set(expected)) > 3  # the model does tell the prompts apart
    found = generate_completions(model, tokenizer, prompts, max_new_tokens=6, max_batch_tokens=max_batch_tokens)
    assert found == expected


def test_generation_leaves_the_mode_of_the_model_as_it_was(model, tokenizer, prompts):
    model.train()
    generate_completions(model, tokenizer, prompts[:1], max_new_tokens=1)
    assert model.training


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 90, 7, 30, 31, 6, 200, 8]
    batches = list(_batches(lengths, max_new_tokens=10, max_batch_tokens=120))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + 10) <= 120


@pytest.mark.parametrize(
    ("num_correct", "num_rows", "expected"),
    [  # by hand: centre (p + z2/2n) / (1 + z2/n), z2 = 3.8415
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),
        (81, 263, (0.2553, 0.3662)),
    ],
)
def test_wilson_interval_of_known_cases(num_correct, num_rows, expected):
    assert wilson_interval(num_correct, num_rows) == pytest.approx(expected, abs=1e-4)


def test_wilson_interval_holds_the_share_itself_at_both_ends():
    for num_rows in range(1, 200):
        assert wilson_interval(num_rows, num_rows)[1] == 1.0 and wilson_interval(0, num_rows)[0] == 0.0


@pytest.mark.parametrize(("num_correct", "num_rows"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_rejects_impossible_counts(num_correct, num_rows):
    with pytest.raises(ValueError, match="num_correct"):
        wilson_interval(num_correct, num_rows)


@pytest.mark.parametrize(
    ("completion", "exact", "is_mentioned"),
    [
        ("412", True, True),
        (" 412.\n", True, True),
        ("The church has 412 windows.", False, True),
        ("4123", False, False),
        ("412 or 413", False, True),
        ("", False, False),
    ],
)
def test_exact_and_mentioned_answers(completion, exact, is_mentioned):
    assert (exact_match(completion, ["412"]) == 1.0, mentioned(completion, ["412"]) == 1.0) == (exact, is_mentioned)


def cell(task, length, answers, completions):
    samples = [Sample(f"{task}{length}{answer}", [], "", (answer,), 16, length) for answer in answers]
    return score_cell(Cell(task, length, "exact_match", list), samples, completions, 0.0)


@pytest.fixture
def results():
    completions = {("a", 128): "10", ("b", 128): "It is 11", ("a", 1024): "12", ("b", 1024): "wrong"}
    cells = [cell(*key, [str(i)], [text]) for i, (key, text) in enumerate(completions.items(), start=10)]
    ruler = score_cell(Cell("vt", 512, "string_match_all", list), [Sample("v", [], "", ("x",), 9, 9)], ["x"], 0.0)
    return {"name": "run", "cells": [*cells, ruler]}  # which is no question


def test_accuracy_is_counted_in_each_group(results):
    summary = summarize_accuracy(results)
    assert summary["overall"]["exact"]["accuracy"] == 0.5
    assert summary["overall"]["mentioned"]["accuracy"] == 0.75
    assert summary["by_length"]["128"]["exact"]["accuracy"] == 0.5
    assert summary["by_task"]["a"]["exact"]["accuracy"] == 1.0
    assert summary["by_task"]["b"]["exact"]["accuracy"] == 0.0
    assert list(summary["by_length"]) == ["128", "1024"]  # by number, not by spelling
    assert sum(group["num_rows"] for group in summary["by_length"].values()) == 4


def test_accuracy_needs_a_completion_for_each_row():
    with pytest.raises(ValueError, match="one completion for each sample"):
        cell("a", 128, ["10", "11"], ["10"])


def test_a_run_without_questions_has_no_accuracy():
    with pytest.raises(ValueError, match="'run' has no questions"):
        summarize_accuracy({"name": "run", "cells": []})


def test_the_report_shows_accuracies_and_only_the_curves_there_are(results, tmp_path):
    report = pytest.importorskip("dgrpo_trl.evaluation.report")
    log = [{"step": i, "loss": 1 / i, "reward": i / 10} for i in range(1, 11)] + [{"step": 10, "train_loss": 0.3}]
    path = report.write_report(
        tmp_path / "out",
        title="A <title>",
        accuracies={"before | after": summarize_accuracy(results)},
        log_histories={"dGRPO": log, "Nothing logged": []},
        settings={"seed": 0},
    )
    page, text = path.read_text(), (tmp_path / "out" / "report.md").read_text()
    assert "A &lt;title&gt;" in page and "before \\| after" in text
    assert "50 % (15-85)" in page and "50 % (15-85)" in text
    assert "Nothing logged" not in page
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {"accuracy_by_length.png", "dgrpo_loss.png", "dgrpo_reward.png"}
    assert {f"figures/{name}" for name in figures} == set(re.findall(r"\((figures/.*?)\)", text))
    assert page.count("data:image/png;base64,") == len(figures)
    assert not re.search(r'(src|href)="(?!data:)', page)  # one file: nothing else to load


def test_a_run_without_a_log_has_an_empty_history(tmp_path):
    report = pytest.importorskip("dgrpo_trl.evaluation.report")
    assert report.read_log_history(tmp_path) == []
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    assert report.read_log_history(tmp_path) == [{"step": 1, "loss": 2.0}]
