import copy
import itertools
import json

import pytest
import reference
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.losses import DIVERGENCES, LOSS_TYPES


LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Not properties of the run: they measure the machine
TIMES = ("time", "runtime", "per_second", "tokens_per_second")


def history(trainer):
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMES)}
        for entry in trainer.state.log_history
    ]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def generation_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def rollouts_of(trainer):
    """One scored generation batch, in training mode and unshuffled."""
    trainer.model.train()
    return trainer._generate_and_score_completions(generation_batch(trainer))


def loss_and_gradients(trainer, rollouts):
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.accelerator.sync_gradients = True  # a run that was stopped within a step leaves False to all later ones
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(rollouts))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def completion_logits(model, prompt_ids, prompt_mask, rollouts, temperature):
    ids = torch.cat([prompt_ids, rollouts["completion_ids"]], 1)
    mask = torch.cat([prompt_mask, rollouts["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, prompt_ids.size(1) - 1 : -1] / temperature


def reference_loss(trainer, student, teacher, rollouts):
    """The whole objective from full logits, for one micro-batch that is a whole generation batch."""
    args = trainer.args
    prompts = rollouts["prompt_ids"], rollouts["prompt_mask"]
    logits = completion_logits(student, *prompts, rollouts, args.temperature)
    with torch.no_grad():
        teacher_logits = completion_logits(teacher, *prompts, rollouts, args.temperature)
    shared = min(logits.size(-1), teacher_logits.size(-1))
    divergence = reference.divergence(
        logits[..., :shared], teacher_logits[..., :shared], args.distill_divergence, args.distill_jsd_mixture
    )
    logps = logits.log_softmax(-1).gather(-1, rollouts["completion_ids"][..., None])[..., 0]
    mask = rollouts["completion_mask"]
    if "tool_mask" in rollouts:
        mask = mask * rollouts["tool_mask"]
    grpo = reference.grpo_per_token(logps, rollouts["advantages"], args.loss_type, args)
    return reference.normalize(
        grpo + args.distill_coef * divergence,
        mask,
        args.loss_type,
        args.max_completion_length,
        rollouts["num_items_in_batch"].item(),
        1,
    )


def assert_equals_reference(trainer, rollouts, teacher, rtol=1e-6):
    student = copy.deepcopy(trainer.model)
    # The trainer's patched forward is bound to the original; the copy computes plain logits
    student.forward = type(student).forward.__get__(student)
    loss, gradients = loss_and_gradients(trainer, rollouts)
    student.zero_grad()
    expected = reference_loss(trainer, student, teacher, rollouts)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach().double(), rtol=rtol, atol=1e-9)
    largest = max(p.grad.abs().max() for p in student.parameters() if p.grad is not None)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=rtol, atol=rtol * largest, msg=lambda m, name=name: f"{name}: {m}"
        )


# --- The objective


# Every loss type, and every divergence with and without sharing: `test_losses` has each by itself
@pytest.mark.parametrize(
    ("loss_type", "divergence", "shared_prefix"),
    list(zip(LOSS_TYPES, itertools.cycle(DIVERGENCES), itertools.cycle(["on", "off"]), strict=False)),
)
def test_loss_and_every_gradient_equal_the_float64_reference(
    make_trainer, make_model, shared_prefix, divergence, loss_type
):
    teacher = make_model(seed=1).double()
    trainer = make_trainer(
        DGRPOTrainer,
        make_model().double(),
        teacher_model=copy.deepcopy(teacher),
        distill_coef=0.7,
        distill_divergence=divergence,
        distill_jsd_mixture=0.3,
        loss_type=loss_type,
        temperature=0.8,
        shared_prefix=shared_prefix,
    )
    rollouts = rollouts_of(trainer)
    rollouts["completion_mask"][1, 3:] = 0  # ragged
    rollouts["num_items_in_batch"] = rollouts["completion_mask"].sum()
    assert rollouts["advantages"].abs().max() > 0.1
    assert_equals_reference(trainer, rollouts, teacher)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None}),
        ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Phi", {}),  # its head has a bias
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logit_factors_soft_caps_biases_and_tied_heads_are_honoured(make_trainer, make_model, kind, options):
    student, teacher = (make_model(kind, seed=seed, **options).double() for seed in (0, 1))
    for model in (student, teacher):
        if model.get_output_embeddings().bias is not None:
            torch.nn.init.normal_(model.get_output_embeddings().bias)
    trainer = make_trainer(DGRPOTrainer, student, teacher_model=copy.deepcopy(teacher))
    assert_equals_reference(trainer, rollouts_of(trainer), teacher)


