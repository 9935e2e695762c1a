"""Measure the three wings beside transformers, CTranslate2 and OpenVINO; print tables, write JSON and a picture.

    python -m benchmarks.speed --shape S --peers-python ~/peers/bin/python
    python -m benchmarks.speed --shape M --only decode1 --only decode8 --contenders gptj-pt,transformers-pt \\
        --json speed.json --plot speed.png                       # a slice, whose figures are added to the file's
    python -m benchmarks.speed --json speed.json --plot speed.png                  # shows a file again
    python -m benchmarks.speed --shape M --against ../before/src --contenders gptj-pt-fast --only decode1
    python -m benchmarks.speed --shape L --alone --contenders gptj-pt-bfloat16,transformers-pt-bfloat16 ...

The peers live in an environment of their own, since transformers 4.57.6 is the last release with all three frameworks:
`pip install transformers==4.57.6 torch tensorflow tf-keras jax flax ctranslate2`; OpenVINO in another, with
`pip install transformers==4.57.6 optimum-intel openvino nncf`. A contender that cannot be imported is named with the
reason; where it was asked for by --contenders, the exit status is 1. Several models are held in memory side by side;
where they do not fit, name fewer, or say --alone. The machine should do nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import math
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console

from benchmarks.speed.contenders import Contender, contenders
from benchmarks.speed.contest import Contest, Rules
from benchmarks.speed.folders import Folders
from benchmarks.speed.machine import CORES, machine
from benchmarks.speed.measures import MEASURES
from benchmarks.speed.picture import draw
from benchmarks.speed.report import tables
from benchmarks.speed.results import Results
from benchmarks.speed.shapes import SHAPES

TINY: dict[str, Any] = {"limits": {"megabytes": 16, "matrix": 64}, "disturbed": 1.0}
"""Rules of the shape that nobody measures for its speed: to be done soon."""


def main() -> None:
    arguments = parsed(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the contenders end, too
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results = Results.opened(arguments.json, run)
    try:
        for name in arguments.shape:
            results.data["machine"] = machine(arguments.threads)
            with tempfile.TemporaryDirectory() as temporary:
                contest = contest_of(arguments, name, results, arguments.directory or Path(temporary))
                wanted = () if arguments.make else arguments.only or MEASURES
                contest.run(chosen(arguments, name), [*wanted])
    finally:
        if arguments.json:
            results.write(arguments.json)
    console = Console(soft_wrap=True, highlight=False)
    for table in tables(results):
        if arguments.markdown:
            table.box, table.title_justify = box.MARKDOWN, "left"
        (console if console.is_terminal else Console(width=200, highlight=False)).print(table)
    if arguments.plot:
        draw(results, arguments.plot)
    named = (arguments.contenders or "").split(",")
    sys.exit(1 if any(failure[0] in named for name in arguments.shape for failure in results.failures(name)) else 0)


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES, default=[], help="may be said again")
    parser.add_argument("--only", action="append", choices=MEASURES, help="which, in this order [default: all]")
    parser.add_argument("--contenders", help="names with commas between [default: all whose weights fit]")
    parser.add_argument("--against", type=Path, help="another checkout's src: each of ours is measured beside its own")
    parser.add_argument("--list", action="store_true", help="print the contenders' and measures' names, and stop")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), help="has the peers")
    parser.add_argument("--openvino-python", type=Path, default=Path(sys.executable), help="has OpenVINO")
    parser.add_argument("--directory", type=Path, help="where the weights are kept [default: temporary]")
    parser.add_argument("--make", action="store_true", help="only write what is missing in --directory")
    parser.add_argument("--threads", type=int, default=CORES, help="for everybody [default: %(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="turns a measure [default: %(default)s]")
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens a turn at most [default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a decoding turn at most [default: %(default)s]")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no turn after this long")
    parser.add_argument("--cold", action="store_true", help="drop the weights from the page cache before each load")
    parser.add_argument("--alone", action="store_true", help="hold one model in memory at a time")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--plot", type=Path, help="draw decoding under the memory's limit (PNG; needs matplotlib)")
    arguments = parser.parse_args(words)
    if arguments.list:
        for name, what in [*((name, "") for name, of in contenders().items() if not of.before), *MEASURES.items()]:
            print(f"{name:28} {what}".rstrip())
        parser.exit()
    if arguments.against and not (arguments.against / "gptj" / "__init__.py").is_file():
        parser.error(f"--against {arguments.against}: no gptj in it")
    named = {name for name, contender in contenders().items() if not contender.before}
    unknown = set((arguments.contenders or "").split(",")) - {""} - named
    if unknown:
        parser.error(f"unknown contenders {', '.join(sorted(unknown))}; --list names them")
    if not arguments.shape and not (arguments.json and arguments.json.exists()):
        parser.error("name a --shape to measure, or a --json file to show")
    return arguments


def chosen(arguments: argparse.Namespace, shape: str) -> list[Contender]:
    """Those named, or all, each of ours beside its own of before; none in a wider dtype than the shape's folder."""
    everybody = contenders()
    names = (
        arguments.contenders.split(",") if arguments.contenders else [n for n in everybody if not everybody[n].before]
    )
    if arguments.against:
        names = [name for ours in names for name in (ours, f"{ours}-before") if name in everybody]
    narrow = SHAPES[shape].dtype != "float32"
    return [everybody[name] for name in names if not (narrow and everybody[name].dtype == "float32")]


def contest_of(arguments: argparse.Namespace, shape: str, results: Results, directory: Path) -> Contest:
    peers, openvino = arguments.peers_python, arguments.openvino_python
    folders = Folders(directory, SHAPES[shape], peers_python=peers, openvino_python=openvino)
    engines = ("TransformersPyTorch", "TransformersTensorFlow", "TransformersFlax", "CTranslate2")
    rules = Rules(
        threads=arguments.threads,
        repeats=arguments.repeats,
        most_steps=arguments.steps,
        target_s=arguments.seconds,
        most_s=60 * arguments.minutes,
        cold=arguments.cold,
        alone=arguments.alone,
        against=arguments.against and arguments.against.resolve(),
        **TINY if shape == "tiny" else {},
    )
    pythons = {**dict.fromkeys(engines, peers), "OpenVINO": openvino}
    return Contest(SHAPES[shape], folders, pythons, rules, results, say=lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    main()
