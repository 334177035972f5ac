"""The benchmarks of `scripts/benchmarks`, short, and the dry run's estimate of memory against what is measured."""

import math

import loss
import memory
import shared_prefix
import torch

from . import Figures, require


# Completion tokens, vocabulary, hidden sizes of student and teacher
LOSS_SIZES = {"cuda": (4096, 151_936, 2048, 5120), "cpu": (64, 1000, 32, 48)}
PREFIXES = {"cuda": [(8192, 512), (32_768, 512)], "cpu": [(48, 8)]}
MEMORIES = {"cuda": [(8192, 512), (32_768, 512)], "cpu": [(512, 64)]}
NUM_ROWS = 8
EVIDENCE_TOKENS = 32
# How far the estimate may be below and above what is measured
UNDERESTIMATE, OVERESTIMATE = 0.25, 0.6


def check_loss(device: str) -> Figures:
    """Seconds and MiB of the loss and its backward, beside those of TRL's and of full logits."""
    inputs = loss.make_inputs(*LOSS_SIZES[device], device)
    values = {way: loss.WAYS[way](*inputs).item() for way in ("naive", "ours")}
    is_right = math.isclose(values["naive"], values["ours"], rel_tol=0.01)
    require(is_right, f"the loss is {values['ours']}, and {values['naive']} by its definition")
    figures: Figures = {}
    for way in ("naive", "TRL GRPO", "ours"):
        seconds, mib = loss.in_child(loss.measure, way, LOSS_SIZES[device], device, 3)
        figures[way] = {"seconds": seconds, "MiB": mib}
    return figures


def check_prefix(device: str) -> Figures:
    """How many times faster than TRL's a micro-batch is whose completions share their prompt, and the ideal."""
    figures: Figures = {}
    for prompt, completion in PREFIXES[device]:
        seconds = loss.in_child(
            shared_prefix.measure_times, device, NUM_ROWS, (prompt, completion), EVIDENCE_TOKENS, 1
        )
        ideal = NUM_ROWS * (prompt + completion) / (prompt + NUM_ROWS * completion)
        on, off = (seconds[f"{way} student"] for way in ("on", "off"))
        ratio = seconds["TRL student"] / on
        figures[f"{prompt} x {completion}"] = {**seconds, "TRL / on": ratio, "share of ideal": ratio / ideal}
        if device == "cuda":  # a handful of tokens on a CPU says nothing
            require(
                not on > off, f"at {prompt} x {completion} the shared prefix takes {on:.3g} s, and {off:.3g} without"
            )
    return figures


def check_memory(device: str) -> Figures:
    """The dry run's estimate of a micro-batch's memory against the peak, with and without the shared prefix."""
    figures: Figures = {}
    for lengths in MEMORIES[device]:
        for shares in (True, False):
            estimate = memory.estimate(device, shares, True, lengths)
            try:
                measured = loss.in_child(memory.measure, device, shares, True, lengths)
            except torch.OutOfMemoryError:  # of a smaller GPU
                continue
            name = f"{lengths[0]} x {lengths[1]}, shared prefix {'on' if shares else 'off'}"
            figures[name] = {"estimated MiB": estimate, "measured MiB": measured, "error": estimate / measured - 1}
    errors = [figure["error"] for figure in figures.values()]
    require(bool(errors), "not even the smallest micro-batch fits")
    if device == "cuda":  # a CPU's peak holds what a small run allocates besides
        require(min(errors) > -UNDERESTIMATE and max(errors) < OVERESTIMATE, f"the estimate is off by {figures}")
    return figures
