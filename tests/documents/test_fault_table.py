"""Every row of the list of faults is held by a test that is named after it, and the page says which."""

from fault_table import ROWS, TABLE, folder_cases, named_tests, table, unheld
from page_parts import ROOT


def test_every_row_has_a_test():
    assert unheld() == []
    assert len(ROWS) == 21 + 6 + 8 + 6 + 6 + 10 + 6


def test_the_pages_table_is_the_tests_table():
    assert TABLE.place(table()) == TABLE.read_page(), "run: python tests/documents/fault_table.py --write"


def test_no_test_is_named_after_a_row_that_is_not_there(tmp_path):
    assert {row for row, _, _ in named_tests(ROOT / "tests")} <= ROWS.keys()


def test_a_row_without_a_test_would_be_noticed(tmp_path):
    (tmp_path / "test_x.py").write_text("def test_W10_C6_a_claim(): pass\ndef test_w1_no_row(): pass\ndef W2_x(): pass")
    assert [*named_tests(tmp_path)] == [("W10", "test_x.py", "a claim"), ("C6", "test_x.py", "a claim")]
    assert folder_cases("Fault('W3', 'x', make); Fault(row, 'x'); other('W4')") == {"W3": 1}
