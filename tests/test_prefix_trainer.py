"""The trainer with a shared prefix against TRL's own and against itself without one."""

import copy
import itertools
import logging
from dataclasses import replace

import pytest
import torch
from conftest import build_model, given_rollouts
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from test_trainer import LORA, generation_batch, loss_and_gradients, rollouts_of, weights
from trl import GRPOTrainer, TrlParser

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.losses import LOSS_TYPES
from dgrpo_trl.shared_prefix import SUPPORTED_LAYERS, Group, PrefixLayout, pack
from dgrpo_trl.shared_prefix.kernels import MathKernel


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}


@pytest.fixture(autouse=True)
def seen_logs(caplog):
    caplog.set_level(logging.INFO, logger="dgrpo_trl")
    return caplog


@pytest.fixture
def packed_tokens(monkeypatch):
    """Tokens of every packed row that is run."""
    lengths = []

    def recording(*args, original=pack, **kwargs):
        packed = original(*args, **kwargs)
        lengths.append(packed.layout.num_tokens)
        return packed

    monkeypatch.setattr("dgrpo_trl.rollouts.pack", recording)
    return lengths


def apart(trainer, other, start):
    """Distance of two trained models, in units of what training moved them."""
    ours, theirs = weights(trainer), weights(other)
    moved = torch.cat([(ours[name] - start[name]).flatten() for name in start]).norm()
    assert moved > 1e-4
    return (torch.cat([(ours[name] - theirs[name]).flatten() for name in start]).norm() / moved).item()


