"""Programs and maps that stand on a page of the documentation, below a heading."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def block(page: str, heading: str, language: str = "python") -> str:
    """The first block of a language below a heading."""
    _, found, rest = (DOCS / page).read_text(encoding="utf-8").partition(f"# {heading}\n")
    assert found, heading
    match = re.search(rf"```{language}\n(.*?)```", rest.split("\n## ")[0], re.DOTALL)
    assert match is not None, heading
    return match[1]
