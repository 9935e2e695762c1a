"""The README's console block of `gptj demo`, made by the command itself.

    python tests/documents/demo_block.py          print the block
    python tests/documents/demo_block.py --write  put it into README.md

Seconds and rounding errors are those of the machine where it was made; `shape` takes them out, so that the rest can be
held to what the command prints today.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- demo: made by tests/documents/demo_block.py -->", "<!-- demo end -->"


def block(output: str) -> str:
    """The console block in Markdown."""
    lines = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
    return f"```console\n$ gptj demo\n{lines}\n```"


def shape(text: str) -> str:
    """The text with every time and every measured difference taken out."""
    text = re.sub(r"^ *\d+\.\d s  ", "# s  ", text, flags=re.MULTILINE)
    return re.sub(r" +\d\.\de-\d\d\b", " #", text)


def found_in(readme: str) -> str:
    """The block that stands in the README."""
    return readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)].strip()


def placed(readme: str, text: str) -> str:
    """The README with the block between its two marks."""
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:start]}\n\n{text}\n\n{readme[end:]}"


if __name__ == "__main__":
    command = [sys.executable, "-m", "gptj", "demo"]
    made = block(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if "--write" in sys.argv[1:]:
        path = ROOT / "README.md"
        path.write_text(placed(path.read_text(), made))
    else:
        print(made)