# --- Equality with GRPOTrainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"peft_config": LoraConfig(**LORA, init_lora_weights=False), "beta": 0.1},
        {"num_iterations": 2, "loss_type": "grpo"},
        {"mask_truncated_completions": True},
        {"num_generations": 8, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 12, "beta": 0.1},
        {"per_device_train_batch_size": 12, "gradient_checkpointing": True},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 4, "loss_type": "dr_grpo"},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "per_device_train_batch_size": 8},
        {"shared_prefix": "auto", "gradient_accumulation_steps": 2, "loss_type": "bnpo"},
        {"shared_prefix": "auto", "gradient_accumulation_steps": 2, "top_entropy_quantile": 0.5},
        {"shared_prefix": "auto", "gradient_accumulation_steps": 2, "entropy_coef": 0.1},
        {"shared_prefix": "auto", "gradient_accumulation_steps": 2, "steps_per_generation": 4},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_training_equals_grpo_trainer(make_trainer, make_model, tokenizer, tmp_path, packed_tokens, options):
    make_model().save_pretrained(tmp_path / "student")  # a reference model is loaded by name
    tokenizer.save_pretrained(tmp_path / "student")
    trainers, options = [], copy.deepcopy(options)
    sharing = {"distill_coef": 0.0, "shared_prefix": options.pop("shared_prefix", "on")}
    for trainer_class, extra in ((DGRPOTrainer, sharing), (GRPOTrainer, {})):
        torch.manual_seed(0)
        trainer = make_trainer(
            trainer_class,
            str(tmp_path / "student"),
            max_steps=4,
            rollout_func=given_rollouts(tokenizer),
            **copy.deepcopy(options),
            **extra,
        )
        start = weights(trainer)
        trainer.train()
        trainers.append(trainer)
    assert packed_tokens
    assert apart(*trainers, start) < 1e-4
    ours, stock = (trainer.state.log_history[:-1] for trainer in trainers)
    for a, b in zip(ours, stock, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [{"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}],
    ids=["one micro-batch", "two"],
)
def test_a_mixture_of_experts_with_its_auxiliary_loss_equals_grpo_trainer(make_trainer, make_model, tokenizer, sizes):
    options = {"mask_truncated_completions": True, "max_steps": 3, **sizes}
    trainers = []
    for trainer_class, extra in ((DGRPOTrainer, {"distill_coef": 0.0, "shared_prefix": "auto"}), (GRPOTrainer, {})):
        trainer = make_trainer(
            trainer_class,
            make_model("Qwen3Moe", **EXPERTS),
            rollout_func=given_rollouts(tokenizer),
            **options,
            **extra,
        )
        start = weights(trainer)
        trainer.train()
        trainers.append(trainer)
    assert apart(*trainers, start) < 1e-4
    for a, b in zip(*(trainer.state.log_history[:-1] for trainer in trainers), strict=True):
        assert a["aux_loss"] == pytest.approx(b["aux_loss"], rel=1e-5)


def test_sampled_training_equals_grpo_trainer(make_trainer, make_model):
    """With the same random numbers: the prefill is shared, the draws are TRL's."""
    trainers = []
    for trainer_class, extra in ((DGRPOTrainer, {"distill_coef": 0.0, "shared_prefix": "on"}), (GRPOTrainer, {})):
        trainer = make_trainer(
            trainer_class, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, **extra
        )
        start = weights(trainer)
        torch.manual_seed(0)
        trainer.train()
        trainers.append(trainer)
    assert apart(*trainers, start) < 1e-4


# --- With a teacher


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_iterations": 2, "beta": 0.1},
        {"mask_truncated_completions": True},
        {"gradient_checkpointing": True, "peft_config": LoraConfig(**LORA, init_lora_weights=False)},
        {"max_tokens_per_micro_batch": 60},
        {"shared_prefix_backend": "math"},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_training_with_a_teacher_is_the_same_with_and_without(
    make_trainer, make_model, tokenizer, tmp_path, packed_tokens, options
):
    make_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{'The ship. ' * (i % 3)}Number {i}?"}],
            "teacher_prompt": [{"role": "user", "content": f"Evidence {i}."}] if i % 2 else None,
        }
        for i in range(11, 31)
    ]
    trainers = []
    for shared_prefix in ("on", "off"):
        torch.manual_seed(0)
        trainer = make_trainer(
            DGRPOTrainer,
            str(tmp_path / "student"),
            teacher_model=make_model("Llama", seed=1, hidden_size=48, num_hidden_layers=3, head_dim=12),
            train_dataset=Dataset.from_list(rows),
            rollout_func=given_rollouts(tokenizer),
            shared_prefix=shared_prefix,
            per_device_train_batch_size=12,
            max_steps=4,
            **copy.deepcopy(options),
        )
        start = weights(trainer)
        trainer.train()
        trainers.append(trainer)
    assert packed_tokens
    assert apart(*trainers, start) < 1e-4
    for a, b in zip(*(trainer.state.log_history[:-1] for trainer in trainers), strict=True):
        for name in ("distill/loss", "distill/grpo_loss", "distill/divergence", "distill/teacher_entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_the_teacher_shares_its_own_prompt(make_trainer, make_model, packed_tokens):
    row = {
        "prompt": [{"role": "user", "content": "A very long document indeed, with a question: Number?"}],
        "teacher_prompt": [{"role": "user", "content": "Number?"}],
    }
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), train_dataset=Dataset.from_list([row] * 4))
    trainer.model.train()
    batch = generation_batch(trainer)
    trainer._generate_and_score_completions(batch)
    packed_tokens.clear()
    rollouts = trainer._generate_and_score_completions(batch)  # the comparisons of the first batch are over
    (teacher_prompt,) = {tuple(ids) for ids in trainer._teacher_prompt_ids(batch, rollouts)}
    assert packed_tokens == [len(teacher_prompt) - 1 + int(rollouts["completion_mask"].sum())]


# --- Micro-batches


