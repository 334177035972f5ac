"""What people look at: the table of completions with its divergences, and the heat map of tokens."""

import html
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import build_tokenizer

from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.run.heatmap import Inspector, Trace, decode_pieces, render_heatmap, tail, write_heatmap
from dgrpo_trl.scoring import DistilledTokens


def test_the_tail_of_a_prompt_is_where_the_question_stands():
    assert tail("short") == "short"
    assert tail("x" * 1000 + "?") == "[...] " + "x" * 299 + "?" == tail(tail("x" * 1000 + "?"))
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "y" * 400 + "Why?"}]
    assert tail(messages)[0] == messages[0] and tail(messages)[1]["content"].endswith("yWhy?")
    assert len(tail(messages)[1]["content"]) == 306


def test_tokens_of_one_character_stay_together():
    tokenizer = build_tokenizer()
    text = "The ship 😀 Ω.\n"
    ids = tokenizer(text)["input_ids"]
    pieces = decode_pieces(ids, tokenizer.decode)
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(count for _, count in pieces) == len(ids)
    assert dict(pieces)["Ω"] == 2
    broken = decode_pieces(ids[:-5], tokenizer.decode)  # cut in the middle of a character
    assert sum(count for _, count in broken) == len(ids) - 5


def trace(ids, divergences):
    return Trace([5, 6], ids, divergences, [-0.5] * len(ids), [1.25] * len(ids), 0.75)


def opacities(page):
    return [float(value) for value in re.findall(r"214, 39, 40, ([\d.]+)\)\" title", page)]


def test_colors_grow_with_the_divergence_and_numbers_are_there():
    tokenizer = build_tokenizer()
    ids = tokenizer("ship town Venice number")["input_ids"]
    divergences = [0.1 * (i + 1) for i in range(len(ids))]
    page = render_heatmap(trace(ids, divergences), tokenizer, "Step 3")
    shown = opacities(page)
    assert shown == sorted(shown) and len(set(shown)) == len(ids) and max(shown) <= 0.75
    notes = "token 1: divergence 0.100 nats, student's log-probability -0.500, teacher's entropy 1.250"
    assert notes in html.unescape(page)
    assert "<h1>Step 3</h1>" in page and "0.750" in page
    huge = render_heatmap(trace(ids, [100.0] * len(ids)), tokenizer, "")
    assert max(opacities(huge)) == 0.75 and "100.0 nats" in huge


def test_what_a_model_writes_cannot_become_markup():
    tokenizer = build_tokenizer()
    ids = tokenizer("<script>alert('x')</script>\n")["input_ids"]
    page = render_heatmap(trace(ids, [0.0] * len(ids)), tokenizer, "<b>")
    assert "<script" not in page and "<b>" not in page
    assert "&lt;" in page and "&#8629;" in page  # the end of the line can be seen
    assert "http" not in page  # nothing is fetched


def test_the_index_names_all_steps(tmp_path):
    for step in (2, 10):
        write_heatmap(tmp_path, step, "page")
    index = (tmp_path / "index.html").read_text()
    assert re.findall(r'href="([^"]+)">step (\d+)', index) == [("step_000002.html", "2"), ("step_000010.html", "10")]


class Watching(Inspector):
    """Remembers the divergence of each completion, by its tokens, as the loss sees it."""

    def __init__(self, trainer):
        super().__init__(keeps_rows=True, keeps_trace=False)
        self.trainer = trainer
        self.seen = {}

    def observe(self, inputs, tokens, mask):
        step = self.trainer.state.global_step + 1
        for row, row_mask, ids in zip(tokens.divergences, mask, inputs["completion_ids"], strict=True):
            text = self.trainer.processing_class.decode(ids[row_mask.bool()], skip_special_tokens=True)
            self.seen.setdefault(step, {})[text] = row[row_mask.bool()].mean().item()
        super().observe(inputs, tokens, mask)


