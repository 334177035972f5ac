"""What a run refuses: each rule at its edge, and the same answer from the trainer, the dry run and the evaluation."""

import json
import re
from contextlib import suppress

import pytest
from conftest import build_model, build_tokenizer, length_reward
from datasets import Dataset
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig
from trl import SFTConfig

import dgrpo_trl.trainer
from dgrpo_trl import DGRPOConfig, DGRPOTrainer, checks
from dgrpo_trl.checks import (
    arriving_prompt_problems,
    packing_warnings,
    raise_problems,
    run_findings,
    supervised_findings,
)
from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.evaluation.runs import EvaluationRun
from dgrpo_trl.models import Models, load_config
from dgrpo_trl.positions import stated_positions, trained_positions
from dgrpo_trl.preflight import GPUS, Engine, preflight


CPU = {"use_cpu": True, "bf16": False}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
VOCAB = {"a": 0, "b": 1, "c": 2}


def prompt(num_words):
    return [{"role": "user", "content": "ship " * num_words}]


def models(tokenizer, student=None, teacher=None, **options):
    student = Qwen3Config(vocab_size=300) if student is None else student
    return Models(student, tokenizer, **{"stored_student": student, "teacher": teacher, **options})


def find(models, prompts, num_processes=1, **options):
    """Findings on rows with these columns, for a run of one generation batch of one prompt."""
    columns = prompts if isinstance(prompts, dict) else {"prompt": prompts}
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, **options}
    args = DGRPOConfig("out", **CPU, **options)
    return run_findings(args, models, {"train_dataset": Dataset.from_dict(columns)}, num_processes)


# --- Positions


@pytest.mark.parametrize("config_class", [Qwen3Config, Qwen3MoeConfig])
def test_a_stock_qwen3_has_the_positions_it_was_trained_on(config_class):
    stock = config_class(max_position_embeddings=40960, rope_theta=1e6)
    assert stated_positions(stock) == 40960 and trained_positions(stock) == 32768
    extended = config_class(max_position_embeddings=40960, rope_parameters=YARN)
    assert stated_positions(extended) == trained_positions(extended) == 131072
    long = config_class(max_position_embeddings=262144, rope_theta=5e6)  # the models of July 2025
    assert trained_positions(long) == 262144


def test_other_models_have_the_positions_that_they_state():
    assert trained_positions(LlamaConfig(max_position_embeddings=40960)) == 40960
    scaled = {**YARN, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    assert trained_positions(build_model(rope_parameters=scaled).config) == 1024


@pytest.fixture(scope="module")
def stock_qwen3(tmp_path_factory):
    """A tiny model that states the positions of a stock Qwen3, and the number of words that fill those it has."""
    path = str(tmp_path_factory.mktemp("qwen3"))
    build_model(max_position_embeddings=40960).save_pretrained(path)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)

    def num_tokens(num_words):
        return len(tokenizer.apply_chat_template(prompt(num_words), add_generation_prompt=True)["input_ids"])

    overhead = num_tokens(1) - 1
    assert num_tokens(1000) == 1000 + overhead  # one token per word
    return path, tokenizer, 32768 - 8 - overhead


class WeightsLoad(Exception):
    """The trainer has refused nothing."""


@pytest.mark.parametrize("num_extra", [0, 1])
@pytest.mark.parametrize("run", ["trainer", "stream", "dry run", "evaluation"])
def test_a_stock_qwen3_gets_the_same_answer_from_all(stock_qwen3, tmp_path, monkeypatch, run, num_extra):
    def weights_load(*args, **kwargs):
        raise WeightsLoad

    monkeypatch.setattr(dgrpo_trl.trainer.GRPOTrainer, "__init__", weights_load)
    path, tokenizer, num_words = stock_qwen3
    row = {"id": "a", "prompt": prompt(num_words + num_extra), "answer": "1", "length_bin": 40960}
    dataset, file = Dataset.from_list([row]), tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    args = DGRPOConfig(
        str(tmp_path / "out"),
        **CPU,
        distill_coef=0.0,
        max_completion_length=8,
        per_device_train_batch_size=4,
        num_generations=4,
    )

    def start():
        if run == "trainer":
            with suppress(WeightsLoad):
                DGRPOTrainer(path, length_reward, args, dataset)
        elif run == "stream":
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
            positions = trained_positions(load_config(path))
            raise_problems(arriving_prompt_problems([[0], ids], 8, positions, "the student"))
        elif run == "dry run":
            preflight(args, path, dataset, tokenizer, Engine(), GPUS["h100-80gb"]).raise_for_problems()
        else:
            EvaluationRun(EvaluationArguments(path, questions=str(file), max_new_tokens=8, output_dir=str(tmp_path)))

    if num_extra == 0:
        start()
    else:
        with pytest.raises(ValueError, match="has 32,769 tokens, more than the 32,768 positions of .*YaRN"):
            start()


# --- Prompt lengths


def test_only_the_longest_rows_are_tokenized(tokenizer, monkeypatch):
    monkeypatch.setattr(checks, "MAX_ROWS_TOKENIZED", 2)
    student = Qwen3Config(vocab_size=300, max_position_embeddings=256)
    prompts = [prompt(n) for n in (10, 300, 400, 500)]
    (problem,) = find(models(tokenizer, student), prompts).problems
    assert problem.startswith("at least 2 of 4 rows have a 'prompt' that is too long")
    monkeypatch.undo()
    (problem,) = find(models(tokenizer, student), prompts).problems
    assert problem.startswith("3 of 4 rows have a 'prompt' that is too long") and "over 248 tokens" in problem


