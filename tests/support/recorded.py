"""Taps of the oracle and its mutants, in float64 or float32, or rounded to 16 bits at every step: samples of traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mutants import Batch, Mutant
from numpy.typing import NDArray

from gptj import GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.parity.oracle import Oracle, causal_lm_loss, positions_of_mask
from gptj.parity.revealing import revealing_weights
from gptj.parity.trace import Trace, TraceFacts, open_trace, rotary_sha256, write_trace

Array = NDArray[Any]


class Recorder(Oracle):
    """Keeps every tap of a forward pass. Stands before a mutant in a class' bases."""

    rounded_to: str | None = None

    def keep(self, tap: str, values: Array) -> Array:
        """Note a tap, rounded where that is asked for, and compute on with what was noted."""
        if self.rounded_to is not None and values.dtype != bool:
            values = values.astype(numpy_dtype(self.rounded_to)).astype(self.dtype)
        self.taps[tap] = values
        return values

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.taps: dict[str, Array] = {}
        return super().forward(*arguments, **options)

    def embed(self, ids: Any) -> Array:
        return self.keep("embedding", super().embed(ids))

    def block(self, layer: int, x: Array, *arguments: Any) -> tuple[Array, Array]:
        self.at = f"h.{layer}."
        y, weights = super().block(layer, x, *arguments)
        return self.keep(f"{self.at}sum", y), weights

    def layer_norm(self, name: str, x: Array) -> Array:
        return self.keep(f"{self.at}ln_1" if name.endswith("ln_1") else "ln_f", super().layer_norm(name, x))

    def linear(self, name: str, x: Array, *, bias: bool = False) -> Array:
        kind = name.rpartition(".")[2]
        source = {"out_proj": "mixed", "fc_out": "activation"}.get(kind)
        if source is not None:
            x = self.keep(f"{self.at}{source}", x)
        y = super().linear(name, x, bias=bias)
        if kind in ("q_proj", "k_proj", "v_proj"):
            self.keep(f"{self.at}{kind[0]}", self.split_heads(y))
            return y if self.rounded_to is None else self.rounded(y)
        return self.keep(f"{self.at}{kind}", y)

    def rounded(self, values: Array) -> Array:
        assert self.rounded_to is not None
        return values.astype(numpy_dtype(self.rounded_to)).astype(self.dtype)

    def rotate(self, x: Array, positions: Array) -> Array:
        name = "k_rotated" if f"{self.at}q_rotated" in self.taps else "q_rotated"  # the oracle turns q first
        return self.keep(f"{self.at}{name}", super().rotate(x, positions))

    def scores(self, q: Array, k: Array) -> Array:
        return self.keep(f"{self.at}scores", super().scores(q, k))

    def attention_weights(self, scores: Array, visible: Array) -> Array:
        self.keep(f"{self.at}visible", np.broadcast_to(visible, (len(scores), 1, *scores.shape[2:])))
        return self.keep(f"{self.at}weights", super().attention_weights(scores, visible))

    def lm_head(self, hidden: Array) -> Array:
        return self.keep("logits", super().lm_head(hidden))


def small_batch(config: GPTJConfig, seed: int = 7, *, rows: int = 2, length: int = 9) -> Batch:
    """A whole row and one padded left, at far positions where the config has them."""
    ids = np.random.Generator(np.random.Philox(seed)).integers(0, config.vocab_size, (rows, length))
    mask = np.ones((rows, length), np.int64)
    mask[-1, :2] = 0
    return Batch(ids, mask, positions_of_mask(mask) + min(300, config.n_positions - length))


def recorded_taps(
    config: GPTJConfig, batch: Batch, dtype: str = "float64", *, seed: int = 0, mutant: Mutant | None = None,
    weights: dict[str, Array] | None = None,
) -> dict[str, Array]:  # fmt: skip
    """Every tap of the revealing weights, rounded to `dtype`, with the loss; 16 bits are rounded at every step."""
    narrow = dtype in ("bfloat16", "float16")
    wide = "float32" if narrow else dtype
    weights = revealing_weights(config, seed) if weights is None else weights
    held = {name: values.astype(numpy_dtype(dtype)).astype(wide) for name, values in weights.items()}
    planted = Oracle(config, held) if mutant is None else mutant.plant(config, held)
    bases = (Recorder,) if type(planted) is Oracle else (Recorder, type(planted))
    kind = type("Recorded", bases, {"rounded_to": dtype if narrow else None})
    oracle = kind(planted.config, planted._read, dtype=wide)
    oracle.forward(batch.input_ids, batch.attention_mask, batch.position_ids)
    taps = oracle.taps
    taps["loss"] = np.asarray(causal_lm_loss(taps["logits"], batch.input_ids), "float32" if narrow else wide)
    return {
        name: values if values.dtype == bool or name == "loss" else values.astype(numpy_dtype(dtype))
        for name, values in taps.items()
    }


def facts_of(config: GPTJConfig, dtype: str = "float64", source: str = "oracle") -> TraceFacts:
    """The facts of such a trace."""
    return TraceFacts(source, dtype, config, {"numpy": np.__version__}, rotary_sha256=rotary_sha256(config))


def inputs_of(batch: Batch) -> dict[str, Array]:
    """A batch as a trace stores it."""
    return {
        "input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids,
        "labels": batch.input_ids,
    }  # fmt: skip


def write_sample(
    path: Path, config: GPTJConfig, dtype: str = "float64", *, taps: dict[str, Array] | None = None,
    batch: Batch | None = None, extras: dict[str, Array] | None = None, **options: Any,
) -> Trace:  # fmt: skip
    """Write and open a trace of the oracle, or of other taps."""
    batch = small_batch(config) if batch is None else batch
    taps = recorded_taps(config, batch, dtype, **options) if taps is None else taps
    write_trace(path, taps, facts_of(config, dtype), inputs=inputs_of(batch), extras=extras or {})
    return open_trace(path)
