"""Findings that nobody computed: every section, numbers that are not finite, names that would be markup, and many."""

from __future__ import annotations

import math

from gptj.calls.taps import list_taps
from gptj.parity.findings import (
    Findings,
    LadderRung,
    MeasureFound,
    PairFound,
    PlantedMistake,
    SmallestFound,
    TapFound,
    TextFound,
)

HOSTILE = '<script>alert(1)</script> "><img src=x onerror=alert(1)> |x| [a](javascript:x) @you #1 `c` '
HOSTILE += "\x00\x1b[31m\ud800\u202e]]>"
"""A name of everything that HTML, XML, Markdown and terminals take for their own."""

VERSIONS = {"pt": {"torch": "2.13.0", "numpy": "2.4.0"}, "tf": {"tensorflow": "2.21.0"}, "flax": {"jax": "0.10.0"}}
CONFIG = {"n_layer": 4, "n_embd": 64, "n_head": 4, "rotary_dim": 8, "vocab_size": 96, "model_type": "gptj"}


def pair(layers: int = 4, *, wrong: int | None = 2, b: str = "tf", dtype: str = "float32") -> PairFound:
    """A pair that goes wrong at q_rotated of block `wrong`, whose consequences follow."""
    taps, gone = [], False
    for number, name in enumerate(list_taps(layers)):
        bound = 1e-7 * (1 + number)
        if wrong is not None and name == f"h.{wrong}.q_rotated":
            gone = True
            taps.append(TapFound(name, 0.41, 2e-6, False, True, 0.4, 1e-6, "row 0, head 3, token 10, channel 6"))
        elif gone and not name.endswith((".k", ".v", ".visible", ".k_rotated")):
            taps.append(TapFound(name, 0.1, bound, False, False, bound / 9, bound / 3, "row 1, token 4, channel 2"))
        else:
            size = 0.0 if name.endswith("visible") else bound * (0.003, 0.05, 0.6)[number % 3]
            taps.append(TapFound(name, size, bound, True, None if number % 5 else False, None, None, "row 0, token 1"))
    headline = f"{b} agrees with the oracle: all {len(taps)} values within what rounding explains"
    if wrong is not None:
        headline = (
            f"{b} first differs from oracle in block {wrong}, q_rotated: born there, 4.1e-01 where rounding explains "
            "2e-06; token 10, head 3, channel 6"
        )
    return PairFound(
        "oracle float64", f"{b} {dtype}", tuple(taps), dtype, headline, None if wrong is None else "rotary sign"
    )


_ERRORS = (1e-6, 2e-6, 1e-4, math.nan, math.inf, None, 0.0, 0.1)


def full() -> Findings:
    """Every section, of a comparison that differs."""
    matrix = [
        MeasureFound(backend, row, what, 1e-7 * (1 + i), 2e-6, True)
        for backend in VERSIONS
        for i, (row, what) in enumerate([("cached against whole", "logits"), ("padded against not", "logits"),
                                         ("gradients against float64", "wte")])
    ]  # fmt: skip
    matrix += [MeasureFound("tf", "saved and loaded", "logits", math.nan, 0.0, False, "row 0, token 3"),
               MeasureFound("pt", "saved and loaded", "logits", 0.0, 0.0, True)]  # fmt: skip
    rungs = [
        LadderRung(b, rung, 10.0**-digits, 10.0 ** -(digits + 3), 1 - 10.0**-digits, 0.999999, 8)
        for b in VERSIONS
        for rung, digits in (("float64", 13), ("float32", 6), ("bfloat16", 2), ("int8", 1))
    ]
    rungs.append(LadderRung("pt", "float16", math.inf, math.nan))
    return Findings(
        "differs",
        pair().headline,
        "models/tiny",
        CONFIG,
        VERSIONS,
        ("weights checked against manifest.json",),
        (
            MeasureFound("pt", "oracle", "logits", 1.2e-6, 2e-5, True, "row 0, token 3, vocabulary 7"),
            MeasureFound("tf", "oracle", "logits", math.inf, 2e-5, False, "shape (1, 2), expected (1, 3)"),
            MeasureFound("flax", "oracle", "loss", 0.0, None, True),
        ),
        (pair(), pair(b="pt", wrong=None), pair(b="flax", wrong=None, dtype="bfloat16")),
        (
            TextFound("pt", "flax", 0, 32, None, errors=tuple(1e-6 * (1 + i) for i in range(32))),
            TextFound("pt", "tf", 1, 8, 3, 0.01, 0.02, 0.03, True, _ERRORS),
            TextFound("flax", "tf", 2, 8, 0, 1.5, 0.9, 0.03, False),
        ),
        tuple(matrix),
        tuple(rungs),
        (
            PlantedMistake("pt", "rotary sign", True, "pt first differs in block 0, q_rotated", "q_rotated"),
            PlantedMistake("tf", "rotary sign", True, "tf first differs in block 0, q_rotated", "q_rotated"),
            PlantedMistake("pt", "epsilon 1.1e-5", False, "pt agrees", "ln_1"),
        ),
        (
            SmallestFound("pt", "float32", "one weight", 3e-5, "h.0.q", "q_proj[0, 3]"),
            SmallestFound("pt", "float32", "epsilon", math.inf),
        ),
    )  # fmt: skip


def holding() -> Findings:
    """A comparison of which everything holds, of measures alone."""
    measures = tuple(MeasureFound(b, "oracle", "logits", 1e-6, 2e-5, True, "row 0, token 0") for b in ("pt", "tf"))
    return Findings("holds", "pt and tf agree: all 2 measures within their limits", "tiny", measures=measures)


def hostile() -> Findings:
    """Every text of it is `HOSTILE`."""
    tap = TapFound(HOSTILE, 1.0, 0.5, False, True, 1.0, 0.5, HOSTILE)
    in_block = TapFound(f"h.0.{HOSTILE}", 1.0, 0.5, False, where=HOSTILE)
    h = HOSTILE
    return Findings(
        "differs", h, h, {"n_layer": h, h: h}, {h: {h: h}}, (h,), (MeasureFound(h, h, h, 1.0, 0.5, False, h),),
        (PairFound(h, h, (tap, in_block, TapFound("h.0.q", 0.0, 0.0, True, where=h)), h, h, h),),
        (TextFound(h, h, 0, 2, 1, errors=(1.0, 2.0)),), (MeasureFound(h, h, h, 1.0, 0.5, False, h),),
        (LadderRung(h, h, 1.0),), (PlantedMistake(h, h, False, h, h),),
        (SmallestFound(h, h, h, 1.0, h, h),),
    )  # fmt: skip


def huge() -> Findings:
    """A model of 28 blocks, six pairs: as many values as the 6B model's three backends in two dtypes give."""
    pairs = [
        pair(28, wrong=None if n else 9, b=b, dtype=dtype)
        for n, (b, dtype) in enumerate((b, d) for b in ("tf", "pt", "flax") for d in ("float32", "bfloat16"))
    ]
    return Findings("differs", pairs[0].headline, "gpt-j-6b", pairs=tuple(pairs), versions=VERSIONS)
