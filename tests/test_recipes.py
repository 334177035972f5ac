"""Every YAML is parsed by the parser that will read it, and holds what its header and its name say."""

import functools
import itertools
import math
import re

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from trl import ModelConfig, SFTConfig

from dgrpo_trl import DGRPOConfig
from dgrpo_trl.cli import train_dgrpo
from dgrpo_trl.cli.arguments import parse_arguments
from dgrpo_trl.config import DGRPOScriptArguments, SFTScriptArguments
from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.longblocks import load_config


RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml"))
BUILDS = [path for path in RECIPES if path.parent.name == "longblocks"]
ACCELERATE = [path for path in RECIPES if path.parent.name == "accelerate_configs"]
EVALUATIONS = [path for path in RECIPES if path.parent.name == "eval"]
CONFIGS = sorted({*RECIPES} - {*BUILDS, *ACCELERATE, *EVALUATIONS})


def parse_training(method, *arguments):
    """Arguments of a training command. Without a GPU, transformers rejects `bf16` unless the CPU is asked for."""
    types = (SFTScriptArguments, SFTConfig) if method == "sft" else (DGRPOScriptArguments, DGRPOConfig)
    return parse_arguments((*types, ModelConfig), [*arguments, "--use_cpu", "true"])


@functools.cache
def parse(path, *flags):
    return parse_training(path.parent.name, "--config", str(path), *flags)


