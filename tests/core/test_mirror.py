"""The three wings are mirrors: the same files, and the same public classes, methods and arguments in the same order.

This reads the sources, so it needs no framework. What a framework forces is listed here by name, and nothing else
may differ. The comparison is also shown to notice a difference.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gptj
from gptj.backends import BACKENDS
from gptj.config.schema import HEADS

ROOT = Path(gptj.__file__).parent
FILES = ("__init__.py", "adapters.py", "arguments.py", "finetune.py", "generate.py", "heads.py", "inference.py")
FILES += ("layers.py", "model.py", "one_step.py", "parallel.py", "parallel_training.py", "processes.py", "weights.py")

OWN_FILES = {
    "pt": {"crossing.py", "export.py", "kernels.py"},
    "tf": {"copies.py", "export.py", "parallel_generate.py", "training.py"},
    "flax": set(),
}
"""Files that one wing alone has: PyTorch leaves the choice of a matrix product's kernel to its callers, Keras has a
training loop of its own, and programs are exported in formats that are one framework's."""

CORE = ROOT / "pretrained" / "base.py"
"""The methods that the wings inherit: `Pretrained`, with hooks that each of them fills."""

LOOKED_INTO = ROOT / "pretrained" / "tapped.py"
"""Its base class, in whose words every wing gives its intermediate values."""

CALL = {"pt": "forward", "tf": "call", "flax": "__call__"}
"""What each framework calls the method behind `model(...)`."""

OWN_ARGUMENTS = {
    "pt": set(),
    "tf": {"name", "training"},
    "flax": {"params", "dropout_rng", "train", "input_shape"},
}
"""Arguments that one framework alone has: its own idiom, on the seed page or in its base class."""

FORCED_ARGUMENTS = {("__init__", "_do_init"), ("__init__", "attn_implementation")}
"""In Flax `_do_init` stands where transformers has it; the choice of attention is PyTorch's. The core's
`from_pretrained` has both, and refuses them where they mean nothing."""

OWN_METHODS = {
    "pt": {"device", "dtype", "enable_input_require_grads", "disable_input_require_grads"},
    "tf": {"dtype", "build", "make_train_function", "make_test_function", "make_predict_function"}
    | {"get_config", "from_config", "compute_loss", "compute_metrics", "export"}
    | {"train_step", "test_step", "predict_step"},
    "flax": {"device", "dtype", "gradient_checkpointing"}
    | {"module", "params", "params_shape_tree", "to_bf16", "to_fp16", "to_fp32"}
    | {"adapter_params", "with_adapter_params", "adapter_variables"},
}
"""Public names that one framework's idiom asks for, or that its base class gives in the others."""


def classes(wing: str, sources: dict[str, str]) -> dict[str, ast.ClassDef]:
    """Every class of a wing by name, and those of the core that its models inherit from."""
    found = {}
    for source in (LOOKED_INTO.read_text(), CORE.read_text(), *sources.values()):
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = node
    return found


def methods(name: str, known: dict[str, ast.ClassDef], wing: str) -> dict[str, tuple[str, ...]]:
    """The public methods of a class and of its bases in the same wing, each with its arguments in order."""
    node = known[name]
    found: dict[str, tuple[str, ...]] = {}
    for base in node.bases:
        inner = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
        if inner in known and inner != name:
            found |= methods(inner, known, wing)
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            said = "(call)" if item.name == CALL[wing] else item.name
            if said.startswith("_") and said != "__init__":
                continue
            arguments = [a.arg for a in (*item.args.posonlyargs, *item.args.args, *item.args.kwonlyargs)][1:]
            kept = [a for a in arguments if a not in OWN_ARGUMENTS[wing] and (said, a) not in FORCED_ARGUMENTS]
            found[said] = tuple(kept)
    return {said: arguments for said, arguments in found.items() if said not in OWN_METHODS[wing]}


