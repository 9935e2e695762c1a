"""A drawn step beside a greedy one, step by step: python -m benchmarks.drawn DIR --backend pt --quantize int8 --rows 8

One text is continued greedily and in the two drawn ways of `benchmarks.speed`, of one model in one process, and the
three take their steps in turn. So the machine is the same for each, where turns of a second each meet another state of
memory. Given are the median of a greedy step, and of each drawn one the median of its quotients by the greedy step of
its turn.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import time
from typing import Any

from benchmarks.speed.engines import DRAWN, options_of

COLD = 3
"""Steps of each that are not counted."""

PROMPT = 8
"""Tokens before the first step."""


def alternate(model: Any, rows: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each step by the ways of DRAWN, which alternate."""
    ids = [random.choices(range(50_000), k=PROMPT) for _ in range(rows)]
    streams = {
        name: model.stream(
            ids, max_new_tokens=COLD + steps, min_new_tokens=COLD + steps, pad_token_id=0, seed=1, **options_of(name)
        )
        for name in DRAWN
    }
    taken: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(COLD + steps):
        for name, stream in streams.items():
            start = time.perf_counter()
            next(stream)
            taken[name].append(time.perf_counter() - start)
    return {name: seconds[COLD:] for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drawn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="with the model's weights")
    parser.add_argument("--backend", choices=("pt", "tf", "flax"), default="pt", help="[default: %(default)s]")
    parser.add_argument("--quantize", help="as `from_pretrained` has it; PyTorch")
    parser.add_argument("--rows", type=int, action="append", help="may be said again [default: 1, 8, 32]")
    parser.add_argument("--steps", type=int, default=100, help="of each way [default: %(default)s]")
    arguments = parser.parse_args()
    wing = importlib.import_module(f"gptj.{arguments.backend}")
    options = {"quantize": arguments.quantize} if arguments.quantize else {}
    model = wing.GPTJForCausalLM.from_pretrained(arguments.folder, inference=True, **options)
    random.seed(0)
    for rows in arguments.rows or (1, 8, 32):
        greedy, *drawn = alternate(model, rows, arguments.steps).items()
        quotients = [
            f"{way} {statistics.median(a / b for a, b in zip(seconds, greedy[1], strict=True)):.3f}"
            for way, seconds in drawn
        ]
        print(f"{rows} rows: {1e3 * statistics.median(greedy[1]):.1f} ms; {', '.join(quotients)}", flush=True)


if __name__ == "__main__":
    main()
