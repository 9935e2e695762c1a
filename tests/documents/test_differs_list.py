"""CONTRIBUTING lists every place where a framework forces the wings apart, and only those."""

from differs_list import LIST, differences, listing
from page_parts import ROOT


def test_contributing_lists_what_the_wings_say():
    made = listing(ROOT / "src" / "gptj")
    assert LIST.place(made) == LIST.read_page(), "run: python tests/documents/differs_list.py --write"


def test_comments_and_docstrings_are_both_found():
    comment = "x = 1  \n# Differs: jax has\n# no such thing.\ny = 2\n"
    docstring = 'def f():\n    """A fact.\n\n    Differs: a graph has\n    no values.\n    """\n'
    assert differences(comment) == ["jax has no such thing."] and differences(docstring) == ["a graph has no values."]
