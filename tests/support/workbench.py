"""A wing whose functions are replaced for a while: where mistakes are planted, written once for all three.

What is put in place of a wing's function is computed in NumPy, so each mistake is written once for all three. Flax runs
without `jax.jit`, which would remember the right function.
"""

from __future__ import annotations

import dataclasses
import importlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from mutants import Mutant
from numpy.typing import NDArray

from gptj.config.labels import IGNORED_LABEL
from gptj.parity.oracle import positions_of_mask
from gptj.parity.revealing import revealing_config

Array = NDArray[Any]

CONFIG = revealing_config(n_layer=2)
LENGTH = 16


def batch(*, ignored: bool = False) -> dict[str, Array]:
    """Three rows: whole, padded left, and padded right, at far positions; two labels are ignored where asked for."""
    ids = np.random.Generator(np.random.Philox(7)).integers(0, CONFIG.vocab_size - 2, (3, LENGTH))
    mask = np.ones((3, LENGTH), np.int64)
    mask[1, :4] = 0
    mask[2, -5:] = 0
    positions = 1_900 + positions_of_mask(mask)
    labels = ids.copy()
    labels[0, 5:7] = IGNORED_LABEL if ignored else labels[0, 5:7]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


PAST = 8
"""Tokens in the cache where a mistake is one of a cached step."""


@dataclasses.dataclass(frozen=True)
class Planted:
    """A mistake in a wing.

    Attributes:
        name: of the mistake.
        where: block and operation that must be named, "block 0, rotated q"; or the config's field that is refused.
        looks_like: the signature that must be named, None where the trace cannot tell.
        plant: replaces a wing's functions; None where the weights or the config are other ones.
        mutant: makes other weights or another config.
        cached: whether it is seen in a cached step alone.
        gradient: whether it is seen in gradients alone; `where` is then the parameter that shows it first, backwards.
        tied: whether the model's head is its embedding.
        mean: of the stream, which is added to the embedding of the right model too.
        ignored: whether two labels are ignored.
        adapter: whether an adapter is at work.
    """

    name: str
    where: str
    looks_like: str | None
    plant: Callable[[Workbench], None] | None = None
    mutant: Mutant | None = None
    cached: bool = False
    gradient: bool = False
    tied: bool = False
    mean: float = 0.0
    ignored: bool = False
    adapter: bool = False


