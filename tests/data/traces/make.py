"""Record the traces of this folder: run a program of docs/recording.md where transformers 4.57.6 is installed.

    python make.py ask FOLDER                          # with gptj: the model, and what it is asked
    python make.py "transformers in PyTorch" FOLDER    # with transformers: FOLDER/theirs.safetensors

Only the first needs gptj and tests/support on the path; what is asked is the tests' `small_batch`.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "recording.md"


def program(heading: str) -> str:
    """The Python below a heading of the page."""
    _, found, rest = PAGE.read_text().partition(f"## {heading}\n")
    assert found, heading
    match = re.search(r"```python\n(.*?)```", rest.split("\n## ")[0], re.DOTALL)
    assert match is not None, heading
    return match[1]


def ask(folder: Path) -> None:
    """Write the model and the oracle's trace of it."""
    from recorded import small_batch, write_sample

    from gptj.checkpoint import write_checkpoint
    from gptj.parity.revealing import revealing_config, revealing_fill

    config = revealing_config(n_layer=2)
    write_checkpoint(folder / "model", config, revealing_fill(), overwrite=True)
    write_sample(folder / "base.safetensors", config, batch=small_batch(config))


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "ask":
        ask(folder)
    else:
        os.chdir(folder)
        exec(program(what), {})