def surface(wing: str, sources: dict[str, str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The public interface of a wing's four model classes. A constructor's keywords count by name.

    So do a call's arguments: Flax has them in the order of transformers' page, which test_flax_params.py holds.
    """
    known = classes(wing, sources)
    found = {name: methods(name, known, wing) for name in HEADS.values()}
    for of_class in found.values():
        for said in ("__init__", "(call)", "save_pretrained"):
            of_class[said] = tuple(sorted(of_class[said]))
    return found


def sources_of(wing: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((ROOT / wing).glob("*.py"))}


@pytest.mark.parametrize("wing", BACKENDS)
def test_the_wings_have_the_same_files(wing):
    assert tuple(name for name in sources_of(wing) if name not in OWN_FILES[wing]) == FILES
    assert OWN_FILES[wing] <= sources_of(wing).keys()


def defined(source: str) -> list[str]:
    """The public functions, classes and types of a module, in order."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.append(node.targets[0].id)
    return [name for name in names if not name.startswith("_")]


PARTS = {
    "arguments.py": ["UpdateCache", "host", "as_ids", "causal_mask", "cache_length", "CacheBuilder"],
    "weights.py": ["to_numpy", "from_numpy", "PretrainedModel", "on_device"],
    "adapters.py": ["LowRank", "AdapterMixin"],
    "layers.py": ["at_least_float32", "RotaryTable", "rotate_pairs"],
    "model.py": ["Attention", "MLP", "Block", "GPTJModel"],
    "finetune.py": ["open_model", "trained_parameters", "TrainingStep"],
    "heads.py": ["cross_entropy", *(name for head, name in HEADS.items() if head != "base")],
}
"""What every wing has in these files, by one name and in one order."""


@pytest.mark.parametrize("wing", BACKENDS)
@pytest.mark.parametrize("name", PARTS)
def test_the_parts_of_the_wings_have_one_name_and_one_order(wing, name):
    assert [part for part in defined(sources_of(wing)[name]) if part in PARTS[name]] == PARTS[name]


def test_a_part_by_another_name_would_be_noticed():
    source = sources_of("pt")["arguments.py"].replace("CacheBuilder", "Memory")
    assert "CacheBuilder" in PARTS["arguments.py"] and "CacheBuilder" not in defined(source)


@pytest.mark.parametrize("name", FILES)
def test_kernels_alone_names_a_processor_or_a_library_of_products(name):
    words = r"(?i)onednn|mkldnn|\bmkl|\bamx|\bavx|vnni|fbgemm|x86|\bamd\b|\bintel\b"
    assert re.search(words, sources_of("pt")["kernels.py"])
    assert not re.search(words, sources_of("pt")[name])


@pytest.mark.parametrize("wing", ["tf", "flax"])
@pytest.mark.parametrize("name", HEADS.values())
def test_the_wings_have_the_same_methods_and_arguments(wing, name):
    assert surface(wing, sources_of(wing))[name] == surface("pt", sources_of("pt"))[name]


def hooks(source: str) -> set[str]:
    """The methods of `Pretrained` that a wing must fill: those that raise NotImplementedError."""
    owner = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "Pretrained")
    return {
        node.name
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Raise)
        if "NotImplementedError" in ast.unparse(node.body[-1])
    }


@pytest.mark.parametrize("wing", BACKENDS)
def test_every_hook_of_the_core_is_filled(wing):
    filled = {node.name for node in classes(wing, sources_of(wing))["PretrainedModel"].body if hasattr(node, "name")}
    missing = hooks(CORE.read_text()) - filled
    assert missing == (set() if wing == "flax" else {"_take_apart"})  # where parameters can be apart from the model


def test_a_hook_that_is_not_filled_would_be_noticed():
    source = CORE.read_text().replace("def _read(", "def _fetch(")
    assert "_read" in hooks(CORE.read_text()) and "_fetch" in hooks(source)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("head_mask: Any = None,", ""),
        ("def init_cache", "def make_cache"),
        ("max_length: int", "length: int"),
    ],
)
def test_a_difference_would_be_noticed(before, after):
    changed = {name: source.replace(before, after) for name, source in sources_of("pt").items()}
    assert surface("pt", changed) != surface("pt", sources_of("pt"))


@pytest.mark.parametrize("wing", BACKENDS)
def test_the_modules_of_a_wing_export_the_same_names(wing):
    def exported(name: str) -> set[str]:
        tree = ast.parse((ROOT / name / "__init__.py").read_text())
        node = next(n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
        return {element.value for element in node.value.elts}

    prefix = {"pt": "", "tf": "TF", "flax": "Flax"}[wing]
    aliases = {prefix + name for name in HEADS.values()} if prefix else set()
    assert exported(wing) - aliases == exported("pt")
