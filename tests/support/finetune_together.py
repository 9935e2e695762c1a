"""A part of a fine-tuning, in as many processes as a launcher starts: for runs that go on elsewhere.

torchrun --nproc-per-node=2 finetune_together.py BACKEND MODEL DATA OUT UPDATES fsdp:2:1|alone '{"lr": 0.01}'
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from gptj.finetune import Settings, finetune
from gptj.sharding import Mesh


def main(backend: str, model: str, data: str, out: str, updates: str, words: str, settings: str) -> None:
    """Train until so many updates are over, and save."""
    cut: dict[str, Any] = {}
    if words != "alone":
        strategy, dp, tp = words.split(":")
        cut = {"cut": (strategy, Mesh(dp=int(dp), tp=int(tp)))}
    asked = _rows(out)

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= int(updates)

    finetune(
        model, data, out, Settings(**json.loads(settings)), backend=backend, evaluation=data, resume=True, stop=stop,
        note=lambda line: print(line, file=sys.stderr), **cut,
    )  # fmt: skip
    importlib.import_module(f"gptj.{backend}.parallel").leave_processes()


def _rows(out: str) -> list[str]:
    try:
        with open(f"{out}/loss.csv", encoding="utf-8") as stream:  # noqa: PTH123
            return stream.read().splitlines()[1:]
    except FileNotFoundError:
        return []


if __name__ == "__main__":
    main(*sys.argv[1:])
