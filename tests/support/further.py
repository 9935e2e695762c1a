"""Mistakes that are none of `mutants.MUTANTS`: of the batch, the cache, the loss, dropout, adapters and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from workbench import CONFIG, LENGTH, Array, Planted, Workbench, batch

from gptj.config.labels import IGNORED_LABEL
from gptj.parity.losses import token_losses
from gptj.parity.oracle import Oracle

# ---- the forward pass


def _outside(x: Array, scale: Array, offset: Array, epsilon: float) -> Array:
    return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + epsilon) * scale + offset


def _one_pass(x: Array, scale: Array, offset: Array, epsilon: float) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = np.maximum((x * x).mean(-1, keepdims=True) - mean * mean, 0)
    return (x - mean) / np.sqrt(variance + np.float32(epsilon)) * scale + offset


def _twice(norm: Any, x: Any, attend: Any, feed: Any) -> Any:
    h = norm(x)
    return attend(h) + feed(h) + x + x


def _dropped(x: Array, rate: float = 0.1) -> Array:
    kept = np.random.Generator(np.random.Philox(3)).random(x.shape) >= rate
    return np.where(kept, x / np.float32(1 - rate), 0).astype(x.dtype)


def _softmax_dropped(scores: Array, seen: Array) -> Array:
    scores = np.where(seen, scores, np.finfo(scores.dtype).min)
    exponentials = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return _dropped(exponentials / np.maximum(exponentials.sum(-1, keepdims=True), 1e-30))


def _slots(positions: Array) -> Array:
    return np.broadcast_to(positions.min() + np.arange(positions.shape[-1]), positions.shape)


def _of_its_neighbour(x: Array) -> Array:
    x = x.copy()
    x[1] = x[0]
    return x


def _head_dropped(x: Array) -> Array:
    x = x.copy()
    x[:, 2] = 0
    return x


def _forgotten_scale(bench: Workbench) -> None:
    from gptj.adapters import AdapterConfig

    bench.patch.setattr(AdapterConfig, "scale", lambda *_: 1.0)


# ---- the loss


def _lost(bench: Workbench, measure: Callable[[Array, Array], float]) -> None:
    """Another loss: of the logits (b, t, v) and the labels of what follows each token (b, t)."""

    def change(_: Any, logits: Any, labels: Any) -> Any:
        values, following = bench.numpy(logits), bench.numpy(labels)
        values, following = values.reshape(-1, LENGTH, values.shape[-1]), following.reshape(-1, LENGTH)
        return bench.back(np.asarray(measure(values, following)), logits)

    bench.loss(change)


def _unshifted(logits: Array, following: Array) -> float:
    labels = np.concatenate([batch()["labels"][:, :1], following[:, :-1]], 1)
    return float(token_losses(logits, labels).sum() / (labels != IGNORED_LABEL).sum())


def _all_counted(logits: Array, following: Array) -> float:
    return float(token_losses(logits, following).sum() / following[:, :-1].size)


# ---- a step over a cache


def _cached(bench: Workbench, change: Callable[[Array, Array, int], None]) -> None:
    """Another past: `change` spoils the keys and values (b, h, s, d) in place, whose first so many are the past."""

    def update(k: Any, v: Any, right: Any) -> Any:
        keys, values = right(k, v)
        old = keys.shape[-2] - k.shape[-2]
        if not old:
            return keys, values
        spoilt = bench.numpy(keys).copy(), bench.numpy(values).copy()
        change(*spoilt, old)
        return bench.back(spoilt[0], keys), bench.back(spoilt[1], values)

    bench.cache(update)


def _late(keys: Array, values: Array, old: int) -> None:
    for part in (keys, values):
        part[..., 1:old, :] = part[..., : old - 1, :].copy()
        part[..., 0, :] = 0


def _turned_twice(keys: Array, values: Array, old: int) -> None:
    positions = batch()["position_ids"][:, :old]
    keys[..., :old, :] = Oracle(CONFIG, {}).rotate(keys[..., :old, :].astype(np.float64), positions)


def _slot_lost(keys: Array, values: Array, old: int) -> None:
    keys[1, :, 5] = 0


def _other_rows(keys: Array, values: Array, old: int) -> None:
    for part in (keys, values):
        part[..., :old, :] = np.roll(part[..., :old, :], 1, 0)


def _mask_of_step(bench: Workbench) -> None:
    def change(right: Any, mask: Any, slots: Any, length: int) -> Any:
        return right(mask, slots - 1 if bench.numpy(slots)[0] else slots, length)

    bench.mask(change)


# ---- gradients: the values stay as they are, bit by bit


def _without_slope(bench: Workbench, y: Any) -> Any:
    return bench.stop(y) + 0 * y


def _no_bias_slope(bench: Workbench) -> None:
    bench.linear(CONFIG.inner_width, lambda y, bias: y + (bench.stop(bias) - bias))


def _no_residual_slope(bench: Workbench) -> None:
    def change(norm: Any, x: Any, attend: Any, feed: Any) -> Any:
        h = norm(x)
        return attend(h) + feed(h) + bench.stop(x)

    bench.block(change)


def _no_slope_of_values(bench: Workbench) -> None:
    bench.cache(lambda k, v, right: right(k, _without_slope(bench, v)))


def _of_the_sum(bench: Workbench) -> None:
    """The loss is the mean, its slope the sum's: gradients that nobody divided by the count of the tokens."""
    count = 3 * (LENGTH - 1)

    def change(right: Any, logits: Any, labels: Any) -> Any:
        loss = right(logits, labels)
        return loss + (count - 1) * (loss - bench.stop(loss))

    bench.loss(change)


