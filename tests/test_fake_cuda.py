"""What would run on a GPU, on a CUDA device that computes on the CPU: no tensor meets one of another device."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fake_cuda import CUDA, fake_cuda
from peft import LoraConfig, get_peft_model

from dgrpo_trl import DGRPOTrainer, rollouts, tiled_loss
from dgrpo_trl.fused import Fused
from dgrpo_trl.losses import DIVERGENCES, Distillation, LMHead, token_terms
from dgrpo_trl.rollouts import Rollouts, score
from dgrpo_trl.scoring import add_completion_scoring
from dgrpo_trl.teacher import HostWeights


@pytest.fixture
def num_devices():
    return 1


@pytest.fixture
def device(num_devices):
    AcceleratorState._reset_state(reset_partial_state=True)
    with fake_cuda(num_devices) as mode:
        yield mode
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_device_refuses_tensors_of_the_cpu(device):
    tensor = torch.ones(3, device=CUDA, requires_grad=True)
    assert tensor.device == CUDA and (2 * tensor).tolist() == [2.0, 2.0, 2.0]
    (2 * tensor).sum().backward()
    assert tensor.grad.device == CUDA and tensor.grad.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="on the same device, but found"):
        tensor + torch.ones(3)
    assert sum(device.waits.values()) == 2


def batch(num_rows: int = 4, prompt_length: int = 9, completion_length: int = 5) -> Rollouts:
    """Two prompts, of unequal lengths, with completions of unequal lengths, on the device."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 290, (2, prompt_length), generator=generator).repeat_interleave(num_rows // 2, 0)
    completions = torch.randint(3, 290, (num_rows, completion_length), generator=generator)
    prompt_mask, completion_mask = torch.ones_like(prompts), torch.ones_like(completions)
    prompt_mask[: num_rows // 2, :3] = 0
    completion_mask[1, 2:] = 0
    return Rollouts(*(t.to(CUDA) for t in (prompts, prompt_mask, completions, completion_mask)))


def test_parts_of_a_micro_batch_repeat_with_the_same_dropout(device, make_model, monkeypatch):
    adapter = LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(make_model(), adapter).to(CUDA).train()
    add_completion_scoring(model.get_base_model())
    accelerator = SimpleNamespace(device=CUDA, gather=lambda tensor: tensor, autocast=Accelerator().autocast)
    accelerator.distributed_type = "NO"
    gradients = []
    for _ in range(2):
        device.random_state = torch.Generator().manual_seed(1).get_state()
        scored = score(model, batch(), accelerator, SimpleNamespace(is_on=False, backend="auto"), 4, max_tokens=20)
        model.zero_grad()
        scored.logps.sum().backward()
        gradients.append([p.grad.cpu() for p in model.parameters() if p.requires_grad])
        # The second time, the parts are not repeated, but kept
        monkeypatch.setattr(rollouts, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    for repeated, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(repeated, kept)


def on_the_device(model):
    return {parameter.device for parameter in model.parameters()} == {CUDA}


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_process_that_sees_several_gpus_trains_on_the_first(
    device, num_devices, make_trainer, saved_teacher, caplog
):
    trainer = make_trainer(DGRPOTrainer, saved_teacher, teacher_model=saved_teacher, use_cpu=False, beta=0.1)
    assert all(map(on_the_device, (trainer.model, trainer.ref_model, trainer.teacher_model)))
    assert ("sees 2 GPUs and trains on cuda:0 alone" in caplog.text) == (num_devices == 2)
    assert trainer.args.n_gpu == 1


@pytest.mark.parametrize("spread", ["student", "teacher"])
def test_a_model_that_is_spread_over_devices_is_refused(make_trainer, make_model, spread):
    models = {"student": make_model(), "teacher": make_model(seed=1)}
    models[spread].hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=f"`device_map` of the {spread} spreads it over 0, 1"):
        make_trainer(DGRPOTrainer, models["student"], teacher_model=models["teacher"])


def test_a_teacher_that_waits_on_the_host_is_copied_there_once_and_pinned(device, make_model):
    model = make_model()
    values = [parameter.detach().clone() for parameter in model.parameters()]
    parameters = list(model.to(CUDA).parameters())
    weights = HostWeights(parameters, CUDA)
    weights.to_host()
    for _ in range(2):
        assert {parameter.device.type for parameter in parameters} == {"cpu"}
        weights.to_device()
        assert {parameter.device for parameter in parameters} == {CUDA}
        weights.to_host()
    assert device.waits == {"teacher.py: host_copy": len(parameters)}
    assert device.pinned == sum(value.numel() for value in values)
    for parameter, value in zip(parameters, values, strict=True):
        torch.testing.assert_close(parameter.data, value, rtol=0, atol=0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_loss_multiplies_in_bfloat16_and_sums_in_float32(device, monkeypatch, kind):
    monkeypatch.setattr(tiled_loss, "TILE_VOCAB", 16)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, states, teacher_weight = (
        torch.randn(size, 8, generator=generator).bfloat16() for size in (7, 40, 7, 40)
    )
    results = []
    for place in (CUDA, torch.device("cpu")):
        inputs = [x.to(place).requires_grad_() for x in (hidden, weight)]
        teacher = Distillation(states.to(place), LMHead(teacher_weight.to(place)), kind)
        terms = token_terms(inputs[0], LMHead(inputs[1]), torch.arange(7).to(place), distillation=teacher)
        (terms.logps + terms.divergences).sum().backward()
        results.append([x.cpu() for x in (*terms, *(x.grad for x in inputs))])
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
    assert device.calls[torch.ops.aten.addmm.dtype_out] == 2 * 3 and not device.calls[torch.ops.aten.mm.default]
    assert not device.waits.keys() - {"elsewhere"} and Fused.is_possible
