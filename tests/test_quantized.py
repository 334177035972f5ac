"""Quantized students and teachers, where bitsandbytes is installed: the same numbers as anywhere else."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dgrpo_trl import DGRPOTrainer


pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # multiples of its blocks
BITS = {
    4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
    8: {"load_in_8bit": True},
}
METRICS = ("loss", "grad_norm", "distill/divergence", "distill/loss", "entropy")


@pytest.fixture
def saved(make_model, tokenizer, tmp_path):
    """Folders of a student and of a teacher."""
    folders = []
    for seed, name in enumerate(("student", "teacher")):
        folders.append(str(tmp_path / name))
        make_model(seed=seed, **SIZES).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


def history(trainer):
    trainer.train()
    return [[entry[name] for name in METRICS] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("teacher", ["other", "base"])
@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_student_learns_the_same_with_and_without_the_shared_prefix(make_trainer, saved, bits, teacher):
    student, other = saved
    histories = {}
    for shared_prefix in ("on", "off"):
        trainer = make_trainer(
            DGRPOTrainer,
            student,
            quantization_config=BitsAndBytesConfig(**BITS[bits]),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
            teacher_model="base" if teacher == "base" else other,
            shared_prefix=shared_prefix,
            bf16=False,
        )
        histories[shared_prefix] = history(trainer)
    assert all(entry[1] > 0.1 for entry in histories["on"])  # the gradient reaches the adapter
    # Weights of 8 bits see rounded activations, and rows of another batch round otherwise
    assert torch.allclose(*map(torch.tensor, histories.values()), rtol=0.1 if bits == 8 else 1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_teacher_teaches_what_its_weights_say(make_trainer, saved, bits):
    student, teacher = saved
    config = BitsAndBytesConfig(**BITS[bits])
    plain = AutoModelForCausalLM.from_pretrained(teacher, quantization_config=config).dequantize()
    histories = [
        history(make_trainer(DGRPOTrainer, student, teacher_model=model, **options))
        for model, options in (
            (teacher, {"teacher_model_init_kwargs": {"quantization_config": BITS[bits]}}),
            (plain, {}),
            (teacher, {}),
        )
    ]
    quantized, dequantized, other = map(torch.tensor, histories)
    assert torch.allclose(quantized, dequantized, rtol=2e-2 if bits == 8 else 1e-3, atol=1e-3)
    assert not torch.equal(quantized, other)
