"""Whether a model shares prompts, the comparison with plain forwards, regrouping, and the prefill of generation."""

import logging
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, build_model
from transformers import DynamicCache

from dgrpo_trl.rollouts import Rollouts, completion_states
from dgrpo_trl.scoring import add_completion_scoring
from dgrpo_trl.shared_prefix import ExactnessCheck, PrefixSharing, regroup, share_prefill
from dgrpo_trl.trl_compat import CACHE_NAMES


sys.path.append(str(ROOT / "scripts" / "benchmarks"))

from exactness import measure  # noqa: E402


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(autouse=True)
def seen_logs(caplog):
    caplog.set_level(logging.INFO, logger="dgrpo_trl")
    return caplog


# --- The comparison


def test_the_comparison_waits_for_two_rollouts_of_a_prompt_and_for_twice_the_length(accelerator):
    check = ExactnessCheck(accelerator)
    assert not check.is_due([[1, 2], [3, 4]], [[5], [6]])
    assert not check.is_due([[1, 2], [1, 2]], [[5], []])
    assert check.is_due([[1, 2], [1, 2]], [[5], [6]])
    assert not check.is_due([[1, 2], [1, 2]], [[5, 6, 7], [6]])
    assert check.is_due([[1, 2], [1, 2]], [[5, 6, 7, 8], [6]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_comparison_fails_for_nan(accelerator, dtype):
    states = torch.ones(2, 4, dtype=dtype)
    states[1] = torch.nan
    assert not ExactnessCheck(accelerator).passes([[1]] * 2, [[2]] * 2, lambda prompts, *_: states[-len(prompts) :])


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        ([[1, 2], [1, 2]], [[5], [6]]),
        ([[1, 2], [3, 4]], [[5], [6]]),  # no two of a prompt
        ([[1, 2]], [[5]]),
        ([[1, 2], [1, 2]], [[], []]),  # all truncated, and masked
    ],
)
def test_every_rank_runs_as_many_forwards_whatever_its_batch_holds(accelerator, prompts, completions):
    calls = []

    def states(prompts, completions, shares_prefix, first_position=0):
        calls.append((len(prompts), shares_prefix))
        return torch.ones(sum(map(len, completions)), 4)

    assert ExactnessCheck(accelerator).passes(prompts, completions, states)
    assert calls == [(1, False), (1, False), (2, True)]


@pytest.mark.parametrize(("error", "passes"), [(0.04, True), (0.25, True), (0.35, False), (math.nan, False)])
@pytest.mark.parametrize("completions", [[[5, 7], [6]], [[], []]], ids=["some", "none"])
def test_in_bfloat16_an_error_may_be_as_large_as_rounding_makes_it(accelerator, completions, error, passes):
    calls = []

    def states(prompts, completions, shares_prefix, first_position=0):
        calls.append((len(prompts), shares_prefix, first_position > 0))
        value = 1 + error if shares_prefix else 1.1 if first_position else 1.0  # rounding: 0.1
        return torch.full((sum(map(len, completions)), 4), value, dtype=torch.bfloat16)

    check = ExactnessCheck(accelerator)
    # The other rank has completions, whatever this one has: what is gathered decides
    check.accelerator = SimpleNamespace(
        device="cpu",
        mixed_precision="bf16",
        gather=lambda own: torch.cat([own, torch.tensor([0.1 if calls[-1][2] else error])]),
    )
    assert check.passes([[1, 2]] * 2, completions, states) is passes
    plain, shared, elsewhere = [(1, False, False)] * 2, [(2, True, False)], [(1, False, True)] * 2
    assert calls == plain + shared + (elsewhere if error != 0.04 else [])


@pytest.mark.parametrize("kind", ["Qwen3", "Llama", "GPTNeoX"])
def test_a_model_does_not_mind_where_positions_start(accelerator, kind):
    """What the rounding of plain forwards is measured with."""
    model = build_model(kind)
    add_completion_scoring(model)
    arguments = (model, accelerator, 0, "auto", [[5, 6, 7, 8] * 4], [[9, 10, 11]], False)
    with torch.no_grad():
        torch.testing.assert_close(completion_states(*arguments), completion_states(*arguments, 64))


@pytest.mark.parametrize("num_layers", [2, pytest.param(64, marks=pytest.mark.slow)])
def test_in_bfloat16_rounding_and_faults_lie_on_either_side_of_the_factor_however_deep_the_model(
    accelerator, num_layers
):
    found = measure(num_layers, (256, 32), seed=0)
    factor = ExactnessCheck(accelerator).noise_factor
    ratios = {way: error / noise for way, (error, noise) in found.items()}
    assert ratios.pop("right") < factor / 2
    assert min(ratios.values()) > 2 * factor, ratios


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_model_that_turns_out_wrong_no_longer_shares(accelerator, seen_logs, mode):
    model = build_model().train()
    sharing = PrefixSharing(model, "the student", mode, "auto", accelerator)
    assert sharing.is_on and "Shared prefix: on for the student" in seen_logs.text

    def states(prompts, completions, shares_prefix, first_position=0):
        assert not model.training
        return torch.full((sum(map(len, completions)), 4), 2.0 if shares_prefix else 1.0)

    rollouts = [[1, 2]] * 2, [[5], [6]]
    if mode == "on":
        with pytest.raises(RuntimeError, match="hidden states of the student.*differ from those without by 1 of"):
            sharing.confirm(model, *rollouts, states)
    else:
        sharing.confirm(model, *rollouts, states)
        assert not sharing.is_on and "is switched off for it" in seen_logs.text
        sharing.confirm(model, *rollouts, lambda *_: pytest.fail("it is off"))
    assert model.training


