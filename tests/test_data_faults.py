"""Data that cannot be read: each kind gets its own message before weights load, from trainer, command and dry run."""

import json
import re

import datasets
import peft
import pytest
import torch
import transformers
from conftest import build_model, length_reward
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from test_errors import no_weights  # noqa: F401  (a fixture)
from trl import SFTConfig

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.checks import supervised_findings
from dgrpo_trl.cli import train_dgrpo, train_sft
from dgrpo_trl.data_loading import MissingSplitError, load_rows
from dgrpo_trl.models import Models
from dgrpo_trl.rewards import LLMJudgeReward, exact_match_reward, get_contains_answer_reward
from dgrpo_trl.row_checks import compares_references, prompt_fault, prompt_problems, template_problems
from dgrpo_trl.training_data import splits_overlap


def user(content):
    return [{"role": "user", "content": content}]


GOOD = [{"prompt": user(f"Number {i}?"), "answer": str(i)} for i in range(8)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def start(make_trainer, saved_teacher, tmp_path, no_weights, request):  # noqa: F811
    """Starts a run on rows that are written to a file, or passed to the trainer: until weights would load."""

    def start(kind, rows, **options):
        if kind == "trainer":
            dataset = Dataset.from_list(rows, on_mixed_types="use_json")
            return make_trainer(DGRPOTrainer, distill_coef=0.0, train_dataset=dataset, **options)
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run_command(kind, path)

    def run_command(kind, path, *flags, command=train_dgrpo):
        words = ["--model_name_or_path", saved_teacher, "--dataset_name", str(path), "--use_cpu", "--bf16", "false"]
        words += ["--output_dir", str(tmp_path / "out"), "--report_to", "none", *flags]
        words += ["--dry_run"] if kind == "dry run" else []
        if command is train_dgrpo:
            words += ["--distill_coef", "0", "--reward_funcs", "exact_match_reward"]
            words += ["--per_device_train_batch_size", "4", "--num_generations", "4", "--max_completion_length", "8"]
        command.main(words)

    start.command = run_command
    return start


FAULTS = {
    "null": (None, "`prompt` is null"),
    "an empty text": ("", "`prompt` is an empty text"),
    "an empty list": ([], "`prompt` is an empty list"),
    "a number": (3, "`prompt` is a int"),
    "texts": (["a"], "`prompt` is a list of str, not of messages"),
    "one message": ({"role": "user", "content": "x"}, "`prompt` is a dict"),
    "no role": ([{"content": "x"}], "a message with no 'role'"),
    "a role that is a number": ([{"role": 3, "content": "x"}], "a message with the role 3"),
    "from and value": ([{"from": "human", "value": "x"}], "messages with 'from' and 'value'"),
    "no content": ([{"role": "user"}], "a message with no 'content'"),
    "a number as content": (user(3), "a content that is a int"),
    "a part without a type": (user([{"text": "x"}]), "a part that is no text or image"),
    "a part of another type": (user([{"type": "text", "text": 3}]), "a part that is no text or image"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("kind", ["trainer", "command", "dry run"])
def test_a_prompt_that_cannot_be_read_is_named_with_its_row(start, kind, name):
    prompt, match = FAULTS[name]
    rows = [*GOOD[:2], {"prompt": prompt, "answer": "1"}, *GOOD[3:]]
    if isinstance(prompt, str):
        rows = [{**row, "prompt": row["prompt"][0]["content"]} for row in GOOD]
        rows[2] = {**rows[2], "prompt": prompt}
    with pytest.raises(ValueError, match=re.escape(match)) as error:
        start(kind, rows)
    assert "in 1 of 8 rows, first in row 2 (from 0)" in str(error.value)


def test_prompts_that_can_be_read_have_no_fault():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    parts = user([{"type": "text", "text": "x", "image": None}, {"type": "image"}])
    for prompt in ("x", user(""), user("x"), [*user("x"), call], parts):
        assert prompt_fault(prompt) is None
    assert not prompt_problems([None, user("x")], "rows", "teacher_prompt", takes_none=True)
    (problem,) = prompt_problems(["x", user("x")], "rows")
    assert "row 0 is a text, that of row 1 a list of messages" in problem


def test_a_teacher_prompt_is_read_as_strictly_where_there_is_one(make_trainer, make_model, no_weights):  # noqa: F811
    rows = [{**row, "teacher_prompt": [] if i == 3 else None} for i, row in enumerate(GOOD)]
    with pytest.raises(ValueError, match="first in row 3 .from 0., the `teacher_prompt` is an empty list"):
        make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), train_dataset=Dataset.from_list(rows))


def test_a_stream_is_read_as_strictly(make_trainer):
    rows = Dataset.from_list([*({"prompt": row["prompt"]} for row in GOOD), {"prompt": None}]).select([8] * 4)
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, train_dataset=rows.to_iterable_dataset())
    with pytest.raises(ValueError, match="`prompt` is null"):
        trainer.train()