def test_groups_stay_together_and_the_random_state_is_that_of_trl(make_trainer):
    states, contents, distinct = [], [], []
    for trainer_class, extra in ((DGRPOTrainer, {"distill_coef": 0.0}), (GRPOTrainer, {})):
        trainer = make_trainer(trainer_class, gradient_accumulation_steps=4, shuffle_dataset=False, **extra)
        trainer.model.train()
        torch.manual_seed(0)
        first = trainer._prepare_inputs(generation_batch(trainer))
        assert first is trainer._buffered_inputs[0]
        states.append(torch.get_rng_state())
        rows = [
            (tuple(prompt), tuple(completion), advantage)
            for inputs in trainer._buffered_inputs
            for prompt, completion, advantage in zip(
                *(inputs[name].tolist() for name in ("prompt_ids", "completion_ids", "advantages")), strict=True
            )
        ]
        contents.append(sorted((*row[:2], round(row[2], 4)) for row in rows))
        distinct.append([len({row[0] for row in rows[i : i + 4]}) for i in range(0, 16, 4)])
    assert torch.equal(*states) and contents[0] == contents[1]
    assert distinct[0] == [1, 1, 1, 1] and max(distinct[1]) > 1


def test_rows_that_must_stay_in_their_micro_batches_are_named(make_trainer, seen_logs):
    options = {"distill_coef": 0.0, "gradient_accumulation_steps": 2, "loss_type": "bnpo"}
    make_trainer(DGRPOTrainer, **options)
    assert seen_logs.text.count("normalized by itself by loss_type='bnpo'.") == 1
    seen_logs.clear()
    make_trainer(DGRPOTrainer, **options | {"shared_prefix": "on"})
    make_trainer(DGRPOTrainer, **options | {"gradient_accumulation_steps": 1})
    assert "normalized by itself" not in seen_logs.text


@pytest.mark.parametrize(
    ("loss_type", "shared_prefix"), list(zip(LOSS_TYPES, itertools.cycle(["on", "off"]), strict=False))
)
def test_bounded_micro_batches_have_the_gradient_of_the_whole(make_trainer, make_model, shared_prefix, loss_type):
    def trainer(**options):
        return make_trainer(
            DGRPOTrainer,
            make_model().double(),
            teacher_model=make_model(seed=1).double(),
            per_device_train_batch_size=8,
            top_entropy_quantile=0.5,
            entropy_coef=0.1,
            shared_prefix=shared_prefix,
            loss_type=loss_type,
            **options,
        )

    whole, bounded = trainer(), trainer(max_tokens_per_micro_batch=70 if shared_prefix == "on" else 150)
    rollouts = rollouts_of(whole)
    rollouts["completion_mask"][2, 3:] = 0
    calls = []
    bounded.model.model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    (loss, gradients), (bounded_loss, bounded_gradients) = (
        loss_and_gradients(trainer, rollouts) for trainer in (whole, bounded)
    )
    assert len(calls) >= 4 and len(calls) % 2 == 0  # each part forward, and again in backward
    torch.testing.assert_close(bounded_loss, loss, rtol=1e-6, atol=1e-9)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name in gradients:  # the tolerance is that of the float32 within the model, see test_trainer
        torch.testing.assert_close(bounded_gradients[name], gradients[name], rtol=1e-4, atol=1e-6 * largest)
    for name in ("entropy", "distill/divergence"):
        assert bounded._metrics["train"][name] == pytest.approx(whole._metrics["train"][name], rel=1e-6)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_bounded_micro_batches_with_checkpointing_and_experts(make_trainer, make_model, checkpointing):
    def trainer(**options):
        trainer = make_trainer(
            DGRPOTrainer,
            make_model("Qwen3Moe", **EXPERTS),
            teacher_model=make_model(seed=1),
            per_device_train_batch_size=8,
            shared_prefix="on",
            gradient_checkpointing=checkpointing is not None,
            gradient_checkpointing_kwargs=checkpointing,
            **options,
        )
        if checkpointing is not None:
            trainer.model.gradient_checkpointing_enable(checkpointing)
            trainer.model.enable_input_require_grads()
        return trainer

    whole, bounded = trainer(), trainer(max_tokens_per_micro_batch=70)
    rollouts = rollouts_of(whole)
    (loss, gradients), (bounded_loss, bounded_gradients) = (
        loss_and_gradients(trainer, rollouts) for trainer in (whole, bounded)
    )
    torch.testing.assert_close(bounded_loss, loss, rtol=1e-5, atol=1e-6)
    for name in gradients:
        torch.testing.assert_close(bounded_gradients[name], gradients[name], rtol=1e-3, atol=1e-5)
    assert bounded._metrics["train"]["aux_loss"] == pytest.approx(whole._metrics["train"]["aux_loss"], rel=1e-5)


