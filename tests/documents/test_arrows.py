"""The arrows of the house: which room may import which, and which libraries; each rule is shown to notice a breach."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping

import house
import pytest

CONTRACT = frozenset({"backends", "calls", "config", "errors", "paths"})
"""The rooms that say what a GPT-J is, and what a call takes and gives. Nothing above them is imported there."""

WINGS = frozenset({"pt", "tf", "flax"})
_FILES = CONTRACT | {"reading", "writing"}
_MODELS = CONTRACT | {"adapters", "pretrained", "generation", "text", "sharding"}

ARROWS: dict[str, frozenset[str]] = {
    **dict.fromkeys(CONTRACT, CONTRACT),
    "sharding": CONTRACT,
    "reading": CONTRACT,
    "writing": CONTRACT | {"reading"},
    "checkpoint": frozenset({"reading", "writing"}),
    "schema": frozenset({"config"}),
    "outputs": frozenset({"calls"}),
    "adapters": _FILES,
    "text": CONTRACT,
    "generation": CONTRACT,
    "parity": _FILES | {"adapters", "generation"},
    "pretrained": _FILES | {"adapters", "generation", "parity", "sharding"},
    "finetune": _FILES | {"adapters", "sharding", "text"},
    **dict.fromkeys(WINGS, _MODELS | {"finetune"}),
    "conversion.common": _FILES,
    "conversion.mesh": _FILES | {"conversion.common"},
    "conversion.hf": _FILES | {"conversion.common"},
    "conversion": _FILES | {"parity", "generation", "text", "conversion.common", "conversion.mesh", "conversion.hf"},
    "harness": CONTRACT | {"generation", "text"},
    "serving": CONTRACT | {"generation"},
    "command": _FILES | _MODELS | {"serving", "harness", "finetune", "parity", "conversion"},
}
"""Which rooms each room may import. There are no circles among them (see `tests/documents/house.py`)."""

MOST_ROOMS, MOST_ARROWS = 27, 141
"""They fall; a new room says in its commit which arrows it needs."""

FRAMEWORKS = frozenset({"torch", "tensorflow", "keras", "jax", "flax", "optax"})
LIBRARIES: dict[str, frozenset[str]] = {
    "pt": frozenset({"torch"}),
    "tf": frozenset({"tensorflow", "keras", "optree"}),
    "flax": frozenset({"jax", "flax", "jaxlib", "optax", "orbax"}),
    "finetune": frozenset({"filelock", "matplotlib"}),
    "writing": frozenset({"filelock", "safetensors"}),
    "paths": frozenset({"huggingface_hub"}),
    "text": frozenset({"tokenizers"}) | FRAMEWORKS,  # frameworks for who asks for their arrays, in a function alone
    "parity": frozenset({"rich", "transformers"}),  # transformers' rungs in a function
    "command": frozenset({"click", "pytest", "rich"}),
    "serving": frozenset({"starlette", "uvicorn", "h11", "jinja2"}),
    "harness": frozenset({"lm_eval", "tqdm"}),
    "conversion.mesh": frozenset({"zstandard"}),
    "conversion.hf": frozenset({"h5py"}),
}
"""The libraries of each room beside NumPy and ml_dtypes."""

EVERYWHERE = frozenset({"numpy", "ml_dtypes", "gptj", "gptj_conversion"}) | sys.stdlib_module_names


def libraries(source: str) -> Iterator[str]:
    """The packages that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def foreign(source: str, room: str) -> set[str]:
    """The libraries that a source imports and its room may not."""
    return set(libraries(source)) - EVERYWHERE - LIBRARIES.get(room, frozenset())


def breaches(rooms: Mapping[str, set[str]]) -> list[str]:
    """Arrows that the table does not have."""
    return [
        f"{room} -> {other}"
        for room, others in sorted(rooms.items())
        for other in sorted(others - ARROWS.get(room, frozenset()))
    ]


MODULES = house.modules()


def test_every_arrow_between_rooms_is_in_the_table():
    assert breaches(house.room_graph(house.module_graph())) == []


def test_there_are_no_more_rooms_and_arrows_than_there_were():
    rooms = house.room_graph(house.module_graph())
    assert len(rooms) <= MOST_ROOMS and sum(map(len, rooms.values())) <= MOST_ARROWS


def test_the_map_has_the_floors_as_they_are():
    made = house.list_floors(house.room_graph(house.module_graph()))
    assert house.FLOORS.place(made) == house.FLOORS.read_page(), "run: python tests/documents/house.py --write"


def test_the_paths_of_the_map_are_files_that_are_there():
    page = house.FLOORS.read_page()
    named = set(
        re.findall(r"`((?:\w+/)+\w+\.py)`", page[page.index("### A weight's path") : page.index("## What the")])
    )
    roots = house.ROOT / "src" / "gptj", house.ROOT / "conversion", house.ROOT / "conversion" / "gptj_conversion"
    assert len(named) > 40 and [path for path in named if not any((root / path).is_file() for root in roots)] == []


def test_every_room_of_the_table_is_there():
    assert ARROWS.keys() == house.room_graph(house.module_graph()).keys()


def test_no_modules_import_each_other_in_a_circle():
    graph = house.module_graph()
    assert house.circles(graph) == []
    assert house.circles(house.room_graph(graph)) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_its_own_libraries_alone(module):
    assert foreign(MODULES[module].read_text(encoding="utf-8"), house.room_of(module)) == set()


@pytest.mark.parametrize("module", [module for module in MODULES if house.room_of(module) == "text"])
def test_the_text_imports_a_framework_only_when_its_arrays_are_asked_for(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert FRAMEWORKS.isdisjoint(libraries(ast.unparse(tree)))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("generation", "import torch"),
        ("conversion", "from jax import numpy"),
        ("reading", "def f():\n    import keras"),
        ("pt", "import tensorflow"),
        ("writing", "import click"),
    ],
)
def test_a_foreign_library_would_be_noticed(room, source):
    assert foreign(source, room)


@pytest.mark.parametrize(
    ("module", "source", "arrow"),
    [
        ("gptj.config.schema", "from gptj import pt", "config -> pt"),
        ("gptj.generation.loop", "import gptj.tf.model", "generation -> tf"),
        ("gptj.pt.model", "from gptj.flax.weights import to_numpy", "pt -> flax"),
        ("gptj.tf.heads", "def f():\n    from gptj_conversion.convert import convert", "tf -> conversion"),
        ("gptj_conversion.mesh.reader", "from gptj_conversion.hf import torch_bin", "conversion.mesh -> conversion.hf"),
        ("gptj.reading.npz", "from gptj.writing.npz import write_npz", "reading -> writing"),
        ("gptj.config.file", "from gptj.checkpoint import open_checkpoint", "config -> checkpoint"),
    ],
)
def test_an_arrow_that_points_up_would_be_noticed(module, source, arrow):
    assert breaches(house.room_graph({module: house.imports_of(module, source, MODULES)})) == [arrow]


def test_a_circle_would_be_noticed():
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def modules_after(statement: str) -> set[str]:
    """Which frameworks a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*({set(FRAMEWORKS)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import gptj",
        "import gptj, gptj.command.demo, gptj.command.main, gptj.generation, gptj.text.tokenizer, gptj.parity",
        "import gptj.pretrained",
        "import gptj_conversion, gptj_conversion.convert",
        "from gptj import GPTJConfig, GenerationConfig, GPTJTokenizer",
    ],
)
def test_importing_the_core_loads_no_framework(statement):
    assert modules_after(statement) == set()
