"""Kill conversions at random moments and look at what is left: the old directory, or the new one, never a mixture.

    python benchmarks/kill.py --rounds 200
    python benchmarks/kill.py --rounds 50 --to mesh

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
from typing import Any

from gptj_conversion.convert import convert
from gptj_conversion.verify import verify

from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.parity.revealing import revealing_fill

CONFIG = GPTJConfig(vocab_size=512, n_positions=32, n_embd=64, n_layer=4, n_head=4, rotary_dim=8)
SIZES = tuple({"max_shard_bytes": size} for size in (10**9, 300_000, 60_000))
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "safetensors": SIZES,
    "bin": SIZES,
    "flax": SIZES,
    "tf": SIZES,
    "mesh": tuple({"shards": shards} for shards in (1, 2, 4)),
}
"""How else each format can be cut: a round goes from one to another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="how many must be killed before they finish")
    parser.add_argument("--to", choices=VARIANTS, default="safetensors", help="the format to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to work [default: temporary]")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # which says what was cleared, every time
    with tempfile.TemporaryDirectory(prefix="gptj-kill-", dir=arguments.directory) as folder:
        counts = run(Path(folder), arguments.to, arguments.rounds, random.Random(arguments.seed))
    print(json.dumps(counts))
    sys.exit(1 if counts["mixed or lost"] else 0)


def run(folder: Path, to: str, rounds: int, chance: random.Random) -> dict[str, int]:
    variants = [{"to": to, **variant} for variant in VARIANTS[to]]
    sources = [write_checkpoint(folder / f"source{n}", CONFIG, revealing_fill(n)) for n in (0, 1)]
    before = [contents(source) for source in sources]
    whole = {}
    for v, variant in enumerate(variants):
        for n, source in enumerate(sources):
            whole[n, v] = contents(convert(source, folder / f"whole-{n}-{v}", **variant))
    target = folder / "target"
    shutil.copytree(folder / "whole-0-0", target)
    started = time.perf_counter()
    convert(sources[0], target, overwrite=True, **variants[-1])
    life_s = time.perf_counter() - started
    old = (0, len(variants) - 1)
    counts: collections.Counter[str] = collections.Counter({"mixed or lost": 0})
    number = -1
    while counts["killed"] < rounds:
        number += 1
        new = (1 - old[0], chance.choice([v for v in range(len(variants)) if v != old[1]]))
        options = {**variants[new[1]], "overwrite": True}
        resume = number % 3 == 2
        was_killed = kill_one(sources[new[0]], target, chance.uniform(0, 1.3 * life_s), resume=resume, **options)
        counts["killed" if was_killed else "finished first"] += 1
        found = contents(target)
        state = "new" if found == whole[new] else "old" if found == whole[old] else "mixed or lost"
        counts[state] += 1
        counts["stages left"] += any(".gptj-stage-" in path.name for path in folder.iterdir())
        verify(target)
        if [contents(source) for source in sources] != before:
            counts["sources changed"] += 1
        if number % 2:
            convert(sources[new[0]], target, resume=number % 4 == 1, **options)
            counts["wrong after the next run"] += contents(target) != whole[new]
            counts["leftovers after the next run"] += any("gptj-" in path.name for path in folder.iterdir())
            state = "new"
        old = new if state == "new" else old
    return dict(counts)


def kill_one(source: Path, target: Path, delay_s: float, **options: Any) -> bool:
    """Convert in a process of its own, and kill it; False where it had finished before."""
    child = os.fork()  # not a new interpreter: it would spend its life on imports
    if child == 0:
        try:
            convert(source, target, **options)
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
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
