"""docs/features.md's table says what the tests say, and nothing that no test backs."""

from pathlib import Path

from feature_table import BEGIN, END, PAGE, cells, marks, placed, table

ROOT = Path(__file__).parents[2]
BACKENDS = ROOT / "tests" / "backends"


def test_the_pages_table_is_the_tests_table():
    page = PAGE.read_text()
    assert placed(page, table(BACKENDS)) == page, "run: python tests/documents/feature_table.py --write"


def test_a_cell_without_a_test_would_be_noticed():
    page = f"{BEGIN}\n\n{table(BACKENDS)}\n\n{END}".replace("| - |", "| all three |", 1)
    assert placed(page, table(BACKENDS)) != page


def test_nothing_in_the_wings_tests_skips():
    for path in BACKENDS.glob("*.py"):
        source = path.read_text()
        assert "skip" not in source.replace("skip_special_tokens", "").replace("# fmt: skip", ""), path.name


def test_marks_name_features_and_classes():
    source = "import pytest\n@pytest.mark.feature('loss', 'causal_lm')\ndef test_x(wing): pass"
    assert list(marks(source)) == [("loss", ("causal_lm",))]
    assert cells(BACKENDS)["labels and loss"].keys() == {"causal_lm", "sequence_classification", "question_answering"}