class Workbench:
    """A wing whose functions are replaced for a while.

    Args:
        name: of the wing.
        patch: pytest's `MonkeyPatch`, which undoes it.
    """

    def __init__(self, name: str, patch: Any) -> None:
        self.name, self.patch = name, patch
        self.wing = importlib.import_module(f"gptj.{name}")
        self.model, self.layers, self.arguments = (
            importlib.import_module(f"gptj.{name}.{part}") for part in ("model", "layers", "arguments")
        )
        self.heads = importlib.import_module(f"gptj.{name}.heads")
        self.call = {"pt": "forward", "tf": "call", "flax": "__call__"}[name]

    def numpy(self, x: Any) -> Array:
        """The framework's array in NumPy."""
        return np.asarray(self.wing.to_numpy(x))

    def back(self, x: Array, like: Any) -> Any:
        """A NumPy array as the framework's, in the dtype of another."""
        if self.name == "pt":
            import torch

            return torch.tensor(np.ascontiguousarray(x)).reshape(np.shape(x)).to(like.dtype)
        if self.name == "tf":
            import tensorflow as tf

            return tf.cast(tf.constant(x), like.dtype)
        import jax.numpy as jnp

        return jnp.asarray(x).astype(like.dtype)

    def stop(self, x: Any) -> Any:
        """The same value, which hands no gradient on."""
        if self.name == "pt":
            return x.detach()
        if self.name == "tf":
            import tensorflow as tf

            return tf.stop_gradient(x)
        import jax

        return jax.lax.stop_gradient(x)

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Put `make(original)` in place of a function or method."""
        self.patch.setattr(owner, name, make(getattr(owner, name)))

    def method(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """The same of a module's method, which Flax wants to know of."""
        made = make(getattr(owner, name))
        if self.name == "flax":
            from flax.linen.module import wrap_method_once

            made = wrap_method_once(made)
        self.patch.setattr(owner, name, made)

    # ---- places

    def table(self, change: Callable[[Array, Array, int], tuple[Array, Array]]) -> None:
        """Another rotary table: `change` of sines, cosines and the width."""

        def make(original: Any) -> Any:
            return lambda n, width, dtype="float32": tuple(
                np.ascontiguousarray(part).astype(dtype) for part in change(*original(n, width, "float64"), width)
            )

        self.replace(self.layers, "rotary_table", make)

    def rotation(self, change: Callable[[Callable[[Array], Array], Array, int], Array]) -> None:
        """Another rotation: `change` of the right one (a function of x), of x, and of how often it was called."""
        calls = [0]

        def make(original: Any) -> Any:
            def rotate(x: Any, sin: Any, cos: Any) -> Any:
                calls[0] += 1

                def right(values: Array) -> Array:
                    return self.numpy(original(self.back(values, x), sin, cos))

                return self.back(change(right, self.numpy(x), calls[0] - 1), x)

            return rotate

        self.replace(self.model, "rotate_pairs", make)

    def positions(self, change: Callable[[Array], Array]) -> None:
        """Other positions in the table's call."""

        def make(original: Any) -> Any:
            def look_up(table: Any, positions: Any) -> Any:
                return original(table, self.back(change(self.numpy(positions)), positions))

            return look_up

        self.replace(self.layers.RotaryTable, "__call__", make)

    def scale(self, factor: Callable[[Array], float]) -> None:
        """Another root."""
        self.patch.setattr(self.model, "math", types.SimpleNamespace(sqrt=factor))

    def mask(self, change: Callable[[Callable[..., Any], Any, Any, int], Any]) -> None:
        """Another mask: `change` of the right function and its arguments."""
        owner = self.arguments if self.name == "pt" else self.model
        self.replace(
            owner, "causal_mask", lambda original: lambda mask, slots, length: change(original, mask, slots, length)
        )

    def weights(self, change: Callable[[Array, Array], Array]) -> None:
        """Other attention weights: `change` of scores and what is visible, both (b, h, t, s)."""

        def make(_: Any) -> Any:
            def attend(attention: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any, taps: Any = None) -> Any:
                taps = rest[-1] if taps is None else taps
                queries, keys, values = map(self.numpy, (q, k, v))
                scores = queries @ np.swapaxes(keys, -1, -2) / np.float32(np.sqrt(queries.shape[-1]))
                visible = np.broadcast_to(self.numpy(mask), (len(scores), 1, *scores.shape[2:]))
                found = self.back(change(scores, np.broadcast_to(visible, scores.shape)).astype(values.dtype), v)
                taps(scores=self.back(scores, v), visible=self.back(visible, mask), weights=found)
                return self.back(self.numpy(found) @ values, v), found

            return attend

        self.replace(self.model.Attention, "_attend", make)

    def block(self, change: Callable[[Any, Any, Callable[[Any], Any], Callable[[Any], Any]], Any]) -> None:
        """Another sum: `change` of the block, x, the attention and the feed-forward as functions of their input."""

        def put(block: Any, x: Any, taps: Any, attention: Callable[[Any], Any], feed: Callable[[Any], Any]) -> Any:
            kept: list[Any] = []

            def attend(h: Any) -> Any:
                out, weights = attention(h)
                kept.append(weights)
                return out

            def norm(values: Any) -> Any:
                found = block.ln_1(values)
                if not kept and taps is not None:
                    taps(ln_1=found)
                return found

            y = change(norm, x, attend, feed)
            if taps is not None:
                taps(sum=y)
            return y, kept[0]

        def run(block: Any, x: Any, *arguments: Any, taps: Any = None) -> Any:
            train = (arguments[-1],) if self.name == "flax" else ()
            return put(block, x, taps, lambda h: block.attn(h, *arguments, taps=taps),
                       lambda h: block.mlp(h, *train, taps=taps))  # fmt: skip

        def run_in_keras(
            block: Any, x: Any, rotation: Any, attention_mask: Any, update_cache: Any, head_mask: Any, seeds: Any,
            taps: Any = None,
        ) -> Any:  # fmt: skip
            def attention(h: Any) -> Any:
                return block.attn(h, rotation=rotation, attention_mask=attention_mask, update_cache=update_cache,
                                  head_mask=head_mask, seeds=None, taps=taps)  # fmt: skip

            return put(block, x, taps, attention, lambda h: block.mlp(h, seed=None, taps=taps))

        self.method(self.model.Block, self.call, lambda _: run_in_keras if self.name == "tf" else run)

    def norm(self, change: Callable[[Array, Array, Array, float], Array | None], *, last: bool = False) -> None:
        """Another layer norm: `change` of x, scale, offset and epsilon; None leaves it. `last`: of ln_f alone."""
        owner: Any = self.layers.LayerNorm if self.name != "pt" else importlib.import_module("torch").nn.LayerNorm
        calls = [0]

        def make(original: Any) -> Any:
            def normalise(module: Any, x: Any) -> Any:
                right = original(module, x)
                calls[0] += 1
                if last and calls[0] <= CONFIG.n_layer:
                    return right
                if self.name == "flax":
                    scale, offset = (module.get_variable("params", kind) for kind in ("weight", "bias"))
                else:
                    scale, offset = module.weight, module.bias
                epsilon = module.eps if self.name == "pt" else module.epsilon
                return self.back(change(*map(self.numpy, (x, scale, offset)), epsilon), x)

            return normalise

        self.method(owner, self.call, make)

    def result(self, owner: Any, change: Callable[[Array], Array], name: str | None = None) -> None:
        """Another result of a module's call, or of a method by its name."""

        def make(original: Any) -> Any:
            def run(module: Any, *arguments: Any) -> Any:
                right = original(module, *arguments)
                return self.back(change(self.numpy(right)), right)

            return run

        (self.replace if name else self.method)(owner, name or self.call, make)

    def cache(self, change: Callable[[Any, Any, Callable[[Any, Any], Any], Array], Any]) -> None:
        """Another cache: `change` of new keys and values, the right update, and the keys before the rotation."""

        def make(original: Any) -> Any:
            def update_of(builder: Any, layer: int, use_cache: bool) -> Any:
                right = original(builder, layer, use_cache)
                return lambda k, v: change(k, v, right)

            return update_of

        self.replace(self.model.CacheBuilder, "update_of", make)

    def loss(self, change: Callable[[Callable[[Any, Any], Any], Any, Any], Any]) -> None:
        """Another loss: `change` of the right function, the logits and the labels of what follows each token."""
        self.replace(self.heads, "cross_entropy", lambda right: lambda logits, labels: change(right, logits, labels))

    def linear(self, width: int, change: Callable[[Any, Any], Any]) -> None:
        """Another result of the products of so many outputs: `change` of the right one and of the bias."""
        owner = importlib.import_module("gptj.pt.kernels").Linear if self.name == "pt" else self.layers.Linear

        def make(original: Any) -> Any:
            def run(module: Any, *arguments: Any, **options: Any) -> Any:
                y = original(module, *arguments, **options)
                if y.shape[-1] != width:
                    return y
                return change(y, module.get_variable("params", "bias") if self.name == "flax" else module.bias)

            return run

        self.method(owner, self.call, make)

    @property
    def embedding_class(self) -> Any:
        """Whose call is the embedding."""
        return self.layers.Embedding if self.name != "pt" else importlib.import_module("torch").nn.Embedding

    def embedded(self, change: Callable[[Any], Any]) -> None:
        """Another result of the embedding, of the framework's own arrays."""
        self.method(
            self.embedding_class, self.call, lambda original: lambda module, *ids: change(original(module, *ids))
        )
