"""Rounding alone stays within its bounds, and ten times a bound does not pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from mutants import Batch
from numpy.typing import NDArray
from recorded import facts_of, inputs_of, recorded_taps, small_batch, write_sample

from gptj import GPTJConfig
from gptj.calls.taps import list_taps
from gptj.config.dtypes import numpy_dtype
from gptj.parity import bounds
from gptj.parity.bounds import Rounding, TokenSizes, accumulate
from gptj.parity.differences import compare_traces
from gptj.parity.operations import OperationOf
from gptj.parity.oracle import Oracle, activation, causal_lm_loss
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.trace import open_trace, write_trace

Array = NDArray[Any]
DTYPES = ("float32", "bfloat16", "float16")
DRAWS = 200


@dataclasses.dataclass(frozen=True)
class Draw:
    """A random model, batch and dtype, with weights already rounded to it, so that both traces are of one model."""

    config: Any
    weights: dict[str, Array]
    batch: Batch
    dtype: str

    def read(self, name: str, dtype: str) -> Array:
        return self.weights[name].astype(numpy_dtype(dtype))


def draw(number: int) -> Draw:
    random = np.random.Generator(np.random.Philox(number))
    heads, width = int(random.choice([1, 2, 4])), int(random.choice([4, 8, 16]))
    config = revealing_config(
        n_head=heads, n_embd=heads * width, rotary_dim=int(random.choice([2, 4])),
        n_inner=int(random.choice([8, 40, 130])), n_layer=int(random.choice([1, 2, 4])),
        vocab_size=int(random.choice([11, 216])), n_positions=512, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, activation_function=str(random.choice(["gelu_new", "gelu", "relu", "silu", "tanh"])),
    )  # fmt: skip
    dtype, loud = DTYPES[number % 3], np.float32(random.choice([0.3, 1, 3]))
    weights = {
        name: (values if "ln_" in name else values * loud).astype(numpy_dtype(dtype)).astype(np.float32)
        for name, values in revealing_weights(config, number).items()
    }
    batch = small_batch(config, number, rows=int(random.integers(1, 4)), length=int(random.integers(3, 16)))
    return Draw(config, weights, batch, dtype)


def traces_of(one: Draw, folder):
    base = write_sample(folder / "base", one.config, batch=one.batch, weights=one.weights)
    other = write_sample(folder / "other", one.config, one.dtype, batch=one.batch, weights=one.weights)
    return base, other


@pytest.mark.parametrize("first", range(0, DRAWS, 40))
def test_rounding_alone_raises_no_alarm(tmp_path, first):
    for number in range(first, first + 40):
        one = draw(number)
        found = compare_traces(traces_of(one, tmp_path), one.read)
        assert found.passed, (number, one.dtype, *found.lines())


@pytest.mark.parametrize("number", range(6))
def test_ten_times_its_bound_is_caught_at_its_tap_and_place(tmp_path, number):
    one = draw(number)
    base, other = traces_of(one, tmp_path)
    random = np.random.Generator(np.random.Philox(number))
    within = compare_traces([base, other], one.read)
    bound_of = {tap.tap: tap.bound for tap in within.pairs[0].taps}
    clean = recorded_taps(one.config, one.batch, one.dtype, weights=one.weights)
    for tap in ("embedding", "h.0.ln_1", "h.0.k", "h.0.q_rotated", "h.0.scores", "h.0.activation", "h.0.sum", "logits"):
        taps = {name: values.copy() for name, values in clean.items()}
        place = tuple(int(random.integers(size)) for size in taps[tap].shape)
        tap_axes = other.places[tap].axes
        largest = max(bound_of[tap], _token_bound(base, other, tap))
        wide = taps[tap].astype(np.float32)
        wide[place] += np.float32(10 * largest)
        taps[tap] = wide.astype(taps[tap].dtype)
        write_trace(tmp_path / "planted", taps, facts_of(one.config, one.dtype), inputs=inputs_of(one.batch))
        found = compare_traces([base, open_trace(tmp_path / "planted")], one.read)
        first = found.pairs[0].first
        assert first is not None and first.tap == tap, (tap, *found.lines())
        numbers = [int(word.split()[1]) for word in first.where.split(", ")]
        assert numbers == [index for index, axis in zip(place, tap_axes, strict=True) if axis != "1"], first.where


def _token_bound(base, other, tap: str) -> float:
    """The largest bound of any token of a tap."""
    sizes = {
        name: bounds.TokenSizes.of(np.asarray(base.read(name), np.float64), place.axes)
        for name, place in base.places.items()
    }
    dtypes = ("float64",), (other.facts.dtype, "float32")
    return sum(
        float(bounds.accumulate(sizes, base.facts.config, Rounding.of(*names), keys=base.sizes["s"])[tap].max())
        for names in dtypes
    )


PARAMETER_FREE = ("q_rotated", "k_rotated", "scores", "visible", "weights", "mixed", "activation", "sum", "loss")
WITH_WEIGHTS = ("embedding", "ln_1", "q", "v", "out_proj", "fc_in", "fc_out", "ln_f", "logits")


@pytest.mark.parametrize("inner", PARAMETER_FREE + WITH_WEIGHTS)
@pytest.mark.parametrize("number", range(3))
def test_ten_times_an_operations_own_bound_is_born_there(tmp_path, inner, number):
    one = draw(number)
    clean = recorded_taps(one.config, one.batch, one.dtype, weights=one.weights)
    tap = inner if inner in clean else f"h.0.{inner}"
    _, other = traces_of(one, tmp_path)
    expected = OperationOf(other, tap, one.read).expect(slice(0, other.sizes["t"]))
    share = np.abs(np.asarray(clean[tap], np.float64) - expected.value) / np.maximum(expected.bound, 1e-300)
    assert share.max() <= 1
    taps = {name: values.copy() for name, values in clean.items()}
    bound, shape = np.broadcast_to(expected.bound, clean[tap].shape), clean[tap].shape
    place = np.unravel_index(int(bound.argmax()), shape)
    if inner == "visible":
        taps[tap][place] = not taps[tap][place]
    else:
        moved = np.float64(taps[tap][place]) + 11 * max(float(bound[place]), 1e-6)
        taps[tap][place] = moved
    write_trace(tmp_path / "planted", taps, facts_of(one.config, one.dtype), inputs=inputs_of(one.batch))
    planted = open_trace(tmp_path / "planted")
    found = compare_traces([other, planted], one.read)
    assert tap in [own.tap for own in found.born["planted"]]
    assert found.born["other"] == ()
    assert not found.passed


@pytest.mark.parametrize("number", range(200))
def test_each_operation_in_float32_stays_within_its_bound(number):
    random = np.random.Generator(np.random.Philox(number))
    length = int(random.choice([1, 3, 64, 700]))
    loud = float(random.choice([1e-3, 1, 30]))
    single = Rounding.of("float32")

    def values(*shape: int) -> Array:
        return (loud * random.standard_normal(shape)).astype(np.float32)

    def wide(x: Array) -> Array:
        return x.astype(np.float64)

    a, b = values(5, length), values(length, 7)
    exact = wide(a) @ wide(b)
    assert (
        np.abs((a @ b) - exact) <= bounds.rounding_of_product(np.abs(wide(a)) @ np.abs(wide(b)), length, single)
    ).all()

    oracle = {dtype: Oracle(revealing_config(), {}, dtype=dtype) for dtype in ("float32", "float64")}
    x, positions = values(2, 4, 6, 12), random.integers(0, 2056, (2, 6))
    turned = [oracle[str(y.dtype)].rotate(y, positions) for y in (x, wide(x))]
    tables = oracle["float64"].rotary(positions)
    assert (np.abs(turned[0] - turned[1]) <= bounds.rounding_of_rotation(wide(x), *tables, single)).all()

    scores, visible = values(2, 3, 6, length), random.random((2, 1, 6, length)) < 0.7
    weights = [oracle[str(y.dtype)].attention_weights(y, visible) for y in (scores, wide(scores))]
    limit = bounds.rounding_of_softmax(wide(scores), np.broadcast_to(visible, scores.shape), weights[1], single)
    assert (np.abs(weights[0] - weights[1]) <= limit).all()

    for name in ("gelu_new", "gelu", "gelu_fast", "relu", "silu", "tanh"):
        limit = bounds.rounding_of_activation(name, wide(a), single)
        assert (np.abs(activation(name, a) - activation(name, wide(a))) <= limit).all(), name

    model = {f"ln.{kind}": values(length) for kind in ("weight", "bias")}
    mean = np.float32(random.choice([0, 100]))
    normal = [Oracle(revealing_config(), model, dtype=y.dtype).layer_norm("ln", y) for y in (a + mean, wide(a + mean))]
    limit = bounds.rounding_of_layer_norm(wide(a + mean), *map(wide, model.values()), 1e-5, single)
    assert (np.abs(normal[0] - normal[1]) <= limit).all()

    logits, labels = values(2, 6, max(2, length)), random.integers(0, 2, (2, 6))
    loss = [causal_lm_loss(y, labels) for y in (logits, wide(logits))]
    limit = bounds.rounding_of_loss(float(np.abs(logits).max()), loss[1], 10, max(2, length), single)
    assert abs(loss[0] - loss[1]) <= limit


def test_a_layer_norm_may_go_on_with_a_sum_that_was_not_rounded():
    """Where a channel is small, the mean of what the others were rounded by is more than its own rounding."""
    rng, half = np.random.default_rng(0), Rounding.of("bfloat16")
    parts = rng.normal(0, 1, (3, 1, 400, 192))
    parts[..., 5] *= 1e-3
    x = parts.sum(0)
    recorded = x.astype(numpy_dtype("bfloat16")).astype(np.float64)
    one, zero = np.ones(192), np.zeros(192)
    of = Oracle(revealing_config(), {"ln.weight": one, "ln.bias": zero}).layer_norm
    limit = bounds.rounding_of_layer_norm(recorded, one, zero, 1e-5, half, parts=np.abs(parts).sum(0))
    off = np.abs(of("ln", x) - of("ln", recorded))
    assert (off <= limit).all()
    assert (off[..., 5] > half.unit * 2 * (np.abs(recorded) + np.abs(parts).sum(0))[..., 5]).any()  # its own is less


def test_a_variance_in_one_pass_leaves_its_bound():
    """E[x^2] - E[x]^2 loses its digits where the mean is large: a known mistake, not rounding."""
    random = np.random.Generator(np.random.Philox(1))
    x = (random.standard_normal((4, 64)) + 1000).astype(np.float32)
    variance = (x * x).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2
    wrong = (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + np.float32(1e-5))
    one, zero = np.ones(64), np.zeros(64)
    right = Oracle(revealing_config(), {"ln.weight": one, "ln.bias": zero}).layer_norm("ln", x.astype(np.float64))
    limit = bounds.rounding_of_layer_norm(x.astype(np.float64), one, zero, 1e-5, Rounding.of("float32"))
    assert (np.abs(wrong - right) > limit).any()


def test_the_unit_is_the_coarsest_dtypes():
    assert Rounding.of("float64").unit == 2.0**-53
    assert Rounding.of("float16", "float32").unit == 2.0**-11
    assert Rounding.of("bfloat16").summing == 2.0**-24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bound_of_a_deep_model_reaches_its_value(dtype):
    config = GPTJConfig(n_layer=28, n_embd=64, n_head=4, rotary_dim=8, vocab_size=64, n_positions=64)
    one = np.ones((1, 3))
    sizes = {tap: TokenSizes(one, 4 * one, one) for tap in list_taps(28) if tap != "loss"}
    sizes |= {tap: TokenSizes(5 * one, 20 * one, 5 * one) for tap in sizes if tap.endswith(".scores")}
    bounds = accumulate(sizes, config, Rounding.of(dtype), keys=3)
    assert (2 * bounds["logits"] < 4).all() and (2 * bounds["h.27.sum"] < 4).all()
    assert (bounds["h.0.sum"] <= bounds["h.27.sum"]).all() and (bounds["h.0.sum"] > 0).all()