@pytest.mark.parametrize("sizes", [(300, 320), (320, 300)], ids=["larger teacher", "larger student"])
def test_heads_padded_to_different_sizes_just_work(make_trainer, make_model, sizes):
    teacher = make_model(seed=1, vocab_size=sizes[1]).double()
    trainer = make_trainer(
        DGRPOTrainer, make_model(vocab_size=sizes[0]).double(), teacher_model=copy.deepcopy(teacher)
    )
    rollouts = rollouts_of(trainer)
    rollouts["completion_ids"].clamp_(max=299)  # a padding row that is sampled is tested below
    rollouts["teacher_hidden_states"] = rescored(trainer, rollouts)
    assert_equals_reference(trainer, rollouts, teacher)


def rescored(trainer, rollouts):
    prompts = [p[m.bool()].tolist() for p, m in zip(rollouts["prompt_ids"], rollouts["prompt_mask"], strict=True)]
    return trainer.teacher.hidden_states(prompts, rollouts["completion_ids"], rollouts["completion_mask"], 0, 4)


def test_a_sampled_padding_row_does_not_stop_a_teacher_without_it(make_trainer, make_model):
    trainer = make_trainer(DGRPOTrainer, make_model(vocab_size=320), teacher_model=make_model(seed=1))
    rollouts = rollouts_of(trainer)
    rollouts["completion_ids"][:, 1] = 319
    rollouts["teacher_hidden_states"] = rescored(trainer, rollouts)
    loss, _ = loss_and_gradients(trainer, rollouts)
    assert loss.isfinite()


def test_a_teacher_of_another_width_and_depth(make_trainer, make_model):
    teacher = make_model("Llama", seed=1, hidden_size=48, num_hidden_layers=3, head_dim=12).double()
    trainer = make_trainer(DGRPOTrainer, make_model().double(), teacher_model=copy.deepcopy(teacher))
    assert_equals_reference(trainer, rollouts_of(trainer), teacher)


def test_tool_tokens_are_left_out_of_both_terms(make_trainer, make_model):
    teacher = make_model(seed=1).double()
    trainer = make_trainer(DGRPOTrainer, make_model().double(), teacher_model=copy.deepcopy(teacher))
    rollouts = rollouts_of(trainer)
    rollouts["tool_mask"] = torch.ones_like(rollouts["completion_mask"])
    rollouts["tool_mask"][:, 2:5] = 0
    rollouts["num_items_in_batch"] = (rollouts["tool_mask"] * rollouts["completion_mask"]).sum()
    assert_equals_reference(trainer, rollouts, teacher)


def test_tokens_of_an_environment_reach_neither_term(make_trainer, make_model, tokenizer):
    def rollout(prompts, trainer):
        ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
        completions = [[10 + i, 20, 21, 30 + i, 2] for i in range(len(prompts))]
        masks = [[1, 0, 0, 1, 1] for _ in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": masks}

    teacher = make_model(seed=1).double()
    trainer = make_trainer(
        DGRPOTrainer, make_model().double(), teacher_model=copy.deepcopy(teacher), rollout_func=rollout
    )
    rollouts = rollouts_of(trainer)
    assert rollouts["tool_mask"].tolist() == [[1, 0, 0, 1, 1]] * 4 and rollouts["num_items_in_batch"] == 12
    assert_equals_reference(trainer, rollouts, teacher)


def test_the_teacher_term_leaves_the_grpo_term_of_a_mixture_of_experts_as_it_is(make_trainer, make_model):
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}
    ours = make_trainer(DGRPOTrainer, make_model("Qwen3Moe", **options), teacher_model=make_model(seed=1), beta=0.0)
    stock = make_trainer(GRPOTrainer, make_model("Qwen3Moe", **options))
    rollouts = rollouts_of(ours)
    loss, _ = loss_and_gradients(ours, rollouts)
    teacher_term = ours._metrics["train"]["distill/loss"][-1]
    stock_loss, _ = loss_and_gradients(stock, rollouts)
    assert ours.aux_loss_enabled and ours._metrics["train"]["aux_loss"] == pytest.approx(
        stock._metrics["train"]["aux_loss"], rel=1e-6
    )
    assert loss.item() - teacher_term == pytest.approx(stock_loss.item(), abs=1e-6)


