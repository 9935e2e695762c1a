"""The matrix of invariances: ways of one backend to one answer, which must agree, and how far rounding may part them.

Judged with NumPy alone. What each limit is made of:

* **Logits** against the oracle: the oracle's own equations in float32 lie as far from float64 as rounding takes them;
  the largest of that, times the ratio of the units, times `SAFETY`. (A bound that is derived a token at a time,
  `gptj.parity.bounds.accumulate`, is a hundred times as wide, since it must hold without the weights.) Two ways of one
  backend lie each within that of the exact answer, so within twice that of each other.
* **Gradients**: the same for each parameter. Where a parameter's rounding happened to be small, the middle one of all
  parameters' stands for it.
* **An optimizer's step**: from the gradient that the backend itself gave, so a wrong gradient is no wrong step. The
  roundings are counted: `gptj.parity.steps.step_limit`.
* **int8**: against the oracle on the weights that the whole numbers and their scales stand for. What is left is that
  activations become whole numbers too, of 14 bits at least and a scale a row: `INT8`.
* **Parameters** that were saved, converted and loaded: nothing. They are equal, bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.parity.bounds import SAFETY, Rounding
from gptj.parity.findings import MeasureFound
from gptj.parity.oracle import Oracle
from gptj.parity.oracle_gradients import loss_gradients

__all__ = [
    "INT8",
    "ROWS",
    "Answer",
    "Reference",
    "judge",
    "quantised",
    "through",
]

Array = NDArray[Any]

ROWS: dict[str, str] = {
    "whole pass": "the logits of a batch, against the oracle's",
    "gradients": "of the loss by every parameter, against the oracle's",
    "step of SGD": "every parameter after it, against the definition",
    "step of AdamW": "every parameter after two, the second of a quarter of the gradient, against the definition",
    "cached": "a prefill and single steps over the cache, against the whole pass",
    "chunks": "the prompt in pieces over the cache, against the whole pass",
    "prepared": "prepared for inference, against the whole pass",
    "int8": "prepared in 8 bits, against the oracle on the weights that the 8 bits stand for",
    "compiled": "in one compiled program, against the whole pass",
    "batch of 8": "eight rows at once, against each alone",
    "padded left": "rows with padding before them, against the rows alone",
    "padded right": "rows with padding after them, against the rows alone",
    "embeddings": "with inputs_embeds, against the same as ids",
    "saved": "every parameter after save_pretrained and from_pretrained, against the one before",
}
"""Each row's name and meaning; beside them one for each file format, see `through`."""

INT8 = Rounding(2.0**-13, 2.0**-24, 2.0**-126)
"""The narrowest kernel has activations of -8,192 to 8,192, whose step is 2^-13 of a row's peak. Rounding to it has a
deviation of a 3.5th of it, and a row's peak is about 4 times its root mean square."""


