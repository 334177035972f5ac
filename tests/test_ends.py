"""Student and teacher that end differently are found, and the end can be left out; prompts beyond the positions."""

import copy

import pytest
import reference
import torch
from conftest import build_model, build_tokenizer, length_reward
from datasets import Dataset
from test_errors import no_weights  # noqa: F401  (a fixture)
from transformers import GenerationConfig, Qwen3Config
from trl import SFTConfig

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.checks import supervised_findings
from dgrpo_trl.ends import Ends, end_warnings, read_ends
from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.evaluation.runs import EvaluationRun
from dgrpo_trl.models import Models
from dgrpo_trl.preflight import GPUS, Engine, preflight


END_OF_TEXT, IM_END = 0, 2  # ids of the tests' tokenizer
ROWS = [{"prompt": [{"role": "user", "content": f"Ship {i}?"}], "answer": "1"} for i in range(8)]
SHORT = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "report_to": "none"}


def base_tokenizer(**changes):
    """That of a base model: no chat template, another end."""
    tokenizer = build_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", None
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_ends_are_read_off_tokenizer_template_and_generation_config(tokenizer):
    config = Qwen3Config(eos_token_id=IM_END)
    assert read_ends(tokenizer, config) == Ends(IM_END, frozenset({IM_END}))
    generation_config = GenerationConfig(eos_token_id=[END_OF_TEXT, IM_END])
    assert read_ends(base_tokenizer(), config, generation_config) == Ends(
        END_OF_TEXT, frozenset({END_OF_TEXT, IM_END})
    )
    templated = base_tokenizer(chat_template=tokenizer.chat_template)  # as a base model of Qwen has it
    assert read_ends(templated, Qwen3Config(eos_token_id=END_OF_TEXT)) == Ends(IM_END, frozenset({END_OF_TEXT}))
    assert read_ends(None, config) == Ends(None, frozenset({IM_END}))
    broken = base_tokenizer(chat_template="{{ raise_exception('no') }}")
    assert read_ends(broken, config).end == END_OF_TEXT


@pytest.mark.parametrize(
    ("student", "teacher", "agree"),
    [
        ((2, {2}), (2, {2}), True),
        ((2, {0, 2}), (2, {2}), True),
        ((0, {0}), (2, {2}), False),  # base, instruct
        ((2, {2}), (0, {0}), False),
        ((2, {0}), (2, {0, 2}), False),  # a base model with the template of the instruct model, which does not stop
        ((0, {0, 2}), (2, {0, 2}), False),
        ((2, {2}), (None, {2}), True),
        ((2, {2}), (None, {0}), False),
    ],
    ids=str,
)
def test_models_agree_where_each_stops_at_the_others_end(tokenizer, student, teacher, agree):
    both = (Ends(end, frozenset(stops)) for end, stops in (student, teacher))
    warnings = end_warnings(*both, tokenizer)
    assert (warnings == []) is agree
    assert all("`distill_mask_eos: true`" in warning and "'<|im_end|>'" in warning for warning in warnings)


@pytest.fixture
def base_teacher(tmp_path):
    """A teacher that ends with another token than the tests' student."""
    build_model(seed=1).double().save_pretrained(tmp_path / "teacher")
    GenerationConfig(eos_token_id=END_OF_TEXT).save_pretrained(tmp_path / "teacher")
    base_tokenizer().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_trainer_and_dry_run_name_ends_that_differ(
    make_trainer,
    base_teacher,
    saved_teacher,
    tokenizer,
    tmp_path,
    caplog,
    no_weights,  # noqa: F811
):
    def start(**options):
        caplog.clear()
        with pytest.raises(AssertionError, match="weights were about to be loaded"):
            make_trainer(DGRPOTrainer, **options)
        return "end differently" in caplog.text

    def dry_run(**options):
        build_model().config.save_pretrained(tmp_path / "student")
        args = DGRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, **SHORT, **options)
        arguments = (Dataset.from_list(ROWS), tokenizer, Engine(), GPUS["h100-80gb"])
        report = preflight(args, str(tmp_path / "student"), *arguments)
        return any("end differently" in warning for warning in report.warnings)

    assert start(teacher_model=base_teacher) and not start(teacher_model=saved_teacher)
    assert not start(teacher_model=base_teacher, distill_mask_eos=True)
    assert dry_run(teacher_model_name_or_path=base_teacher)
    assert not dry_run(teacher_model_name_or_path=saved_teacher)
    assert not dry_run(teacher_model_name_or_path=base_teacher, distill_mask_eos=True)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("masks", [False, True])
