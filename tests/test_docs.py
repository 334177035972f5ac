"""The pages for readers: their Python runs, and their commands name files, targets and flags that exist."""

import asyncio
import re
import shlex
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, build_model
from datasets import Dataset
from pydantic import TypeAdapter
from test_command_lines import help_of
from test_prefix import errors, tiny_model
from test_recipes import parse_training

from dgrpo_trl import DGRPOConfig
from dgrpo_trl.cli.arguments import parse_arguments
from dgrpo_trl.cli.train_dgrpo import load_reward_func
from dgrpo_trl.evaluation.arguments import EvaluationArguments
from dgrpo_trl.evaluation.ruler import RULER_TASKS, make_samples
from dgrpo_trl.longblocks import BuildConfig, split_blocks
from dgrpo_trl.longblocks.questions.rule_engine import TASKS, RuleEngine, RuleEngineConfig
from dgrpo_trl.longblocks.records import Document
from dgrpo_trl.longblocks.sources import reading
from dgrpo_trl.losses import DIVERGENCES, Distillation, LMHead, token_terms
from dgrpo_trl.shared_prefix import BACKENDS, SUPPORTED_LAYERS, check_backend, choose_kernel


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("README.md"))]
EXTENDING = ROOT / "docs" / "extending.md"
PARAGRAPH = "The ship Antonio sails from Venice with number 4821. "
ONE_SHORT_STEP = (
    "max_steps=1, num_generations=2, per_device_train_batch_size=2, max_completion_length=4, use_cpu=True, "
    "bf16=False, report_to='none'"
)
# What a reader has, and a test has not: what stands on a page, and what is run in its place
STAND_INS = {
    "Qwen/Qwen3-1.7B": "student",
    "Qwen/Qwen3-32B": "teacher",
    "nvidia/Nemotron-Post-Training-Dataset-v1": "conversations.jsonl",
    "load_longblocks(tokenizer": "load_longblocks('longblocks.jsonl', tokenizer",
    "DGRPOConfig(": f"DGRPOConfig({ONE_SHORT_STEP}, ",
}


def blocks(page, language):
    """Code blocks of a page, with the numbers of their lines."""
    for match in re.finditer(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.M | re.S):
        yield page.read_text()[: match.start()].count("\n") + 1, match[1]


