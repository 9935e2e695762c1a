"""The oracle's backward pass: the gradient of the loss by every parameter, in plain NumPy, equation by equation.

Each step is the transpose of its own line in `Oracle.forward`, walked from the loss to the embedding over the values
that `Oracle.taps` kept. y = x W' + b gives dx = dy W, dW = dy' x, db = sum dy; a rotation is turned back; a softmax
w gives w (dw - sum(w dw)); a layer norm with normal n and deviation s gives (g - mean(g) - n mean(g n)) / s.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gptj.config.labels import IGNORED_LABEL
from gptj.config.rotary import rotate_pairs
from gptj.parity.oracle import Oracle, activation

__all__ = ["loss_gradients"]

Array = NDArray[Any]

_SLOPE_STEP = 1e-20
"""Of the complex step: an analytic function's slope is its imaginary part over the step, with no cancellation at all
(Squire and Trapp 1998, SIAM Review 40, 110)."""


def loss_gradients(
    oracle: Oracle,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    position_ids: ArrayLike | None = None,
    *,
    labels: ArrayLike,
) -> tuple[float, dict[str, Array]]:
    """The loss of a call, and its gradient by every parameter, by the schema's names.

    Args:
        oracle: of a language model, in float64.
        input_ids, attention_mask, position_ids, labels: see `Oracle.taps`.

    Raises:
        InputError: an argument breaks its rule.
    """
    return _Backward(oracle, input_ids, attention_mask, position_ids, labels).run()


class _Backward:
    """One call walked back."""

    def __init__(self, oracle: Oracle, ids: ArrayLike, mask: Any, positions: Any, labels: ArrayLike) -> None:
        self._oracle, self._config = oracle, oracle.config
        self._ids, self._labels = np.asarray(ids), np.asarray(labels)
        t = self._ids.shape[1]
        self._positions = np.broadcast_to(np.arange(t)[None] if positions is None else positions, self._ids.shape)
        self._taps = oracle.taps(ids, mask, positions, labels=labels)
        self._gradients: dict[str, Array] = {}

    def run(self) -> tuple[float, dict[str, Array]]:
        """The loss and the gradients, in the schema's order as far as one follows from the walk."""
        taps, config = self._taps, self._config
        logits = self._of_loss(taps["logits"])
        head = "transformer.wte" if config.tie_word_embeddings else "lm_head"
        self._add("lm_head.bias", logits.sum((0, 1)))
        self._add(f"{head}.weight", _outer(logits, taps["ln_f"]))
        stream = self._of_layer_norm("transformer.ln_f", self._entering(config.n_layer), logits @ self._read(head))
        for layer in reversed(range(config.n_layer)):
            stream = self._of_block(layer, stream)
        table = np.zeros((config.vocab_size, config.n_embd))
        np.add.at(table, self._ids, stream)
        self._add("transformer.wte.weight", table)
        return float(taps["loss"]), self._gradients

    def _entering(self, layer: int) -> Array:
        return self._taps[f"h.{layer - 1}.sum" if layer else "embedding"]

    def _read(self, name: str) -> Array:
        return self._oracle.read(f"{name}.weight")

    def _add(self, name: str, gradient: Array) -> None:
        before = self._gradients.get(name)
        self._gradients[name] = gradient if before is None else before + gradient

    def _of_loss(self, logits: Array) -> Array:
        """(softmax - one hot) over the number of labels that count, of each token but the last."""
        after = self._labels[:, 1:]
        counted = after != IGNORED_LABEL
        exponentials = np.exp(logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True))
        slope = exponentials / exponentials.sum(-1, keepdims=True)
        rows, tokens = np.nonzero(counted)
        slope[rows, tokens, after[rows, tokens]] -= 1
        gradient = np.zeros_like(logits)
        gradient[:, :-1] = slope * counted[..., None] / max(int(counted.sum()), 1)
        return gradient

    def _of_block(self, layer: int, stream: Array) -> Array:
        """The gradient of what enters a block, from that of what leaves it."""
        at, name = f"h.{layer}.", f"transformer.h.{layer}."
        normed = self._of_attention(at, f"{name}attn.", stream) + self._of_mlp(at, f"{name}mlp.", stream)
        return stream + self._of_layer_norm(f"{name}ln_1", self._entering(layer), normed)

    def _of_mlp(self, at: str, name: str, stream: Array) -> Array:
        inner = self._of_linear(f"{name}fc_out", self._taps[f"{at}activation"], stream, bias=True)
        slope = inner * _slope(self._config.activation_function, self._taps[f"{at}fc_in"])
        return self._of_linear(f"{name}fc_in", self._taps[f"{at}ln_1"], slope, bias=True)

    def _of_attention(self, at: str, name: str, stream: Array) -> Array:
        taps = {kind: self._taps[at + kind] for kind in ("weights", "v", "q_rotated", "k_rotated", "mixed", "ln_1")}
        mixed = self._oracle.split_heads(self._of_linear(f"{name}out_proj", taps["mixed"], stream))
        weights = mixed @ np.swapaxes(taps["v"], -1, -2)
        within = (taps["weights"] * weights).sum(-1, keepdims=True)
        scores = taps["weights"] * (weights - within) / math.sqrt(self._config.head_dim)
        slopes = {
            "q": self._turn_back(scores @ taps["k_rotated"]),
            "k": self._turn_back(np.swapaxes(scores, -1, -2) @ taps["q_rotated"]),
            "v": np.swapaxes(taps["weights"], -1, -2) @ mixed,
        }
        normed = np.zeros_like(stream)
        for kind, slope in slopes.items():
            merged = np.swapaxes(slope, 1, 2).reshape(stream.shape)
            normed = normed + self._of_linear(f"{name}{kind}_proj", taps["ln_1"], merged)
        return normed

    def _turn_back(self, x: Array) -> Array:
        """A rotation's transpose: by the same angles, the other way."""
        sin, cos = self._oracle.rotary(self._positions)
        return rotate_pairs(x, -sin, cos)

    def _of_linear(self, name: str, x: Array, slope: Array, *, bias: bool = False) -> Array:
        if bias:
            self._add(f"{name}.bias", slope.sum((0, 1)))
        self._add(f"{name}.weight", _outer(slope, x))
        back: Array = slope @ self._read(name)
        return back

    def _of_layer_norm(self, name: str, x: Array, slope: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred * centred).mean(-1, keepdims=True) + self._config.layer_norm_epsilon)
        normal = centred / deviation
        self._add(f"{name}.weight", (slope * normal).sum((0, 1)))
        self._add(f"{name}.bias", slope.sum((0, 1)))
        within = slope * self._read(name)
        mean, along = within.mean(-1, keepdims=True), (within * normal).mean(-1, keepdims=True)
        back: Array = (within - mean - normal * along) / deviation
        return back


def _outer(slope: Array, x: Array) -> Array:
    """The weight's gradient (outputs, inputs) of y = x W'."""
    product: Array = slope.reshape(-1, slope.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return product


def _slope(name: str, x: Array) -> Array:
    """The slope of an activation function at x."""
    if name == "relu":
        return (x > 0).astype(x.dtype)
    if name == "gelu":  # the error function takes no complex numbers
        normal = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        integral = np.array([math.erf(value / math.sqrt(2)) for value in x.flat]).reshape(x.shape)
        return 0.5 * (1 + integral) + x * normal
    if name in ("silu", "swish"):  # computed by |x| there, which takes no complex numbers either
        sigmoid = activation(name, x) / np.where(x == 0, 1, x)
        sigmoid = np.where(x == 0, 0.5, sigmoid)
        return sigmoid * (1 + x * (1 - sigmoid))
    slope: Array = activation(name, x + 1j * _SLOPE_STEP).imag / _SLOPE_STEP
    return slope