def test_a_row_without_a_prompt_for_the_teacher_has_it_read_the_students(tokenizer):
    teacher = Qwen3Config(vocab_size=300, max_position_embeddings=64)
    both = models(tokenizer, teacher=teacher, teacher_vocab=tokenizer.get_vocab())
    columns = {"prompt": [prompt(100)] * 2, "teacher_prompt": [prompt(1), None]}
    (problem,) = find(both, columns).problems
    assert "1 of 2 rows have a 'teacher_prompt'" in problem and "the 64 positions of the teacher" in problem
    (problem,) = find(both, columns, teacher_prompt_column=None).problems
    assert "2 of 2 rows have a 'prompt'" in problem


def test_vllm_has_a_limit_of_its_own(tokenizer):
    (problem,) = find(models(tokenizer), [prompt(100)], use_vllm=True, vllm_max_model_length=64).problems
    assert "more than `vllm_max_model_length` (64)" in problem


def test_a_row_for_sft_may_fill_the_positions(tokenizer):
    student = models(tokenizer, Qwen3Config(vocab_size=300, max_position_embeddings=64))
    answer = [{"role": "assistant", "content": "ship"}]
    rows = [prompt(n) for n in range(1, 101)]
    lengths = [len(tokenizer.apply_chat_template([*row, *answer])["input_ids"]) for row in rows]
    assert 64 in lengths
    dataset = Dataset.from_dict({"prompt": rows, "completion": [answer] * len(rows)})
    args = SFTConfig("out", **CPU, max_length=None)

    def problems(args, dataset):
        return supervised_findings(args, student, {"train_dataset": dataset}).problems

    (problem,) = problems(args, dataset)
    num_over = sum(length > 64 for length in lengths)
    assert problem.startswith(f"{num_over} of 100 rows are too long: the longest has {max(lengths)} tokens")
    assert not problems(args, dataset.select(range(lengths.index(64) + 1)))
    assert not problems(SFTConfig("out", **CPU, max_length=64), dataset)


def test_packed_rows_are_for_flash_attention():
    def warnings(attention, **options):
        kwargs = {"attn_implementation": attention}
        return packing_warnings(SFTConfig("out", **CPU, model_init_kwargs=kwargs, **options))

    for attention, name in (("sdpa", "sdpa"), ("flex_attention", "flex_attention"), (None, "sdpa")):
        (warning,) = warnings(attention, packing=True, max_length=32768)
        assert f"'{name}' keeps them apart by a mask of 32,768 x 32,768 (1.0 GiB)" in warning
        assert not warnings(attention, packing=False, max_length=32768)
    for attention in ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        assert not warnings(attention, packing=True, max_length=32768)


# --- Scaled positions


def test_vllm_must_sample_from_the_model_that_is_trained(tokenizer):
    stored = Qwen3Config(vocab_size=300)
    scaled = models(tokenizer, Qwen3Config(vocab_size=300, rope_parameters=YARN), stored_student=stored)
    findings = find(scaled, [prompt(1)], use_vllm=True, vllm_mode="colocate")
    assert "which is what vLLM reads" in findings.problems[0] and not findings.warnings
    findings = find(scaled, [prompt(1)], use_vllm=True, vllm_mode="server")  # may have been started with them
    assert "which is what vLLM reads" in findings.warnings[0] and not findings.problems
    assert find(scaled, [prompt(1)]) == find(models(tokenizer), [prompt(1)], use_vllm=True) == checks.Findings()


# --- Rows, vocabularies, the shared prefix


@pytest.mark.parametrize(("num_rows", "num_problems"), [(5, 1), (6, 0)])
def test_a_generation_batch_of_all_processes_must_be_filled(tokenizer, num_rows, num_problems):
    problems = find(models(tokenizer), [prompt(1)] * num_rows, num_processes=3, gradient_accumulation_steps=2).problems
    assert len(problems) == num_problems
    assert all("has 5 rows, and a generation batch takes 6 prompts (24 completions" in problem for problem in problems)


def test_a_teacher_without_a_tokenizer_is_warned_of(tokenizer):
    findings = find(models(tokenizer, teacher=Qwen3Config(vocab_size=300)), [prompt(1)])
    assert "token ids are taken to be the student's" in findings.warnings[0] and not findings.problems


def test_a_model_that_cannot_share_is_refused_where_sharing_is_required(tokenizer):
    teacher = Qwen3Config(vocab_size=300, attention_dropout=0.1)
    both = models(tokenizer, teacher=teacher, teacher_vocab=tokenizer.get_vocab())
    (problem,) = find(both, [prompt(1)], shared_prefix="on").problems
    assert re.search("the teacher cannot run packed rows exactly: .* dropout", problem)
    assert not find(both, [prompt(1)]).problems


def test_all_problems_are_in_one_error(tokenizer):
    student = Qwen3Config(vocab_size=100, max_position_embeddings=64)
    both = models(tokenizer, student, Qwen3Config(vocab_size=300), teacher_vocab=VOCAB)
    findings = find(both, [prompt(100)], num_processes=2)
    with pytest.raises(ValueError) as error:
        findings.raise_for_problems()
    lines = str(error.value).splitlines()
    assert lines[0] == "The run cannot start, for 4 reasons:" and len(lines) == 5
    matches = ("generation batch", "different vocabularies", "Both must have a row", "64 positions of the student")
    for line, match in zip(lines[1:], matches, strict=True):
        assert line.startswith("- ") and match in line


def test_a_set_without_rows_or_prompts_may_come_with_an_environment(tokenizer):
    args = DGRPOConfig("out", **CPU)
    datasets = {"eval_dataset": Dataset.from_dict({"task": []})}
    assert len(run_findings(args, models(tokenizer), datasets, 1).problems) == 2
    assert not run_findings(args, models(tokenizer), datasets, 1, needs_prompts=False).problems
