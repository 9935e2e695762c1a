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

from page_parts import Part

BLOCK = Part("README.md", "demo", "tests/documents/demo_block.py")


def block(output: str) -> str:
    """The console block in Markdown."""
    lines = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
    return f"```console\n$ gptj demo\n{lines}\n```"


def shape(text: str) -> str:
    """The text with every time and every measured difference taken out."""
    text = re.sub(r"^ *\d+\.\d s  ", "# s  ", text, flags=re.MULTILINE)
    return re.sub(r" +\d\.\de-\d\d\b", " #", text)


def run_demo() -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "gptj", "demo"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    BLOCK.print_or_write(lambda: block(run_demo()))
