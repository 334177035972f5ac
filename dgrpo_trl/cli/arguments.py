"""The command line of every command: the fields of its dataclasses are keys of a YAML file, and flags.

    --config recipe.yaml                   values of any fields
    --learning_rate 1e-6                   one value, which overrides the file's
    --model_init_kwargs.dtype bfloat16     one entry of a mapping, as YAML; an item of a list is named by its number

A key or a flag that is unknown is an error, which names the nearest known one.
"""

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from ..recipe import did_you_mean, override, read_recipe


@dataclass(frozen=True)
class CommandLine:
    """A command line in its three parts."""

    config: str | None  # the YAML file that `--config` names
    overrides: dict[str, Any]  # values by nested keys of that file, such as `{"questions.seed": 1}`
    flags: list[str]  # what is left: flags of dataclass fields, and their values

    @property
    def required_config(self) -> str:
        """The file, for a command that does nothing without one."""
        if self.config is None:
            raise ValueError("`--config` is missing. It names the YAML file to read. See the folder `recipes`.")
        return self.config


def split_command_line(arguments: Sequence[str] | None = None, keys: Collection[str] = ()) -> CommandLine:
    """Takes the file and the overrides of its keys out of a command line, by default that of this process.

    `keys` of the file are no fields of a dataclass; `--key value` overrides them. Raises a `ValueError` if a flag
    lacks its value, or the value is no YAML.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    config, overrides, flags = None, {}, []
    while words:
        word = words.pop(0)
        key, has_value, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (key == "config" or key in keys or "." in key):
            flags.append(word)
            continue
        if not has_value and not words:
            raise ValueError(f"`--{key}` has no value. Write `--{key} VALUE`.")
        text = text if has_value else words.pop(0)
        if key == "config":
            config = text
            continue
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"`--{key} {text}` is no YAML: {error}. Quote the value.") from error
    return CommandLine(config, overrides, flags)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and shows defaults."""


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """Raises, where argparse would print all flags and exit."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}. `--help` lists the flags.")


def parse_arguments(
    dataclass_types: Sequence[type],
    arguments: Sequence[str] | None = None,
    description: str | None = None,
    other_flags: Collection[str] = (),
) -> tuple[Any, ...]:
    """Instances of dataclasses, from a command line (by default that of this process) and the YAML file that it names.

    Args:
        dataclass_types (`Sequence[type]`):
            Dataclasses, as [`~trl.TrlParser`] takes them.
        description (`str`, *optional*):
            What `--help` prints above the flags.
        other_flags (`Collection[str]`, *optional*):
            Names that the command knows beside the fields, to suggest for one that is unknown.

    Raises:
        ValueError: If the file cannot be read, a key or flag is unknown, a list is given twice, or a value is wrong.
    """
    command = split_command_line(arguments)
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    known = {item.name: hints[item.name] for kind in dataclass_types for item in fields(kind) if item.init}
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file, whose keys flags override")
    parser.set_defaults_with_config(**_values_of_file(command, known))
    for name, hint in known.items():
        if _takes(hint, list) and sum(word.partition("=")[0] == f"--{name}" for word in command.flags) > 1:
            raise ValueError(f"`--{name}` is given twice, and the last would win. Write all its values after one.")
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        command.flags, return_remaining_strings=True, look_for_args_file=False
    )
    flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    _reject_unknown(flags or unknown, [*known, *other_flags])
    return tuple(parsed)


def _values_of_file(command: CommandLine, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says, with its overrides; its `env` becomes environment variables, as in TRL."""
    values = {} if command.config is None else read_recipe(command.config)
    variables = values.pop("env", {})
    if not isinstance(variables, dict):
        raise ValueError(f"`env` is {variables!r}. It names environment variables. Write `NAME: value` below it.")
    os.environ.update({name: str(value) for name, value in variables.items()})
    for key, value in command.overrides.items():
        name = key.partition(".")[0]
        if name in known and not (_takes(known[name], dict) or isinstance(values.get(name), list)):
            raise ValueError(f"`--{key}` names an entry, but `{name}` holds a single value. Write `--{name} VALUE`.")
        if any(word.partition("=")[0] == f"--{name}" for word in command.flags):
            raise ValueError(f"`--{name}` and `--{key}` are both given. The first would replace the second. Give one.")
        override(values, key, value)
    _reject_unknown([name for name in values if name not in known], known)
    return values


def _takes(hint: Any, kind: type) -> bool:
    return any(part is kind or get_origin(part) is kind for part in (hint, *get_args(hint)))


def _reject_unknown(names: Sequence[str], known: Collection[str]) -> None:
    if names:
        listed = " ".join(f"`{name}` is unknown.{did_you_mean(name.removeprefix('--'), known)}" for name in names)
        raise ValueError(f"{listed} Correct or remove it; `--help` lists the arguments of this command.")


@contextmanager
def exit_with_message(*errors: type[Exception]) -> Iterator[None]:
    """Ends the process with the message of these errors, which the user can resolve, instead of a traceback."""
    try:
        yield
    except errors as error:
        sys.exit(f"{type(error).__name__}: {error}")
