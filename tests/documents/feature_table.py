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
import sys
from collections.abc import Iterator
from pathlib import Path

HEADS = {
    "base": "GPTJModel",
    "causal_lm": "GPTJForCausalLM",
    "sequence_classification": "GPTJForSequenceClassification",
    "question_answering": "GPTJForQuestionAnswering",
}
WINGS = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "Flax"}
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features.md"
BEGIN, END = "<!-- features: made by tests/documents/feature_table.py -->", "<!-- features end -->"


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


def cells(folder: Path) -> dict[str, dict[str, set[str]]]:
    """For each feature and head, the wings in which a test backs it."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in sorted(folder.glob("test_*.py")):
        alone = re.match(r"test_(pt|tf|flax)_", path.name)
        wings = {alone[1]} if alone else set(WINGS)
        for name, heads in marks(path.read_text()):
            for head in heads:
                found.setdefault(name, {}).setdefault(head, set()).update(wings)
    return found


def table(folder: Path) -> str:
    """The table in Markdown: a row a feature, a column a class, the wings in the cells; a single wing's rows last."""
    lines = ["| | " + " | ".join(HEADS.values()) + " |", "|---" * (len(HEADS) + 1) + "|"]
    alone = {name: len(set().union(*by_head.values())) == 1 for name, by_head in cells(folder).items()}
    for name, by_head in sorted(cells(folder).items(), key=lambda item: alone[item[0]]):
        row = [", ".join(WINGS[w] for w in WINGS if w in by_head.get(head, ())) or "-" for head in HEADS]
        lines.append("| " + " | ".join([name, *("all three" if c.count(",") == 2 else c for c in row)]) + " |")
    return "\n".join(lines)


def placed(page: str, text: str) -> str:
    """The page with the table between its two marks."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n\n{text}\n\n{page[end:]}"


if __name__ == "__main__":
    made = table(ROOT / "tests" / "backends")
    if "--write" in sys.argv[1:]:
        path = PAGE
        path.write_text(placed(path.read_text(), made))
    else:
        print(made)
