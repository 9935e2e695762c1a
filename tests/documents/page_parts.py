"""Parts of pages that a script makes: between two marks of a page, printed or written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Part:
    """What stands between `<!-- NAME: made by MAKER -->` and `<!-- NAME end -->`.

    Attributes:
        page: the page, from the root of the repository.
        name: the part's name on that page.
        maker: the script, from the root, or the command that makes it.
    """

    page: str
    name: str
    maker: str

    def read_page(self) -> str:
        """The whole page as it stands."""
        return (ROOT / self.page).read_text(encoding="utf-8")

    def read(self, page: str | None = None) -> str:
        """The part as it stands on the page, without the blank lines around it."""
        page = self.read_page() if page is None else page
        start, end = self._borders(page)
        return page[start:end].strip()

    def read_rows(self) -> list[list[str]]:
        """The cells of a part that is a table, without its head."""
        return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in self.read().splitlines()[2:]]

    def place(self, text: str, page: str | None = None) -> str:
        """The page with `text` as the part."""
        page = self.read_page() if page is None else page
        start, end = self._borders(page)
        return f"{page[:start]}\n\n{text}\n\n{page[end:]}"

    def write(self, text: str) -> None:
        """Write `text` as the part into the page."""
        (ROOT / self.page).write_text(self.place(text), encoding="utf-8")

    def print_or_write(self, make: Callable[[], str]) -> None:
        """Make the part: print it, or with `--write` among the command's words put it into the page."""
        text = make()
        if "--write" in sys.argv[1:]:
            self.write(text)
        else:
            print(text)

    def _borders(self, page: str) -> tuple[int, int]:
        begin = f"<!-- {self.name}: made by {self.maker} -->"
        return page.index(begin) + len(begin), page.index(f"<!-- {self.name} end -->")


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = _line(columns)
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *map(_line, rows)])


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