def test_the_divergence_of_a_teacher_equal_to_the_student_is_zero(make_trainer, make_model):
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model())
    loss_and_gradients(trainer, rollouts_of(trainer))
    metrics = trainer._metrics["train"]
    assert metrics["distill/divergence"] == [pytest.approx(0.0, abs=1e-7)]
    assert metrics["distill/top1_agreement"] == [1.0]


def test_the_gradient_moves_the_student_towards_the_teacher(make_trainer, make_model):
    trainer = make_trainer(
        DGRPOTrainer, reward_funcs=None, teacher_model=make_model(seed=1), max_steps=12, learning_rate=0.1
    )
    trainer.train()
    divergences = [entry["distill/divergence"] for entry in trainer.state.log_history if "distill/divergence" in entry]
    assert divergences[-1] < 0.8 * divergences[0]


# --- Equality with GRPOTrainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
        {"peft_config": LoraConfig(**LORA), "beta": 0.1},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "mask_truncated_completions": True},
        {"bf16": True, "gradient_checkpointing": True, "optim": "adamw_torch", "loss_type": "sapo"},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "loss_type": "cispo"},
    ],
    ids=["default", "beta and two iterations", "lora", "accumulation", "bf16 and checkpointing", "entropy"],
)
def test_zero_coefficient_without_shared_prefix_is_grpo_bit_for_bit(
    make_trainer, make_model, tokenizer, tmp_path, options
):
    make_model().save_pretrained(tmp_path / "student")  # a reference model is loaded by name
    tokenizer.save_pretrained(tmp_path / "student")
    plain = {"distill_coef": 0.0, "shared_prefix": "off"}
    ours, stock = (
        make_trainer(cls, str(tmp_path / "student"), max_steps=3, eval_dataset=None, **options, **extra)
        for cls, extra in ((DGRPOTrainer, plain), (GRPOTrainer, {}))
    )
    for trainer in (stock, ours):
        torch.manual_seed(0)
        trainer.train()
    assert history(ours) == history(stock)
    for (name, p), (_, q) in zip(weights(ours).items(), weights(stock).items(), strict=True):
        assert torch.equal(p, q), name
    assert ours.teacher_model is None


@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "num_iterations": 2}, {"loss_type": "vespo"}], ids=str)
def test_with_a_teacher_the_grpo_term_is_the_parents(make_trainer, make_model, tokenizer, tmp_path, options):
    make_model().save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    path = str(tmp_path / "student")
    ours = make_trainer(DGRPOTrainer, path, teacher_model=make_model(seed=1), **options)
    stock = make_trainer(GRPOTrainer, path, **options)
    rollouts = rollouts_of(ours)
    if "old_per_token_logps" in rollouts:  # two iterations: the second is off-policy, so clipping is seen
        rollouts["old_per_token_logps"] = rollouts["old_per_token_logps"] + 0.3 * torch.randn(4, 8)
    loss_and_gradients(ours, rollouts)
    stock_loss, _ = loss_and_gradients(stock, rollouts)
    assert ours._metrics["train"]["distill/grpo_loss"] == [pytest.approx(stock_loss.item(), abs=1e-6)]
    for name in ("entropy", "kl", "clip_ratio/region_mean"):
        assert ours._metrics["train"][name] == pytest.approx(stock._metrics["train"][name], rel=1e-4, abs=1e-6)


# --- The teacher