def header(path):
    """The comment at the top, unwrapped, as `name: text`."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    text = re.sub(r"\\?\n#\s{3,}", " ", "\n".join(lines))
    return dict(re.findall(r"^# (\w+):\s+(.*)$", text, re.M))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_is_parsed_by_its_own_parser(path):
    script_args, training_args, model_args = parse(path)
    assert script_args.dataset_name and model_args.model_name_or_path and training_args.output_dir
    text = path.read_text()
    assert not re.search(r"^push_to_hub: true", text, re.MULTILINE)
    assert all(not str(value).startswith("/") for value in yaml.safe_load(text).values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_batch_of_a_recipe_is_what_its_header_says(path):
    _, args, _ = parse(path)
    notes = header(path)
    assert str(path.relative_to(ROOT)) in notes["Launch"]
    named = re.search(r"accelerate_configs/\S+", notes["Launch"])
    config = load_config_from_file(str(ROOT / "recipes" / named[0])) if named else None
    numbers = [int(n) for n in re.findall(r"\d+", notes["Batch"].replace(",", ""))]
    factors = [
        config.num_processes if config else 1,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
    ]
    assert numbers[:4] == [*factors, math.prod(factors)]
    if isinstance(args, DGRPOConfig):
        assert numbers[4:6] == [math.prod(factors) // args.num_generations, args.num_generations]
        assert args.per_device_train_batch_size % args.num_generations == 0  # a group shares its prompt on one device


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prompts_completions_and_positions_fit_each_other(path):
    script_args, args, model_args = parse(path)
    if script_args.max_prompt_tokens is None:
        return
    positions = (args.model_init_kwargs or {}).get("max_position_embeddings", 32768)
    if isinstance(args, DGRPOConfig):
        assert script_args.max_prompt_tokens + args.max_completion_length == positions == args.vllm_max_model_length
        teacher = args.teacher_model_init_kwargs or {}
        if args.distill_coef > 0 and positions > 32768:
            for key in ("rope_parameters", "max_position_embeddings"):
                assert teacher[key] == args.model_init_kwargs[key]
    else:
        assert args.max_length == positions
    if positions > 32768:
        rope = args.model_init_kwargs["rope_parameters"]
        assert rope["factor"] * rope["original_max_position_embeddings"] == positions and rope["rope_theta"] == 1000000


@pytest.mark.parametrize("method", ["dgrpo", "opd", "grpo"])
def test_at_128k_a_prompt_is_never_run_once_per_completion_without_a_word(method):
    _, args, _ = parse(ROOT / "recipes" / "qwen3-1.7b" / method / "128k.yaml")
    assert args.shared_prefix == "on"


def test_the_baselines_are_what_they_are_called():
    for path in CONFIGS:
        script_args, args, model_args = parse(path)
        if path.parent.name == "grpo":
            assert args.distill_coef == 0 and args.teacher_model_name_or_path is None and script_args.reward_funcs
        elif path.parent.name == "opd":
            assert args.distill_coef > 0 and args.teacher_model_name_or_path and not script_args.reward_funcs
        elif path.parent.name == "dgrpo":
            assert args.distill_coef > 0 and args.teacher_model_name_or_path and script_args.reward_funcs
        assert model_args.use_peft == ("lora" in path.name or "base_teacher" in path.name)


def test_an_ablation_differs_from_the_method_in_what_it_is_named_after_alone():
    folder = ROOT / "recipes" / "qwen3-1.7b" / "dgrpo"
    method = yaml.safe_load((folder / "32k.yaml").read_text())
    for name, keys in {
        "rl_zero_32k": {"model_name_or_path"},
        "self_teacher_32k": {"teacher_model_name_or_path"},
        "coef_0.1_32k": {"distill_coef"},
        "coef_1.0_32k": {"distill_coef"},
        "long_only_32k": {"short_dataset_name", "short_dataset_split", "short_share"},
        "evidence_teacher_32k": {
            *("short_dataset_name", "short_dataset_split", "short_share", "dataset_name", "teacher_prompt_column"),
        },
        "scheduled_32k": {"distill_scheduler_type", "distill_scheduler_kwargs", "reward_start"},
        "lora_32k": {"use_peft", "lora_r", "lora_alpha", "lora_target_modules", "learning_rate"},
    }.items():
        values = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert {k for k in {*values, *method} if values.get(k) != method.get(k)} == {*keys, "output_dir"}, name


@pytest.mark.parametrize("folder", sorted({path.parent.parent for path in CONFIGS}), ids=lambda folder: folder.name)
def test_the_readme_of_a_model_names_all_its_recipes(folder):
    text = (folder / "README.md").read_text()
    for path in folder.rglob("*.yaml"):
        assert str(path.relative_to(folder)) in text, path


def test_a_qwen_recipe_leaves_its_model_where_the_readme_says():
    for path in CONFIGS:
        if path.parent.parent.name.startswith("qwen3"):
            assert parse(path)[1].output_dir == f"outputs/{path.relative_to(ROOT / 'recipes').with_suffix('')}"


@pytest.mark.parametrize("path", BUILDS, ids=lambda path: path.name)
def test_a_build_is_read_by_the_builder(path):
    config = load_config(path)
    assert config.name and config.publish.private and len(config.fingerprint) == 16
    assert load_config(path, {"questions.seed": 1}).fingerprint != config.fingerprint


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.name)
def test_an_evaluation_is_parsed_by_its_own_parser(path):
    (args,) = parse_arguments((EvaluationArguments,), ["--config", str(path)])
    assert (args.tasks or args.harness_tasks) and not args.overwrite
    assert f"scripts/evaluate.py --config {path.relative_to(ROOT)}" in header(path)["Launch"]
    assert path.name in (path.parent / "README.md").read_text()
    positions = args.model_init_kwargs.get("max_position_embeddings", 32768)
    assert max(args.lengths, default=0) <= positions
    if positions > 32768:
        rope = args.model_init_kwargs["rope_parameters"]
        assert rope["factor"] * rope["original_max_position_embeddings"] == positions and rope["rope_theta"] == 1000000
    unsafe = {**args.harness_kwargs, **args.harness_task_kwargs.get("humaneval_instruct", {})}
    assert not unsafe.get("confirm_run_unsafe_code")  # that is for the user to say


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_an_accelerate_config_is_read_by_accelerate(path):
    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.parametrize("key", ["distil_coef", "max_prompt_length", "torch_dtype"])
def test_an_unknown_key_is_an_error(tmp_path, key):
    recipe = ROOT / "recipes" / "smollm2-135m" / "dgrpo" / "demo.yaml"
    path = tmp_path / "dgrpo" / "demo.yaml"
    path.parent.mkdir()
    path.write_text(recipe.read_text() + f"\n{key}: 1\n")
    with pytest.raises(ValueError, match=f"`{key}` is unknown"):
        parse(path)


def test_a_flag_overrides_the_recipe():
    recipe = ROOT / "recipes" / "smollm2-135m" / "dgrpo" / "demo.yaml"
    _, training_args, model_args = parse(recipe, "--distill_coef", "0.25", "--use_peft")
    assert training_args.distill_coef == 0.25 and model_args.use_peft


def test_reward_functions_are_found_by_name_or_path():
    assert train_dgrpo.load_reward_func("token_f1_reward").__name__ == "token_f1_reward"
    assert train_dgrpo.load_reward_func("trl.rewards.think_format_reward").__name__ == "think_format_reward"
    for name in ("exactly", "no_module.reward"):
        with pytest.raises(ValueError, match=f"no reward function '{name}'.*exact_match_reward"):
            train_dgrpo.load_reward_func(name)


def test_vllm_may_serve_from_a_place_of_its_own():
    recipe = ROOT / "recipes" / "qwen3-1.7b" / "dgrpo" / "32k.yaml"
    flags = [
        "--use_vllm",
        "true",
        "--vllm_mode",
        "server",
        "--vllm_server_host",
        "n2",
        "--vllm_server_timeout",
        "1800",
    ]
    _, args, _ = parse(recipe, *flags)  # as the sbatch script sets them
    assert args.vllm_mode == "server" and args.vllm_server_host == "n2"
