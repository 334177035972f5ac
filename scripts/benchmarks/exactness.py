"""How far packed forwards in bfloat16 are from plain ones, over the depth of a model: rounding, and faults.

    python scripts/benchmarks/exactness.py [--layers 2 8 32 64] [--lengths 2048x64] [--seeds 2]

Two completions of one prompt, of P x C tokens, through a Qwen3 with random weights. In units of what rounding does to
plain forwards (the same rows at other positions), as `ExactnessCheck` measures it: the error of a right packed row,
and of rows with faults. Its `noise_factor` must lie between them.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM

from dgrpo_trl import rollouts
from dgrpo_trl.rollouts import completion_states
from dgrpo_trl.scoring import add_completion_scoring
from dgrpo_trl.shared_prefix import ExactnessCheck, Group, PackedRollouts, PrefixLayout, pack, register


def one_branch(packed: PackedRollouts) -> PackedRollouts:
    """The second completion sees the first."""
    (group,) = packed.layout.groups
    joined = replace(group, branch_lengths=(sum(group.branch_lengths),))
    return replace(packed, layout=PrefixLayout((joined,), packed.layout.backend))


def running_positions(packed: PackedRollouts) -> PackedRollouts:
    """The second completion stands after the first."""
    return replace(packed, position_ids=torch.arange(packed.layout.num_tokens).unsqueeze(0))


def no_prefix(packed: PackedRollouts) -> PackedRollouts:
    """The second completion does not see the prompt."""
    (group,) = packed.layout.groups
    first = Group(0, group.prefix_length, group.branch_lengths[:1])
    second = Group(first.branches.stop, 0, group.branch_lengths[1:])
    return replace(packed, layout=PrefixLayout((first, second), packed.layout.backend))


def one_position_on(packed: PackedRollouts) -> PackedRollouts:
    """Both completions stand one position too far."""
    (group,) = packed.layout.groups
    positions = packed.position_ids.clone()
    positions[:, group.prefix_length :] += 1
    return replace(packed, position_ids=positions)


Change = Callable[[PackedRollouts], PackedRollouts]
WAYS: dict[str, Change] = {
    "right": lambda packed: packed,
    "sees the other": one_branch,
    "runs on": running_positions,
    "no prompt": no_prefix,
    "one position on": one_position_on,
}


def make_model(num_layers: int, num_tokens: int, seed: int) -> Qwen3ForCausalLM:
    """Thin, with weights so large that every layer matters."""
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=num_tokens + 128,
        initializer_range=256**-0.5,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    add_completion_scoring(model)
    register("sdpa")
    return model


@torch.no_grad()
def measure(num_layers: int, lengths: tuple[int, int], seed: int) -> dict[str, tuple[float, float]]:
    """Of each of `WAYS` the mean relative error of the states, and what rounding does."""
    accelerator = Accelerator(cpu=True)
    model = make_model(num_layers, sum(lengths), seed)
    generator = torch.Generator().manual_seed(seed)
    prompt, *completions = (
        torch.randint(1, 1024, (n,), generator=generator).tolist() for n in (lengths[0], lengths[1], lengths[1])
    )
    plain: dict[tuple, torch.Tensor] = {}

    def states(prompts, completions, shares_prefix, first_position=0):
        arguments = (prompts, completions, shares_prefix, first_position)
        if shares_prefix:
            return completion_states(model, accelerator, 0, "auto", *arguments)
        key = (tuple(completions[0]), first_position)  # the same for every way
        if key not in plain:
            plain[key] = completion_states(model, accelerator, 0, "auto", *arguments)
        return plain[key]

    found = {}
    for way, change in WAYS.items():
        check = ExactnessCheck(accelerator, low_precision_tolerance=0.0)  # measures the rounding in any case
        with mock.patch.object(rollouts, "pack", lambda *args, change=change: change(pack(*args))):
            check.passes([prompt] * 2, completions, states)
        found[way] = (check.error, check.noise)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 8, 32, 64])
    parser.add_argument("--lengths", default="2048x64", metavar="PxC")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    lengths = tuple(int(part) for part in args.lengths.split("x"))
    print(f"P x C: {args.lengths}, times what rounding does\n\n| layers | seed | rounding | {' | '.join(WAYS)} |")
    print("| --- " * (3 + len(WAYS)) + "|")
    for num_layers in args.layers:
        for seed in range(args.seeds):
            found = measure(num_layers, lengths, seed)
            ratios = " | ".join(f"{error / noise:.2f}" for error, noise in found.values())
            print(f"| {num_layers} | {seed} | {found['right'][1]:.4f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
