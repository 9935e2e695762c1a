"""Kill -9 of one of the processes that fine-tune together, at random moments: the others end, and the run goes on.

    python benchmarks/rank_kills.py DIR DATA OUT [--backend pt] [--processes 2] [--kills 10] [-- options of finetune]

Processes are started by themselves, with torchrun's variables and without its agent, so that what ends them is theirs.
A moment is between the start and --latest. For each kill: how long the others lived on,
their status, and what they said of it. In the end the run goes to its end, and its losses are compared with those of
the run that nothing stopped.
"""

from __future__ import annotations

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

from finetune_kills import losses, make_parser, read_options

LONGEST_S = 60


def start(command: list[str], processes: int, folder: Path) -> list[subprocess.Popen[Any]]:
    """The command in so many processes, each of which speaks into a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for n in range(processes):
        with (folder / f"said-{n}").open("w") as said:
            place = {"RANK": str(n), "LOCAL_RANK": str(n)}
            one = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **shared, **place})
        started.append(one)
    return started


def main() -> None:
    parser = make_parser(__doc__, kills=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--latest", type=float, default=30, help="the latest moment, in seconds")
    given, words, options = read_options(parser, sys.argv[1:])
    drawn = random.Random(given.seed)
    options = ["--save-every", "1", "--strategy", "fsdp", *options]
    whole = given.out.with_name(given.out.name + "-whole")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        began = time.monotonic()
        for process in start([*words, str(whole), *options], given.processes, folder):
            assert process.wait() == 0, (folder / "said-0").read_text()
        lasts = time.monotonic() - began
        print(f"{given.backend}, {given.processes} processes: a run that nothing stops takes {lasts:.0f} s", flush=True)
        slow = 0.0
        for kill in range(given.kills):
            moment, victim = drawn.uniform(0, given.latest), drawn.randrange(given.processes)
            running = start([*words, str(given.out), *options, "--resume"], given.processes, folder)
            time.sleep(moment)
            running[victim].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            others = [process for n, process in enumerate(running) if n != victim]
            try:
                statuses = [process.wait(timeout=2 * LONGEST_S) for process in others]
            except subprocess.TimeoutExpired:
                statuses = ["LIVES ON"]
                for process in others:
                    process.kill()
            took = time.monotonic() - killed
            slow = max(slow, took)
            said = [line for n in range(given.processes) if n != victim
                    for line in (folder / f"said-{n}").read_text().splitlines() if "gptj: " in line]  # fmt: skip
            steps = sorted(path.name[-3:] for path in given.out.glob("checkpoints/step-*"))
            print(f"kill {kill + 1} of process {victim} after {moment:.1f} s: the others ended after {took:.1f} s with "
                  f"{statuses}; they said {said}; checkpoints {steps}", flush=True)  # fmt: skip
        for process in start([*words, str(given.out), *options, "--resume"], given.processes, folder):
            assert process.wait() == 0, (folder / "said-0").read_text()
    found, expected = losses(given.out), losses(whole)
    same = len(found) == len(expected) and all(abs(a - b) <= 1e-5 * b for a, b in zip(found, expected, strict=True))
    print(f"losses of {len(found)} updates: {'the same' if same else 'NOT THE SAME'}; the slowest end {slow:.1f} s")
    sys.exit(not same or slow > LONGEST_S)


if __name__ == "__main__":
    main()