def test_off_asks_nothing_of_the_model(accelerator, seen_logs):
    sharing = PrefixSharing(build_model("StableLm"), "the student", "off", "auto", accelerator)
    assert not sharing.is_on and sharing.unsupported_reason is None and not seen_logs.text


def test_a_rank_without_rows_still_takes_part():
    rollouts = Rollouts.from_prompts([[1, 2]] * 2, torch.tensor([[3], [4]]), torch.ones(2, 1, dtype=torch.long), 0)
    empty = rollouts.select([])
    assert empty.prompts[0].tolist() == [1, 2] and empty.completion_lengths == [0]


# --- Regrouping


def test_rows_of_a_prompt_come_together_in_the_order_of_their_first_ones():
    prompts, values = [7, 8, 7, 9, 8, 7], torch.arange(6.0)
    batch = {
        "prompt_ids": torch.tensor([[0, prompt] for prompt in prompts]),
        "prompt_mask": torch.tensor([[0, 1]] * 6),
        "advantages": values,
        "num_images": list("abcdef"),
        "num_items_in_batch": torch.tensor(12),
        "old_per_token_logps": None,
    }
    whole = ("num_items_in_batch", "old_per_token_logps")
    halves = [{name: v if name in whole else v[i : i + 3] for name, v in batch.items()} for i in (0, 3)]
    first, second = regroup(halves, 2)
    assert first["advantages"].tolist() == [0, 2, 5] and second["advantages"].tolist() == [1, 4, 3]
    assert first["num_images"] == ["a", "c", "f"] and second["num_images"] == ["b", "e", "d"]
    assert second["prompt_ids"][:, 1].tolist() == [8, 8, 9]
    assert first["num_items_in_batch"] == 12 and first["old_per_token_logps"] is None


# --- The prefill


PROMPTS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(0)).repeat_interleave(3, 0)


def generate(model, **options):
    return model.generate(input_ids=PROMPTS, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)


def rows_of_the_prefill(model):
    rows = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return rows


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_prefill_is_shared_under_each_name_of_the_cache(seen_logs, name):
    """transformers calls it `past_key_values` up to 5.23, and `cache` since."""
    plain, shared = build_model(), build_model()
    original = shared._prefill

    def renamed(kwargs, old, new):
        return {(new if key == old else key): value for key, value in kwargs.items()}

    installed = next(known for known in CACHE_NAMES if known in seen_names(build_model()))
    shared._prefill = lambda ids, config, kwargs, *args, **rest: original(
        ids, config, renamed(kwargs, name, installed), *args, **rest
    )
    share_prefill(shared)
    patched, rows = shared._prefill, rows_of_the_prefill(shared)
    shared._prefill = lambda ids, config, kwargs, *args, **rest: patched(
        ids, config, renamed(kwargs, installed, name), *args, **rest
    )
    assert torch.equal(generate(plain), generate(shared))
    assert rows[0] == 2 and set(rows[1:]) == {6} and not seen_logs.text


def seen_names(model):
    """Names of what the installed transformers passes to the prefill."""
    names, original = set(), model._prefill
    model._prefill = lambda ids, config, kwargs, *args, **rest: (
        names.update(kwargs) or original(ids, config, kwargs, *args, **rest)
    )
    generate(model)
    return names


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_implementation": "static"}, "its cache is a StaticCache, not a DynamicCache"),
        ({"use_cache": False}, "it keeps no cache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states or attentions are to be re"),
        ({"num_beams": 2}, None),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_generation_that_cannot_share_a_prompt_says_why_once(seen_logs, options, reason):
    plain, shared = build_model(), build_model()
    share_prefill(shared)
    for _ in range(2):
        outputs = [generate(model, **options) for model in (plain, shared)]
        if not isinstance(outputs[0], torch.Tensor):
            outputs = [output.sequences for output in outputs]
        assert torch.equal(*outputs)
    messages = [message for message in seen_logs.messages if "generation runs every row" in message]
    assert len(messages) == (reason is not None) and all(reason in message for message in messages)


def test_generation_from_a_cache_that_holds_something_says_so(seen_logs):
    plain, shared = build_model(), build_model()
    share_prefill(shared)
    outputs = []
    for model in (plain, shared):
        cache = DynamicCache(config=model.config)
        model(input_ids=PROMPTS[:, :5], past_key_values=cache)
        outputs.append(generate(model, past_key_values=cache))
    assert torch.equal(*outputs) and "it continues from a cache that is not empty" in seen_logs.text
