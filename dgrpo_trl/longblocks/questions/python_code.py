"""Questions on Python code, from its syntax tree: only what stands in the window as a whole is asked for.

A call is certain where a name stands for one function of the file: a function of the module called by its name, or a
method called on `self`. A name with any other use in the file (shadowed, passed on, called on another object) is not
asked for.
"""

import ast
import functools
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from ..records import Document
from .passages import draft
from .windows import Draft, Window


Span = tuple[int, int]


@dataclass
class Function:
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    span: Span
    calls: set[str] = field(default_factory=set)  # certain calls, by name
    raised: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Module:
    functions: dict[str, Function]  # those whose name is given once in the file
    strings: tuple[Span, ...]  # of string literals over several lines


def is_python(document: Document) -> bool:
    """Whether a document is a file of Python that can be parsed."""
    return (
        document.kind == "code" and document.source_id.endswith((".py", ".pyi")) and parsed(document.text) is not None
    )


@functools.lru_cache(maxsize=4)
def parsed(text: str) -> Module | None:
    """What questions are made of; `None` for a text with an error of syntax."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    starts = [0, *(match.end() for match in re.finditer("\r\n|\r|\n", text))]
    lines = text.splitlines(keepends=True) if "\f" not in text else re.split("(?<=\n)", text)

    def offset(line: int, column: int) -> int:
        raw = lines[line - 1] if line <= len(lines) else ""
        return starts[line - 1] + (column if raw.isascii() else len(raw.encode()[:column].decode(errors="ignore")))

    def span(node: ast.AST) -> Span:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])  # type: ignore[attr-defined]
        return starts[first - 1], offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    strings = [
        (offset(n.lineno, n.col_offset), offset(n.end_lineno, n.end_col_offset))  # type: ignore[attr-defined,arg-type]
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant | ast.JoinedStr) and n.end_lineno != n.lineno  # type: ignore[attr-defined]
    ]
    names: Counter[str] = Counter()
    found: list[tuple[Function, bool]] = []
    certain: Counter[str] = Counter()

    def visit(node: ast.AST, owner: Function | None, in_class: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names[node.name] += 1
            # A function within another is part of it: who calls what there would be a matter of taste
            if owner is None:
                owner = Function(node.name, node, span(node))
                found.append((owner, in_class))
        elif isinstance(node, ast.ClassDef):
            names[node.name] += 1
            in_class = True
        elif isinstance(node, ast.arg | ast.alias | ast.keyword | ast.MatchAs | ast.ExceptHandler):
            names[
                getattr(node, "arg", None) or getattr(node, "asname", None) or getattr(node, "name", None) or ""
            ] += 1
        elif isinstance(node, ast.Name):
            names[node.id] += 1
        elif isinstance(node, ast.Attribute):
            names[node.attr] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.update(re.findall(r"\w+", node.value) if len(node.value) < 60 else ())
        elif isinstance(node, ast.Call) and owner is not None:
            target = node.func
            if isinstance(target, ast.Name):
                owner.calls.add(f"{target.id}()")
                certain[f"{target.id}()"] += 1
            elif (
                isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
            ):
                owner.calls.add(f"self.{target.attr}()")
                certain[f"self.{target.attr}()"] += 1
        elif isinstance(node, ast.Raise) and owner is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            owner.raised.add(error.id if isinstance(error, ast.Name) and error.id[0].isupper() else "?")
        for child in ast.iter_child_nodes(node):
            visit(child, owner, in_class)

    try:
        visit(tree, None, False)
    except RecursionError:
        return None
    definitions = Counter(function.name for function, _ in found)
    functions = {f.name: f for f, _ in found if definitions[f.name] == 1}
    forms = {f.name: f"self.{f.name}()" if is_method else f"{f.name}()" for f, is_method in found}
    sure = {form: name for name, form in forms.items() if name in functions and names[name] == 1 + certain[form]}
    for function, _ in found:
        function.calls = {sure[form] for form in function.calls if form in sure} - {function.name}
    return Module(functions, tuple(strings))


def _inside(window: Window) -> tuple[dict[str, Function], set[str]]:
    """The functions that stand in a window as a whole, and those of which it holds a part only."""
    module = parsed(window.document.text)
    if module is None:
        return {}, set()
    start, end = window.start, window.start + len(window.text)
    whole = {n: f for n, f in module.functions.items() if start <= f.span[0] and f.span[1] <= end and n[:2] != "__"}
    return whole, {n for n, f in module.functions.items() if n not in whole and f.span[0] < end and start < f.span[1]}


def _spans(window: Window, functions: list[Function]) -> list[Span]:
    return [(f.span[0] - window.start, f.span[1] - window.start) for f in functions]


def _callers(window: Window) -> dict[str, list[Function]]:
    """By name, the functions that call it, where none that the window cuts, or that has another's name, does."""
    module = parsed(window.document.text)
    whole, cut = _inside(window)
    callers = defaultdict(list)
    for function in whole.values():
        for name in function.calls:
            callers[name].append(function)
    hidden = {n for name in cut if module for n in module.functions[name].calls}
    # Uses outside of these functions: at the level of the module, in functions whose name is not unique
    return {
        name: sorted(of, key=lambda function: function.span)
        for name, of in callers.items()
        if name in whole
        and name not in hidden
        and len(re.findall(rf"\b{name}\(", window.text)) >= 1 + len(of)
        and set(_lines_with_call(window, name)) == {f.name for f in of}
    }


