"""How far the dry run's estimate of activations is from what a micro-batch takes.

    python scripts/benchmarks/memory.py [--lengths 512x128 2048x128 2048x512]

One prompt of P tokens with 8 completions of C tokens; with and without the shared prefix and gradient checkpointing.
The measured value is what loss and backward add to a process that holds the models and the gradients: the allocator's
peak on CUDA, the growth of the peak resident set elsewhere, each in a process of its own.
"""

import argparse
import os
from pathlib import Path

import torch
from loss import add_teacher, in_child, make_rollouts, make_trainer
from shared_prefix import make_model

from dgrpo_trl.preflight import Shape, micro_batch_bytes


NUM_ROWS = 8


def make_step(device: str, shares: bool, checkpoints: bool, lengths: tuple[int, int]):
    max_length = sum(lengths) + 64
    trainer = make_trainer(
        make_model(device, max_length),
        make_model(device, max_length),
        NUM_ROWS,
        device,
        gradient_checkpointing=checkpoints,
        max_completion_length=lengths[1],
        shared_prefix="on" if shares else "off",
    )
    generator = torch.Generator().manual_seed(0)
    size = trainer.model.config.vocab_size
    prompt = torch.randint(1, size, (1, lengths[0]), generator=generator).repeat(NUM_ROWS, 1)
    completions = torch.randint(1, size, (NUM_ROWS, lengths[1]), generator=generator)
    return trainer, make_rollouts(prompt.to(device), completions.to(device))


def measure(device: str, shares: bool, checkpoints: bool, lengths: tuple[int, int]) -> float:
    """Peak MiB that loss and backward add."""
    trainer, rollouts = make_step(device, shares, checkpoints, lengths)
    short = make_rollouts(rollouts["prompt_ids"][:, :32], rollouts["completion_ids"][:, :8])
    for inputs in (short, rollouts):  # kernels and gradients are there after the first
        add_teacher(trainer, inputs, inputs["prompt_ids"].tolist())
        if inputs is rollouts:
            before = held_mib(device)
        trainer.compute_loss(trainer.model, dict(inputs)).backward()
    return peak_mib(device) - before


def held_mib(device: str) -> float:
    """Memory held now, from which on the peak is counted anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_mib(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def estimate(device: str, shares: bool, checkpoints: bool, lengths: tuple[int, int]) -> float:
    shape = Shape.of(make_model("cpu", 64).config if device == "cpu" else _config())
    prompt, completion = lengths
    tokens = prompt + NUM_ROWS * completion if shares else NUM_ROWS * (prompt + completion)
    return (
        micro_batch_bytes(
            shape,
            shape,
            tokens,
            NUM_ROWS * completion,
            width=2 if device == "cuda" else 4,
            stream=2 if device == "cuda" else 4,
            checkpoints=checkpoints,
            device_type=device,
        )
        / 2**20
    )


def _config():
    with torch.device("meta"):
        return make_model("cuda", 64).config


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", default=["512x128", "2048x128", "2048x512"], metavar="PxC")
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of the processes to come: what they free goes back at once
    print("| P | C | shared prefix | checkpointing | estimate, MiB | measured, MiB | error |")
    print("| --- " * 7 + "|")
    for text in args.lengths:
        lengths = tuple(int(part) for part in text.split("x"))
        for shares in (True, False):
            for checkpoints in (False, True):
                guess = estimate(device, shares, checkpoints, lengths)
                found = in_child(measure, device, shares, checkpoints, lengths)
                words = ("on" if shares else "off", "on" if checkpoints else "off")
                print(
                    f"| {lengths[0]} | {lengths[1]} | {words[0]} | {words[1]} | {guess:.0f} | {found:.0f} | "
                    f"{guess / found - 1:+.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