def test_the_teacher_is_frozen_in_eval_mode_and_not_saved(make_trainer, saved_teacher, tmp_path):
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher, save_strategy="steps", save_steps=2)
    before = copy.deepcopy(trainer.teacher_model.state_dict())
    trainer.train()
    assert not trainer.teacher_model.training
    for name, parameter in trainer.teacher_model.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, before[name])
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert saved.state_dict().keys() == trainer.model.state_dict().keys()
    model_bytes = sum(p.numel() * 4 for p in trainer.model.parameters())
    assert sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) < 1.1 * model_bytes


def test_the_teachers_lm_head_never_runs_as_a_module(make_trainer, make_model):
    teacher = make_model(seed=1)
    trainer = make_trainer(DGRPOTrainer, teacher_model=teacher)
    calls = []
    teacher.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls


@pytest.mark.parametrize(
    ("student", "options", "expected"),
    [
        (torch.float32, {}, torch.float32),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.float32, {"bf16": True}, torch.bfloat16),
        (torch.float32, {"bf16": True, "teacher_model_init_kwargs": {"dtype": "float32"}}, torch.float32),
        (torch.float32, {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, torch.bfloat16),
    ],
)
def test_the_teacher_is_loaded_in_the_dtype_of_the_run(
    make_trainer, make_model, saved_teacher, student, options, expected
):
    trainer = make_trainer(
        DGRPOTrainer, make_model().to(student), teacher_model_name_or_path=saved_teacher, max_steps=1, **options
    )
    assert trainer.model.dtype == student and trainer.teacher_model.dtype == expected
    trainer.train()


def test_the_teacher_reads_its_own_prompt_where_there_is_one(make_trainer, make_model, tokenizer):
    teacher = make_model(seed=1)
    messages = [{"role": "user", "content": "Number?"}]
    rows = [
        {"prompt": [{"role": "user", "content": "The long document. Number?"}], "teacher_prompt": own}
        for own in (messages, None)
    ]
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model=copy.deepcopy(teacher),
        train_dataset=Dataset.from_list(rows),
        per_device_train_batch_size=8,
    )
    batch = generation_batch(trainer)
    trainer.model.train()
    rollouts = trainer._generate_and_score_completions(batch)
    for i, row in enumerate(batch):
        text = tokenizer.apply_chat_template(row["teacher_prompt"] or row["prompt"], add_generation_prompt=True)
        prompt = torch.tensor(text["input_ids"])
        mask = rollouts["completion_mask"][i].bool()
        ids = torch.cat([prompt, rollouts["completion_ids"][i][mask]])
        with torch.no_grad():
            expected = teacher.base_model(input_ids=ids[None]).last_hidden_state[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(rollouts["teacher_hidden_states"][i][mask], expected, rtol=1e-4, atol=1e-5)

    switched_off = make_trainer(
        DGRPOTrainer,
        teacher_model=copy.deepcopy(teacher),
        train_dataset=Dataset.from_list(rows),
        per_device_train_batch_size=8,
        teacher_prompt_column=None,
    )
    ids = switched_off._teacher_prompt_ids(batch, rollouts)
    assert ids == [p[m.bool()].tolist() for p, m in zip(rollouts["prompt_ids"], rollouts["prompt_mask"], strict=True)]


def test_base_teacher_is_the_student_without_its_adapter(make_trainer, make_model):
    options = {"peft_config": LoraConfig(**LORA, init_lora_weights=False), "distill_coef": 0.5}
    shared = make_trainer(DGRPOTrainer, teacher_model="base", **options)
    copied = make_trainer(DGRPOTrainer, teacher_model=make_model(), **options)
    assert shared.teacher_model is None
    rollouts = rollouts_of(shared)
    with_copy = dict(rollouts)
    with_copy["teacher_hidden_states"] = rescored(copied, rollouts)
    loss, gradients = loss_and_gradients(shared, rollouts)
    expected_loss, expected = loss_and_gradients(copied, with_copy)
    assert shared._metrics["train"]["distill/divergence"][-1] > 0.01
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys() and all("lora" in name for name in gradients)
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)
    assert shared.model.training