def test_the_bound_holds_for_everything_that_is_run(make_trainer, make_model, tokenizer, packed_tokens):
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model=make_model(seed=1),
        per_device_train_batch_size=8,
        num_iterations=2,
        max_tokens_per_micro_batch=60,
        rollout_func=given_rollouts(tokenizer),
    )
    trainer.train()
    assert len(packed_tokens) > 8 and max(packed_tokens) <= 60


def test_a_fully_masked_micro_batch_trains_on(make_trainer, make_model):
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model=make_model(seed=1),
        mask_truncated_completions=True,
        max_completion_length=2,
        shared_prefix="on",
        max_tokens_per_micro_batch=20,
    )
    trainer.generation_config.suppress_tokens = [2]
    trainer.train()
    assert trainer.state.global_step == 2


# --- Where it is on, off and refused


def test_auto_is_on_where_it_is_exact_and_says_so(make_trainer, make_model, seen_logs):
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1))
    assert trainer.sharing.is_on and trainer.teacher.sharing.is_on
    trainer.train()
    assert "Shared prefix: on for the student" in seen_logs.text
    assert "Shared prefix: exact for the teacher to" in seen_logs.text


def test_auto_is_off_for_what_was_not_tested_and_says_why(make_trainer, make_model, seen_logs, packed_tokens):
    teacher = make_model("StableLm", seed=1)
    trainer = make_trainer(DGRPOTrainer, teacher_model=teacher)
    assert trainer.sharing.is_on and not trainer.teacher.sharing.is_on
    trainer.train()
    lines = [record.getMessage() for record in seen_logs.records if "off for the teacher" in record.getMessage()]
    assert len(lines) == 1 and "'stablelm' is not among those that were tested" in lines[0]


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_on_is_refused_before_weights_load(make_trainer, make_model, tokenizer, tmp_path, who):
    path = tmp_path / "stablelm"
    make_model("StableLm").save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "model.safetensors").unlink()
    models = {"model": str(path), "teacher_model": make_model()}
    if who == "teacher":
        models = {"model": make_model(), "teacher_model": str(path)}
    with pytest.raises(ValueError, match=f"`shared_prefix` is 'on', but the {who} cannot.*'stablelm'.*'auto'"):
        make_trainer(DGRPOTrainer, shared_prefix="on", **models)


def test_eager_attention_is_not_shared(make_trainer, make_model, seen_logs):
    model = make_model()
    model.set_attn_implementation("eager")
    assert not make_trainer(DGRPOTrainer, model, distill_coef=0.0).sharing.is_on
    assert "'eager', not 'sdpa' or a flash one" in seen_logs.text
    with pytest.raises(ValueError, match="'eager', not 'sdpa'"):
        make_trainer(DGRPOTrainer, model, distill_coef=0.0, shared_prefix="on")


def test_prompt_tuning_is_not_shared(make_trainer, seen_logs):
    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert not make_trainer(DGRPOTrainer, distill_coef=0.0, peft_config=adapter).sharing.is_on
    assert "off for the student: its adapter puts virtual tokens before the prompt" in seen_logs.text


def test_off_leaves_the_parents_forward_alone(make_trainer):
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, shared_prefix="off")
    assert not trainer._scores
    assert "_prefill" not in vars(trainer.model)