# --- Chat templates


def test_a_role_that_the_template_leaves_out_is_named(tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('No tools.') }}{% endif %}"
        "{% if m.role in ('user', 'assistant') %}{{ m.content | trim }}{% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    human = [{"role": "human", "content": "x"}]
    (problem,) = template_problems([user("x"), [*user("a"), *human], human], "rows", tokenizer)
    assert "leaves out messages of the role 'human'" in problem and "row 1" in problem
    (problem,) = template_problems([user("x"), [{"role": "tool", "content": "x"}]], "rows", tokenizer)
    assert "rejects messages: No tools." in problem
    assert not template_problems([user("x"), user(""), "a text"], "rows", tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert not template_problems(["a text"], "rows", tokenizer)
    (problem,) = template_problems([user("x")], "rows", tokenizer)
    assert "has no chat template" in problem


# --- Columns


INSTEAD_OF_A_PROMPT = {
    "messages": [*user("Number?"), {"role": "assistant", "content": "4"}],
    "conversations": [{"from": "user", "value": "Number?"}, {"from": "assistant", "value": "4"}],
    "question": "Number?",
    "problem": "Number?",
    "instruction": "Number?",
    "text": "Number?",
}


@pytest.mark.parametrize("column", INSTEAD_OF_A_PROMPT)
@pytest.mark.parametrize("kind", ["trainer", "command", "dry run"])
def test_the_line_in_the_error_makes_a_prompt_of_another_column(start, kind, column):
    row = {column: INSTEAD_OF_A_PROMPT[column]}
    row |= {"input": "The ship.", "output": "4"} if column == "instruction" else {}
    with pytest.raises(ValueError, match="no column 'prompt'") as error:
        start(kind, [row] * 8)
    line = re.search(r"`dataset = (.*?)`\.", str(error.value))[1]
    import trl

    made = eval(line, {"dataset": Dataset.from_list([row]), "trl": trl})
    expected = {"instruction": user("Number?\n\nThe ship."), "text": "Number?"}.get(column, user("Number?"))
    assert made[0]["prompt"] == expected
    if column in ("messages", "conversations", "instruction"):
        assert made[0]["answer"] == "4"


@pytest.mark.parametrize("kind", ["trainer", "command", "dry run"])
def test_a_column_that_a_reward_function_takes_must_be_there(start, kind):
    rows = [{"prompt": row["prompt"]} for row in GOOD]
    options = {"reward_funcs": exact_match_reward} if kind == "trainer" else {}
    with pytest.raises(ValueError, match="no column 'answer'; .*reward function `exact_match_reward` takes it"):
        start(kind, rows, **options)


@pytest.mark.parametrize("kind", ["trainer", "command", "dry run"])
@pytest.mark.parametrize(("value", "shown"), [(4, "a int: 4"), (0.5, "a float: 0.5"), ([1, 2], "a list")])
def test_an_answer_that_is_no_text_is_refused_where_text_is_compared(start, kind, value, shown):
    rows = [{**row, "answer": value} for row in GOOD]
    options = {"reward_funcs": exact_match_reward} if kind == "trainer" else {}
    with pytest.raises(ValueError, match=re.escape(f"first in row 0 (from 0), the `answer` is {shown}")) as error:
        start(kind, rows, **options)
    line = re.search(r"`dataset = (dataset\.map.*?)`\.", str(error.value))[1]
    made = eval(line, {"dataset": Dataset.from_list(rows)})
    assert made[0]["answer"] == ([str(part) for part in value] if isinstance(value, list) else str(value))


def test_answers_that_are_missing_are_counted(make_trainer, no_weights, caplog):  # noqa: F811
    rows = [{**row, "answer": None} for row in GOOD]
    with pytest.raises(ValueError, match="no row has an `answer`"):
        options = {"distill_coef": 0.0, "reward_funcs": exact_match_reward}
        make_trainer(DGRPOTrainer, train_dataset=Dataset.from_list(rows), **options)
    with pytest.raises(AssertionError, match="weights were about to be loaded"):
        make_trainer(DGRPOTrainer, train_dataset=Dataset.from_list([*rows[:3], *GOOD[3:]]), **options)
    assert "3 of 8 rows have no `answer`" in caplog.text


def test_what_reward_functions_take_is_read_off_them(make_trainer, no_weights):  # noqa: F811
    def takes_color(prompts, completions, completion_ids, color, trainer_state, log_extra, size=1, **kwargs):
        return [0.0] * len(completions)

    async def asynchronous(completions, *, color):
        return [0.0] * len(completions)

    class Callable:
        def __call__(self, completions, color, **kwargs):
            return [0.0] * len(completions)

    def start(*reward_funcs, rows=GOOD, **options):
        dataset = Dataset.from_list(rows)
        arguments = {"reward_funcs": list(reward_funcs), "train_dataset": dataset, **options}
        make_trainer(DGRPOTrainer, distill_coef=0.0, **arguments)

    for func in (takes_color, asynchronous, Callable()):
        with pytest.raises(ValueError, match="no column 'color'"):
            start(func)
        with pytest.raises(AssertionError, match="weights were about"):
            start(func, rows=[{**row, "color": "red"} for row in GOOD])
        with pytest.raises(AssertionError, match="weights were about"):  # its output has columns too
            start(func, rollout_func=lambda prompts, trainer: {})
    with pytest.raises(ValueError, match="Set `remove_unused_columns=False`"):
        start(exact_match_reward, remove_unused_columns=True)
    with pytest.raises(ValueError, match="`eval_dataset` has no column 'answer'"):
        start(exact_match_reward, eval_dataset=Dataset.from_list([{"prompt": user("x")}] * 4))


def test_rewards_of_the_package_compare_references_and_others_need_not():
    ours = (exact_match_reward, get_contains_answer_reward(3), LLMJudgeReward("m", base_url="http://localhost"))
    assert all(map(compares_references, ours))
    assert not any(map(compares_references, (length_reward, "a/model", torch.nn.Linear(1, 1), max)))


# --- What is no data set


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        (GOOD, "`Dataset.from_list(rows)`"),
        ({"prompt": ["a"]}, "`Dataset.from_dict(columns)`"),
        (DatasetDict(train=Dataset.from_list(GOOD)), "`dataset['train']`"),
        ("rows.jsonl", "`load_dataset(...)`"),
    ],
    ids=["list", "dict", "splits", "path"],
)
def test_what_is_no_data_set_is_trls_error_with_a_way_out(make_trainer, no_weights, value, fix):  # noqa: F811
    match = f"`train_dataset` must be a `Dataset` or `IterableDataset`, got `{type(value).__name__}`.*"
    with pytest.raises(TypeError, match=match + re.escape(fix)):
        make_trainer(DGRPOTrainer, distill_coef=0.0, train_dataset=value)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return GOOD[index]


