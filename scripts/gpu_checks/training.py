"""Steps of training: against the CPU in each precision, a short run, and one with vLLM."""

import importlib.util
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from loss import add_teacher, make_rollouts, make_tokenizer, make_trainer
from shared_prefix import make_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from dgrpo_trl import DGRPOConfig, DGRPOTrainer

from . import Figures, Skipped, require


PRECISIONS = {
    "bf16 weights": (torch.bfloat16, False),
    "float32 weights, bf16 autocast": (torch.float32, True),
}
# Of the norm of the gradient, for bfloat16 against float32; a completion that sees another one gives more than 0.5
TOLERANCE = 0.1
NUM_ROWS = 4
LENGTHS = {"cuda": (2048, 256), "cpu": (64, 8)}  # of the prompt and of a completion


def check_step(precision: str, device: str) -> Figures:
    """Loss and gradient of a micro-batch of dGRPO in one of `PRECISIONS`, against float32 on the CPU."""
    dtype, autocast = PRECISIONS[precision]
    lengths = LENGTHS[device]
    expected_loss, expected = _gradient("cpu", lengths, dtype, torch.float32, autocast=False)
    loss, gradient = _gradient(device, lengths, dtype, dtype, autocast)
    error = ((gradient - expected).norm() / expected.norm()).item()
    figures = {"loss": loss, "loss of float32 on the CPU": expected_loss, "error of the gradient": error}
    require(error < TOLERANCE, f"the gradient is off by {error:.3g} of its norm: {figures}")
    require(
        math.isclose(loss, expected_loss, rel_tol=0.05, abs_tol=0.01), f"the loss is not that of float32: {figures}"
    )
    return figures


def check_offload(device: str) -> Figures:
    """Checkpoints of the layers, and the teacher, on the host: the gradient stays."""
    dtype = torch.bfloat16
    _, expected = _gradient(device, LENGTHS[device], dtype, dtype, autocast=False)
    options = {"gradient_checkpointing_kwargs": {"offload": True}, "teacher_offload": "cpu"}
    _, gradient = _gradient(device, LENGTHS[device], dtype, dtype, autocast=False, **options)
    error = ((gradient - expected).norm() / expected.norm()).item()
    require(error < 0.01, f"the gradient is off by {error:.3g} of its norm")  # kernels may add in another order
    return {"error of the gradient": error}


def _gradient(
    device: str, lengths: tuple[int, int], stored: torch.dtype, dtype: torch.dtype, autocast: bool, **options: Any
) -> tuple[float, torch.Tensor]:
    """Loss and gradient with weights that were rounded to `stored`, in `dtype`."""
    student, teacher = (make_model("cpu", sum(lengths) + 64).to(stored).to(dtype) for _ in range(2))
    with torch.no_grad():  # another model than the student
        teacher.lm_head.weight.mul_(1.5)
    trainer = make_trainer(
        *(student, teacher, NUM_ROWS, device),
        **{"bf16": autocast, "shared_prefix": "on", "gradient_checkpointing": True, **options},
        max_completion_length=lengths[1],
    )
    generator = torch.Generator().manual_seed(0)
    prompt, *completions = (
        torch.randint(1, student.config.vocab_size, (n,), generator=generator)
        for n in (lengths[0], *[lengths[1]] * NUM_ROWS)
    )
    rollouts = make_rollouts(prompt.repeat(NUM_ROWS, 1).to(device), torch.stack(completions).to(device))
    add_teacher(trainer, rollouts, rollouts["prompt_ids"].tolist())
    loss = trainer.compute_loss(trainer.model, rollouts)
    loss.backward()
    gradient = torch.cat([p.grad.flatten().cpu().float() for p in trainer.model.parameters()])
    return loss.item(), gradient


def check_training(device: str) -> Figures:
    """A short run of on-policy distillation: the student comes nearer to the teacher."""
    log = _train(device, max_steps=30)
    first, last = (log[i]["distill/divergence"] for i in (0, -1))
    figures = {"first divergence": first, "last divergence": last, "seconds of a step": log[-1]["step_time"]}
    require(last < 0.7 * first, f"the divergence to the teacher does not fall: {figures}")
    return figures


def check_vllm(device: str) -> Figures:
    """Two steps with vLLM in the same process, which sleeps while the student trains."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed: `make install-gpu`")
    log = _train(
        device,
        max_steps=2,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=0.2,
    )
    differences = [step["sampling/sampling_logp_difference/mean"] for step in log]
    figures = {"mean difference of log-probabilities": max(differences)}
    require(len(log) == 2 and max(differences) < 0.1, f"vLLM does not sample from the student: {differences}")
    return figures


def tiny_model(seed: int) -> Qwen3ForCausalLM:
    """Random weights, with heads of a size that all kernels take."""
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def save_models(folder: Path) -> tuple[str, str]:
    """Paths of a student and of a teacher, with their tokenizer."""
    paths = str(folder / "student"), str(folder / "teacher")
    for seed, path in enumerate(paths):
        model = tiny_model(seed)
        with torch.no_grad():  # so that there is something to learn
            model.lm_head.weight.mul_(8.0 if seed else 1.0)
        model.save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return paths


def _train(device: str, **options: Any) -> list[dict[str, float]]:
    """What each step of a run of on-policy distillation logged."""
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = save_models(Path(folder))
        trainer = DGRPOTrainer(
            student,
            args=DGRPOConfig(
                folder,
                per_device_train_batch_size=8,
                num_generations=8,
                max_completion_length=16,
                distill_coef=1.0,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=True,
                use_cpu=device == "cpu",
                **options,
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(1, 90)]}),
            processing_class=make_tokenizer(),
            teacher_model=teacher,
        )
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