def windowed_experts(seed=0):
    """A family whose window is in the mask alone: packed rows would be silently wrong beyond it."""
    return build_model(
        "Qwen2Moe",
        seed=seed,
        **EXPERTS,
        sliding_window=40,
        use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
    )


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_turns_out_wrong_is_caught_when_rows_outgrow_its_window(
    make_trainer, make_model, monkeypatch, seen_logs, who
):
    monkeypatch.setitem(SUPPORTED_LAYERS, "qwen2_moe", SUPPORTED_LAYERS["qwen3_moe"])  # as if by mistake
    short, long = ([{"role": "user", "content": content}] for content in ("Number?", "A long, long document. " * 9))

    def trainer(shared_prefix):
        return make_trainer(
            DGRPOTrainer,
            windowed_experts() if who == "student" else make_model(),
            teacher_model=make_model(seed=1) if who == "student" else windowed_experts(1),
            train_dataset=Dataset.from_list([{"prompt": short}, {"prompt": long}]),
            shuffle_dataset=False,
            shared_prefix=shared_prefix,
        )

    auto = trainer("auto")
    auto.train()  # one prompt a step
    assert auto.sharing.is_on is (who != "student") and auto.teacher.sharing.is_on is (who != "teacher")
    assert f"Shared prefix: exact for the {who} to" in seen_logs.text  # the short prompt
    assert "The shared prefix is switched off for it" in seen_logs.text
    with pytest.raises(RuntimeError, match=f"The hidden states of the {who} with a shared prefix differ"):
        trainer("on").train()


@pytest.mark.parametrize("breaks", [False, True], ids=["right", "completions see each other"])
def test_the_comparison_tells_wrong_from_rounded_in_bfloat16(make_trainer, monkeypatch, breaks):
    def one_branch(*args, original=pack, **kwargs):
        packed = original(*args, **kwargs)
        groups = (Group(g.start, g.prefix_length, (sum(g.branch_lengths),)) for g in packed.layout.groups)
        return replace(packed, layout=PrefixLayout(tuple(groups)))

    if breaks:
        monkeypatch.setattr("dgrpo_trl.rollouts.pack", one_branch)
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, bf16=True)
    trainer.train()
    assert trainer.sharing.is_on is not breaks
    error, tolerance = trainer.sharing.check.error, trainer.sharing.check.low_precision_tolerance
    assert error > tolerance if breaks else 0 < error < tolerance / 5


def test_lora_dropout_does_not_disturb_the_comparison(make_trainer, make_model):
    adapter = LoraConfig(**LORA, lora_dropout=0.5, init_lora_weights=False)
    trainer = make_trainer(DGRPOTrainer, teacher_model="base", peft_config=adapter, shared_prefix="on")
    trainer.train()
    assert 0 < trainer.sharing.check.error < 1e-4 and trainer.model.training


def test_the_backend_is_the_one_that_was_asked_for(make_trainer, monkeypatch):
    calls = []
    forward = MathKernel.forward
    monkeypatch.setattr(MathKernel, "forward", lambda *args: calls.append(1) or forward(*args))
    make_trainer(DGRPOTrainer, distill_coef=0.0, shared_prefix_backend="math").train()
    assert len(calls) > 10


# --- Configuration


@pytest.mark.parametrize(("value", "expected"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'off'", "off")])
def test_yaml_says_on_and_off(tmp_path, value, expected):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: {tmp_path}\nshared_prefix: {value}\nuse_cpu: true\nbf16: false\n")
    (config,) = TrlParser(DGRPOConfig).parse_args_and_config(["--config", str(path)])
    assert config.shared_prefix == expected
    (config,) = TrlParser(DGRPOConfig).parse_args_and_config(["--config", str(path), "--shared_prefix", "auto"])
    assert config.shared_prefix == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_prefix": "yes"}, "`shared_prefix` is 'yes'.*auto, on, off"),
        ({"shared_prefix_backend": "triton"}, "`shared_prefix_backend` is 'triton'.*flash_attention_3"),
        ({"max_tokens_per_micro_batch": 0}, "`max_tokens_per_micro_batch` must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
