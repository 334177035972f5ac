"""The functions of tiles, compiled as on CUDA: the same loss, from one compilation for all shapes of tiles."""

import math

import pytest
import torch
from test_losses import make_case, small_tiles, weighted_sum  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend

from dgrpo_trl import losses, tiles
from dgrpo_trl.fused import Fused
from dgrpo_trl.losses import DIVERGENCES, Distillation, token_terms


FUNCTIONS = [tiles.fold_tile, tiles.tile_log_probs, tiles.tile_gradient, losses._terms_of_jsd]


def compile_with(backend, monkeypatch):
    """As on CUDA, but with this backend, and on the CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(Fused, "device_type", "cpu")
    monkeypatch.setattr(Fused, "is_possible", True)  # other tests may have run where nothing compiles
    for function in FUNCTIONS:
        monkeypatch.setattr(function, "compiled", torch.compile(function.function, backend=backend, fullgraph=True))


def loss_and_gradients(kind, dtype=torch.float64, vocab=50, impossible=False, **options):
    hidden, head, targets, (states, teacher_head) = make_case(vocab=vocab, dtype=dtype, **options)
    if impossible:
        teacher_head.bias[16:32] = -math.inf
    distillation = None if kind is None else Distillation(states, teacher_head, kind, 0.3)
    terms = token_terms(hidden, head, targets, 0.7, distillation)
    outputs = [output.detach() for output in terms if output is not None]
    return outputs, torch.autograd.grad(weighted_sum(terms), (hidden, head.weight, head.bias))


CASES = {
    "reverse_kl": ("reverse_kl", {}),
    "forward_kl, impossible ids": ("forward_kl", {"impossible": True}),
    "jsd, soft-capped": ("jsd", {"final_logit_softcapping": 4.0, "logit_scale": 2.0}),
    "a larger policy": ("reverse_kl", {"vocab": 59}),
    "no teacher": (None, {}),
    "bfloat16": ("jsd", {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_tiles_give_the_same_values_and_gradients(monkeypatch, backend, kind, options):
    expected = loss_and_gradients(kind, **options)
    counter = CompileCounterWithBackend(backend)
    compile_with(counter, monkeypatch)
    found = loss_and_gradients(kind, **options)
    assert counter.frame_count > 0 and Fused.is_possible
    low = options.get("dtype") == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=1e-2 if low else 1e-11, atol=1e-2 if low else 1e-11)


@pytest.mark.parametrize(("kind", "num_graphs"), [("reverse_kl", 2), ("jsd", 4)])
def test_one_compilation_serves_tiles_of_all_shapes(monkeypatch, kind, num_graphs):
    counter = CompileCounterWithBackend("eager")
    compile_with(counter, monkeypatch)
    for num_tokens in (8, 5, 6):  # tiles of 3 tokens, by 16 ids: each has ragged ones
        for vocab in (50, 43):
            hidden, head, targets, (states, teacher) = make_case(vocab=vocab, teacher_vocab=vocab)
            rows = torch.arange(num_tokens) % len(hidden)
            terms = token_terms(hidden[rows], head, targets[rows], 1.0, Distillation(states[rows], teacher, kind))
            (terms.logps + terms.divergences).sum().backward()
    assert counter.frame_count == num_graphs


def test_where_compilation_fails_the_loss_runs_uncompiled_with_one_warning(monkeypatch, caplog):
    expected = loss_and_gradients("jsd")

    def fails(graph, inputs):
        raise RuntimeError("no Triton here")

    compile_with(fails, monkeypatch)
    torch.testing.assert_close(loss_and_gradients("jsd"), expected, rtol=0, atol=0)
    assert [record.levelname for record in caplog.records if record.name == "dgrpo_trl.fused"] == ["WARNING"]
    assert "`torch.compile` failed on `fold_tile`" in caplog.text and "no Triton here" in caplog.text


def test_a_lack_of_memory_is_not_taken_for_a_failed_compilation(monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("none left")

    compile_with("eager", monkeypatch)
    monkeypatch.setattr(tiles.fold_tile, "compiled", fails)
    with pytest.raises(torch.OutOfMemoryError):
        loss_and_gradients("jsd")
    assert Fused.is_possible


def test_a_fault_of_a_divergence_is_raised_as_it_is(monkeypatch):
    def gradient(log_p_NV, log_t_NV, kl_N1, w):
        raise ArithmeticError("of the divergence")

    monkeypatch.setitem(DIVERGENCES, "faulty", DIVERGENCES["reverse_kl"]._replace(gradient=gradient))
    monkeypatch.setattr(Fused, "is_possible", True)
    compile_with("eager", monkeypatch)
    with pytest.raises(ArithmeticError, match="of the divergence"):
        loss_and_gradients("faulty")


def test_on_a_cpu_nothing_is_compiled(monkeypatch):
    counter = CompileCounterWithBackend("eager")
    compile_with(counter, monkeypatch)
    monkeypatch.setattr(Fused, "device_type", "cuda")
    loss_and_gradients("jsd")
    assert counter.frame_count == 0
