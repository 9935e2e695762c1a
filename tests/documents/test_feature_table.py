"""docs/features.md's table says what the tests say, and nothing that no test backs."""

from feature_table import TABLE, cells, marks, table
from page_parts import ROOT

BACKENDS = ROOT / "tests" / "backends"


def test_the_pages_table_is_the_tests_table():
    assert TABLE.place(table(BACKENDS)) == TABLE.read_page(), "run: python tests/documents/feature_table.py --write"


def test_a_cell_without_a_test_would_be_noticed():
    page = TABLE.place(table(BACKENDS).replace("| - |", "| all three |", 1))
    assert TABLE.place(table(BACKENDS), page) != page


def test_nothing_in_the_wings_tests_skips():
    for path in BACKENDS.glob("*.py"):
        source = path.read_text()
        assert "skip" not in source.replace("skip_special_tokens", "").replace("# fmt: skip", ""), path.name


def test_marks_name_features_and_classes():
    source = "import pytest\n@pytest.mark.feature('loss', 'causal_lm')\ndef test_x(wing): pass"
    assert list(marks(source)) == [("loss", ("causal_lm",))]
    assert cells(BACKENDS)["labels and loss"].keys() == {"causal_lm", "sequence_classification", "question_answering"}
