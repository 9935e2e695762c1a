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

from mutants import revealing_batch
from page_parts import Part, markdown_table
from recorded import facts_of, inputs_of, recorded_taps

from gptj.config.dtypes import numpy_dtype
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.sensitivity import Sensitivity, measure_sensitivity
from gptj.parity.trace import open_trace, write_trace

TABLE = Part("docs/parity.md", "sensitivity", "tests/documents/sensitivity_table.py")
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


def row(found: Sensitivity) -> list[str]:
    """A dtype's row."""
    least = [min(one.change for one in found.smallest if one.what == what) for what in CHANGES]
    missed = ", ".join(one.mutant.removesuffix(", as by transformers 4.28 to 4.57") for one in found.missed)
    caught = f"{len(found.planted) - len(found.missed)} of {len(found.planted)}"
    return [found.dtype, caught, *(f"{change:.0e}" for change in least), missed or "none"]


def table(rows: list[list[str]]) -> str:
    """The table in Markdown."""
    return markdown_table(["dtype", "planted mistakes shown", *CHANGES, "not shown"], rows)


if __name__ == "__main__":
    TABLE.print_or_write(lambda: table([row(found) for found in measure()]))
