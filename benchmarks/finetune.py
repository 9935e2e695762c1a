"""Loss curves of one fine-tuning in every framework, compared and drawn into one picture.

    python benchmarks/finetune.py DIR DATA OUT [--backends pt,tf,flax] [-- any option of gptj finetune]

Each framework runs `gptj finetune` in a process of its own with the same options, and its folder is OUT/NAME. Printed
is the largest relative difference from the first framework, of any update and of the first 10, 20, 50 ...; the picture
is OUT/curves.png.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from gptj.finetune.curve import Row, draw_curve, read_curve

NAMES = {"pt": "PyTorch", "tf": "TensorFlow", "flax": "Flax"}


def difference(one: list[Row], other: list[Row], steps: int) -> float:
    """The largest relative difference of the losses of the first updates."""
    pairs = zip(one[:steps], other[:steps], strict=True)
    return max(abs(a.loss - b.loss) / abs(a.loss) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--backends", default="pt,tf,flax")
    parser.add_argument("options", nargs="*", help="behind --")
    arguments = parser.parse_args()
    arguments.out.mkdir()
    curves: dict[str, list[Row]] = {}
    for name in arguments.backends.split(","):
        folder = arguments.out / name
        command = [sys.executable, "-m", "gptj", "finetune", arguments.directory, arguments.data, str(folder)]
        subprocess.run([*command, "--backend", name, *arguments.options], check=True)
        curves[name] = read_curve(folder / "loss.csv")
    first, *others = curves
    steps = len(curves[first])
    for other in others:
        for count in sorted({min(count, steps) for count in (10, 20, 50, 100, 200, 500, steps)}):
            found = difference(curves[first], curves[other], count)
            print(f"{NAMES[other]} from {NAMES[first]}, first {count} updates: at most {found:.1e}")
    title = f"{steps} updates in {len(curves)} frameworks"
    picture = draw_curve([(NAMES[name], rows) for name, rows in curves.items()], title=title)
    (arguments.out / "curves.png").write_bytes(picture)


if __name__ == "__main__":
    main()