def test_no_reward_function_is_pure_distillation(make_trainer, make_model):
    trainer = make_trainer(DGRPOTrainer, reward_funcs=None, teacher_model=make_model(seed=1))
    before = weights(trainer)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["distill/grpo_loss"] == 0 and logged["distill/loss"] > 0
    assert not any("reward" in name for name in logged)
    assert any(not torch.equal(p, before[name]) for name, p in weights(trainer).items())


# --- What it works with


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"num_iterations": 2},
        {"steps_per_generation": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"beta": 0.1, "peft_config": LoraConfig(**LORA)},
        {"mask_truncated_completions": True},
        {"cast_lm_head_to_fp32": True, "bf16": True},
        {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
        {"remove_unused_columns": True},
    ],
    ids=str,
)
def test_trains_with(make_trainer, make_model, dataset, options):
    options = dict(options)
    if "eval_strategy" in options:
        options["eval_dataset"] = dataset.select(range(2))
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), **options)
    before = weights(trainer)
    trainer.train()
    for entry in trainer.state.log_history:
        for name in ("loss", "distill/loss", "distill/divergence"):
            assert entry.get(name) is None or torch.tensor(entry[name]).isfinite()
    if "mask_truncated_completions" not in options:  # there every random completion is cut off, see below
        assert any(not torch.equal(p, before[name]) for name, p in weights(trainer).items())
    if "eval_strategy" in options:
        logged = [entry for entry in trainer.state.log_history if "eval_distill/divergence" in entry]
        assert logged and logged[0]["eval_distill/divergence"] > 0


