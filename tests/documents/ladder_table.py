"""The ladders of docs/parity.md: the demo's model and the revealing checkpoint, as `gptj parity ladder` prints them.

python tests/documents/ladder_table.py pt tf flax         print them; it takes a minute, and the frameworks named
python tests/documents/ladder_table.py --write pt         put them into docs/parity.md; rows of others stay
python tests/documents/ladder_table.py --write transformers    where transformers is installed, which not all are
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from page_parts import Part

from gptj.parity.findings import Findings, LadderRung
from gptj.parity.ladder import RUNGS, TRANSFORMERS, run_ladder
from gptj.parity.reports.text import render_text

LADDERS = Part("docs/parity.md", "ladder", "tests/documents/ladder_table.py")
BACKENDS = ("pt", "tf", "flax", TRANSFORMERS)
MODELS = ("demo", "revealing")


def block(name: str, rungs: tuple[LadderRung, ...]) -> str:
    """The lines that the command prints of one checkpoint, below their headline."""
    printed = render_text(Findings("holds", "", ladder=rungs), width=80)
    return f"{name}:\n" + printed.split("\n", 1)[1].strip("\n")


def text(ladders: dict[str, tuple[LadderRung, ...]]) -> str:
    """What stands between the page's two marks."""
    return "```text\n" + "\n\n".join(block(name, rungs) for name, rungs in ladders.items()) + "\n```"


def read_rows(printed: str) -> dict[str, list[list[str]]]:
    """The cells of each checkpoint's rows in what `text` gives, and the page shows."""
    found: dict[str, list[list[str]]] = {}
    for line in printed.splitlines():
        if line.removesuffix(":") in MODELS:
            found[line.removesuffix(":")] = []
        elif line.startswith("  "):
            found[[*found][-1]].append(line.split())
    return found


def expected_rows() -> list[list[str]]:
    """Backend and precision of each row."""
    return [[backend, rung] for backend in BACKENDS for rung in RUNGS[backend]]


def read_rungs(printed: str) -> dict[str, tuple[LadderRung, ...]]:
    """Each checkpoint's rungs, as far as the printed digits say them."""
    return {
        name: tuple(LadderRung(*row[:2], *map(float, row[2:4]), *(float(n.rstrip("%")) / 100 for n in row[4:]))
                    for row in rows)
        for name, rows in read_rows(printed).items()
    }  # fmt: skip


def merged(
    old: dict[str, tuple[LadderRung, ...]], new: dict[str, tuple[LadderRung, ...]]
) -> dict[str, tuple[LadderRung, ...]]:
    """The new rungs, and the old ones of backends that were not measured, in the order of the page."""
    found = {}
    for name in MODELS:
        again = {rung.backend for rung in new[name]}
        rungs = (*new[name], *(rung for rung in old[name] if rung.backend not in again))
        found[name] = tuple(sorted(rungs, key=lambda rung: BACKENDS.index(rung.backend)))
    return found


def _measure(backends: list[str]) -> dict[str, tuple[LadderRung, ...]]:
    from gptj_conversion.convert import convert

    from gptj.checkpoint import write_checkpoint
    from gptj.command.demo.journey import SHAKESPEARE
    from gptj.parity.revealing import revealing_config, revealing_fill

    with tempfile.TemporaryDirectory() as folder:
        revealing = write_checkpoint(Path(folder) / "revealing", revealing_config(), revealing_fill())
        places = {"demo": convert(SHAKESPEARE, Path(folder) / "demo", dtype="float32"), "revealing": revealing}
        return {name: run_ladder(place, backends).ladder for name, place in places.items()}


if __name__ == "__main__":
    backends = [name for name in sys.argv[1:] if name != "--write"]
    LADDERS.print_or_write(lambda: text(merged(read_rungs(LADDERS.read()), _measure(backends))))
