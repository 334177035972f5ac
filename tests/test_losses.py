import math
import weakref
from dataclasses import replace

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgrpo_trl import tiled_loss
from dgrpo_trl.losses import (
    DIVERGENCES,
    LOSS_TYPES,
    Distillation,
    Divergence,
    LMHead,
    TokenTerms,
    aggregate,
    token_terms,
)


N, V, H, H_TEACHER = 7, 50, 6, 9


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles both ways, with a ragged last one."""
    monkeypatch.setattr(tiled_loss, "TILE_TOKENS", {"cpu": 3, "accelerator": 3})
    monkeypatch.setattr(tiled_loss, "TILE_VOCAB", 16)


def make_case(vocab=V, teacher_vocab=V, dtype=torch.float64, bias=True, seed=0, **head_options):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = randn(N, H).requires_grad_(), (2 * randn(vocab, H)).requires_grad_()
    b = randn(vocab).requires_grad_() if bias else None
    targets = torch.randint(vocab, (N,), generator=generator)
    teacher = randn(N, H_TEACHER), LMHead(2 * randn(teacher_vocab, H_TEACHER), randn(teacher_vocab), **head_options)
    return hidden, LMHead(weight, b, **head_options), targets, teacher


def weighted_sum(terms, seed=1):
    """A scalar with a different weight on every output, so that an error in one token cannot hide in a mean."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [t for t in (terms.logps, terms.entropies, terms.divergences) if t is not None]
    return sum((torch.randn(N, generator=generator, dtype=torch.float64).to(t) * t).sum() for t in outputs)


def reference_terms(hidden, head, targets, teacher, kind, mixture, temperature):
    def full(states, h):
        return reference.logits(
            states, h.weight, h.bias, h.logit_scale, h.final_logit_softcapping, temperature=temperature
        )

    policy_logits, teacher_logits = full(hidden, head), full(*teacher)
    log_p = policy_logits.log_softmax(-1)
    shared = min(policy_logits.size(-1), teacher_logits.size(-1))
    t = teacher_logits[:, :shared].softmax(-1)
    return TokenTerms(
        log_p[torch.arange(N), targets],
        -(log_p.exp() * log_p).sum(-1),
        reference.divergence(policy_logits[:, :shared], teacher_logits[:, :shared], kind, mixture),
        -torch.xlogy(t, t).sum(-1),
        (policy_logits[:, :shared].argmax(-1) == teacher_logits[:, :shared].argmax(-1)).double(),
    )


