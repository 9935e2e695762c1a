"""Budgets of the house: how long a file, how many arguments and branches a function, and how a docstring begins.

python tests/documents/budgets.py    # everything that is over, and the sums
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import house

FILE_LINES = 500
MODEL_LINES = 450
ARGUMENTS = 12
COMPLEXITY = 15
CLAUSES = (
    "What ",
    "That ",
    "By which ",
    "Which ",
    "Where ",
    "For how ",
    "From how ",
    "By how ",
    "Between which ",
    "Of what ",
)
"""Beginnings of a docstring that is a clause and no noun or verb. ("Whether" and "How many" say which type it is.)"""

PRIVATE_WORDS = frozenset(
    ("settle", "settled", "desk", "witness", "spoiled", "turned", "remember", "weigh", "accumulated", "stepped")
)
"""Words that stand in no name of a function or class: each was the name of several things, or another's of one."""

Function = ast.FunctionDef | ast.AsyncFunctionDef

_BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)


@dataclasses.dataclass(frozen=True)
class Over:
    """A file or a function that is over a budget.

    Attributes:
        place: the module, and behind a colon the function in it where it is one.
        budget: which: "lines", "arguments" or "complexity".
        found: how much it has.
    """

    place: str
    budget: str
    found: int


def line_limit(path: Path) -> int:
    """The most lines that the file may have."""
    return MODEL_LINES if path.name == "model.py" else FILE_LINES


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function in a tree with its qualified name: `Class.method`, `function.inner`."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}{node.name}" if isinstance(node, Function | ast.ClassDef) else prefix.rstrip(".")
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, f"{name}." if name else "")


def count_arguments(function: Function) -> int:
    """The named arguments of a function without `self` and `cls`; `*args` and `**options` count nothing."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in named)


def complexity(function: Function) -> int:
    """McCabe's number of a function, as ruff's C901 counts: 1, and 1 for each branching statement and inner function.

    The `else` of a loop or a `try` is a branch too; and, or and the `if` of an expression are none.
    """
    count = 1
    for node in ast.walk(function):
        count += isinstance(node, _BRANCHES) or (isinstance(node, Function) and node is not function)
        count += isinstance(node, ast.For | ast.AsyncFor | ast.While | ast.Try) and bool(node.orelse)
    return count


def over_in(module: str, path: Path, source: str) -> Iterator[Over]:
    """Everything in a source that is over a budget."""
    lines = len(source.splitlines())
    if lines > line_limit(path):
        yield Over(module, "lines", lines)
    for name, function in functions(ast.parse(source)):
        for budget, limit, found in (
            ("arguments", ARGUMENTS, count_arguments(function)),
            ("complexity", COMPLEXITY, complexity(function)),
        ):
            if found > limit:
                yield Over(f"{module}:{name}", budget, found)


def over() -> list[Over]:
    """Everything in the product that is over a budget."""
    return [
        one
        for module, path in house.modules().items()
        for one in over_in(module, path, path.read_text(encoding="utf-8"))
    ]


def docstrings(source: str) -> Iterator[str]:
    """The docstrings of a source: of modules, classes, functions, and those below constants."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value.lstrip()


def clauses() -> list[tuple[str, str]]:
    """Docstrings that begin with a clause: the module, and the first line."""
    return [
        (module, text.splitlines()[0])
        for module, path in house.modules().items()
        for text in docstrings(path.read_text(encoding="utf-8"))
        if text.startswith(CLAUSES)
    ]


def private_names(module: str, source: str) -> Iterator[str]:
    """The functions and classes of a source one of whose words is a private one: `settle_dtype`, `Desk`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Function | ast.ClassDef):
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", node.name).lower().split("_")
            if not PRIVATE_WORDS.isdisjoint(words):
                yield f"{module}:{node.name}"


def main() -> None:
    for one in over():
        print(f"{one.place}: {one.found} {one.budget}")
    found = clauses()
    for module, line in found:
        print(f"{module}: {line}")
    print(f"{sum(house.lines_by_room().values())} lines of product, {len(found)} docstrings that begin with a clause")


if __name__ == "__main__":
    main()
