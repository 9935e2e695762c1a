"""The mistakes of `mutants.MUTANTS`, and more, planted in a wing: its functions or weights replaced."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from adapter_samples import KINDS, sample_pairs, write_sample_adapter
from further import FURTHER
from mutants import MUTANTS, Mutant, RotaryWithTable
from numpy.typing import NDArray
from workbench import CONFIG, LENGTH, PAST, Planted, Workbench, batch

from gptj import GPTJConfig
from gptj.adapters import AdapterConfig
from gptj.checkpoint import write_checkpoint
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import schema
from gptj.errors import InputError
from gptj.parity.differences import compare_traces, spell_tap
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.run import whole_weight
from gptj.parity.trace import TraceFacts, open_trace, write_trace
from gptj.parity.trace_record import record_trace

Array = NDArray[Any]

# ---- the mistakes


def _softmax(scores: Array, visible: Array, axis: int = -1) -> Array:
    scores = np.where(visible, scores, np.finfo(scores.dtype).min)
    exponentials = np.exp(scores - scores.max(axis, keepdims=True))
    return np.where(visible, exponentials / exponentials.sum(axis, keepdims=True), 0)


def _table_of(kind: type[RotaryWithTable]) -> Callable[[Array, Array, int], tuple[Array, Array]]:
    """The table of one of the oracle's mutants."""

    def change(sin: Array, cos: Array, width: int) -> tuple[Array, Array]:
        mutant = kind(CONFIG, {})
        found = mutant.rotary(np.arange(len(sin))[None])
        return found[0][0, 0], found[1][0, 0]

    return change


def _rounded(x: Array, dtype: str) -> Array:
    return x.astype(numpy_dtype(dtype)).astype(x.dtype)


def _half_split(right: Callable[[Array], Array], x: Array, _: int) -> Array:
    width = CONFIG.rotary_width
    order = np.concatenate([np.arange(width).reshape(2, -1).T.reshape(-1), np.arange(width, x.shape[-1])])
    return right(x[..., order])[..., np.argsort(order)]


def _late(positions: Array) -> Array:
    return np.arange(positions.shape[-1]) >= LENGTH // 2


def _serial(norm: Any, x: Any, attend: Any, feed: Any) -> Any:
    x = x + attend(norm(x))
    return x + feed(norm(x))


def _unfed(norm: Any, x: Any, attend: Any, feed: Any) -> Any:
    h = norm(x)
    out, _ = attend(h), feed(h)
    return out + x


def _parallel(mlp_reads_x: bool = False, residual: Callable[[Any, Any], Any] = lambda x, h: x) -> Any:
    def change(norm: Any, x: Any, attend: Any, feed: Any) -> Any:
        h = norm(x)
        attended = attend(h)
        y = attended + feed(x if mlp_reads_x else h)
        kept = residual(x, h)
        return y if kept is None else y + kept

    return change


def _no_mean(x: Array, scale: Array, offset: Array, epsilon: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale + offset


def _unbiased(x: Array, scale: Array, offset: Array, epsilon: float) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True, ddof=1) + epsilon) * scale + offset


def _evenly(scores: Array, visible: Array) -> Array:
    return np.where(visible.any(-1, keepdims=True), _softmax(scores, visible), 1 / scores.shape[-1])


def _of_tensorflow(scores: Array, visible: Array) -> Array:
    causal = np.tril(np.ones(visible.shape[-2:], bool))
    keys = visible[:, :, -1:, :]
    added = np.where(causal, 0, -1e9) + np.where(keys, 0, -1e4)
    return _softmax((scores + added).astype(scores.dtype), np.ones_like(visible))


def _quick(bench: Workbench) -> None:
    silu = bench.model.ACTIVATIONS["silu"]
    bench.patch.setitem(bench.model.ACTIVATIONS, CONFIG.activation_function, lambda x: silu(x * 1.702) / 1.702)


def _interleaved(x: Array) -> Array:
    b, h, t, d = x.shape
    return np.swapaxes(x, 1, 2).reshape(b, t, d, h).transpose(0, 3, 1, 2)


def _embedding(bench: Workbench) -> None:
    bench.result(bench.embedding_class, lambda x: x * np.float32(CONFIG.n_embd**0.5))