HEADS = {
    "plain": {},
    "scaled": {"logit_scale": 0.3},
    "soft-capped": {"final_logit_softcapping": 4.0},
    "both": {"logit_scale": 2.0, "final_logit_softcapping": 5.0},
}


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_naive_reference(kind, options, temperature):
    for mixture in (0.5, 0.1) if kind == "jsd" else (0.5,):
        hidden, head, targets, teacher = make_case(**options)
        terms = token_terms(hidden, head, targets, temperature, Distillation(*teacher, kind, mixture))
        expected = reference_terms(hidden, head, targets, teacher, kind, mixture, temperature)
        for name, got, want in zip(terms._fields, terms, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
        inputs = (hidden, head.weight, head.bias)
        got = torch.autograd.grad(weighted_sum(terms), inputs)
        want = torch.autograd.grad(weighted_sum(expected), inputs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("sizes", [(50, 43), (43, 50), (48, 33)], ids=str)
def test_heads_of_different_sizes_are_compared_over_the_shared_ids_and_renormalized(kind, sizes):
    hidden, head, targets, teacher = make_case(*sizes)
    targets[0] = sizes[0] - 1  # the log-probability stays over the student's own head
    terms = token_terms(hidden, head, targets, 0.9, Distillation(*teacher, kind, 0.3))
    expected = reference_terms(hidden, head, targets, teacher, kind, 0.3, 0.9)
    for got, want in zip(terms, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    got = torch.autograd.grad(weighted_sum(terms), (hidden, head.weight))
    want = torch.autograd.grad(weighted_sum(expected), (hidden, head.weight))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_gradcheck(kind):
    hidden, head, targets, (states, teacher_head) = make_case(vocab=19, teacher_vocab=17, final_logit_softcapping=6.0)

    def function(hidden, weight, bias):
        head_ = LMHead(weight, bias, final_logit_softcapping=6.0)
        return token_terms(hidden, head_, targets[:4], 0.8, Distillation(states[:4], teacher_head, kind, 0.4))[:3]

    assert torch.autograd.gradcheck(function, (hidden[:4].detach().requires_grad_(), head.weight, head.bias))


def impossible(head, ids):
    """`head` with logits of -inf at these ids."""
    bias = head.bias.detach().clone()
    bias[ids] = -math.inf
    return replace(head, bias=bias.requires_grad_(head.bias.requires_grad))


@pytest.mark.parametrize("ids", [slice(20, 23), slice(0, 16)], ids=["some", "a whole tile"])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_ids_that_are_impossible_for_the_teacher_count_with_probability_0(kind, ids):
    hidden, head, targets, (states, teacher_head) = make_case()
    teacher = states, impossible(teacher_head, ids)
    terms = token_terms(hidden, head, targets, 1.0, Distillation(*teacher, kind, 0.3))
    expected = reference_terms(hidden, head, targets, teacher, kind, 0.3, 1.0)
    inputs = (hidden, head.weight, head.bias)
    for got, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(weighted_sum(t), inputs) for t in (terms, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)


def test_an_id_that_only_the_teacher_excludes_is_infinitely_far_in_reverse_kl_alone():
    hidden, head, targets, (states, teacher_head) = make_case()
    terms = token_terms(hidden, head, targets, 1.0, Distillation(states, impossible(teacher_head, slice(20, 23))))
    assert terms.divergences.isposinf().all() and terms.logps.isfinite().all()


@pytest.mark.parametrize("ids", [slice(20, 23), slice(0, 16)], ids=["some", "a whole tile"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_ids_that_are_impossible_for_both_are_as_if_they_were_not_there(kind, ids):
    hidden, head, targets, (states, teacher_head) = make_case()
    kept = torch.ones(V, dtype=torch.bool)
    kept[ids] = False
    targets = kept.nonzero().squeeze(1)[targets % kept.sum()]
    small_targets = kept.cumsum(0)[targets] - 1
    small_head, small_teacher = (
        replace(h, weight=h.weight.detach()[kept].requires_grad_(), bias=h.bias.detach()[kept].requires_grad_())
        for h in (head, teacher_head)
    )
    head, teacher_head = impossible(head, ids), impossible(teacher_head, ids)
    terms = token_terms(hidden, head, targets, 1.0, Distillation(states, teacher_head, kind, 0.3))
    expected = token_terms(hidden, small_head, small_targets, 1.0, Distillation(states, small_teacher, kind, 0.3))
    for name in ("logps", "entropies", "divergences", "teacher_entropies"):
        torch.testing.assert_close(getattr(terms, name), getattr(expected, name), rtol=0, atol=1e-12)
    hidden_grad, weight_grad = torch.autograd.grad(weighted_sum(terms), (hidden, head.weight))
    expected_grads = torch.autograd.grad(weighted_sum(expected), (hidden, small_head.weight))
    torch.testing.assert_close((hidden_grad, weight_grad[kept]), expected_grads, rtol=0, atol=1e-11)
    assert (weight_grad[~kept] == 0).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_teacher_equal_to_the_student_gives_exactly_zero(kind):
    hidden, head, targets, _ = make_case(dtype=torch.float32)
    same = Distillation(hidden.detach(), LMHead(head.weight.detach(), head.bias.detach()), kind)
    terms = token_terms(hidden, head, targets, 1.0, same)
    # JSD's log of the mixture rounds even where both sides are equal
    torch.testing.assert_close(terms.divergences, torch.zeros(N), rtol=0, atol=1e-6 if kind == "jsd" else 0)
    assert terms.top1_agreement.eq(1).all()
    (grad,) = torch.autograd.grad(terms.divergences.sum(), hidden)
    assert grad.abs().max() < 1e-6


def test_hand_worked_two_word_vocabulary():
    # Policy (3/4, 1/4), teacher (1/4, 3/4): KL = 3/4 ln 3 - 1/4 ln 3 = ln(3) / 2 both ways
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[math.log(3.0)], [0.0]]).double()
    for kind, want in (("reverse_kl", math.log(3) / 2), ("forward_kl", math.log(3) / 2)):
        teacher = Distillation(hidden, LMHead(weight.flip(0)), kind)
        terms = token_terms(hidden, LMHead(weight), torch.tensor([0]), distillation=teacher)
        assert terms.divergences.item() == pytest.approx(want, abs=1e-6)
        assert terms.logps.item() == pytest.approx(math.log(0.75), abs=1e-6)
        assert terms.top1_agreement.item() == 0
    # JSD at 1/2, mixture (1/2, 1/2): ln 2 - H(3/4, 1/4)
    terms = token_terms(hidden, LMHead(weight), torch.tensor([0]), distillation=Distillation(*_swap(teacher), "jsd"))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert terms.divergences.item() == pytest.approx(math.log(2) - entropy, abs=1e-6)


def _swap(distillation):
    return distillation.hidden_states, distillation.head


def test_without_a_teacher_only_log_probabilities_and_entropies_come_back():
    hidden, head, targets, teacher = make_case()
    alone = token_terms(hidden, head, targets)
    beside = token_terms(hidden, head, targets, distillation=Distillation(*teacher))
    assert alone.divergences is None and alone.teacher_entropies is None and alone.top1_agreement is None
    torch.testing.assert_close(alone.logps, beside.logps, rtol=0, atol=1e-13)


def test_no_token_at_all_still_connects_every_parameter_to_the_loss():
    hidden, head, targets, teacher = make_case()
    states, teacher_head = teacher
    terms = token_terms(hidden[:0], head, targets[:0], distillation=Distillation(states[:0], teacher_head))
    loss = sum(t.sum() for t in (terms.logps, terms.entropies, terms.divergences))
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (hidden, head.weight, head.bias)):
        assert grad.abs().max() == 0


def test_bf16_inputs_are_accumulated_in_float32():
    hidden, head, targets, teacher = make_case(dtype=torch.bfloat16, bias=False)
    states, teacher_head = teacher
    terms = token_terms(hidden, head, targets, distillation=Distillation(states, teacher_head))
    assert terms.divergences.dtype == torch.float32

    def double(x):
        return None if x is None else x.detach().double()

    exact = reference_terms(
        double(hidden),
        LMHead(double(head.weight)),
        targets,
        (double(states), LMHead(double(teacher_head.weight), double(teacher_head.bias))),
        "reverse_kl",
        0.5,
        1.0,
    )
    torch.testing.assert_close(terms.divergences.double(), exact.divergences, rtol=1e-5, atol=1e-5)


def test_frozen_weight_gets_no_gradient_and_no_work():
    hidden, head, targets, teacher = make_case()
    frozen = LMHead(head.weight.detach(), head.bias.detach())
    terms = token_terms(hidden, frozen, targets, distillation=Distillation(*teacher))
    weighted_sum(terms).backward()
    assert hidden.grad is not None and frozen.weight.grad is None


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(kind):
    num_tokens, vocab_size, hidden_size = 60, 120, 3
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
    teacher = Distillation(torch.randn(num_tokens, hidden_size), LMHead(torch.randn(vocab_size, hidden_size)), kind)
    with LargestTensor() as largest:
        terms = token_terms(hidden, LMHead(weight), torch.zeros(num_tokens, dtype=torch.long), distillation=teacher)
        (terms.logps + terms.entropies + terms.divergences).sum().backward()
    assert largest.numel == vocab_size * hidden_size  # the gradient of the head; tokens x vocabulary is 20 times that
    with LargestTensor() as largest:  # the same instrument does see full logits
        (hidden @ weight.t()).sum().backward()
    assert largest.numel == num_tokens * vocab_size


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made in it that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, key):
        self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("kind", [None, *DIVERGENCES])
def test_tiles_take_the_memory_that_the_dry_run_counts(monkeypatch, kind):
    monkeypatch.setattr(tiled_loss, "TILE_TOKENS", {"cpu": 64, "accelerator": 64})
    monkeypatch.setattr(tiled_loss, "TILE_VOCAB", 512)
    num_tokens, vocab_size, hidden_size = 128, 5 * 512, 16
    hidden, weight, states, teacher_weight = (
        torch.randn(size, hidden_size) for size in (num_tokens, vocab_size, num_tokens, vocab_size)
    )
    teacher = Distillation(states, LMHead(teacher_weight), kind) if kind else None
    with LiveBytes() as live:
        head = LMHead(weight.requires_grad_())
        terms = token_terms(hidden.requires_grad_(), head, torch.arange(num_tokens), distillation=teacher)
        weighted = [(t * t.detach()).sum() for t in terms[:3] if t is not None]
        sum(weighted).backward()
    found = live.peak - weight.grad.nbytes - hidden.grad.nbytes
    counted = tiled_loss.tile_bytes("cpu", num_tokens, vocab_size, hidden_size, teacher is not None)
    assert 0.7 * counted < found <= counted


@pytest.mark.parametrize("mixture", [0.0, 1.0, -0.1])
def test_a_mixture_weight_outside_its_range_is_refused(mixture):
    hidden, head, targets, teacher = make_case()
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        token_terms(hidden, head, targets, distillation=Distillation(*teacher, "jsd", mixture))


def test_an_unknown_divergence_is_refused():
    hidden, head, *_ = make_case()
    with pytest.raises(ValueError, match="Unknown divergence 'kl'. Choose one of reverse_kl, forward_kl, jsd."):
        Distillation(hidden, head, "kl")


def test_a_divergence_is_added_by_its_line_in_the_table(monkeypatch):
    def squared_distance(statistics, log_probs, w):
        """sum_v (p_v - t_v)^2, and sum_v p_v (p_v - t_v), which its gradient needs."""
        pairs = [(log_p_NV.exp(), log_t_NV.exp()) for log_p_NV, log_t_NV in log_probs]
        return sum(((p - t) ** 2).sum(-1) for p, t in pairs), sum((p * (p - t)).sum(-1) for p, t in pairs)

    def gradient(log_p_NV, log_t_NV, mean_N1, w):
        p = log_p_NV.exp()
        return 2 * p * (p - log_t_NV.exp() - mean_N1)

    monkeypatch.setitem(DIVERGENCES, "squared_distance", Divergence(squared_distance, gradient))
    hidden, head, targets, (states, teacher_head) = make_case(vocab=19, teacher_vocab=17)
    hidden, targets, states = hidden[:4].detach().requires_grad_(), targets[:4], states[:4]
    teacher = Distillation(states, teacher_head, "squared_distance")

    def function(hidden, weight, bias):
        return token_terms(hidden, LMHead(weight, bias), targets, distillation=teacher).divergences

    p = (hidden @ head.weight[:17].T + head.bias[:17]).softmax(-1)
    t = (states @ teacher_head.weight.T + teacher_head.bias).softmax(-1)
    torch.testing.assert_close(function(hidden, head.weight, head.bias), ((p - t) ** 2).sum(-1))
    assert torch.autograd.gradcheck(function, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_aggregate_equals_the_reference_and_ignores_padding(loss_type):
    values = torch.randn(4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]])
    want = reference.normalize(values, mask, loss_type, 9, 13.0, 2)
    padded = values.masked_fill(mask == 0, math.nan)
    got = aggregate(padded, mask, loss_type, max_completion_length=9, token_normalizer=13.0, accumulation_steps=2)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_fully_masked_batch_has_zero_loss_and_zero_gradient(loss_type):
    values = torch.randn(2, 3, requires_grad=True)
    loss = aggregate(values, torch.zeros(2, 3), loss_type, 3, 1.0)
    loss.backward()
    assert loss.item() == 0 and values.grad.abs().max() == 0


