"""The table of docs/parity.md: how small a change a trace shows, and which planted mistakes, in each dtype.

python tests/documents/sensitivity_table.py          print the table
python tests/documents/sensitivity_table.py --write  put it into docs/parity.md

The oracle in the dtype stands for a backend, rounded at every step where the dtype has 16 bits: no framework is needed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))  # pytest has it there already

from feature_table import ROOT
from mutants import revealing_batch
from recorded import facts_of, inputs_of, recorded_taps

from gptj.dtypes import numpy_dtype
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.sensitivity import Sensitivity, measure_sensitivity
from gptj.parity.trace import open_trace, write_trace

PAGE = ROOT / "docs" / "parity.md"
BEGIN, END = "<!-- sensitivity: made by tests/documents/sensitivity_table.py -->", "<!-- sensitivity end -->"
DTYPES = ("float64", "float32", "float16", "bfloat16")
CHANGES = ("one weight", "one rotary angle", "epsilon")


def measure() -> list[Sensitivity]:
    """The sensitivity of the revealing model at far positions, in each dtype."""
    config = revealing_config()
    weights, batch = revealing_weights(config), revealing_batch(config)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            path = Path(folder) / dtype
            write_trace(path, recorded_taps(config, batch, dtype), facts_of(config, dtype), inputs=inputs_of(batch))
            found.append(measure_sensitivity(open_trace(path), lambda name, to: weights[name].astype(numpy_dtype(to))))
    return found


def row(found: Sensitivity) -> tuple[str, ...]:
    """A dtype's row."""
    least = [min(one.change for one in found.smallest if one.what == what) for what in CHANGES]
    missed = ", ".join(one.mutant.removesuffix(", as by transformers 4.28 to 4.57") for one in found.missed)
    caught = f"{len(found.planted) - len(found.missed)} of {len(found.planted)}"
    return (found.dtype, caught, *(f"{change:.0e}" for change in least), missed or "none")


def table(rows: list[tuple[str, ...]]) -> str:
    """The table in Markdown."""
    lines = [
        "| dtype | planted mistakes shown | one weight | one rotary angle | epsilon | not shown |",
        "|---" * 6 + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def read_rows(page: str) -> list[tuple[str, ...]]:
    """The page's rows."""
    text = page[page.index(BEGIN) + len(BEGIN) : page.index(END)].strip().splitlines()[2:]
    return [tuple(part.strip() for part in line.strip("|").split(" | ")) for line in text]


def placed(page: str, text: str) -> str:
    """The page with the table between its two marks."""
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return f"{page[:start]}\n\n{text}\n\n{page[end:]}"


if __name__ == "__main__":
    made = table([row(found) for found in measure()])
    if "--write" in sys.argv[1:]:
        PAGE.write_text(placed(PAGE.read_text(), made))
    else:
        print(made)
