"""The arrows of the house: who may import whom. Each rule is also shown to notice a breach."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gptj_conversion
import pytest

import gptj

CORE = Path(gptj.__file__).parent
CONVERSION = Path(gptj_conversion.__file__).parent
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "flax", "optax"}
OF_WING = {"pt": {"torch"}, "tf": {"tensorflow", "keras", "optree"}, "flax": {"jax", "flax", "jaxlib"}}
CORE_LIBRARIES = {
    "numpy",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "filelock",
    "click",
    "rich",
    "gptj",
    "huggingface_hub",
}
CONVERSION_LIBRARIES = {"numpy", "ml_dtypes", "filelock", "gptj", "gptj_conversion", "h5py", "zstandard"}
FRONT = {"cli.py", "__main__.py"}
ASKED_FOR = {"token_rows.py": FRAMEWORKS, "tokenizer.py": FRAMEWORKS}
"""Files that import a framework only inside a function, when a caller asks for its arrays (return_tensors)."""


def imported(source: str, *, module_level_only: bool = False) -> Iterator[str]:
    """The dotted names of what a source imports."""
    tree = ast.parse(source)
    nodes = tree.body if module_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def as_it_runs(source: str) -> str:
    """A source without what stands there for type checkers alone: how they see the classes of a chosen backend."""

    class Runs(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.If | list[ast.stmt]:
            self.generic_visit(node)
            return node.orelse if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node

    return ast.unparse(Runs().visit(ast.parse(source)))


def breaches(source: str, allowed: set[str], forbidden: tuple[str, ...] = ()) -> list[str]:
    """Imports of a source that are neither the standard library's nor allowed, or that are forbidden by prefix."""
    return [
        name
        for name in imported(source)
        if (name.split(".")[0] not in allowed | sys.stdlib_module_names)
        or any(name == f or name.startswith(f + ".") for f in forbidden)
    ]


def room_of(path: Path) -> str:
    """The wing that a file of the package is in, or nothing for the core."""
    first = path.relative_to(CORE).parts[0]
    return first if first in OF_WING else ""


FILES = sorted(CORE.rglob("*.py"))


@pytest.mark.parametrize(
    "path", [p for p in FILES if not room_of(p) and p.name not in FRONT], ids=lambda p: str(p.relative_to(CORE))
)
def test_the_core_imports_no_framework_and_no_wing(path):
    wings = tuple(f"gptj.{name}" for name in OF_WING)
    conversion = {"gptj_conversion"} if "demo" in path.parts else set()
    allowed = CORE_LIBRARIES | ASKED_FOR.get(path.name, set()) | conversion
    source = as_it_runs(path.read_text()) if path == CORE / "__init__.py" else path.read_text()
    assert breaches(source, allowed, wings) == []


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p)], ids=lambda p: str(p.relative_to(CORE)))
def test_a_wing_imports_the_core_and_its_own_framework_only(path):
    room = room_of(path)
    others = (*(f"gptj.{name}" for name in OF_WING if name != room), "gptj.command.main", "gptj_conversion")
    assert breaches(path.read_text(), {"numpy", "ml_dtypes", "gptj"} | OF_WING[room], others) == []


@pytest.mark.parametrize("path", sorted(CONVERSION.rglob("*.py")), ids=lambda p: p.name)
def test_the_converters_import_no_framework_and_no_wing(path):
    wings = (*(f"gptj.{name}" for name in OF_WING), "gptj.command.main")
    assert breaches(path.read_text(), CONVERSION_LIBRARIES, wings) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from jax import numpy",
        "def f():\n    import keras",
        "from gptj import pt",
        "import gptj.tf.model",
    ],
)
def test_a_breach_would_be_noticed(source):
    assert breaches(source, CORE_LIBRARIES, ("gptj.pt", "gptj.tf"))


def modules_after(statement: str) -> set[str]:
    """Which frameworks a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*({FRAMEWORKS} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import gptj",
        "import gptj, gptj.command.main, gptj.generation, gptj.text.tokenizer, gptj.parity, gptj.pretrained, gptj.demo",
        "import gptj_conversion, gptj_conversion.convert",
        "from gptj import GPTJConfig, GenerationConfig, GPTJTokenizer",
    ],
)
def test_importing_the_core_loads_no_framework(statement):
    assert modules_after(statement) == set()