def through(name: str) -> str:
    """The row of a file format."""
    return f"through {name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """An answer of a backend, and the right one.

    Attributes:
        what: logits, or a parameter's name.
        found, expected: of one shape.
        limit: of the absolute difference, broadcast to them.
        axes: a word for each axis.
    """

    what: str
    found: Array
    expected: Array
    limit: Array
    axes: tuple[str, ...] = ()


def judge(backend: str, row: str, answers: Iterable[Answer]) -> MeasureFound:
    """A row of the matrix: the answer that lies the farthest over, or the nearest to, its limit.

    What is not finite holds nowhere, nor does an answer of another shape, nor none at all.
    """
    worst: tuple[float, MeasureFound] | None = None
    for answer in answers:
        share, found = _judge_one(backend, row, answer)
        if worst is None or share > worst[0]:
            worst = share, found
    if worst is None:
        return MeasureFound(backend, row, "nothing was answered", None, None, False)
    return worst[1]


def _judge_one(backend: str, row: str, answer: Answer) -> tuple[float, MeasureFound]:
    """How much of its limit an answer takes, and its row."""
    if answer.found.shape != answer.expected.shape:
        where = f"shape {[*answer.found.shape]} in place of {[*answer.expected.shape]}"
        return np.inf, MeasureFound(backend, row, answer.what, None, None, False, where)
    if answer.found.size == 0:
        return np.inf, MeasureFound(backend, row, f"{answer.what}: no value", None, None, False)
    found, expected = (np.atleast_1d(x).astype(np.float64) for x in (answer.found, answer.expected))
    limit = np.broadcast_to(answer.limit, answer.found.shape).reshape(found.shape).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        difference = np.abs(found - expected)
        share = np.where(difference == 0, 0, difference / limit)
    share[~np.isfinite(difference) | ~np.isfinite(limit) | np.isnan(share)] = np.inf
    place = np.unravel_index(int(share.argmax()), share.shape)
    words = answer.axes or tuple(f"axis {axis}" for axis in range(answer.found.ndim))
    where = ", ".join(f"{word} {index}" for word, index in zip(words, place, strict=False))
    holds = bool(share[place] <= 1)
    row_found = MeasureFound(backend, row, answer.what, float(difference[place]), float(limit[place]), holds, where)
    return float(share[place]), row_found


# ---- what is expected, and how nearly


class Reference:
    """The answers of the oracle, and how far rounding takes a backend from them.

    Args:
        oracle: in float64, on the weights as the backend has them.
        dtype: what the backend computes in.
    """

    def __init__(self, oracle: Oracle, dtype: str) -> None:
        self.oracle, self.dtype = oracle, dtype
        self.rounding = Rounding.of(dtype)

    @property
    def config(self) -> GPTJConfig:
        """The model's."""
        return self.oracle.config

    def logits(
        self, ids: Any, mask: Any = None, positions: Any = None, *, rounding: Rounding | None = None
    ) -> tuple[Array, Array]:
        """The logits (b, t, v) of a call, and the limit of a difference from them, ()."""
        exact = self.oracle.forward(ids, mask, positions).logits
        single = self._single.forward(ids, mask, positions).logits
        assert exact is not None and single is not None
        rounding = rounding or self.rounding
        off = float(np.abs(single - exact).max())
        return exact, np.asarray(SAFETY * off * rounding.unit / _SINGLE.unit + rounding.smallest)

    @property
    def _single(self) -> Oracle:
        """The oracle in float32."""
        return Oracle(self.config, self.oracle._read, dtype="float32")

    def gradients(self, batch: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, float]]:
        """The gradient by every parameter, and the limit of a difference from each."""
        _, exact = loss_gradients(self.oracle, **batch)
        _, rounded = loss_gradients(self._single, **batch)
        peaks = {name: float(np.abs(slope).max()) for name, slope in exact.items()}
        shares = {name: float(np.abs(rounded[name] - slope).max()) / peaks[name] if peaks[name] else 0.0
                  for name, slope in exact.items()}  # fmt: skip
        usual = float(np.median([*shares.values()]))
        ratio = self.rounding.unit / _SINGLE.unit
        limits = {name: SAFETY * ratio * max(share, usual) * peaks[name] + self.rounding.smallest
                  for name, share in shares.items()}  # fmt: skip
        return exact, limits


_SINGLE = Rounding.of("float32")


def quantised(oracle: Oracle) -> Oracle:
    """The oracle on the weights that 8 bits stand for: a row's scale is its largest magnitude over 127.

    A block's two products into the stream are one matrix, whose rows have one scale each. Embeddings, layer norms and
    biases stay as they are.
    """
    read, config = oracle.read, oracle.config

    def scale(*parts: Array) -> Array:
        peak = np.max([np.abs(part).max(1, keepdims=True) for part in parts], 0).astype(np.float32)
        scales: Array = np.maximum(peak, np.finfo(np.float32).tiny) / np.float32(127)
        return scales

    def rounded(values: Array, scales: Array) -> Array:
        whole: Array = np.rint(values.astype(np.float32) / scales)
        return whole.astype(np.float64) * scales.astype(np.float64)

    def of_name(name: str) -> Array:
        if name == "lm_head.weight":
            head = read("transformer.wte.weight" if config.tie_word_embeddings else name)
            return rounded(head, scale(head))
        values = read(name)
        if name.endswith(("attn.out_proj.weight", "mlp.fc_out.weight")):
            block = name.rsplit(".", 3)[0]
            both = (read(f"{block}.attn.out_proj.weight"), read(f"{block}.mlp.fc_out.weight"))
            return rounded(values, scale(*both))
        is_matrix = values.ndim == 2 and name != "transformer.wte.weight"
        return rounded(values, scale(values)) if is_matrix else values

    return Oracle(config.replace(tie_word_embeddings=False), of_name)
