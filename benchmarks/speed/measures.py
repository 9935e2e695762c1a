"""What is measured, by which requests to a contender, and how the seconds become figures.

A user's call is measured, `generate`, not a step inside it. Two calls that differ only in how many tokens they write
give the time of a decoded token: (time of n2 tokens - time of n1 tokens) / (n2 - n1), in which the prompt cancels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from benchmarks.speed.engines import DRAWN
from benchmarks.speed.shapes import Shape

Ask = Callable[..., dict[str, Any]]
"""Asks the contender whose turn it is: `ask("generate", ids=[[1, 2]], new=3)["seconds"]`."""

PROMPT, FIRST = 16, 2
"""Tokens of the prompt before decoding, and of the shorter of the two calls."""

PREFILL = 512
BATCH = 8
DRAWN_ROWS = (1, 8, 32)
TRAINING = (4, 128)
CHECKED = 24
"""Greedy tokens that are compared."""

MEASURES = {
    "start": "import, load, first token and peak memory, each time in a new process",
    "prefill": f"one token after a prompt of {PREFILL}",
    "decode1": "a token of one row",
    "decode8": f"a token of each of {BATCH} rows",
    **{
        f"drawn{rows}": f"a token of each of {rows} rows: greedy, and drawn in two ways, in turn" for rows in DRAWN_ROWS
    },
    "train": f"loss, gradient and plain descent on {TRAINING[0]} rows of {TRAINING[1]} tokens",
}

FIGURES = (
    *("import_s", "load_s", "first_token_s", "peak_bytes", "prefill_s", "decode1_s", "decode8_s", "train_s"),
    *(f"drawn{rows}_{choice}_s" for rows in DRAWN_ROWS for choice in DRAWN),
)
"""What the measures give. Peak memory is over that after the imports; first_token_s is of the first call, with all that
is compiled in it, and load_s apart."""


def prompts(shape: Shape, rows: int, tokens: int) -> list[list[int]]:
    """The same random prompts for everybody."""
    chance = random.Random(f"{shape.name} {rows} {tokens}")
    return [[chance.randrange(1, shape.config.vocab_size) for _ in range(tokens)] for _ in range(rows)]


def start(ask: Ask, shape: Shape) -> dict[str, float]:
    """All figures of a process' first moments, from a process that has done nothing yet."""
    imported = ask("bring_in")
    loaded = ask("load")
    first = ask("generate", ids=prompts(shape, 1, PROMPT), new=1)
    return {
        "import_s": imported["seconds"],
        "load_s": loaded["seconds"],
        "first_token_s": first["seconds"],
        "peak_bytes": first["peak_bytes"] - imported["peak_bytes"],
    }


def prepare(measure: str, ask: Ask, shape: Shape, *, most_steps: int, target_s: float) -> dict[str, Any]:
    """Do once, untimed, all that will be timed, so that nothing is compiled then. Returns what `repeat` wants to know.

    A contender that is slow decodes fewer tokens, so that a repeat takes some `target_s`: a power of two, 4 at least.
    """
    if measure == "prefill":
        ask("generate", ids=prompts(shape, 1, PREFILL), new=1)
    elif measure == "train":
        ask("train", ids=prompts(shape, *TRAINING))
    else:
        rows = int(measure.removeprefix("decode").removeprefix("drawn"))
        ids = prompts(shape, rows, PROMPT)
        ask("generate", ids=ids, new=FIRST)
        step_s = ask("generate", ids=ids, new=FIRST)["seconds"] / FIRST
        steps = most_steps
        while steps > 4 and steps * step_s > target_s:
            steps //= 2
        for choice in choices(measure):
            for new in (FIRST, FIRST + steps):
                ask("generate", ids=ids, new=new, **choice)
        return {"rows": rows, "steps": steps}
    return {}


def repeat(measure: str, ask: Ask, shape: Shape, known: dict[str, Any]) -> dict[str, float]:
    """One timed turn."""
    if measure == "prefill":
        return {"prefill_s": ask("generate", ids=prompts(shape, 1, PREFILL), new=1)["seconds"]}
    if measure == "train":
        return {"train_s": ask("train", ids=prompts(shape, *TRAINING))["seconds"]}
    ids = prompts(shape, known["rows"], PROMPT)
    found = {}
    for choice in choices(measure):
        short_s = ask("generate", ids=ids, new=FIRST, **choice)["seconds"]
        long_s = ask("generate", ids=ids, new=FIRST + known["steps"], **choice)["seconds"]
        figure = "_".join([measure, *choice.values(), "s"])
        found[figure] = (long_s - short_s) / known["steps"]
    return found


def choices(measure: str) -> list[dict[str, str]]:
    """How the tokens of a decoding measure are chosen, in the words of an engine's `generate`."""
    return [{"choice": name} for name in DRAWN] if measure.startswith("drawn") else [{}]


def tokens_per_s(figure: str, seconds: float) -> float:
    """Tokens a second of a prefill_s, decode1_s, decode8_s or train_s."""
    count = {"prefill_s": PREFILL, "decode1_s": 1, "decode8_s": BATCH, "train_s": TRAINING[0] * TRAINING[1]}[figure]
    return count / seconds


def bound(measure: str, dtype: str) -> str:
    """Which of the machine's limits bounds a measure: the bytes that it reads a second, or multiplies in `dtype`."""
    return dtype if measure in ("prefill", "train") else "read"


def share_of_limit(figure: str, seconds: float, shape: Shape, dtype: str, limits: dict[str, float]) -> float | None:
    """How much was had of what the machine can do; None where there is no such limit: nobody multiplies in int4."""
    measure = figure.removesuffix("_s")
    limit = limits.get(bound(measure, dtype))
    if limit is None or measure not in MEASURES:
        return None
    if measure.startswith("decode"):
        least = shape.bytes_a_token(dtype)
    elif measure == "prefill":
        least = shape.prefill_operations(PREFILL)
    else:
        least = shape.training_operations(*TRAINING)
    return least / seconds / limit
