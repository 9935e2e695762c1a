"""docs/features.md's table of classes, features and frameworks, made from the marks on the tests that back its cells.

A test in tests/backends runs in every wing (its `wing` fixture), and nothing there skips; a test in a file named
test_pt_*, test_tf_* or test_flax_* runs in that wing alone. `@pytest.mark.feature(name, *heads)` says which cells it
backs. This reads the sources, so the core's environment can hold the page to it.

    python tests/documents/feature_table.py          print the table
    python tests/documents/feature_table.py --write  put it into docs/features.md
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from page_parts import ROOT, Part, markdown_table

HEADS = {
    "base": "GPTJModel",
    "causal_lm": "GPTJForCausalLM",
    "sequence_classification": "GPTJForSequenceClassification",
    "question_answering": "GPTJForQuestionAnswering",
}
WINGS = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "Flax"}
TABLE = Part("docs/features.md", "features", "tests/documents/feature_table.py")


def marks(source: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The feature marks on a source's tests: name and heads."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.feature":
                name, *heads = (ast.literal_eval(argument) for argument in decorator.args)
                unknown = set(heads) - HEADS.keys() - {"every"}
                if unknown or not heads:
                    raise ValueError(f"{node.name}: feature {name!r} names no class: {sorted(unknown)}")
                yield name, tuple(HEADS) if "every" in heads else tuple(heads)


def wings_of(path: Path) -> set[str]:
    """The wings in which a file's tests run: one where its name says so, else all."""
    alone = re.match(r"test_(pt|tf|flax)_", path.name)
    return {alone[1]} if alone else set(WINGS)


def cells(folder: Path) -> dict[str, dict[str, set[str]]]:
    """For each feature and head, the wings in which a test backs it."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in sorted(folder.glob("test_*.py")):
        for name, heads in marks(path.read_text()):
            for head in heads:
                found.setdefault(name, {}).setdefault(head, set()).update(wings_of(path))
    return found


def table(folder: Path) -> str:
    """The table in Markdown: a row a feature, a column a class, the wings in the cells; a single wing's rows last."""
    found = cells(folder)
    alone = {name: len(set().union(*by_head.values())) == 1 for name, by_head in found.items()}
    rows = []
    for name, by_head in sorted(found.items(), key=lambda item: alone[item[0]]):
        row = [", ".join(WINGS[w] for w in WINGS if w in by_head.get(head, ())) or "-" for head in HEADS]
        rows.append([name, *("all three" if c.count(",") == 2 else c for c in row)])
    return markdown_table(["", *HEADS.values()], rows)


if __name__ == "__main__":
    TABLE.print_or_write(lambda: table(ROOT / "tests" / "backends"))
