"""What is used of TRL and transformers beyond their public interfaces is as `trl_compat` says, and all of it."""

import ast
import inspect
import pydoc
import re
from pathlib import Path

import pytest
import transformers
import trl
from peft import LoraConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import dgrpo_trl
from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.prompts import CheckedPrompts
from dgrpo_trl.rewards.guard import GuardedRewards
from dgrpo_trl.run.checkpoints import CompleteCheckpoints
from dgrpo_trl.run.vllm_server import ServerOutages
from dgrpo_trl.trl_compat import ATTRIBUTES, HELPERS, OVERRIDDEN, Hook


VERSIONS = f"TRL {trl.__version__}, transformers {transformers.__version__}"


def change(hook, is_overridden):
    """What is different from what `hook` says, or `None`."""
    function = pydoc.locate(hook.path)
    if function is None:
        return f"{VERSIONS}: there is no {hook.path}. It is needed: {hook.reason}."
    found = [name for name in inspect.signature(function).parameters if name not in ("self", "args", "kwargs")]
    known = hook.parameters.split()
    added, removed = [[name for name in a if name not in b] for a, b in ((found, known), (known, found))]
    if removed or (is_overridden and found != known):
        return (
            f"{VERSIONS}: the parameters of {hook.path} are now {', '.join(found)}; "
            f"new: {', '.join(added) or 'none'}; gone: {', '.join(removed) or 'none'}. It is needed: {hook.reason}."
        )
    return None


@pytest.mark.parametrize("hook", OVERRIDDEN, ids=lambda hook: hook.path)
def test_what_is_overridden_takes_the_parameters_that_it_took(hook):
    assert change(hook, is_overridden=True) is None


@pytest.mark.parametrize("hook", HELPERS, ids=lambda hook: hook.path)
def test_what_is_called_takes_the_arguments_that_it_is_given(hook):
    assert change(hook, is_overridden=False) is None


def test_a_change_is_named():
    """The tests above can fail."""
    gone = change(Hook("trl.GRPOTrainer._score_rollouts", "", "it scores"), True)
    assert "there is no trl.GRPOTrainer._score_rollouts. It is needed: it scores." in gone
    other = change(Hook("trl.GRPOTrainer._compute_loss", "model batch", "it adds a term"), False)
    assert "are now model, inputs; new: inputs; gone: batch. It is needed: it adds a term." in other
    assert change(Hook("trl.GRPOTrainer._compute_loss", "inputs model", ""), True) is not None  # by position
    assert change(Hook("trl.GRPOTrainer._compute_loss", "inputs", ""), False) is None


OWN = (DGRPOTrainer, CheckedPrompts, CompleteCheckpoints, GuardedRewards, ServerOutages)


def own_methods():
    return {
        name
        for owner in OWN
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and hasattr(trl.GRPOTrainer, name) and not name.startswith("__")
    }


def test_every_method_that_is_overridden_is_listed():
    listed = {hook.path.rsplit(".", 1)[1] for hook in OVERRIDDEN if hook.path.startswith("trl.GRPOTrainer.")}
    assert own_methods() == listed


def names_on_self(classes):
    return {name for cls in classes for name in re.findall(r"\bself\.(\w+)", inspect.getsource(cls))}


PARENTS = [cls for cls in trl.GRPOTrainer.__mro__ if cls.__module__.split(".")[0] in ("trl", "transformers")]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_trls_trainer_are_still_there(name):
    assert name in names_on_self(PARENTS), f"{VERSIONS}: no `{name}`. It is needed: {ATTRIBUTES[name]}."


def test_every_private_attribute_of_trls_that_is_used_is_listed():
    theirs = names_on_self(PARENTS) | set(dir(trl.GRPOTrainer))
    used = {name for name in names_on_self(OWN) & theirs if name.startswith("_")}
    assert used - own_methods() - set(DGRPOTrainer.__dict__) <= set(ATTRIBUTES)


def test_private_modules_of_trl_are_imported_in_one_place():
    root = Path(dgrpo_trl.__file__).parent
    importing = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith(("trl.", "transformers.tr"))
            ):
                importing.add(path.relative_to(root).as_posix())
    assert importing == {"trl_compat.py"}


# --- Other minor versions


def test_nothing_is_passed_by_position_that_another_version_takes_by_keyword(make_trainer, monkeypatch):
    """TRL 1.14 had `batch_size` as a keyword only."""

    def keyword_only(self, model, input_ids, attention_mask, logits_to_keep, *, batch_size=None, **kwargs):
        seen.append((batch_size, kwargs["compute_entropy"]))
        return original(self, model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)

    seen, original = [], trl.GRPOTrainer._get_per_token_logps_and_entropies
    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", keyword_only)
    make_trainer(DGRPOTrainer, distill_coef=0.0, shared_prefix="off", num_iterations=2).train()
    assert (4, False) in seen and (None, True) in seen


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules="all-linear")], ids=["full", "lora"])
def test_options_of_checkpoints_are_those_that_were_set_after_trl_has_switched_them_off(make_trainer, peft_config):
    options = {"every_n_layers": 2, "offload": True, "use_reentrant": False}
    trainer = make_trainer(
        *(DGRPOTrainer,),
        **{"distill_coef": 0.0, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": options},
        peft_config=peft_config,
    )
    trainer.train()
    layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]
