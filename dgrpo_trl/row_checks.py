"""What the rows of a data set must hold, each rule once: prompts that can be read, columns that rewards need.

Trainer, dry run and commands ask here. Functions called `..._problems` and `..._warnings` return texts, none where all
is well.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import PreTrainedTokenizerBase

from .data_loading import AnyDataset, column_problems


# --- The object


# What to write for an object that is no data set, by the name of its class
_CONVERSIONS = {
    "list": "`Dataset.from_list(rows)`",
    "tuple": "`Dataset.from_list(list(rows))`",
    "dict": "`Dataset.from_dict(columns)`",
    "DataFrame": "`Dataset.from_pandas(frame)`",
    "generator": "`Dataset.from_generator(function)`",
    "str": "`load_dataset(...)`, both of `datasets`",
}


def named_datasets(train_dataset: Any, eval_dataset: Any) -> dict[str, AnyDataset]:
    """The data sets of a run that can be checked, by the name of the argument that they are passed as.

    What TRL evaluates on without being a data set, a list of rows for instance, is taken too; rows of a class of its
    own, such as a `torch.utils.data.Dataset`, are left out.

    Raises:
        TypeError: If it is nothing that `GRPOTrainer` trains or evaluates on.
    """
    datasets = {}
    if train_dataset is not None:
        datasets["train_dataset"] = _checked_class(train_dataset, "train_dataset")
    if isinstance(eval_dataset, Mapping):
        parts = {f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()}
    else:
        parts = {} if eval_dataset is None else {"eval_dataset": eval_dataset}
    for name, value in parts.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            datasets[name] = Dataset.from_list(value, on_mixed_types="use_json")
        elif isinstance(value, list | str) or not (hasattr(value, "__getitem__") or hasattr(value, "__iter__")):
            datasets[name] = _checked_class(value, name)
        elif isinstance(value, Dataset | IterableDataset):
            datasets[name] = value
    return datasets


def _checked_class(value: Any, name: str) -> AnyDataset:
    if isinstance(value, Dataset | IterableDataset):
        return value
    kind = type(value).__name__
    message = f"`{name}` must be a `Dataset` or `IterableDataset`, got `{kind}`."
    if isinstance(value, DatasetDict | IterableDatasetDict):
        first = next(iter(value), "train")
        raise TypeError(
            f"{message} It holds the splits {', '.join(map(repr, value))}, and one is trained on. Pass "
            f"`dataset[{first!r}]`."
        )
    way = _CONVERSIONS.get(kind, "a `Dataset` made of it")
    raise TypeError(f"{message} TRL reads rows and their columns from nothing else. Pass {way}.")


# --- The column


_QUESTION = 'dataset.map(lambda row: {{"prompt": [{{"role": "user", "content": row["{name}"]}}]}})'
# How to make a prompt of the columns that data sets have in its place, the surest sign first
_PROMPTS_OF_COLUMNS = {
    "messages": 'dataset.map(lambda row: {{"prompt": row["{name}"][:-1], "answer": row["{name}"][-1]["content"]}})',
    "conversations": 'dataset.map(trl.data_utils.maybe_convert_to_chatml).map(lambda row: {{"prompt": '
    'row["messages"][:-1], "answer": row["messages"][-1]["content"]}})',
    "instruction": 'dataset.map(lambda row: {{"prompt": [{{"role": "user", "content": "\\n\\n".join(filter(None, '
    '[row["instruction"], row.get("input")]))}}], "answer": row.get("output")}})',
    **dict.fromkeys(("question", "problem", "query", "input"), _QUESTION),
    "text": 'dataset.rename_column("{name}", "prompt")',
}


def prompt_column_problems(columns: Iterable[str], name: str) -> list[str]:
    """A problem if there is no column `prompt`, with the line that makes one of the columns that there are."""
    columns = list(columns)
    found = next((column for column in _PROMPTS_OF_COLUMNS if column in columns), None)
    fix = "Rename yours with `dataset.rename_column(old, 'prompt')`, or build it with `dataset.map`."
    if found is not None:
        fix = f"Make it of `{found}`: `dataset = {_PROMPTS_OF_COLUMNS[found].format(name=found)}`."
    why = "The trainer generates completions for the prompts of that column."
    return column_problems(columns, ["prompt"], name, why, fix)


# --- The prompts


class Fault(NamedTuple):
    """What is wrong with a prompt, and what to do. Prompts with the same fault are one problem."""

    what: str
    fix: str


_LEAVE_OUT = "Fill it in, or leave the row out with `dataset.filter`."
_FORM = 'Write a text, or a list of messages such as `{"role": "user", "content": "..."}`.'


def prompt_fault(prompt: Any) -> Fault | None:
    """Why a prompt cannot be read, or `None`."""
    if prompt is None:
        return Fault("is null", _LEAVE_OUT)
    if isinstance(prompt, str):
        return None if prompt else Fault("is an empty text", _LEAVE_OUT)
    if not isinstance(prompt, list):
        return Fault(f"is a {type(prompt).__name__}", _FORM)
    if not prompt:
        return Fault("is an empty list", _LEAVE_OUT)
    return next((fault for fault in map(_message_fault, prompt) if fault is not None), None)


def _message_fault(message: Any) -> Fault | None:
    if not isinstance(message, dict):
        return Fault(f"is a list of {type(message).__name__}, not of messages", _FORM)
    if message.get("role") is None and "from" in message:
        return Fault(
            "has messages with 'from' and 'value'",
            "Rename these to 'role' and 'content', and the roles to 'system', 'user' and 'assistant'.",
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        shown = "no 'role'" if role is None else f"the role {role!r}"
        return Fault(f"has a message with {shown}", "Give each message a role: 'system', 'user' or 'assistant'.")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return None
    if isinstance(content, list):
        return next((fault for fault in map(_part_fault, content) if fault is not None), None)
    shown = "no 'content'" if content is None else f"a content that is a {type(content).__name__}"
    return Fault(f"has a message with {shown}", "Write the content as a text, or as a list of parts with a 'type'.")


def _part_fault(part: Any) -> Fault | None:
    if isinstance(part, dict) and isinstance(part.get("type"), str):
        if part["type"] != "text" or isinstance(part.get("text"), str):
            return None
    return Fault(
        "has a message with a part that is no text or image",
        'Write parts such as `{"type": "text", "text": "..."}`.',
    )


def prompt_problems(
    prompts: Iterable[Any], name: str, column: str = "prompt", takes_none: bool = False, first_row: int = 0
) -> list[str]:
    """A problem for each fault that prompts have, with the number of rows and the first of them.

    Args:
        prompts (`Iterable`):
            Values of a column.
        name (`str`), column (`str`, *optional*, defaults to `"prompt"`):
            What messages call the data set and the column.
        takes_none (`bool`, *optional*, defaults to `False`):
            Whether a row may have none.
        first_row (`int`, *optional*, defaults to `0`):
            Number of the first row.
    """
    faults: dict[Fault, list[int]] = {}
    forms: dict[bool, int] = {}
    row = first_row - 1
    try:
        for row, prompt in enumerate(prompts, first_row):
            fault = None if prompt is None and takes_none else prompt_fault(prompt)
            if fault is not None:
                faults.setdefault(fault, []).append(row)
            elif prompt is not None:
                forms.setdefault(isinstance(prompt, str), row)
    except UnicodeDecodeError as error:  # Arrow reads a text without looking at its bytes
        return [f"{name}: after row {row} (from 0) a `{column}` is no UTF-8: {error}. Save the file as UTF-8."]
    num_rows = row + 1 - first_row
    problems = [
        f"{name}: in {len(rows)} of {num_rows} rows, first in row {rows[0]} (from 0), the `{column}` {fault.what}. No "
        f"completion can be generated for that. {fault.fix}"
        for fault, rows in faults.items()
    ]
    if len(forms) == 2:
        problems.append(
            f"{name}: the `{column}` of row {forms[True]} is a text, that of row {forms[False]} a list of messages. "
            "TRL takes all rows of a batch for what the first is. Write all of them in one form."
        )
    return problems


# --- The chat template


_MAX_SHAPES = 64


def template_problems(
    prompts: Iterable[Any],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Callable] | None = None,
) -> list[str]:
    """A problem if the chat template rejects messages, or leaves some of them out.

    One prompt of each sequence of roles is rendered. `prompts` have no fault.
    """
    shapes: dict[tuple, tuple[int, list[dict]]] = {}
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, list) and len(shapes) < _MAX_SHAPES:
            shape = tuple((message["role"], bool(message.get("tool_calls"))) for message in prompt)
            shapes.setdefault(shape, (row, prompt))
    if shapes and not tokenizer.chat_template:
        return [
            f"{name} has prompts of messages, and the student's tokenizer has no chat template. They cannot be made a "
            "text. Write the prompts as texts, or set `tokenizer.chat_template`, that of the model's instruct version "
            "for instance."
        ]
    found: dict[str, int] = {}
    for row, prompt in shapes.values():
        problem = _rendering_problem(prompt, tokenizer, chat_template_kwargs or {}, tools)
        if problem is not None:
            found.setdefault(problem, row)
    return [f"{name}: the chat template {problem} (row {row}, from 0)." for problem, row in found.items()]


def _rendering_problem(
    prompt: list[dict], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], tools: Sequence[Callable] | None
) -> str | None:
    words = {i: f"message{i}text" for i, message in enumerate(prompt) if _has_text(message)}
    marked = [{**message, "content": words[i]} if i in words else message for i, message in enumerate(prompt)]
    try:
        text = tokenizer.apply_chat_template(
            marked, tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=True, **kwargs
        )
    except Exception as error:  # whatever a template raises, the run would end with it
        return f"rejects messages: {error}. Write them as the model's card says"
    left_out = [prompt[i]["role"] for i, word in words.items() if word not in text]
    if not left_out:
        return None
    return (
        f"leaves out messages of the role {left_out[0]!r}: the model would not read them. Give them a role that it "
        "knows, or remove them"
    )


def _has_text(message: dict) -> bool:
    return isinstance(message.get("content"), str) and bool(message["content"])


# --- The columns of reward functions


# What TRL passes to a reward function beside the columns of the data set
_GIVEN = {*("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")}


def reward_column_problems(reward_funcs: Sequence[Any], columns: Iterable[str], name: str, fix: str) -> list[str]:
    """A problem for each reward function that has an argument without default that is no column."""
    columns = set(columns) - {"prompt", "completion", "completion_ids"}  # TRL passes these under other names
    problems = []
    for func in reward_funcs:
        missing = [argument for argument in _required_arguments(func) if argument not in columns]
        problems += column_problems(columns, missing, name, f"The reward function `{_name(func)}` takes it.", fix)
    return problems


def _required_arguments(func: Any) -> list[str]:
    if isinstance(func, str | nn.Module):
        return []
    try:
        parameters = inspect.signature(func).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return []
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.default is p.empty and p.kind in by_name and p.name not in _GIVEN]


def _name(func: Any) -> str:
    return getattr(func, "__name__", type(func).__name__)


def compares_references(func: Any) -> bool:
    """Whether a reward function declares that its `answer` is text to compare, as those of [`rewards`] do."""
    from .rewards.rules import References  # takes a second, which a run without reward functions does without

    if isinstance(func, str | nn.Module):
        return False
    try:
        answer = inspect.signature(func).parameters.get("answer")
    except (TypeError, ValueError):
        return False
    return answer is not None and answer.annotation == list[References]


def answer_problems(answers: Iterable[Any], name: str, reward_func: Any) -> list[str]:
    """A problem if references are no text, or none is there, for a function that [`compares_references`]."""
    entries = list(answers)
    wrong = [row for row, entry in enumerate(entries) if not _is_reference(entry)]
    if wrong:
        entry = entries[wrong[0]]
        text = '[str(part) for part in row["answer"]]' if isinstance(entry, list) else 'str(row["answer"])'
        return [
            f"{name}: in {len(wrong)} of {len(entries)} rows, first in row {wrong[0]} (from 0), the `answer` is a "
            f"{type(entry).__name__}: {entry!r:.80}. The reward function `{_name(reward_func)}` compares text. "
            "Convert the column to strings, or to lists of strings of which any is right: "
            f'`dataset = dataset.map(lambda row: {{"text": {text}}}, remove_columns="answer")'
            '.rename_column("text", "answer")`.'
        ]
    if entries and not any(entries):
        return [
            f"{name}: no row has an `answer`. The reward function `{_name(reward_func)}` would score nothing. Fill "
            "the column in, or leave the function out."
        ]
    return []


def answer_warnings(answers: Iterable[Any], name: str, reward_func: Any) -> list[str]:
    """A warning with the number of rows that a function that [`compares_references`] cannot score."""
    from .rewards.rules import num_unscorable

    entries, warnings = list(answers), []
    num_missing = sum(not entry for entry in entries)
    if num_missing:
        warnings.append(
            f"{name}: {num_missing} of {len(entries)} rows have no `answer`: `{_name(reward_func)}` gives their "
            "completions no reward."
        )
    can_score = getattr(reward_func, "can_score", lambda reference: True)
    num_others = num_unscorable(entries, can_score)
    if num_others:
        row = next(row for row, entry in enumerate(entries) if entry and num_unscorable([entry], can_score))
        warnings.append(
            f"{name}: in {num_others} of {len(entries)} rows, first in row {row} (from 0), `{_name(reward_func)}` "
            f"cannot compare the `answer` {entries[row]!r:.80} with anything: their completions get no reward. Write "
            "it in a form that it reads, or use another reward."
        )
    return warnings


def _is_reference(entry: Any) -> bool:
    texts = entry if isinstance(entry, list) else [entry]
    return all(text is None or isinstance(text, str) for text in texts)
