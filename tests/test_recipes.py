"""Every YAML is parsed by the parser that will read it, and every file that a command of the README names exists."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig, SFTConfig, TrlParser

from dgrpo_trl import DGRPOConfig
from dgrpo_trl.longblocks import load_config


ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml"))
BUILDS = [path for path in RECIPES if path.parent.name == "longblocks"]
ACCELERATE = [path for path in RECIPES if path.parent.name == "accelerate_configs"]
CONFIGS = sorted({*RECIPES} - {*BUILDS, *ACCELERATE})
READMES = [ROOT / "README.md", *(ROOT / "recipes").rglob("README.md")]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser_of(method):
    if method == "sft":
        return TrlParser((script("train_sft").SFTScriptArguments, SFTConfig, ModelConfig))
    return TrlParser((script("train_dgrpo").DGRPOScriptArguments, DGRPOConfig, ModelConfig))


def parse(path, *flags):
    return parser_of(path.parent.name).parse_args_and_config(["--config", str(path), *flags])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_recipe_is_parsed_by_its_own_parser(path):
    script_args, training_args, model_args = parse(path)
    assert script_args.dataset_name and model_args.model_name_or_path and training_args.output_dir
    text = path.read_text()
    assert not re.search(r"^push_to_hub: true", text, re.MULTILINE)
    assert all(not str(value).startswith("/") for value in yaml.safe_load(text).values())


@pytest.mark.parametrize("path", BUILDS, ids=lambda path: path.name)
def test_a_build_is_read_by_the_builder(path):
    config = load_config(path)
    assert config.name and config.publish.private and len(config.fingerprint) == 16
    assert load_config(path, ["questions.seed=1"]).fingerprint != config.fingerprint


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.name)
def test_an_accelerate_config_is_read_by_accelerate(path):
    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.parametrize("key", ["distil_coef", "max_prompt_length", "torch_dtype"])
def test_an_unknown_key_is_an_error(tmp_path, key):
    recipe = ROOT / "recipes" / "smollm2-135m" / "dgrpo" / "demo.yaml"
    path = tmp_path / "dgrpo" / "demo.yaml"
    path.parent.mkdir()
    path.write_text(recipe.read_text() + f"\n{key}: 1\n")
    with pytest.raises(ValueError, match=key):
        parse(path)


def test_a_flag_overrides_the_recipe():
    recipe = ROOT / "recipes" / "smollm2-135m" / "dgrpo" / "demo.yaml"
    _, training_args, model_args = parse(recipe, "--distill_coef", "0.25", "--use_peft")
    assert training_args.distill_coef == 0.25 and model_args.use_peft


def test_reward_functions_are_found_by_name_or_path():
    train_dgrpo = script("train_dgrpo")
    assert train_dgrpo.load_reward_func("token_f1_reward").__name__ == "token_f1_reward"
    assert train_dgrpo.load_reward_func("trl.rewards.think_format_reward").__name__ == "think_format_reward"
    for name in ("exactly", "no_module.reward"):
        with pytest.raises(ValueError, match=f"no reward function '{name}'.*exact_match_reward"):
            train_dgrpo.load_reward_func(name)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_that_a_readme_names_exist(readme):
    named = re.findall(r"(?:scripts|recipes|tests|dgrpo_trl)/[\w./-]*\w(?:\.\w+)", readme.read_text())
    assert named
    for name in named:
        assert (ROOT / name).exists(), name
