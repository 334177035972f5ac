"""The metrics of an accumulation window: means over its tokens on all ranks."""

import pytest
import torch

from dgrpo_trl.run.metrics import AccumulationWindow, distillation_values
from dgrpo_trl.scoring import DistilledTokens


class TwoRanks:
    """Stands in for an accelerator: the other rank has seen the same."""

    num_processes, sync_gradients = 2, False

    def reduce(self, totals, reduction):
        assert reduction == "sum"
        return 2 * totals


def add(window, values, mask, loss=1.0):
    per_token = {"nats": (torch.tensor(values), torch.tensor(mask))}
    return window.add(per_token, {"loss": torch.tensor(loss, requires_grad=True)})


def test_every_token_of_the_window_weighs_the_same():
    accelerator = TwoRanks()
    window = AccumulationWindow(accelerator)
    assert add(window, [[1.0, 2.0, 3.0]], [[1, 1, 1]], loss=0.25) == {}
    accelerator.sync_gradients = True
    means = add(window, [[9.0, 100.0, 100.0]], [[1, 0, 0]], loss=0.5)
    assert means == {"nats": pytest.approx(15 / 4), "loss": pytest.approx(0.75)}
    assert add(window, [[4.0]], [[1]]) == {"nats": 4.0, "loss": 1.0}  # the next window begins at zero


def test_what_no_token_counts_for_is_left_out():
    accelerator = TwoRanks()
    accelerator.sync_gradients = True
    assert add(AccumulationWindow(accelerator), [[float("inf")]], [[False]]).keys() == {"loss"}


def test_quarters_of_a_completion_are_rounded_up():
    divergences = torch.arange(1.0, 9.0).unsqueeze(0).repeat(2, 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    values = distillation_values(DistilledTokens(*(divergences,) * 4), mask)
    for name, expected in (("first", [[1, 2], [1]]), ("last", [[4, 5], [1]])):
        tokens, where = values[f"distill/divergence_{name}_quarter"]
        assert [row[m.bool()].tolist() for row, m in zip(tokens, where, strict=True)] == expected
