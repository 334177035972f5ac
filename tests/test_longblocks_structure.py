"""Questions on what stands in a text by its structure, solved again by another way, and what does without the text."""

import ast
import asyncio
import re
import sysconfig
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from dgrpo_trl.longblocks.questions.baselines import Baselines
from dgrpo_trl.longblocks.questions.blocks import BlocksConfig, split_blocks
from dgrpo_trl.longblocks.questions.python_code import parsed
from dgrpo_trl.longblocks.questions.rule_engine import RuleEngine, RuleEngineConfig
from dgrpo_trl.longblocks.records import Document
from dgrpo_trl.rewards import list_match_reward


NAMES = ["ANNA", "BRUNO", "CARLA", "DAVID", "ELENA"]
STDLIB = [
    Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in ("argparse", "tarfile", "configparser", "shutil")
]


def sentence(number):
    return f"The {number}th traveller of the evening has come down to the harbour."


def make_play(names=NAMES, num_speeches=120, repeated=False):
    parts, order = ["ACT I.\n\nSCENE I. A harbour."], []
    for number in range(num_speeches):
        name = names[(number * number + number // 7) % len(names)]
        if order and order[-1] == name:
            name = names[(names.index(name) + 1) % len(names)]
        order.append(name)
        words = sentence(0 if repeated else number)
        parts.append(f"{name}.\nGood day to you.\n{words}")
        if number % 9 == 4:
            parts.append(f"[Enter {names[number % len(names)].title()}.]")
    return "\n\n".join(parts), order


def make_manual(heading="## {title}", num_sections=40, same_titles=False):
    topics = "lanterns bridges orchards kettles windows ladders barrels mirrors"
    sections = []
    for number in range(num_sections):
        title = "Other" if same_titles else f"Care of {topics.split()[number % 8]} in year {number}"
        words = "painted brushes" if number % 5 == 0 else "cleaned cloths"
        body = f"In this season the workers of number {number} begin early and use {words} all day. " * 1
        line = heading.format(title=title, number=f"{number + 1}.")
        sections.append(f"{line}\n\n{body}\n\nThey rest at noon for {number} minutes, and then the work goes on.")
    return "\n\n".join(sections)


def make_rows(task, text, kind="text", source_id="x.txt", rows_per_document=12, lengths=(600, 900)):
    config = RuleEngineConfig(engine="rule", lengths=lengths, tasks={task: 1}, rows_per_document=rows_per_document)
    document = Document(text=text, source="s", source_id=source_id, language="en", kind=kind)
    blocks = split_blocks(text, kind, BlocksConfig(min_block_chars=200, max_block_chars=1500), source_id)
    rows, drops = asyncio.run(RuleEngine(config, lambda text: len(text) // 4).rows(document, blocks, []))
    for row in rows:
        assert row.document in text  # nothing is inserted
        assert row.evidence and all(row.document[e.start : e.end].strip() for e in row.evidence)
    return rows, drops


def speeches_of(text):
    """(name, words) by reading lines, not by the pattern of the engine."""
    found, name = [], None
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z]+\.", line):
            name = line[:-1]
            found.append([name, ""])
        elif line.startswith("["):
            name = None
        elif name is not None:
            found[-1][1] += line + " "
    return found


def solve_play(row):
    found = speeches_of(row.document)
    quotes = re.findall("“(.*?)”", row.question)
    places = [next(i for i, (_, words) in enumerate(found) if quote in words) for quote in quotes]
    if row.task == "play_speaker":
        return found[places[0]][0]
    if row.task == "play_reply":
        return found[places[0] - 1][0]
    if row.task == "play_entry":
        return re.search(r"\[Enter (\w+)", row.document[row.document.index(quotes[0]) :])[1]
    names = [name for name, _ in found[places[0] : places[1] + 1]]
    if row.task == "play_most":
        return Counter(names).most_common(1)[0][0]
    return ", ".join(dict.fromkeys(names))


PLAY_TASKS = ["play_speaker", "play_reply", "play_entry", "play_most", "play_speakers"]


@pytest.mark.parametrize("task", PLAY_TASKS)
def test_questions_on_plays_have_the_answer_that_the_lines_give(task):
    rows, _ = make_rows(task, make_play(NAMES + ["FELIX", "GRETA"])[0])
    assert len(rows) >= 6
    for row in rows:
        assert solve_play(row) == row.answer


@pytest.mark.parametrize("task", PLAY_TASKS)
@pytest.mark.parametrize(
    "text",
    [
        make_manual(),  # no play
        make_play(repeated=True)[0],  # each speech has the words of every other
        make_play(["ANN", "ANNA", "ANNABEL"])[0],  # one may be short for another
    ],
)
def test_plays_that_leave_an_answer_open_are_not_asked_about(task, text):
    if task == "play_entry" and "ANNABEL" in text:
        pytest.skip("who enters is written out")
    assert make_rows(task, text)[0] == []


@pytest.mark.parametrize("task", ["play_speaker", "play_reply"])
def test_a_short_line_is_no_speaker(task):
    text, number = make_play([*NAMES, "FELIX", "GRETA"])[0], iter(range(100))
    text = re.sub(r"to you\.\n(?=The \d*5th)", lambda _: f"to you.\n\nGood Night{'x' * next(number)}.\n", text)
    rows, _ = make_rows(task, text)
    assert rows and "Good Nightx." in text
    for row in rows:
        assert row.answer in (*NAMES, "FELIX", "GRETA")
        if task == "play_speaker":
            assert not re.search("[0-9]*5th", row.question)


@pytest.mark.parametrize(
    ("heading", "kind"), [("## {title}", "markdown"), ("{number}4. {title}", "text"), (":{title}:", "text")]
)
def test_a_passage_stands_under_the_heading_before_it(heading, kind):
    rows, _ = make_rows("heading", make_manual(heading), kind)
    assert len(rows) >= 6
    for row in rows:
        (quote,) = re.findall("“(.*?)”", row.question)
        before = row.document[: row.document.index(quote)]
        last = [line for line in before.splitlines() if re.match(r"## |\d+\.4\. |:", line)][-1]
        assert re.sub("^## |:", "", last) == row.answer
        assert row.document.count(quote) == 1


def test_the_headings_of_a_word_are_all_of_them():
    rows, _ = make_rows("headings", make_manual(), "markdown", lengths=(600, 500))
    assert rows
    for row in rows:
        (word,) = re.findall("“(.*?)”", row.question)
        parts = re.split(r"(?m)^## (.*)$", row.document)[1:]
        titles = [title for title, body in zip(parts[::2], parts[1::2], strict=True) if word in body]
        assert titles == row.answer.split(", ")


def test_the_section_that_refers_to_another_is_found():
    text = "\n\n".join(
        f"{n}. Topic {chr(65 + n)} of the manual\n\n{sentence(n)} For more, see Section {n * 7 % 30 + 1}.{n % 3 + 1}."
        for n in range(1, 30)
    )
    text = re.sub(r"(?m)^(\d+)\. ", lambda m: f"{int(m[1])}.{int(m[1]) % 3 + 1}. ", text)
    for row in make_rows("heading_reference", text, lengths=(900,))[0]:
        (title,) = re.findall("“(.*?)”", row.question)
        number = re.search(rf"(?m)^([\d.]+)\. {re.escape(title)}$", row.document)[1]
        (place,) = [m.start() for m in re.finditer(rf"Section {re.escape(number)}\b", row.document)]
        assert re.findall(r"(?m)^\d+\.\d+\. .*$", row.document[:place])[-1] == row.answer


@pytest.mark.parametrize("task", ["heading", "headings", "heading_reference"])
def test_headings_that_repeat_or_are_none_are_not_asked_for(task):
    items = make_manual("{number} {title}")  # may be the items of a list
    underlined = re.sub(r"(?m)^## (Care of l.*)$", r"\1\n=======", make_manual())
    assert make_rows(task, underlined, "markdown")[0] == []
    for text in (
        items,
        make_manual(same_titles=True),
        make_play()[0],
        "\n".join(f"{n}. Topic {n}" for n in range(400)),
    ):
        assert make_rows(task, text, "markdown" if text.startswith("#") else "text")[0] == []


def test_passages_stand_in_the_order_of_the_answer():
    rows, _ = make_rows("passage_order", make_manual(), "markdown")
    assert len(rows) >= 6
    for row in rows:
        options = dict(re.findall(r"(?m)^([A-D]): (.*)$", row.question))
        assert sorted(options, key=lambda letter: row.document.index(options[letter])) == row.answer.split(", ")
    assert len({row.answer for row in rows}) >= len(rows) // 2 and not any(row.answer == "A, B, C, D" for row in rows)


# --- Code: solved with a walk of its own


def functions_of(text):
    """By name, the outermost functions of a file, where the name is given to one alone."""
    found = defaultdict(list)

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found[child.name].append(child)
            else:
                walk(child)

    walk(ast.parse(text))
    return {name: nodes[0] for name, nodes in found.items() if len(nodes) == 1}


def called(node):
    targets = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {getattr(target, "id", getattr(target, "attr", None)) for target in targets} - {node.name}


def raised(node):
    errors = [r.exc.func if isinstance(r.exc, ast.Call) else r.exc for r in ast.walk(node) if isinstance(r, ast.Raise)]
    return {error.id for error in errors if isinstance(error, ast.Name)}


CODE_TASKS = ["code_caller", "code_callers", "code_chain", "code_raiser", "code_default"]


@pytest.mark.parametrize("task", CODE_TASKS)
def test_questions_on_code_have_the_answer_that_its_tree_gives(task):
    num_rows = 0
    for path in STDLIB:
        text = path.read_text(encoding="utf-8")
        functions = functions_of(text)
        for row in make_rows(task, text, "code", path.name, lengths=(3000,))[0]:
            num_rows += 1
            names = re.findall("`(.*?)`", row.question)
            here = {n: f for n, f in functions.items() if f"def {n}(" in row.document}
            if task in ("code_caller", "code_callers"):
                assert {n for n, f in here.items() if names[0] in called(f)} == set(row.answer.split(", "))
            elif task == "code_raiser":
                assert [n for n, f in here.items() if names[0] in raised(f)] == [row.answer]
            elif task == "code_chain":
                assert names[1] in called(functions[row.answer]) and row.answer in called(functions[names[0]])
                assert names[1] not in called(functions[names[0]])
            else:
                assert re.search(rf"\b{names[0]}(:[^,]*)?\s*=\s*{re.escape(row.answer)}\W", row.document)
                assert row.answer not in ("None", "True", "False")
    assert num_rows >= 5


@pytest.mark.parametrize("task", CODE_TASKS)
def test_code_with_an_error_of_syntax_or_of_another_language_is_not_asked_about(task):
    text = STDLIB[0].read_text(encoding="utf-8")
    assert make_rows(task, text + "\ndef f(:\n", "code", "x.py")[0] == []
    assert make_rows(task, text, "code", "x.c")[0] == []


def test_calls_of_a_name_with_another_use_are_not_certain():
    text = (
        "def f(x):\n    return x\n\ndef g(h):\n    return f(h)\n\ndef h(f=None):\n    return f(1)\n\n"
        "class A:\n    def run(self):\n        return self.stop()\n    def stop(self):\n        return other.stop()\n"
    )
    assert all(not function.calls for function in parsed(text).functions.values())


def test_facts_are_never_written_into_docstrings():
    text = "\n\n\n".join(
        f'def function_{n}():\n    """First line.\n\n'
        + "\n\n".join(f"    Words number {i} of {n}. " * 8 for i in range(8))
        + f'\n    """\n    return {n}\n'
        for n in range(12)
    )
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.parse(text).body}
    rows, _ = make_rows_inserted(text, "code", "x.py")
    for row in rows:
        assert {ast.get_docstring(node, clean=False) for node in ast.parse(row.document).body} == docstrings
    assert rows


def test_facts_are_paragraphs_of_their_own_in_verse():
    verse = "\n\n".join(
        "\n".join(
            f"Of man's first step {n} and of the fruit. So {line}"
            for line in ("it fell,", "They ran,", "We saw,", "All.")
        )
        for n in range(60)
    )
    rows, _ = make_rows_inserted(verse, "text", "x.txt")
    assert rows
    for row in rows:
        added = [p for p in row.document.split("\n\n") if p not in verse.split("\n\n")]
        assert len(added) >= 4 and all(re.match(r"(The \w+ of|\w+ lives in)", paragraph) for paragraph in added)


def make_rows_inserted(text, kind, name):
    config = RuleEngineConfig(engine="rule", lengths=(None,), tasks={"two_hop": 1}, rows_per_document=6)
    document = Document(text=text, source="s", source_id=name, language="en", kind=kind)
    blocks = split_blocks(text, kind, BlocksConfig(min_block_chars=100, max_block_chars=400), name)
    return asyncio.run(RuleEngine(config, lambda text: len(text) // 4).rows(document, blocks, []))


# --- What does without reading: by task, the share of right answers


def scores_without_reading(rows):
    baselines = Baselines()
    for row in rows:
        baselines.add(row.task, row.question, row.answer, row.document)
    (shares,) = baselines.shares()
    return dict(zip(("majority", "closed book", "grep"), (int(share[:-1]) for share in shares[2:]), strict=True))


@pytest.mark.parametrize("task", [*PLAY_TASKS, "passage_order", "heading", *CODE_TASKS])
def test_neither_a_constant_nor_a_grep_answers(task):
    if task.startswith("code_"):
        made = [make_rows(task, p.read_text(encoding="utf-8"), "code", p.name, lengths=(3000,))[0] for p in STDLIB]
    elif task.startswith("play_"):
        made = [make_rows(task, make_play(NAMES + ["FELIX", "GRETA"], n)[0])[0] for n in (120, 150, 170)]
    else:
        made = [make_rows(task, make_manual(num_sections=n), "markdown")[0] for n in (30, 40, 50)]
    scores = scores_without_reading([row for rows in made for row in rows])
    if task == "passage_order":  # the options are letters
        del scores["closed book"]
    if task == "code_default":  # the line of the parameter holds its default: only the file must be searched
        del scores["grep"]
    assert all(score <= 40 for score in scores.values()), scores


def test_what_does_without_reading_is_counted():
    baselines = Baselines()
    text = "The mill of Ashwick has 12 doors.\nThe church of Ashwick has 30 windows. A bird sang."
    for answer in ("30", "30", "12", "Ashwick"):
        baselines.add("t", "How many windows does the church of Ashwick have?", answer, text)
    baselines.add("t", "How many windows?", "30", None)
    assert baselines.shares() == [("t", 5, "60%", "20%", "75%")]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("b, a", "a, b", 1.0),
        ("- B\n- A", "a, b", 1.0),
        ("a and b", "a, b", 1.0),
        ("a, b, c, d", "a, b", 0.5),
        ("a", "a, b", 0.5),
        ("c", "a, b", 0.0),
        ("<answer>First Lord; Queen</answer>", "QUEEN, FIRST LORD", 1.0),
        ("a, b", "a", 0.0),
        ("", "a, b", 0.0),
        ("a", "", None),
    ],
)
def test_lists_are_compared_as_sets(completion, answer, reward):
    assert list_match_reward([completion], [answer]) == [reward]