def test_each_completion_has_its_own_divergence_in_the_table(make_trainer, saved_teacher, tmp_path):
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model=saved_teacher,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        generation_batch_size=12,
        log_completions=True,
        max_steps=2,
        temperature=2.0,
    )
    trainer.inspector = Watching(trainer)
    trainer.train()
    for step in (1, 2):
        table = pd.read_parquet(tmp_path / "out" / "completions" / f"completions_{step:05d}.parquet")
        assert (
            len(table) == 12
            and table["distill/divergence"].notna().all()
            and set(table["dataset/answer"]) >= {table["dataset/answer"][0]}
        )
        matched = 0
        for _, row in table.iterrows():
            text = row["completion"][0]["content"]
            if text in trainer.inspector.seen[step]:
                assert row["distill/divergence"] == pytest.approx(trainer.inspector.seen[step][text], rel=1e-4)
                matched += 1
            assert row["dataset/answer"] in row["prompt"][0]["content"]
        assert matched >= 10


def test_columns_that_a_reward_function_logs_are_its_own(make_trainer, saved_teacher, tmp_path):
    def logging(completions, answer, log_extra, **kwargs):
        log_extra("answer", [f"mine {value}" for value in answer])
        log_extra("divergence", list(range(len(answer))))
        return [float(i) for i in range(len(answer))]

    options = {"log_completions": True, "max_steps": 1, "per_device_train_batch_size": 8}
    make_trainer(DGRPOTrainer, teacher_model=saved_teacher, reward_funcs=logging, **options).train()
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert list(table["answer"]) == [f"mine {value}" for value in table["dataset/answer"]]
    assert list(table["divergence"]) == list(table["logging"]) == list(range(8))
    assert table["distill/divergence"].notna().all()


def test_rows_of_an_evaluation_have_no_divergence_in_the_table(make_trainer, saved_teacher, dataset, tmp_path):
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model=saved_teacher,
        eval_dataset=dataset.select(range(3)),
        per_device_train_batch_size=8,
        log_completions=True,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        num_iterations=2,  # the second step is made on rollouts from before an evaluation
    )
    trainer.train()
    files = sorted((tmp_path / "out" / "completions").glob("*.parquet"))
    assert len(files) == 3  # TRL overwrites the table of a step with that of its evaluation
    assert all(pd.read_parquet(path)["distill/divergence"].isna().all() for path in files)
    assert None not in trainer.inspector.divergences


def test_a_run_writes_its_heat_maps_and_sends_them_to_wandb(make_trainer, saved_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher, log_heatmaps=True, report_to=["wandb"])
    trainer.train()
    folder = tmp_path / "out" / "heatmaps"
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "step_000001.html", "step_000002.html"]
    page = (folder / "step_000001.html").read_text()
    assert "What is the number?" in page and max(opacities(page)) > 0
    import wandb

    media = list(Path(wandb.run.dir).rglob("*.html"))
    wandb.finish()
    assert len(media) == 2


def test_nothing_is_kept_where_nothing_is_asked_for(make_trainer, saved_teacher, tmp_path):
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher)
    trainer.train()
    assert trainer.inspector.trace is None and set(trainer.inspector.divergences) == {None}
    assert not (tmp_path / "out" / "heatmaps").exists()
    with pytest.raises(ValueError, match="there is no teacher to disagree"):
        make_trainer(DGRPOTrainer, distill_coef=0.0, log_heatmaps=True)


def test_a_completion_with_nothing_to_learn_from_has_no_divergence(make_trainer, saved_teacher):
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher, log_heatmaps=True, log_completions=True)
    inspector = trainer.inspector
    inspector.begin(2, is_training=True)
    inputs = {
        "row_index": torch.tensor([1, 0]),
        "prompt_ids": torch.tensor([[0, 4], [5, 6]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[7, 8], [9, 2]]),
        "advantages": torch.tensor([0.5, -0.5]),
    }

    zeros = torch.zeros(2, 2)
    tokens = DistilledTokens(zeros, torch.tensor([[1.0, 3.0], [5.0, 5.0]]), zeros, zeros)
    inspector.observe(inputs, tokens, torch.tensor([[1, 1], [0, 0]]))
    assert inspector.divergences == [None, 2.0]
    assert inspector.trace.completion_ids == [7, 8] and inspector.trace.prompt_ids == [4]