def _of_the_last_row(bench: Workbench) -> None:
    """As of gradients that were accumulated row by row, and overwritten."""

    def change(right: Any, logits: Any, labels: Any) -> Any:
        rows = np.zeros((3, LENGTH, 1), np.float32)
        rows[-1] = 1
        last = bench.back(rows.reshape(*logits.shape[:-1], 1), logits)
        return right(logits * last + bench.stop(logits) * (1 - last), labels)

    bench.loss(change)


FURTHER = (
    Planted("epsilon outside the root", "block 0, ln_1", "epsilon outside the root", lambda b: b.norm(_outside)),
    Planted("variance in one pass", "block 0, ln_1", "variance in one pass, as by Flax's fast variance",
            lambda b: b.norm(_one_pass), mean=3.0),
    Planted("residual added twice", "block 0, sum", "residual added twice", lambda b: b.block(_twice)),
    Planted("padding counted in the positions", "block 0, rotated q", "padding counted in the positions",
            lambda b: b.positions(_slots)),
    Planted("dropout of the embedding left on", "embedding", "dropout of 0.1 left on",
            lambda b: b.result(b.embedding_class, _dropped)),
    Planted("dropout of the attention left on", "block 0, weights", "dropout of 0.1 left on",
            lambda b: b.weights(_softmax_dropped)),
    Planted("one row of the batch computes its neighbour's heads", "block 0, q", "row 1 alone",
            lambda b: b.result(b.model.Attention, _of_its_neighbour, "_heads")),
    Planted("one head left out", "block 0, q", "head 2 alone",
            lambda b: b.result(b.model.Attention, _head_dropped, "_heads")),
    Planted("adapter's scale forgotten", "block 0, q", None, _forgotten_scale, adapter=True),
    Planted("loss: labels not shifted", "loss", "labels not shifted", lambda b: _lost(b, _unshifted)),
    Planted("loss: ignored labels counted in the mean", "loss", "ignored labels counted in the mean",
            lambda b: _lost(b, _all_counted), ignored=True),
    Planted("cache: the mask of the step hides the token itself", "block 0, visible", "mask hides the token itself",
            _mask_of_step, cached=True),
    Planted("cache: written one slot late", "block 0, scores", "cached keys one slot late",
            lambda b: _cached(b, _late), cached=True),
    Planted("cache: keys rotated twice", "block 0, scores", None, lambda b: _cached(b, _turned_twice), cached=True),
    Planted("cache: one slot of one row lost", "block 0, scores", "row 1, key 5 alone",
            lambda b: _cached(b, _slot_lost), cached=True),
    Planted("cache: rows of the batch in another order", "block 0, scores", None, lambda b: _cached(b, _other_rows),
            cached=True),
    Planted("gradient: of fc_in's bias forgotten", "h.1.mlp.fc_in.bias", "no gradient", _no_bias_slope, gradient=True),
    Planted("gradient: the embedding's forgotten", "wte.weight", "no gradient",
            lambda b: b.embedded(lambda y: _without_slope(b, y)), gradient=True),
    Planted("gradient: tied embeddings' from the head alone", "wte.weight", None,
            lambda b: b.embedded(lambda y: _without_slope(b, y)), gradient=True, tied=True),
    Planted("gradient: values hand on none", "h.1.attn.v_proj.weight", "no gradient", _no_slope_of_values,
            gradient=True),
    Planted("gradient: the residual hands on none", "h.0.mlp.fc_out.bias", None, _no_residual_slope, gradient=True),
    Planted("gradient: not divided by the count of tokens", "lm_head.bias", "a factor of 45", _of_the_sum,
            gradient=True),
    Planted("gradient: of the last row alone", "lm_head.bias", None, _of_the_last_row, gradient=True),
)  # fmt: skip