@pytest.fixture
def reader(tokenizer, saved_teacher, tmp_path, monkeypatch):
    """The names that a reader has defined; the folder holds the models and data of `STAND_INS`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").symlink_to(saved_teacher)
    build_model(max_position_embeddings=2048).save_pretrained("student")
    tokenizer.save_pretrained("student")
    question = {"question": "Which number has the ship?", "answer": "4821"}
    prompt = [{"role": "user", "content": question["question"]}]
    Dataset.from_list([{"prompt": prompt, **question}] * 4).to_json("questions.jsonl")
    document = {"id": "1", "document": PARAGRAPH * 20, "source": "s", "language": "en"}
    Dataset.from_list([{**document, **question}] * 20).to_json("longblocks.jsonl")
    messages = [*prompt, {"role": "assistant", "content": "4821"}]
    Dataset.from_list([{"messages": messages}] * 20).to_json("conversations.jsonl")
    return {"tokenizer": tokenizer}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != EXTENDING and any(blocks(page, "python"))], ids=lambda page: page.name
)
def test_the_python_of_a_page_runs(page, reader):
    for line, code in blocks(page, "python"):
        for name, stand_in in STAND_INS.items():
            code = code.replace(name, stand_in)
        exec(compile("\n" * line + code, str(page), "exec"), reader)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_exist(page):
    named = re.findall(r"(?:scripts|recipes|tests|dgrpo_trl)/[\w./-]*\w(?:\.\w+)", page.read_text())
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_targets_and_extras_that_a_page_names_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    extras = metadata("dgrpo_trl").get_all("Provides-Extra")
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"(?:`|^)make ([\w-]+)", text, re.M):
            assert name in targets, f"{page}: make {name}"
        for names in re.findall(r"pip install -e '?\.\[([\w,]+)\]", text):
            assert set(names.split(",")) <= set(extras), f"{page}: {names}"


def commands(page):
    """Commands of a page as lists of words, without the parts that are placeholders."""
    for _, block in blocks(page, "bash"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if words := shlex.split(re.sub(r"\[--.*?\]", "", line), comments=True):
                yield words


COMMANDS = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, words in enumerate(commands(page))
    if any(word.startswith("scripts/") for word in words)
]


@pytest.mark.parametrize("words", COMMANDS)
def test_the_flags_of_a_command_are_known_to_its_script(words):
    place = next(number for number, word in enumerate(words) if word.startswith("scripts/"))
    script = Path(words[place])
    known = {*re.findall(r"--[\w.]+", help_of(ROOT / script))}
    if "build_longblocks" in script.name:
        known |= {f"--{key}" for key in BuildConfig.model_fields}
    flags = [word.partition("=")[0] for word in words[place:] if word.startswith("--")]
    assert all(flag.partition(".")[0] in known for flag in flags), flags


TRAINING = [item for item in COMMANDS if any(re.fullmatch(r"scripts/train_\w+\.py", word) for word in item.values[0])]


@pytest.mark.parametrize("words", TRAINING)
def test_a_training_command_is_read_by_the_script_that_it_names(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words[0] == "sbatch":  # script and recipe are the words after the job's
        words = [*words[: words.index("recipes/slurm/train.sbatch") + 2], "--config", words[-1]]
    place = next(number for number, word in enumerate(words) if word.startswith("scripts/train_"))
    parse_training(Path(words[place]).stem.removeprefix("train_"), *words[place + 1 :])
    if "--config_file" in words:
        assert load_config_from_file(words[words.index("--config_file") + 1])


# --- docs/extending.md: what each section adds works


SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", EXTENDING.read_text(), re.M | re.S))


def section(name):
    """The names that the Python of a section defines."""
    names = {"__name__": "my_extension"}
    exec(re.search(r"^```python\n(.*?)^```", SECTIONS[name], re.M | re.S)[1], names)
    return names


@pytest.fixture
def tables():
    """Takes out again what a section adds."""
    found = (DIVERGENCES, BACKENDS, SUPPORTED_LAYERS, RULER_TASKS, TASKS)
    before = [dict(table) for table in found]
    yield
    for table, lines in zip(found, before, strict=True):
        table.clear()
        table.update(lines)


def test_every_section_of_extending_is_followed():
    assert set(SECTIONS) == {
        *("A reward", "A divergence", "An attention backend", "A model type", "An evaluation task"),
        *("A source of documents", "A kind of question"),
    }


def test_a_reward_is_added_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(.*?)^```", SECTIONS["A reward"], re.M | re.S)[1]
    Path("my_rewards.py").write_text(code)
    reward = load_reward_func(re.search(r"reward_funcs: \[(.*?)\]", SECTIONS["A reward"])[1])
    completions = [[{"role": "assistant", "content": text}] for text in ("The port, please.", "The port.")]
    assert reward(completions=completions, answer=["a", "b"]) == [1.0, 0.0]


def test_a_divergence_is_added_as_the_page_says(tables, tmp_path):
    section("A divergence")
    name = re.search(r"distill_divergence: (\w+)", SECTIONS["A divergence"])[1]
    assert DGRPOConfig(str(tmp_path), distill_divergence=name, use_cpu=True, bf16=False).distill_divergence == name
    generator = torch.Generator().manual_seed(0)
    hidden, states, head, teacher_head = (
        torch.randn(size, dtype=torch.float64, generator=generator) for size in ((4, 3), (4, 5), (9, 3), (9, 5))
    )

    def divergence(hidden, weight):
        distillation = Distillation(states, LMHead(teacher_head), name)
        return token_terms(hidden, LMHead(weight), torch.arange(4), distillation=distillation).divergences

    p, t = (hidden @ head.T).softmax(-1), (states @ teacher_head.T).softmax(-1)
    torch.testing.assert_close(divergence(hidden, head), 1 - (p * t).sqrt().sum(-1))
    assert torch.autograd.gradcheck(divergence, (hidden.requires_grad_(), head.requires_grad_()))


def test_an_attention_backend_is_added_as_the_page_says(tables):
    kernel = section("An attention backend")["Float64Kernel"]
    name = re.search(r"shared_prefix_backend: (\w+)", SECTIONS["An attention backend"])[1]
    check_backend(name)
    assert isinstance(choose_kernel(name, torch.device("cpu"), torch.float32, 8), kernel)


def test_a_model_type_is_added_as_the_page_says(tables):
    before = set(SUPPORTED_LAYERS)
    section("A model type")
    (added,) = set(SUPPORTED_LAYERS) - before
    logps, gradients = errors(tiny_model(added).double())
    assert logps < 1e-12 and gradients < 1e-6  # of its gradients, some pass through float32


def test_an_evaluation_task_is_added_as_the_page_says(tables, tokenizer):
    section("An evaluation task")
    name = re.search(r"--tasks (\w+)", SECTIONS["An evaluation task"])[1]
    (args,) = parse_arguments(
        (EvaluationArguments,), ["--model_name_or_path", "m", "--output_dir", "o", "--lengths", "512", "--tasks", name]
    )
    for sample in make_samples(args.tasks[0], 512, 3, tokenizer):
        assert sample.messages[-1]["content"].count("A ship sails by.") == int(sample.references[0])


def test_a_source_of_documents_is_added_as_the_page_says(tmp_path):
    source = section("A source of documents")["CsvSource"]
    diff = re.search(r"^```diff\n(.*?)^```", SECTIONS["A source of documents"], re.M | re.S)[1].splitlines()
    before, after = ("\n".join(line[1:] for line in diff if line[0] in signs) for signs in (" -", " +"))
    text = Path(reading.__file__).read_text()
    assert text.count(before) == 1
    names = {"__name__": reading.__name__, "__package__": reading.__package__, "CsvSource": source}
    exec(text.replace(before, after), names)
    (tmp_path / "rows.csv").write_text("text,number\nA ship.,1\nA port.,2\n")
    values = {"type": "csv", "name": "s", "path": str(tmp_path / "rows.csv"), "id_column": "number"}
    config = TypeAdapter(names["SourceConfig"]).validate_python(values)
    config.check()
    documents = list(config.read(skip=1))
    assert [(document.text, document.source_id) for document in documents] == [("A port.", "2")]


def test_a_kind_of_question_is_added_as_the_page_says(tables):
    section("A kind of question")
    values = yaml.safe_load(re.search(r"`questions: (\{.*?\}\})`", SECTIONS["A kind of question"])[1])
    text = "\n\n".join(f"The ship {word} sails from Venice. {PARAGRAPH * 8}" for word in ("Aa", "Bartholomew", "Cc"))
    engine = RuleEngine(RuleEngineConfig(**values, lengths=(None,)), lambda text: len(text.split()))
    document = Document(text=text, source="s", source_id="1", language="en")
    rows, _ = asyncio.run(engine.rows(document, split_blocks(text), []))
    assert rows[0].answer == "bartholomew" and rows[0].task in values["tasks"]
    assert all("Bartholomew" in rows[0].document[e.start : e.end] for e in rows[0].evidence)
