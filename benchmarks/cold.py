"""From the shell to a text's first tokens, backend by backend: where the time goes, and what a cache on disk saves.

    python -m benchmarks.cold --shape S                     # each backend, three turns each, one after another
    python -m benchmarks.cold --shape S --only flax --only "flax, programs on disk"

Each turn is a process of its own that imports a backend, loads a folder, and makes two tokens of a prompt of 32: the
first waits for the prompt's programs, the second for the step's. Seconds on the clock, and beside them seconds of
processors, which other work on the machine changes less; medians of turns. The folder is in the page cache.

With "programs on disk", XLA's compiled programs are kept in a folder from one process to the next (in Flax
`jax_compilation_cache_dir`, in TensorFlow `--tf_xla_persistent_cache_directory`), which one turn before has filled.
With "jax hidden", TensorFlow is imported as where jax is not installed: its `tensorflow.lite` imports jax if it can.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

WAYS = {
    "pt": ("pt", ""),
    "pt, inference=True": ("pt", "inference"),
    "tf": ("tf", ""),
    "tf, jax hidden": ("tf", "hidden"),
    "tf, programs on disk": ("tf", "disk"),
    "flax": ("flax", ""),
    "flax, programs on disk": ("flax", "disk"),
}

PHASES = ("python", "import", "load", "first token", "second token")


def turn_here(backend: str, how: str, folder: str, started: float) -> dict[str, list[float]]:
    """The phases of this process, which began at `started`: seconds on the clock, and of processors."""
    marks = [(started, 0.0)]

    def mark() -> None:
        marks.append((time.monotonic(), time.process_time()))

    mark()
    import gptj

    if how == "hidden":
        sys.modules["jax"] = None  # type: ignore[assignment]
    wing = gptj.backend(backend)
    mark()
    if how == "disk" and backend == "flax":
        import jax

        jax.config.update("jax_compilation_cache_dir", os.environ["PROGRAMS"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = wing.GPTJForCausalLM.from_pretrained(folder, **({"inference": True} if how == "inference" else {}))
    mark()
    for _ in model.stream([[*range(32)]], max_new_tokens=2, eos_token_id=None):
        mark()
    return {
        phase: [b - a for a, b in zip(before, after, strict=True)]
        for phase, before, after in zip(PHASES, marks, marks[1:], strict=False)
    }


def turn(way: str, folder: Path, programs: Path) -> dict[str, list[float]]:
    """The phases of a process."""
    backend, how = WAYS[way]
    environment: dict[str, Any] = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "KERAS_BACKEND": "tensorflow",
        "PYTHONPATH": str(ROOT / "src"),
        "PROGRAMS": str(programs),
    }
    if how == "disk" and backend == "tf":
        environment["TF_XLA_FLAGS"] = f"--tf_xla_persistent_cache_directory={programs}"
    words = [sys.executable, __file__, "--turn", way, str(folder), str(time.monotonic())]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{way}: {done.stderr}")
    phases: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return phases


def main() -> None:
    if sys.argv[1:2] == ["--turn"]:
        way, folder, started = sys.argv[2:]
        print(json.dumps(turn_here(*WAYS[way], folder, float(started))))
        return
    sys.path.insert(0, str(ROOT))
    from benchmarks.speed.folders import Folders
    from benchmarks.speed.shapes import SHAPES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cold", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--only", action="append", choices=WAYS, help="may be said again [default: all]")
    parser.add_argument("--turns", type=int, default=3, help="[default: %(default)s]")
    arguments = parser.parse_args()
    ways = arguments.only or [*WAYS]
    with tempfile.TemporaryDirectory() as temporary:
        place, unused = Path(temporary), Path(sys.executable)
        folder = Folders(place, SHAPES[arguments.shape], peers_python=unused, openvino_python=unused).find("folder")
        programs = {way: place / f"programs{n}" for n, way in enumerate(ways)}
        for way in ways:
            programs[way].mkdir()
            turn(way, folder, programs[way])  # the files come into the page cache, and the programs to disk
        turns: dict[str, list[dict[str, list[float]]]] = {way: [] for way in ways}
        for _ in range(arguments.turns):
            for way in ways:
                turns[way].append(turn(way, folder, programs[way]))
        print("| seconds (of processors) | " + " | ".join(PHASES) + " | to the first token |")
        print("|---" * (len(PHASES) + 2) + "|")
        for way in ways:
            columns = [[statistics.median(t[phase][n] for t in turns[way]) for n in (0, 1)] for phase in PHASES]
            columns.append([sum(column[n] for column in columns[:4]) for n in (0, 1)])
            print(f"| {way} | " + " | ".join(f"{clock:.2f} ({cpu:.2f})" for clock, cpu in columns) + " |")
            stored = sum(path.stat().st_size for path in programs[way].rglob("*") if path.is_file())
            if stored:
                print(f"{way}: {stored / 1e6:.1f} MB on disk", file=sys.stderr)


if __name__ == "__main__":
    main()