def test_the_end_is_in_the_teacher_term_or_not(make_trainer, make_model, loss_type, masks):
    student, teacher = make_model().double(), make_model(seed=1).double()
    options = {"loss_type": loss_type, "distill_mask_eos": masks, "distill_coef": 1.0, "beta": 0.0}
    trainer = make_trainer(DGRPOTrainer, student, teacher_model=copy.deepcopy(teacher), **options)
    generate = trainer._generate_single_turn

    def ended(*args, **kwargs):
        ids, logps = generate(*args, **kwargs)
        return [[i if i > 2 else 7 for i in row[: 3 + n]] + [IM_END] * (n != 3) for n, row in enumerate(ids)], logps

    trainer._generate_single_turn = ended
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])  # the teacher term alone
    loss = trainer.compute_loss(trainer.model, inputs)
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()))
    got = trainer._metrics["train"]

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    first = inputs["prompt_ids"].size(1) - 1
    policy, taught = (
        model(input_ids=ids, attention_mask=attention_mask).logits[:, first:-1] for model in (trainer.model, teacher)
    )
    divergence = reference.divergence(policy, taught.detach(), "reverse_kl")
    mask = inputs["completion_mask"].double()
    is_end = inputs["completion_ids"] == IM_END
    assert (is_end * mask).sum() == 3  # one completion was cut off
    normalized_by, num_items = mask, mask.sum()
    if masks:
        mask = mask * ~is_end
    expected = reference.normalize(divergence * mask, normalized_by, loss_type, 8, num_items, 1)
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-9, atol=1e-12)
    wanted = torch.autograd.grad(expected, list(trainer.model.parameters()))
    largest = max(w.abs().max().item() for w in wanted)
    for g, w in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6 * largest)  # as in `test_trainer`: in part in float32
    assert got["distill/divergence"][-1] == pytest.approx(((divergence * mask).sum() / mask.sum()).item(), rel=1e-9)


def test_a_completion_that_is_an_end_alone_has_no_teacher_term(make_trainer, make_model):
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), distill_mask_eos=True, loss_type="grpo")
    trainer._generate_single_turn = lambda prompt_ids, *args: ([[IM_END]] * len(prompt_ids), None)
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "distill/loss" in entry]
    assert losses and all(entry["distill/loss"] == 0 and "distill/divergence" not in entry for entry in losses)


# --- Prompts beyond the positions


LONG = [{"prompt": [{"role": "user", "content": "ship " * 300}]}] * 4


@pytest.mark.parametrize("is_stream", [False, True])
def test_prompts_beyond_the_positions_train_where_that_is_allowed(make_trainer, make_model, is_stream, caplog):
    def train(**options):
        rows = Dataset.from_list(LONG)
        rows = rows.to_iterable_dataset() if is_stream else rows
        make_trainer(
            DGRPOTrainer, teacher_model=make_model(seed=1), train_dataset=rows, max_steps=1, **options
        ).train()

    with pytest.raises(ValueError, match="256 positions of the student.* set `allow_extrapolation: true`"):
        train()
    train(allow_extrapolation=True)
    assert is_stream or "256 positions of the student" in caplog.text


def test_the_dry_run_sft_and_the_evaluation_allow_the_same(saved_teacher, tokenizer, tmp_path):
    for allowed in (False, True):
        flag = {"allow_extrapolation": allowed}
        args = DGRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, distill_coef=0.0, **SHORT, **flag)
        arguments = (tokenizer, Engine(), GPUS["h100-80gb"])
        report = preflight(args, saved_teacher, Dataset.from_list(LONG), *arguments)
        assert len(report.warnings if allowed else report.problems) == 1
        assert not (report.problems if allowed else report.warnings)
        rows = Dataset.from_list([{**row, "completion": [{"role": "assistant", "content": "4"}]} for row in LONG])
        config, sft = build_model().config, SFTConfig("out", use_cpu=True, bf16=False, max_length=None)
        findings = supervised_findings(sft, Models(config, tokenizer, config), {"train_dataset": rows}, **flag)
        assert len(findings.warnings if allowed else findings.problems) == 1

    def evaluate(**options):
        lengths = {"tasks": ["niah_single_1"], "lengths": [1024], "num_samples": 1}
        EvaluationRun(EvaluationArguments(saved_teacher, output_dir=str(tmp_path / "eval"), **lengths, **options))

    with pytest.raises(ValueError, match="256 positions"):
        evaluate()
    evaluate(allow_extrapolation=True)


def test_vllms_own_limit_stays(make_trainer, no_weights):  # noqa: F811
    options = {"use_vllm": True, "vllm_max_model_length": 40, "allow_extrapolation": True, "distill_coef": 0.0}
    with pytest.raises(ValueError, match="more than `vllm_max_model_length`"):
        make_trainer(DGRPOTrainer, train_dataset=Dataset.from_list(LONG), reward_funcs=length_reward, **options)
