"""How every command reads its arguments: files, flags, nested keys, and what it rejects."""

import functools
import io
import os
import runpy
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from unittest import mock

import pytest
import yaml
from conftest import ROOT

from dgrpo_trl.cli.arguments import parse_arguments, split_command_line
from dgrpo_trl.recipe import override, read_recipe


@dataclass
class Arguments:
    """One field of each kind."""

    learning_rate: float = field(default=0.1, metadata={"help": "A number."})
    model_init_kwargs: dict | str | None = field(default=None, metadata={"help": "A mapping."})
    lengths: list[int] | None = field(default=None, metadata={"help": "A list."})
    bf16: bool = field(default=False, metadata={"help": "A switch."})
    backend: str = field(default="a", metadata={"help": "One of some.", "choices": ["a", "b"]})


@pytest.fixture
def parse(tmp_path):
    def parse(values, *arguments):
        path = tmp_path / "recipe.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return parse_arguments((Arguments,), ["--config", str(path), *arguments])[0]

    return parse


def test_a_file_overrides_defaults_and_a_flag_overrides_the_file(parse):
    values = {"learning_rate": "1e-3", "lengths": [1, 2]}  # a number without a point is a text in YAML 1.1
    assert parse(values) == Arguments(learning_rate=1e-3, lengths=[1, 2])
    args = parse(values, "--learning_rate", "0.5", "--lengths", "3", "4", "--bf16", "--backend=b")
    assert args == Arguments(learning_rate=0.5, lengths=[3, 4], bf16=True, backend="b")
    assert parse_arguments((Arguments,), ["--learning_rate=0.5"]) == (Arguments(learning_rate=0.5),)


def test_a_nested_key_overrides_one_entry(parse):
    values = {"model_init_kwargs": {"dtype": "float32", "rope": {"factor": 2}}, "lengths": [1, 2]}
    flags = ["--model_init_kwargs.rope.factor", "4.0", "--model_init_kwargs.use_cache=false", "--lengths.1", "-7"]
    args = parse(values, *flags)
    assert args.model_init_kwargs == {"dtype": "float32", "rope": {"factor": 4.0}, "use_cache": False}
    assert args.lengths == [1, -7]
    (args,) = parse_arguments((Arguments,), ["--model_init_kwargs.a.b", "[1, x]"])
    assert args.model_init_kwargs == {"a": {"b": [1, "x"]}}


def test_a_recipe_sets_environment_variables(parse, monkeypatch):
    monkeypatch.setenv("SHIP", "none")
    parse({"env": {"SHIP": 7}})
    assert os.environ["SHIP"] == "7"


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({"lerning_rate": 1}, [], "`lerning_rate` is unknown. Did you mean `learning_rate`?"),
        ({"first": 1, "second": 2}, [], "`first` is unknown. `second` is unknown."),
        ({}, ["--lerning_rate", "1"], "`--lerning_rate` is unknown. Did you mean `learning_rate`?"),
        ({}, ["--learning", "1"], "`--learning` is unknown"),  # argparse would take it for `--learning_rate`
        ({}, ["stray"], "`stray` is unknown"),
        ({}, ["--model_kwargs.dtype", "x"], "`model_kwargs` is unknown. Did you mean `model_init_kwargs`?"),
        ({}, ["--learning_rate.x", "1"], "`learning_rate` holds a single value"),
        ({"lengths": [1]}, ["--lengths.4", "1"], "`lengths.4` names no value"),
        ({}, ["--model_init_kwargs.dtype"], "`--model_init_kwargs.dtype` has no value"),
        ({}, ["--model_init_kwargs.dtype", "[1"], "is no YAML"),
        ({}, ["--model_init_kwargs", "{}", "--model_init_kwargs.a", "1"], "are both given"),
        ({}, ["--lengths", "1", "--lengths", "2"], "`--lengths` is given twice"),
        ({}, ["--learning_rate", "fast"], "invalid float value: 'fast'"),
        ({}, ["--backend", "c"], "invalid choice: 'c'"),
        ({}, ["--config"], "`--config` has no value"),
        ({}, ["--config", "none.yaml"], "'none.yaml' cannot be read"),
        ("bf16: true\nbf16: false\n", [], "'bf16' is given twice"),
        ("- bf16\n", [], "holds no keys"),
        ("env: SHIP=7\n", [], "`env` is 'SHIP=7'"),
    ],
)
def test_a_wrong_argument_is_rejected_with_its_name(parse, values, arguments, message):
    with pytest.raises(ValueError) as raised:
        parse(values, *arguments)
    assert message in str(raised.value)


def test_the_keys_of_a_configuration_are_flags(tmp_path):
    command = split_command_line(
        ["--stages", "a", "b", "--name", "x", "--config=c.yaml", "--a.b=1", "--dry_run"], ["name"]
    )
    assert command.config == "c.yaml" and command.overrides == {"name": "x", "a.b": 1}
    assert command.flags == ["--stages", "a", "b", "--dry_run"]
    (tmp_path / "c.yaml").write_text("a: [{b: 1}]\n")
    assert read_recipe(tmp_path / "c.yaml", {"a.0.b": 2, "c.d": 3}) == {"a": [{"b": 2}], "c": {"d": 3}}
    (tmp_path / "c.yaml").write_text("a:\n")
    assert read_recipe(tmp_path / "c.yaml", {"a.b": 1}) == {"a": {"b": 1}}
    for key in ("a.1.b", "a.x", "a.0.b.c", "a.0.b.c.d"):
        with pytest.raises(ValueError, match=f"`{key}` names no value"):
            override({"a": [{"b": 1}]}, key, 2)


COMMANDS = [
    path
    for path in sorted((ROOT / "scripts").rglob("*.py"))
    if "__main__" in path.read_text() and path.parent.name != "gpu_checks"  # which one of the commands starts
]


@functools.cache
def help_of(path):
    """What `python PATH --help` prints, without another process."""
    shown = io.StringIO()
    with redirect_stdout(shown), mock.patch.object(sys, "argv", [str(path), "--help"]):
        with mock.patch.object(sys, "path", [str(path.parent), *sys.path]):  # as Python does for a script
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    return shown.getvalue()


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_script_shows_its_help(path):
    assert f"usage: {path.name}" in help_of(path) and "--help" in help_of(path)