@pytest.mark.parametrize(
    "rows", [GOOD[:4], Rows(), DatasetDict(a=Dataset.from_list(GOOD[:4]))], ids=["list", "torch", "splits"]
)
def test_what_trl_evaluates_on_is_evaluated_on(make_trainer, rows):
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, eval_dataset=rows)
    assert any(name.endswith("loss") for name in trainer.evaluate())


def test_a_list_to_evaluate_on_is_checked(make_trainer, no_weights):  # noqa: F811
    with pytest.raises(ValueError, match="`eval_dataset`: in 1 of 2 rows, first in row 1"):
        make_trainer(DGRPOTrainer, distill_coef=0.0, eval_dataset=[GOOD[0], {"prompt": None, "answer": "1"}])
    with pytest.raises(TypeError, match="`eval_dataset` must be"):
        make_trainer(DGRPOTrainer, distill_coef=0.0, eval_dataset=3)


# --- Files


FILES = {
    "empty.jsonl": ("", "it is empty"),
    "blank.jsonl": (" \n\n", "it holds no row"),
    "no_rows.json": ("[]", "it holds no row"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n', "line 2 of broken.jsonl is no JSON"),
    "broken.json": ('[{"prompt": "a"},\n{"prompt": ]\n', "line 2 of broken.json is no JSON"),
    "lines.json": ('{"prompt": "a"}\n\n{"prompt": \n', "line 3 of lines.json is no JSON"),
    "list.jsonl": ('{"prompt": "a"}\n["b"]\n', "line 2 of list.jsonl is no JSON object"),
    "broken.parquet": ("PAR1 and no more", "Parquet magic bytes not found"),
    "table.csv": ("prompt\na\n", "it is a .csv file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_rows_says_so(tmp_path, name):
    content, match = FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"The data set .*{name}' cannot be read: {match}"):
        load_rows(str(tmp_path / name))
    if name != "table.csv":
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / name).write_text(content)
        with pytest.raises(ValueError, match=f"The data set .*folder' cannot be read: {match}"):
            load_rows(str(tmp_path / "folder"))


@pytest.mark.parametrize("command", [train_dgrpo, train_sft])
@pytest.mark.parametrize("kind", ["command", "dry run"])
def test_the_commands_say_so_too(start, tmp_path, kind, command):
    (tmp_path / "broken.jsonl").write_text(FILES["broken.jsonl"][0])
    (tmp_path / "nothing").mkdir()
    for name, match in (("broken.jsonl", "line 2 of broken.jsonl"), ("nothing", "it has no data files")):
        with pytest.raises(ValueError, match=match):
            start.command(kind, tmp_path / name, command=command)


def test_a_text_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    (problem,) = prompt_problems(load_rows(str(tmp_path / "latin.jsonl"))["prompt"], "rows")
    assert "is no UTF-8" in problem


def test_sft_refuses_completions_that_cannot_be_read(tokenizer):
    config = build_model().config
    rows = {"prompt": ["a", "b"], "completion": ["x", None]}
    findings = supervised_findings(
        SFTConfig("out", use_cpu=True, bf16=False),
        Models(config, tokenizer, config),
        {"train_dataset": Dataset.from_dict(rows)},
    )
    assert "in 1 of 2 rows, first in row 1 (from 0), the `completion` is null" in findings.problems[0]


# --- Adapters


@pytest.fixture
def adapter(tokenizer, tmp_path):
    """Paths of a model and of a folder with its adapter alone, and the adapted model."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    build_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    return base, folder, model


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_the_lines_in_the_error_merge_an_adapter(adapter, tokenizer, make_trainer, tmp_path, with_tokenizer):
    _, folder, model = adapter
    if with_tokenizer:
        tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="is a PEFT adapter of .*base', and no model") as error:
        make_trainer(DGRPOTrainer, teacher_model=str(folder))
    for line in str(error.value).splitlines()[1:3]:
        eval(line, {"peft": peft, "transformers": transformers})
    merged = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}-merged")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits)
    make_trainer(DGRPOTrainer, teacher_model=f"{folder}-merged", max_steps=1).train()


def test_an_adapter_is_no_student(adapter, dataset, start, tmp_path):
    base, folder, _ = adapter
    args = DGRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, distill_coef=0.0)
    for match in ("is a PEFT adapter", "is_trainable=True"):
        with pytest.raises(ValueError, match=match):
            DGRPOTrainer(str(folder), length_reward, args, dataset)
    dataset.to_json(tmp_path / "rows.jsonl")
    for kind in ("command", "dry run"):
        with pytest.raises(ValueError, match="is a PEFT adapter"):
            start.command(kind, tmp_path / "rows.jsonl", "--model_name_or_path", str(folder))


# --- Splits


def test_splits_of_every_kind_of_local_data(tmp_path):
    rows = Dataset.from_list([{"prompt": str(i)} for i in range(10)])
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("rows.jsonl", "saved", "splits", "folder"):
        path = str(tmp_path / name)
        for split, expected in (("train", range(10)), ("train[:80%]", range(8)), ("train[-3:]", range(7, 10))):
            assert load_rows(path, split=split)["prompt"][:] == [str(i) for i in expected]
        with pytest.raises(MissingSplitError, match=r"has no split 'test'; it has \['train'\]"):
            load_rows(path, split="test", needs_split=True)
    assert len(load_rows(str(tmp_path / "rows.jsonl"), split="chat")) == 10  # a file names no split
    with pytest.raises(ValueError, match="a part of a stream"):
        load_rows(str(tmp_path / "rows.jsonl"), split="train[:80%]", streaming=True)


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ("train", "test", False),
        ("train", "train", True),
        ("train", "train[90%:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:91%]", "train[90%:]", True),
        ("train[:-100]", "train[-100:]", False),
        ("train+validation", "validation", True),
        ("train[:0%]", "train", False),
    ],
)
def test_splits_that_overlap(first, second, overlap):
    assert splits_overlap(first, second) == splits_overlap(second, first) == overlap
