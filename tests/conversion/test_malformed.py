"""Every malformed input is refused by name, or read and said; and docs/faults.md counts them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from malformed import GOOD, Malformed, __main__, cases, kinds

from gptj.errors import FormatError, warn_of


@pytest.mark.parametrize("kind", kinds())
def test_every_case_is_refused_by_name_or_read_and_said(kind):
    wrong = [f"{came}: {case.what}: {said}" for case, came, said in __main__.run(kind) if came not in GOOD]
    assert wrong == []


def test_the_page_counts_every_case():
    counted = {name: int(count) for name, count, *_ in __main__.TABLE.read_rows()}
    expected = Counter({__main__.title(kind): len(cases(kind)) for kind in kinds()})
    assert counted == {**expected, "all": expected.total()}, "run: python -m malformed --write"


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("door", "came"),
    [
        (lambda folder: _raise(FormatError("no", file="culprit")), "refused"),
        (lambda folder: _raise(FormatError("no", file="another")), "unnamed"),
        (lambda folder: _raise(TypeError("culprit")), "traceback"),
        (lambda folder: _raise(AssertionError("culprit")), "wrong"),
        (lambda folder: None, "silent"),
        (lambda folder: warn_of("odd", file="culprit"), "silent"),
        (lambda folder: (folder / "out").mkdir() or _raise(FormatError("no", file="culprit")), "left"),
    ],
)
def test_each_outcome_is_told_from_the_others(tmp_path: Path, door, came):
    case = Malformed("x", lambda folder: None, door, "culprit")
    assert __main__.outcome(case, tmp_path)[0] == came