def test_doubling_the_token_count_halves_the_loss():
    values, mask = torch.rand(2, 3), torch.ones(2, 3)
    assert aggregate(values, mask, "dapo", 3, 12.0) * 2 == pytest.approx(
        aggregate(values, mask, "dapo", 3, 6.0).item()
    )


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="Unknown `loss_type` 'ppo'"):
        aggregate(torch.zeros(1, 1), torch.ones(1, 1), "ppo", 1, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_values_and_gradients_equal_the_reference(kind, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    hidden, head, targets, (states, teacher_head) = make_case(dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    teacher = states.double(), LMHead(teacher_head.weight.double(), teacher_head.bias.double())
    expected = reference_terms(exact[0], LMHead(*exact[1:]), targets, teacher, kind, 0.3, 0.9)
    on_gpu = [x.detach().cuda().requires_grad_() for x in (hidden, head.weight, head.bias)]
    gpu_teacher = LMHead(teacher_head.weight.cuda(), teacher_head.bias.cuda())
    distillation = Distillation(states.cuda(), gpu_teacher, kind, 0.3)
    terms = token_terms(on_gpu[0], LMHead(*on_gpu[1:]), targets.cuda(), 0.9, distillation)
    for got, want in zip(terms, expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(weighted_sum(terms._replace(**{f: t.cpu() for f, t in terms._asdict().items()})), on_gpu)
    want = torch.autograd.grad(weighted_sum(expected), exact)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # the gradient leaves in the dtype of the input
    for g, w in zip(got, want, strict=True):
        assert (g.cpu().double() - w).norm() <= tolerance * w.norm()
