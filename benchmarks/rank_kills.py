"""Kill -9 of one of the processes that fine-tune together, at random moments: the others end, and the run goes on.

    python -m benchmarks.rank_kills [--backend flax] [--processes 2 4] [--finish 1]       # a small model of its own
    python -m benchmarks.rank_kills --model DIR --data DATA --out OUT [-- options of finetune]

Processes are started by themselves, with torchrun's variables and without its agent, so that what ends them is theirs.
A moment comes up to --latest seconds after the first checkpoint of a run. For each kill: how long the others lived on,
their status, and what they said. In the end the run goes to its end, and its losses are compared with those of the run
that nothing stopped. The status is 1 where an end took longer than 60 s, was no error or had not one line that says
so, or a loss is another.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.finetune_kills import losses, make_parser, newest, read_options

LONGEST_S = 60
TRAINS = {"pt": "fsdp", "flax": "fsdp", "tf": "dp"}
"""The strategy by which processes of a framework train."""


def start(command: list[str], processes: int, folder: Path) -> list[subprocess.Popen[Any]]:
    """The command in so many processes, each of which speaks into a file."""
    port = free_port()
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for n in range(processes):
        with (folder / f"said-{n}").open("w") as said:
            place = {"RANK": str(n), "LOCAL_RANK": str(n)}
            one = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **shared, **place})
        started.append(one)
    return started


def free_port() -> int:
    """A port that is free beside the next one, which jax takes."""
    while True:
        with socket.socket() as free, socket.socket() as next_one:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
            with contextlib.suppress(OSError):
                next_one.bind(("127.0.0.1", port + 1))
                return port


def main() -> None:
    parser = make_parser(__doc__, kills=10)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="of the runs, in turn")
    parser.add_argument("--finish", type=int, help="processes of the run that goes to the end")
    parser.add_argument("--latest", type=float, default=0.5, help="seconds after a checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    given, more = read_options(parser)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if given.model is None:
            given.model, given.data = make_model(folder)
            more = ["--batch", str(2 * max(given.processes)), "--lr", "0.01", "--pad", *more]
        given.out = given.out or folder / "out"
        sys.exit(not kill_and_compare(given, folder, more))


def make_model(folder: Path) -> tuple[Path, Path]:
    """A small model with a tokenizer, and lines to learn."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from finetune_samples import lines_file, tuned_model

    return tuned_model(folder / "model", n_head=4), lines_file(folder)


def kill_and_compare(given: argparse.Namespace, folder: Path, more: list[str]) -> bool:
    """Whether all ends were as they must be, and the losses are those of a run that nothing stopped."""
    drawn, out = random.Random(given.seed), given.out
    words = [sys.executable, "-m", "gptj", "finetune", str(given.model), str(given.data)]
    options = ["--backend", given.backend, "--steps", str(given.steps), "--save-every", "1", "--strategy",
               TRAINS[given.backend]]  # fmt: skip
    options += more
    whole = out.with_name(out.name + "-whole")

    def finish(place: Path, processes: int, *how: str) -> float:
        began = time.monotonic()
        for process in start([*words, str(place), *options, *how], processes, folder):
            assert process.wait() == 0, (folder / "said-0").read_text()
        return time.monotonic() - began

    lasts = finish(whole, given.processes[0])
    print(f"{given.backend}, {given.processes[0]} processes: {given.steps} updates that nothing stops "
          f"take {lasts:.0f} s", flush=True)  # fmt: skip
    slow, good = 0.0, True
    for kill in range(given.kills):
        moment = drawn.uniform(0, given.latest)
        before, processes = newest(out), given.processes[kill % len(given.processes)]
        victim = drawn.randrange(processes)
        running = start([*words, str(out), *options, "--resume"], processes, folder)
        while newest(out) <= before and all(process.poll() is None for process in running):
            time.sleep(0.001)
        time.sleep(moment)
        over = any(process.poll() is not None for process in running)
        at = newest(out) + 1
        running[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        others = {n: process for n, process in enumerate(running) if n != victim}
        try:
            statuses = [process.wait(timeout=2 * LONGEST_S) for process in others.values()]
        except subprocess.TimeoutExpired:
            statuses = ["LIVES ON"]
            for process in others.values():
                process.kill()
        took = time.monotonic() - killed
        running[victim].wait()
        slow = max(slow, took)
        said = [line for n in others for line in (folder / f"said-{n}").read_text().splitlines() if is_clear(line)]
        fine = not over and (0 not in statuses and took <= LONGEST_S and len(said) == 1)
        good &= fine
        print(f"kill {kill + 1} of process {victim} of {processes} in update {at}: the others ended after {took:.1f} s "
              f"with {statuses}; they said {said}; checkpoint {newest(out)}{'' if fine else ' FAILS'}"
              f"{', it was over: give it more --steps' if over else ''}", flush=True)  # fmt: skip
        if not fine:
            print(*((folder / f"said-{n}").read_text()[-3000:] for n in others), sep="\n---\n", flush=True)
    finish(out, given.finish or given.processes[0], "--resume")
    found, expected = losses(out), losses(whole)
    off = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
    bits = "the same bits" if found == expected else f"within {off:.1e}"
    print(f"losses of {len(found)} updates: {bits}; the slowest end {slow:.1f} s")
    return good and off <= 1e-5


def is_clear(line: str) -> bool:
    """Whether it says that another process is no more."""
    return line.startswith("gptj: ")


if __name__ == "__main__":
    main()