def test_gradient_checkpointing_changes_no_gradient(make_trainer, make_model):
    plain = make_trainer(DGRPOTrainer, make_model().double(), teacher_model=make_model(seed=1).double())
    rollouts = rollouts_of(plain)
    _, expected = loss_and_gradients(plain, rollouts)
    for use_reentrant in (False, True):
        trainer = make_trainer(
            DGRPOTrainer,
            make_model().double(),
            teacher_model=make_model(seed=1).double(),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        trainer.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        trainer.model.enable_input_require_grads()
        _, gradients = loss_and_gradients(trainer, rollouts)
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "shared_prefix"),
    [
        *zip([kind for kind in LOSS_TYPES if kind != "bnpo"], itertools.cycle(["on", "off"]), strict=False),
        ("dapo", "on"),
    ],
)
def test_batch_of_one_times_four_steps_is_a_batch_of_four(make_trainer, make_model, shared_prefix, loss_type):
    # `bnpo` is left out: it averages over the tokens of a micro-batch, so there the split matters by definition
    options = {
        "teacher_model": make_model(seed=1).double(),
        "loss_type": loss_type,
        "shared_prefix": shared_prefix,
    }
    # Gradients that reach a shared prompt pass the float32 of the model's norms added up, those of single rows do not
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if shared_prefix == "off" else {"rtol": 1e-4, "atol": 1e-6}
    whole = make_trainer(DGRPOTrainer, make_model().double(), **options)
    options["teacher_model"] = make_model(seed=1).double()
    split = make_trainer(
        DGRPOTrainer,
        make_model().double(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **options,
    )
    rollouts = rollouts_of(whole)
    rollouts["completion_mask"][2, 1:] = 0
    rollouts["num_items_in_batch"] = rollouts["completion_mask"].sum()
    loss, gradients = loss_and_gradients(whole, rollouts)
    losses, total = [], {}
    for micro_batch in split_tensor_dict(rollouts, 4):
        micro_loss, micro_gradients = loss_and_gradients(split, micro_batch)
        losses.append(micro_loss)
        for name, gradient in micro_gradients.items():
            total[name] = total.get(name, 0) + gradient
    torch.testing.assert_close(sum(losses), loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(total[name], gradient, **tolerance)
    assert sum(split._metrics["train"]["distill/loss"]) == pytest.approx(whole._metrics["train"]["distill/loss"][0])


def test_a_fully_masked_batch_has_zero_loss_and_still_steps(make_trainer, make_model):
    trainer = make_trainer(
        DGRPOTrainer, teacher_model=make_model(seed=1), mask_truncated_completions=True, max_completion_length=1
    )
    trainer.generation_config.suppress_tokens = [2]  # never ends: every completion is truncated, hence masked
    trainer.train()
    assert trainer.state.global_step == 2
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]


def test_resumes_as_exactly_as_the_parent(make_trainer, make_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    for trainer_class, extra in ((GRPOTrainer, {}), (DGRPOTrainer, {"teacher_model": make_model(seed=1)})):
        straight = make_trainer(trainer_class, output_dir=str(tmp_path / trainer_class.__name__), **options, **extra)
        straight.train()
        resumed = make_trainer(trainer_class, output_dir=str(tmp_path / trainer_class.__name__), **options, **extra)
        resumed.train(resume_from_checkpoint=str(tmp_path / trainer_class.__name__ / "checkpoint-2"))
        assert resumed.state.global_step == 4
        for name, p in weights(straight).items():
            assert torch.equal(p, weights(resumed)[name]), f"{trainer_class.__name__}: {name}"


# --- What is logged, and the card


def test_logged_metrics_are_those_of_the_definitions(make_trainer, make_model):
    teacher = make_model(seed=1)
    trainer = make_trainer(DGRPOTrainer, teacher_model=copy.deepcopy(teacher))
    rollouts = rollouts_of(trainer)
    rollouts["completion_mask"][0, 5:] = 0  # 5 tokens: quarters of 2
    rollouts["completion_mask"][1, 1:] = 0  # 1 token is both quarters
    student = make_model()
    prompts = rollouts["prompt_ids"], rollouts["prompt_mask"]
    with torch.no_grad():
        logits, teacher_logits = (completion_logits(m, *prompts, rollouts, 1.0) for m in (student, teacher))
    divergence = reference.divergence(logits.double(), teacher_logits.double(), "reverse_kl")
    log_t = teacher_logits.double().log_softmax(-1)
    loss_and_gradients(trainer, rollouts)
    mask = rollouts["completion_mask"].bool()
    lengths = mask.sum(-1).tolist()
    first = [divergence[i, : -(-n // 4)] for i, n in enumerate(lengths)]
    last = [divergence[i, n - -(-n // 4) : n] for i, n in enumerate(lengths)]
    expected = {
        "distill/divergence": divergence[mask].mean(),
        "distill/divergence_first_quarter": torch.cat(first).mean(),
        "distill/divergence_last_quarter": torch.cat(last).mean(),
        "distill/teacher_entropy": -(log_t.exp() * log_t).sum(-1)[mask].mean(),
        "distill/top1_agreement": (logits.argmax(-1) == teacher_logits.argmax(-1))[mask].double().mean(),
    }
    for name, value in expected.items():
        assert trainer._metrics["train"][name] == [pytest.approx(value.item(), rel=1e-4)], name


def test_the_two_terms_add_up_to_the_loss_and_reach_the_log(make_trainer, make_model):
    trainer = make_trainer(
        DGRPOTrainer,
        teacher_model=make_model(seed=1),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        beta=0.0,
    )
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        assert entry["distill/grpo_loss"] + entry["distill/loss"] == pytest.approx(entry["loss"], abs=1e-4)
        assert 0 < entry["distill/teacher_time_share"] < 1


def test_the_model_card_names_the_method_and_the_paper(make_trainer, make_model, tmp_path):
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1))
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("dgrpo", "dGRPO", "2605.12227", "ramos2026recipe", "Ramos"):
        assert words in card


def test_special_tokens_in_a_prompt_stay_text(make_trainer, tokenizer):
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (ids,), _, _ = trainer._tokenize_prompts([[{"role": "user", "content": "a <|im_end|> b <|endoftext|>"}]])
    assert ids.count(end) == 1 and tokenizer.convert_tokens_to_ids("<|endoftext|>") not in ids
    assert "<\u200b|im_end|>" in tokenizer.decode(ids)


def test_the_checkpoint_holds_no_trace_of_the_teacher(make_trainer, make_model, tmp_path):
    trainer = make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), save_strategy="steps", save_steps=2)
    trainer.train()
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert any("distill/divergence" in entry for entry in state["log_history"])
    assert not list((tmp_path / "out").rglob("*teacher*"))
