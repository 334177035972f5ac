"""What the card of a trained model says beside TRL's text: the recipe, and what the run logged last."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments


# Of the machine and the run, not of the method
_LEFT_OUT = (
    *("output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "hub_token", "hub_model_id", "push_to_hub"),
    *("deepspeed", "distributed_state", "local_rank", "report_to", "disable_tqdm", "use_cpu", "log_completions"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "project", "trackio_space_id"),
)
# In this order, as far as they were logged
_METRICS = (
    *("loss", "reward", "reward_std", "distill/grpo_loss", "distill/loss", "distill/divergence"),
    *("distill/teacher_entropy", "distill/top1_agreement", "entropy", "completions/mean_length"),
    *("completions/clipped_ratio", "num_tokens", "eval_loss", "eval_reward", "eval_distill/divergence"),
)


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Fields that differ from their defaults; paths are cut to their last part, nothing secret is among them."""
    changed = {}
    for item in fields(args):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        value = getattr(args, item.name, None)
        value = getattr(value, "value", value)  # of an enumeration
        is_plain = value is None or isinstance(value, bool | int | float | str | list | dict)
        if not item.init or item.name in _LEFT_OUT or item.name.startswith("_") or not is_plain:
            continue
        if value is not None and value != getattr(default, "value", default):
            changed[item.name] = Path(value).name if isinstance(value, str) and Path(value).is_dir() else value
    return changed


def recipe_and_metrics(args: TrainingArguments, log_history: list[dict[str, Any]]) -> str:
    """Two sections of Markdown, of the arguments of a run and its `trainer.state.log_history`."""
    recipe = yaml.safe_dump(changed_arguments(args), sort_keys=False, allow_unicode=True)
    last: dict[str, Any] = {}
    steps = [entry["step"] for entry in log_history if "step" in entry]
    for entry in log_history:
        last |= {name: entry[name] for name in _METRICS if isinstance(entry.get(name), int | float)}
    rows = "".join(f"| `{name}` | {last[name]:.4g} |\n" for name in _METRICS if name in last)
    table = f"| metric | last value |\n| --- | --- |\n{rows}" if rows else "Nothing was logged.\n"
    return (
        f"\n## Recipe\n\nWhat differs from the defaults of `{type(args).__name__}`:\n\n```yaml\n{recipe}```\n"
        f"\n## Metrics\n\nAfter {max(steps, default=0)} steps; of the training itself, not of an evaluation set, "
        f"unless the name begins with `eval`.\n\n{table}"
    )


def add_recipe_and_metrics(card: Path, args: TrainingArguments, log_history: list[dict[str, Any]]) -> None:
    """Puts the sections into a card, before its list of versions where it has one."""
    text = card.read_text(encoding="utf-8")
    sections = recipe_and_metrics(args, log_history)
    place = text.find("\n### Framework versions")
    text = text + sections if place < 0 else text[:place] + sections + text[place:]
    card.write_text(text, encoding="utf-8")
