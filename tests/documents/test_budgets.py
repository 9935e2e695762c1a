"""The budgets of `budgets.py` hold, each exception is needed, and each rule would notice a breach."""

from __future__ import annotations

import ast
from pathlib import Path

import budgets
import house
import pytest
from budgets import Over, clauses, complexity, count_arguments, functions, over, over_in

PRODUCT_LINES = 64_900
"""The most lines of product; it falls, but for a new room, whose commit says what it takes. The aim is 24,000."""

CLAUSE_DOCSTRINGS = 0
"""The most docstrings that begin with a clause."""

FIXED_SIGNATURES = {
    "gptj.config.gptj_config:GPTJConfig.__init__": "the order of transformers' GPTJConfig",
    "gptj.flax.heads:GPTJForCausalLM.__call__": "transformers' page",
    "gptj.flax.heads:GPTJForQuestionAnswering.__call__": "transformers' page",
    "gptj.flax.heads:GPTJForSequenceClassification.__call__": "transformers' page",
    "gptj.flax.model:GPTJModel.__call__": "transformers' page",
    "gptj.generation.mixin:Generates.generate": "transformers' generate",
    "gptj.generation.mixin:Generates.stream": "the arguments of generate",
    "gptj.harness:GPTJLM.__init__": "lm-evaluation-harness' model arguments: each typed for its callers",
    "gptj.pretrained.base:Pretrained.from_pretrained": "transformers' page, and our options typed",
    "gptj.tf.heads:GPTJForCausalLM.call": "transformers' page",
    "gptj.tf.heads:GPTJForSequenceClassification.call": "transformers' page",
    "gptj.writing.checkpoint_writer:write_checkpoint": "a public door: each option typed for its callers",
    "gptj_conversion.convert:convert": "a public door: each option typed for its callers",
}
"""Functions that have more arguments than the budget because others fixed them, with who did."""

STILL_OVER: set[tuple[str, str]] = set()
"""Files and functions that are over a budget and shall not be. An entry that is mended must be deleted."""


def spelled(found: list[Over]) -> list[str]:
    return [f"{one.place}: {one.found} {one.budget}" for one in found]


def exempt(one: Over) -> bool:
    return (one.place, one.budget) in STILL_OVER or (one.budget == "arguments" and one.place in FIXED_SIGNATURES)


def test_nothing_is_over_a_budget_but_the_exceptions():
    assert spelled([one for one in over() if not exempt(one)]) == []


def test_every_exception_is_really_over():
    found = {(one.place, one.budget) for one in over()}
    assert {(place, "arguments") for place in FIXED_SIGNATURES} | STILL_OVER <= found


def test_the_product_does_not_grow():
    assert sum(house.lines_by_room().values()) <= PRODUCT_LINES


def test_the_ratchet_of_the_product_follows_what_is_deleted():
    assert PRODUCT_LINES - sum(house.lines_by_room().values()) < 1_000, "set it to the sum, rounded up to a hundred"


def test_no_docstring_begins_with_a_clause():
    assert len(clauses()) <= CLAUSE_DOCSTRINGS, clauses()


def test_no_function_and_no_class_has_a_word_of_our_own_for_a_name():
    sources = {module: path.read_text(encoding="utf-8") for module, path in house.modules().items()}
    assert [name for module, source in sources.items() for name in budgets.private_names(module, source)] == []


# ---- each rule can fail


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("reader.py", "x = 1\n" * 501, Over("m", "lines", 501)),
        ("model.py", "x = 1\n" * 451, Over("m", "lines", 451)),
        ("a.py", f"def f({', '.join(f'a{n}' for n in range(13))}): ...", Over("m:f", "arguments", 13)),
        ("a.py", f"class C:\n  def f(self, *, {', '.join(f'a{n}' for n in range(13))}): ...",
         Over("m:C.f", "arguments", 13)),
        ("a.py", "def f():\n" + "  if x: ...\n" * 15, Over("m:f", "complexity", 16)),
    ],
)  # fmt: skip
def test_a_breach_would_be_noticed(name, source, found):
    assert [*over_in("m", Path(name), source)] == [found]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("reader.py", "x = 1\n" * 500),
        ("model.py", "x = 1\n" * 450),
        ("a.py", f"def f(self, {', '.join(f'a{n}' for n in range(12))}, *more, **options): ..."),
        ("a.py", "def f():\n" + "  if x: ...\n" * 14),
    ],
)
def test_what_just_fits_is_no_breach(name, source):
    assert [*over_in("m", Path(name), source)] == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return 1", 1),
        ("if a: ...\nelif b: ...\nelse: ...", 3),
        ("for x in y: ...\nelse: ...", 3),
        ("while a: ...", 2),
        ("try: ...\nexcept A: ...\nexcept B: ...\nelse: ...\nfinally: ...", 4),
        ("match a:\n case 1: ...\n case _: ...", 3),
        ("def inner():\n if a: ...", 3),
        ("return a and b or c if d else [x for x in y if x]", 1),
    ],
)
def test_complexity_is_mccabes(body, expected):
    source = "def f():\n" + "\n".join(f"  {line}" for line in body.splitlines())
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert complexity(function) == expected


def test_a_functions_name_has_its_class_and_its_outer_function():
    tree = ast.parse("class A:\n  def f(self):\n    def g(a, /, b, *c, d, **e): ...\nif x:\n  async def h(): ...")
    assert {name: count_arguments(function) for name, function in functions(tree)} == {"A.f": 0, "A.f.g": 3, "h": 0}


def test_a_docstring_that_is_a_clause_would_be_noticed():
    source = '"""What it does."""\nX = 1\n"""That is one."""\nclass A:\n  def f(self):\n    """By which it is."""\n'
    source += 'def g():\n  """The thing. What is more."""\n'
    found = [text for text in budgets.docstrings(source) if text.startswith(budgets.CLAUSES)]
    assert found == ["What it does.", "That is one.", "By which it is."]


def test_a_name_of_our_own_words_would_be_noticed():
    source = "def settle_dtype(): ...\nclass FrontDesk:\n  def weigh(self): ...\ndef weight(): ...\nclass DeskTop2: ..."
    assert [*budgets.private_names("m", source)] == ["m:settle_dtype", "m:FrontDesk", "m:DeskTop2", "m:weigh"]
