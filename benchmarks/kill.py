"""Kill conversions at random moments and look at what is left: the old directory, or the new one, never a mixture.

    python benchmarks/kill.py --rounds 200

Each round converts one model over another, which is cut into another number of files, in a process that gets
SIGKILL at a random moment of its life. Afterwards the destination must be, by the hashes of its manifest and to the
byte, what stood there before or what was to be written; the source must be untouched; and an undisturbed run must
succeed and leave nothing else behind. Every third run continues (`--resume`) what the one before left.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from gptj_conversion.convert import convert

from gptj.checkpoint import verify_checkpoint, write_checkpoint
from gptj.config import GPTJConfig
from gptj.parity.revealing import revealing_fill

CONFIG = GPTJConfig(vocab_size=512, n_positions=32, n_embd=64, n_layer=4, n_head=4, rotary_dim=8)
SIZES = (10**9, 300_000, 60_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="how many must be killed before they finish")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to work [default: temporary]")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # which says what was cleared, every time
    with tempfile.TemporaryDirectory(prefix="gptj-kill-", dir=arguments.directory) as folder:
        counts = run(Path(folder), arguments.rounds, random.Random(arguments.seed))
    print(json.dumps(counts))
    sys.exit(1 if counts["mixed or lost"] else 0)


def run(folder: Path, rounds: int, chance: random.Random) -> dict[str, int]:
    sources = [write_checkpoint(folder / f"source{n}", CONFIG, revealing_fill(n)) for n in (0, 1)]
    before = [contents(source) for source in sources]
    whole = {}
    for size in SIZES:
        for n, source in enumerate(sources):
            whole[n, size] = contents(convert(source, folder / f"whole-{n}-{size}", max_shard_bytes=size))
    target = folder / "target"
    shutil.copytree(folder / f"whole-0-{SIZES[0]}", target)
    started = time.perf_counter()
    convert(sources[0], target, overwrite=True, max_shard_bytes=SIZES[-1])
    life_s = time.perf_counter() - started
    old = (0, SIZES[-1])
    counts: collections.Counter[str] = collections.Counter({"mixed or lost": 0})
    number = -1
    while counts["killed"] < rounds:
        number += 1
        new = (1 - old[0], chance.choice([size for size in SIZES if size != old[1]]))
        resume = number % 3 == 2
        was_killed = kill_one(sources[new[0]], target, new[1], chance.uniform(0, 1.3 * life_s), resume=resume)
        counts["killed" if was_killed else "finished first"] += 1
        found = contents(target)
        state = "new" if found == whole[new] else "old" if found == whole[old] else "mixed or lost"
        counts[state] += 1
        counts["stages left"] += any(".gptj-stage-" in path.name for path in folder.iterdir())
        verify_checkpoint(target)
        if [contents(source) for source in sources] != before:
            counts["sources changed"] += 1
        if number % 2:
            convert(sources[new[0]], target, overwrite=True, max_shard_bytes=new[1], resume=number % 4 == 1)
            counts["wrong after the next run"] += contents(target) != whole[new]
            counts["leftovers after the next run"] += any("gptj-" in path.name for path in folder.iterdir())
            state = "new"
        old = new if state == "new" else old
    return dict(counts)


def kill_one(source: Path, target: Path, max_shard_bytes: int, delay_s: float, *, resume: bool) -> bool:
    """Convert in a process of its own, and kill it; False where it had finished before."""
    child = os.fork()  # not a new interpreter: it would spend its life on imports
    if child == 0:
        try:
            convert(source, target, overwrite=True, max_shard_bytes=max_shard_bytes, resume=resume)
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 1:
        raise SystemExit("a conversion failed by itself")
    return os.WIFSIGNALED(status)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


if __name__ == "__main__":
    main()