_COMPUTED: dict[str, tuple[str, str | None, Callable[[Workbench], None]]] = {
    "rotary sign": ("block 0, rotated q", "rotary sign", lambda b: b.table(lambda sin, cos, _: (-sin, cos))),
    "rotary half split": ("block 0, rotated q", "rotary half split", lambda b: b.rotation(_half_split)),
    "rotary last dimensions": (
        "block 0, rotated q", "rotary last dimensions",
        lambda b: b.rotation(lambda right, x, _: right(x[..., ::-1])[..., ::-1]),
    ),
    "rotary only queries": (
        "block 0, rotated k", "rotary none", lambda b: b.rotation(lambda right, x, n: x if n % 2 else right(x)),
    ),
    "rotary none": ("block 0, rotated q", "rotary none", lambda b: b.rotation(lambda right, x, _: x)),
    "step position off by one": (
        "block 0, rotated q", "step position off by one", lambda b: b.positions(lambda at: at + _late(at)),
    ),
    "step position restarts": (
        "block 0, rotated q", "step position restarts", lambda b: b.positions(lambda at: at - LENGTH // 2 * _late(at)),
    ),
    "no scale": ("block 0, scores", "no scale", lambda b: b.scale(lambda d: 1.0)),
    "scale of model width": (
        "block 0, scores", "scale of model width", lambda b: b.scale(lambda d: (d * CONFIG.n_head) ** 0.5),
    ),
    "serial residual": ("block 0, fc_in", "serial residual", lambda b: b.block(_serial)),
    "mlp reads the stream": ("block 0, fc_in", "MLP reads the stream", lambda b: b.block(_parallel(True))),
    "no residual": ("block 0, sum", "no residual", lambda b: b.block(_parallel(residual=lambda x, h: None))),
    "no final norm": ("ln_f", "no norm", lambda b: b.norm(lambda x, *_: x, last=True)),
    "norm without mean": ("block 0, ln_1", "norm without mean", lambda b: b.norm(_no_mean)),
    "norm unbiased variance": ("block 0, ln_1", "norm unbiased variance", lambda b: b.norm(_unbiased)),
    "mask shows the next token": (
        "block 0, visible", "mask shows the next token",
        lambda b: b.mask(lambda right, mask, slots, length: right(mask, slots + 1, length)),
    ),
    "mask hides the token itself": (
        "block 0, visible", "mask hides the token itself",
        lambda b: b.mask(lambda right, mask, slots, length: right(mask, slots - 1, length)),
    ),
    "mask shows the future": (
        "block 0, visible", "mask shows the future",
        lambda b: b.mask(lambda right, mask, slots, length: right(mask, slots + length, length)),
    ),
    "mask shows padding": (
        "block 0, visible", "mask shows padding",
        lambda b: b.mask(lambda right, mask, slots, length: right(None, slots, length)),
    ),
    "mask of queries": (
        "block 0, visible", "mask of queries",
        lambda b: b.mask(
            lambda right, mask, slots, length: right(None, slots, length) & (mask == 1)[:, None, :, None]
        ),
    ),
    "mask too weak": (
        "block 0, weights", "mask too weak",
        lambda b: b.weights(lambda scores, seen: _softmax(np.where(seen, scores, scores - 10), np.ones_like(seen))),
    ),
    "masked row attends evenly": ("block 0, weights", "masked row attends evenly", lambda b: b.weights(_evenly)),
    "softmax over queries": (
        "block 0, weights", "softmax over queries", lambda b: b.weights(lambda s, seen: _softmax(s, seen, -2)),
    ),
    "heads interleaved": (
        "block 0, q", "heads interleaved", lambda b: b.result(b.model.Attention, _interleaved, "_heads"),
    ),
    "embedding scaled": ("embedding", "embedding scaled", _embedding),
    "quick gelu": ("block 0, activation", "activation quick gelu", _quick),
}  # fmt: skip

_TABLES = {
    "rotary base": "rotary base 1,000", "rotary exponent of head": "rotary exponent of head",
    "rotary table bfloat16": "rotary table bfloat16", "rotary table float16": "rotary table float16",
    "rotary positions bfloat16": "rotary positions bfloat16",
}  # fmt: skip

_READ = {
    "rotary of the whole head": ("config: rotary_dim", None), "heads of another width": ("config: n_head", None),
    "a layer too few": ("config: n_layer", None), "epsilon 1e-6": ("block 0, ln_1", "epsilon 1e-06"),
    "epsilon 1e-12": ("block 0, ln_1", "epsilon 1e-12"), "exact GELU": ("block 0, activation", "exact GELU"),
    ".ln_1.bias dropped": ("block 0, ln_1", "offset dropped"),
    ".fc_in.bias dropped": ("block 0, fc_in", "bias dropped"),
    ".fc_out.bias dropped": ("block 0, fc_out", "bias dropped"), ".ln_f.bias dropped": ("ln_f", "offset dropped"),
    "lm_head.bias dropped": ("logits", "bias dropped"), ".ln_1.weight left at 1": ("block 0, ln_1", "scale left at 1"),
    ".ln_f.weight left at 1": ("ln_f", "scale left at 1"), ".q_proj.weight transposed": ("block 0, q", "transposed"),
    ".k_proj.weight transposed": ("block 0, k", "transposed"),
    ".v_proj.weight transposed": ("block 0, v", "transposed"),
    ".out_proj.weight transposed": ("block 0, out_proj", "transposed"),
    "k and v swapped": ("block 0, k", "k and v swapped"), "q and k swapped": ("block 0, q", "q and k swapped"),
    "layers in lexicographic order": ("block 2, ln_1", "layers in lexicographic order"),
    "fc_out bias from one shard of two": ("block 0, fc_out", "bias from one shard of two"),
    "fc_out bias added once a shard": ("block 0, fc_out", "bias added once a shard"),
    "ln_1 scale as the mean of two shards": ("block 0, ln_1", "scale as the mean of two shards"),
    "ln_1 offset as the mean of two shards": ("block 0, ln_1", "offset as the mean of two shards"),
    "ln_f scale as the sum of two shards": ("ln_f", "scale as the sum of two shards"),
    "lm_head tied": ("logits", "lm_head tied"),
}  # fmt: skip


def _made_in_bfloat16(sin: Array, cos: Array, width: int) -> tuple[Array, Array]:
    """PyTorch's own way under a default dtype of bfloat16, without PyTorch."""
    frequency = _rounded(
        1 / _rounded(_rounded(np.asarray(1e4), "bfloat16") ** _rounded(np.arange(0, width, 2) / width, "bfloat16"),
                     "bfloat16"), "bfloat16")  # fmt: skip
    angle = (np.arange(len(sin), dtype=np.float32)[:, None] * frequency.astype(np.float32)).astype(float)
    return _rounded(np.sin(angle), "bfloat16"), _rounded(np.cos(angle), "bfloat16")


def _next_blocks(weights: dict[str, Array]) -> dict[str, Array]:
    changed = dict(weights)
    for name, value in weights.items():
        if name.startswith("transformer.h."):
            layer = int(name.split(".")[2])
            changed[name.replace(f".h.{layer}.", f".h.{(layer - 1) % CONFIG.n_layer}.")] = value
    return changed


def _one_row(weights: dict[str, Array]) -> dict[str, Array]:
    name = "transformer.h.1.mlp.fc_out.weight"
    changed = weights[name].copy()
    changed[5] *= 1.01
    return {**weights, name: changed}


def _reads(name: str, change: Callable[[dict[str, Array]], dict[str, Array]]) -> Mutant:
    return Mutant(name, lambda config, weights: Oracle(config, change(weights)))


def _double_slope_of_rotation(bench: Workbench) -> None:
    def make(right: Any) -> Any:
        def rotate(x: Any, sin: Any, cos: Any) -> Any:
            y = right(x, sin, cos)
            return 2 * y - bench.stop(y)

        return rotate

    bench.replace(bench.model, "rotate_pairs", make)


def _activation_with(change: Callable[[Workbench, Any, Any], Any]) -> Callable[[Workbench], None]:
    """Another slope of the activation: `change` of x and of its value, equal to the value."""

    def plant(bench: Workbench) -> None:
        right = bench.model.ACTIVATIONS[CONFIG.activation_function]
        changed = lambda x: change(bench, x, right(x))  # noqa: E731
        bench.patch.setitem(bench.model.ACTIVATIONS, CONFIG.activation_function, changed)

    return plant


_MORE = (
    Planted("rotary table of transformers 4.28 to 4.57 in bfloat16", "block 0, rotated q",
            "rotary table made in bfloat16, as by transformers 4.28 to 4.57", lambda b: b.table(_made_in_bfloat16)),
    Planted("additive -1e4 padding", "block 0, weights", "additive -1e4 padding", lambda b: b.weights(_of_tensorflow)),
    Planted("softmax in bfloat16", "block 0, weights", "computed in bfloat16",
            lambda b: b.weights(lambda s, seen: _rounded(_softmax(s, seen), "bfloat16"))),
    Planted("scale applied twice", "block 0, scores", "scale applied twice", lambda b: b.scale(lambda d: float(d))),
    Planted("residual of ln_1", "block 0, sum", "residual of ln_1",
            lambda b: b.block(_parallel(residual=lambda x, h: h))),
    Planted("feed-forward left out", "block 0, sum", "feed-forward left out of the sum",
            lambda b: b.block(_unfed)),
    Planted("position one too high", "block 0, rotated q", "position off by one",
            lambda b: b.positions(lambda at: np.minimum(at + 1, CONFIG.n_positions - 1))),
    Planted("every block reads the next one's weights", "block 0, ln_1", "weights of the next block",
            mutant=_reads("next", _next_blocks)),
    Planted("one row of one weight off by 1%", "block 1, fc_out", "row 5 alone of its weight",
            mutant=_reads("row", _one_row)),
    Planted("lm_head's bias twice", "logits", "another bias", mutant=_reads(
        "twice", lambda weights: {**weights, "lm_head.bias": 2 * weights["lm_head.bias"]})),
    Planted("cache: keys of another rotation", "block 0, scores", None,
            lambda b: b.cache(_other_rotation(b)), cached=True),
    Planted("cache: the step counts from 0", "block 0, rotated q", f"positions off by -{PAST}",
            lambda b: b.positions(lambda at: at - PAST * (at.shape[-1] < LENGTH - PAST + 1)), cached=True),
    Planted("cache: values of the step not kept", "block 0, mixed", None, lambda b: b.cache(_no_new_values(b)),
            cached=True),
    Planted("gradient: the rotation's slope is doubled", "h.1.attn.k_proj.weight", "a factor of 2",
            _double_slope_of_rotation, gradient=True),
    Planted("gradient: the activation's slope is 1", "h.1.mlp.fc_in.bias", None,
            _activation_with(lambda b, x, y: x + b.stop(y - x)), gradient=True),
    Planted("gradient: the activation's slope is doubled", "h.1.mlp.fc_in.bias", "a factor of 2",
            _activation_with(lambda b, x, y: 2 * y - b.stop(y)), gradient=True),
)  # fmt: skip


def _other_rotation(bench: Workbench) -> Callable[..., Any]:
    """The past's keys with their pairs in another order, as a cache that holds another rotation's keys would."""

    def change(k: Any, v: Any, right: Any) -> Any:
        keys, values = right(k, v)
        old = keys.shape[-2] - k.shape[-2]
        if old:
            wrong = bench.numpy(keys).copy()
            wrong[..., :old, : CONFIG.rotary_width] = wrong[..., :old, : CONFIG.rotary_width][..., ::-1]
            keys = bench.back(wrong, keys)
        return keys, values

    return change


def _no_new_values(bench: Workbench) -> Callable[..., Any]:
    def change(k: Any, v: Any, right: Any) -> Any:
        keys, values = right(k, v)
        old = values.shape[-2] - v.shape[-2]
        if old:
            wrong = bench.numpy(values).copy()
            wrong[..., old:, :] = 0
            values = bench.back(wrong, values)
        return keys, values

    return change


def _list() -> Iterator[Planted]:
    for mutant in MUTANTS:
        if mutant.name in _COMPUTED:
            where, like, plant = _COMPUTED[mutant.name]
            yield Planted(mutant.name, where, like, plant)
        elif mutant.name in _TABLES:
            kind: Any = mutant.plant
            yield Planted(mutant.name, "block 0, rotated q", _TABLES[mutant.name],
                          lambda b, kind=kind: b.table(_table_of(kind)))  # fmt: skip
        else:
            where, like = _READ[mutant.name]
            yield Planted(mutant.name, where, like, mutant=mutant)
    yield from _MORE
    yield from FURTHER


LAYERS = {"layers in lexicographic order": 11, "a layer too few": 3}
PLANTED: tuple[Planted, ...] = tuple(_list())


# ---- planting and recording


def headline(planted: Planted, name: str, folder: Path, patch: Any) -> tuple[str, str | None, str]:
    """The place and the signature that a comparison of a wing with a mistake and the oracle names, and its sentence."""
    config = revealing_config(n_layer=LAYERS.get(planted.name, CONFIG.n_layer), tie_word_embeddings=planted.tied)
    weights = dict(revealing_weights(config))
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"] + np.float32(planted.mean)
    bench, given = Workbench(name, patch), batch(ignored=planted.ignored)
    pairs = sample_pairs(AdapterConfig(**KINDS["all"]), config) if planted.adapter else {}
    adapter = write_sample_adapter(folder / "adapter", config=config) if planted.adapter else None
    wrong_config, wrong_weights = config, weights
    if planted.mutant is not None:
        oracle = planted.mutant.plant(config, weights)
        wrong_config = oracle.config
        wrong_weights = {spec.name: np.asarray(oracle._read(spec.name)) for spec in schema(wrong_config)}
    write_checkpoint(folder / "model", wrong_config, lambda spec: wrong_weights[spec.name])
    if planted.plant is not None:
        planted.plant(bench)
    if planted.gradient:
        return _gradient_headline(bench, folder, config, weights, given)
    _record(bench, folder, wrong_config, given, cached=planted.cached, adapter=adapter)
    oracle = Oracle(config, weights, adapter=pairs)
    _record_oracle(folder, oracle, given, cached=planted.cached)
    try:
        found = compare_traces(
            [open_trace(folder / "oracle"), open_trace(folder / name)],
            lambda name, dtype: whole_weight(oracle, name).astype(numpy_dtype(dtype)),
        )
    except InputError as error:
        return str(error.where), None, str(error)
    pair = found.pairs[0]
    return ("nowhere" if pair.first is None else spell_tap(pair.first.tap)), pair.looks_like, pair.headline


def _gradient_headline(
    bench: Workbench, folder: Path, config: GPTJConfig, weights: dict[str, Array], given: dict[str, Array]
) -> tuple[str, str | None, str]:
    """The first parameter, backwards, whose gradient is wrong, and what is said of it."""
    with contextlib.ExitStack() as stack:
        if bench.name == "flax":
            import jax

            stack.enter_context(jax.disable_jit())
        record_trace(folder / "model", bench.name, folder / bench.name, batch=given, gradients=True)
    _record_oracle(folder, Oracle(config, weights), given, cached=False)
    found = compare_traces(
        [open_trace(folder / "oracle"), open_trace(folder / bench.name)],
        lambda name, dtype: weights[name].astype(numpy_dtype(dtype)),
    )
    assert all(pair.first is None for pair in found.pairs), [*found.lines()]  # forward it is right
    [first, *_] = [line for line in found.lines() if ": the gradient of " in line]
    name = first.partition("the gradient of ")[2].partition(" ")[0].removeprefix("transformer.")
    like = first.partition("; looks like: ")[2] or None
    return name, like, re.sub(r"; \[[^;]*", "", first.partition(": ")[2]).replace("; looks like: ", ": ")


def shorten(sentence: str) -> str:
    """A headline without the traces' names and the place within the tap."""
    start = re.sub(r"^\w+ first differs from oracle in ", "", sentence)
    return re.sub(r"; row [^;]*", "", start).replace("; looks like: ", ": ")


def _record(
    bench: Workbench, folder: Path, config: GPTJConfig, given: dict[str, Array], *, cached: bool, adapter: Path | None
) -> None:
    """The wing's trace, of a step over a cache where that is asked for."""
    with _no_compilation(bench.name):
        model = bench.wing.GPTJForCausalLM.from_pretrained(folder / "model")
        if adapter is not None:
            model.load_adapter(adapter)
        if cached:
            before = {name: value[:, :PAST] for name, value in given.items() if name != "labels"}
            past = model(**before, use_cache=True).past_key_values
            given = _step(given)
            found = model.taps(**given, past_key_values=past)
        else:
            found = model.taps(**given)
        taps = {name: np.asarray(bench.wing.to_numpy(value)) for name, value in found.items()}
    write_trace(folder / bench.name, taps, TraceFacts(bench.name, "float32", config), inputs=given)


def _step(given: dict[str, Array]) -> dict[str, Array]:
    """The arguments of the step after the cache."""
    return {name: value if name == "attention_mask" else value[:, PAST:] for name, value in given.items()}


def _record_oracle(folder: Path, oracle: Oracle, given: dict[str, Array], *, cached: bool) -> None:
    taps = oracle.taps(**given)
    if cached:
        taps = {name: value[..., PAST:, :] if value.ndim else value for name, value in taps.items()}
        taps.pop("loss")
        given = _step(given)
    write_trace(folder / "oracle", taps, TraceFacts("oracle", "float64", oracle.config), inputs=given)


@contextlib.contextmanager
def _no_compilation(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if name == "flax":
            import jax

            stack.enter_context(jax.disable_jit())
        if name == "pt":
            import torch

            stack.enter_context(torch.no_grad())
        yield