def _lines_with_call(window: Window, name: str) -> list[str]:
    """For each call of a name in the text of the window, whose it is; `"?"` where it stands in no whole function."""
    whole, _ = _inside(window)
    owners = []
    for match in re.finditer(rf"(?<!def )\b{name}\(", window.text):
        place = match.start() + window.start
        owners.append(next((f.name for f in whole.values() if f.span[0] <= place < f.span[1]), "?"))
    return owners


def ask_caller(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """Which function calls another?"""
    callers = {name: of[0] for name, of in _callers(window).items() if len(of) == 1}
    if not callers or len(_inside(window)[0]) < 5:
        return None
    name = rng.choice(sorted(callers))
    question = f"Which function of this code calls `{name}`? Answer with its name only."
    return draft(window, _spans(window, [callers[name]]), question, callers[name].name)


def list_callers(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """All functions that call another."""
    callers = {name: of for name, of in _callers(window).items() if 2 <= len(of) <= 8}
    if not callers:
        return None
    name = rng.choice(sorted(callers))
    question = f"List all functions of this code that call `{name}`. Answer with their names, separated by commas."
    return draft(window, _spans(window, callers[name]), question, ", ".join(f.name for f in callers[name]))


def ask_chain(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """By which function does one reach another?"""
    whole, _ = _inside(window)
    chains = []
    for first in whole.values():
        by_last = defaultdict(list)
        for middle in sorted(first.calls & set(whole)):
            for last in whole[middle].calls & set(whole) - {first.name, middle} - first.calls:
                by_last[last].append(middle)
        chains += [(first.name, middles[0], last) for last, middles in by_last.items() if len(middles) == 1]
    if not chains:
        return None
    start, middle, end = rng.choice(sorted(chains))
    question = (
        f"`{start}` does not call `{end}` itself, but a function that it calls does. Which one? Answer with its name "
        "only."
    )
    return draft(window, _spans(window, [whole[start], whole[middle]]), question, middle)


def ask_raiser(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """Which function raises an exception that no other in the window raises?"""
    whole, _ = _inside(window)
    counts: Counter[str] = Counter()
    raisers = {}
    for function in whole.values():
        for error in function.raised - {"?"}:
            counts[error] += 1
            raisers[error] = function
    certain = [e for e in counts if counts[e] == 1 and _only_there(window, e, raisers[e])]
    if not certain or len(whole) < 5:
        return None
    error = rng.choice(sorted(certain))
    question = f"Which function of this code raises `{error}`? Answer with its name only."
    return draft(window, _spans(window, [raisers[error]]), question, raisers[error].name)


def _only_there(window: Window, error: str, function: Function) -> bool:
    places = [m.start() + window.start for m in re.finditer(rf"\braise {error}\b", window.text)]
    return bool(places) and all(function.span[0] <= place < function.span[1] for place in places)


def ask_default(engine: object, rng: random.Random, window: Window) -> Draft | None:
    """The default value of a parameter; never one of the most frequent, `None`, `True` and `False`."""
    found: dict[str, list[tuple[Function, str, ast.Constant]]] = defaultdict(list)
    for function in _inside(window)[0].values():
        arguments = function.node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        pairs: list[tuple[ast.arg, ast.expr | None]] = [
            *zip(positional[::-1], arguments.defaults[::-1], strict=False),
            *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
        ]
        for argument, node in pairs:
            if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bytes):
                text = str(node.value)
                if not isinstance(node.value, bool) and len(text) <= 30 and re.search(r"\w", text):
                    found[text].append((function, argument.arg, node))
    if len(found) < 2:
        return None
    # First the value, so that a frequent one is not right more often than others
    function, name, node = rng.choice(found[rng.choice(sorted(found))])
    answer = ast.get_source_segment(window.document.text, node)
    question = f"What is the default value of the parameter `{name}` of `{function.name}`? Answer as in the code."
    return None if answer is None else draft(window, _spans(window, [function]), question, answer)
