"""Every known mistake is told from every other by the trace alone, and what is none of them is not named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mutants import revealing_batch
from recorded import facts_of, inputs_of, recorded_taps

from gptj.dtypes import numpy_dtype
from gptj.parity.mistaken import MistakenOperation
from gptj.parity.mutants import MISTAKES, mistakes_at
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.signatures import find_signature
from gptj.parity.trace import open_trace, write_trace
from gptj.taps import IN_BLOCK

CONFIG = revealing_config(n_layer=2)
WEIGHTS = revealing_weights(CONFIG)
BATCH = revealing_batch(CONFIG)
LENGTH = BATCH.input_ids.shape[1]

ALIKE = {
    "layers in lexicographic order": None, "activation gelu_new": None, "activation gelu_pytorch_tanh": None,
    "activation gelu_fast": None, "epsilon 1e-05": None, "rotary positions float16": None,
}  # fmt: skip
"""Of this config no mistakes."""


def read(name, dtype):
    return WEIGHTS[name].astype(numpy_dtype(dtype))


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("signatures") / "right"
    write_trace(path, recorded_taps(CONFIG, BATCH, "float32"), facts_of(CONFIG, "float32"), inputs=inputs_of(BATCH))
    return path


def planted(right: Path, path: Path, tap: str, values):
    """The right trace with one tap changed."""
    trace = open_trace(right)
    taps = {name: trace.read(name) for name in trace.places}
    taps[tap] = np.broadcast_to(values, taps[tap].shape).astype(taps[tap].dtype)
    write_trace(path, taps, facts_of(CONFIG, "float32"), inputs=inputs_of(BATCH))
    return open_trace(path)


def taps_of(inner: str) -> str:
    return inner if inner in ("embedding", "ln_f", "logits") else f"h.1.{inner}"


@pytest.mark.parametrize(
    ("mistake", "inner"),
    [(mistake, inner) for mistake in MISTAKES if mistake.name not in ALIKE for inner in mistake.taps],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_mistake_is_named_and_no_other(right, tmp_path, mistake, inner):
    tap = taps_of(inner)
    operation = MistakenOperation(open_trace(right), tap, read)
    with np.errstate(all="ignore"):
        values = mistake.expect(operation, slice(0, LENGTH)).value
    assert signature(planted(right, tmp_path / "wrong", tap, values), tap) == mistake.name


def signature(trace, tap):
    return find_signature(trace, tap, read, lambda trace, tap: iter([slice(0, 10), slice(10, LENGTH)]))


def bfloat16(x):
    return x.astype(numpy_dtype("bfloat16")).astype(np.float32)


def one_row(x):
    changed = x.copy()
    changed[..., 7] *= 1.01
    return changed


FITTED = [
    ("h.1.scores", lambda x: x * 1.25, "a factor of 1.25"),
    ("h.1.weights", bfloat16, "computed in bfloat16"),
    ("h.1.activation", bfloat16, "computed in bfloat16"),
    ("h.1.fc_in", one_row, "row 7 alone of its weight"),
    ("h.1.fc_in", lambda x: x + np.linspace(0, 1, x.shape[-1]), "another bias"),
    ("h.0.ln_1", lambda x: x + np.linspace(0, 1, x.shape[-1]), "another bias"),
]


@pytest.mark.parametrize(("tap", "change", "name"), FITTED)
def test_a_mistake_with_a_number_of_its_own_is_named_with_it(right, tmp_path, tap, change, name):
    values = change(open_trace(right).read(tap))
    assert signature(planted(right, tmp_path / "wrong", tap, values), tap) == name


@pytest.mark.parametrize(("tap", "change", "name"), [
    ("h.1.ln_1", lambda op: op.normed(slice(None), epsilon=3e-4), "epsilon 0.0003"),
    ("h.1.q_rotated", lambda op: op.rotated(slice(None), positions=op.given("position_ids") + 3),
     "positions off by +3"),
    ("h.1.k_rotated", lambda op: op.rotated(slice(None), positions=op.given("position_ids")[:, ::-1]),
     "other positions"),
])  # fmt: skip
def test_an_epsilon_and_positions_are_fitted(right, tmp_path, tap, change, name):
    values = change(MistakenOperation(open_trace(right), tap, read)).value
    assert signature(planted(right, tmp_path / "wrong", tap, values), tap).startswith(name)


def test_scores_that_were_recorded_after_the_mask_are_told_so(right, tmp_path):
    trace = open_trace(right)
    values = np.where(trace.read("h.1.visible"), trace.read("h.1.scores"), np.finfo(np.float32).min)
    wrong = planted(right, tmp_path / "wrong", "h.1.scores", values)
    assert signature(wrong, "h.1.scores") == "recorded after the mask"


def test_a_variance_in_one_pass_is_told_from_an_epsilon(right, tmp_path):
    """Where the mean is large: elsewhere one pass loses nothing, and is not called a mistake."""
    trace = open_trace(right)
    taps = {name: trace.read(name) for name in trace.places}
    stream = (taps["h.0.sum"] + np.float32(3)).astype(np.float32)
    mean = stream.mean(-1, keepdims=True)
    variance = (stream * stream).mean(-1, keepdims=True) - mean * mean
    scale, offset = (WEIGHTS[f"transformer.h.1.ln_1.{kind}"] for kind in ("weight", "bias"))
    taps["h.0.sum"] = stream
    taps["h.1.ln_1"] = ((stream - mean) / np.sqrt(variance + np.float32(1e-5)) * scale + offset).astype(np.float32)
    write_trace(tmp_path / "wrong", taps, facts_of(CONFIG, "float32"), inputs=inputs_of(BATCH))
    assert signature(open_trace(tmp_path / "wrong"), "h.1.ln_1") == "variance in one pass, as by Flax's fast variance"


@pytest.mark.parametrize("inner", ["embedding", *(tap.name for tap in IN_BLOCK), "ln_f", "logits"])
def test_an_error_that_is_no_known_mistake_is_not_named(right, tmp_path, inner):
    tap = taps_of(inner)
    values = open_trace(right).read(tap)
    noise = np.random.Generator(np.random.Philox(3)).normal(size=values.shape)
    wrong = values ^ (noise > 1) if values.dtype == bool else values + 1e-3 * noise * np.abs(values).max()
    assert signature(planted(right, tmp_path / "wrong", tap, wrong), tap) is None


@pytest.mark.parametrize("inner", ["q_rotated", "ln_1", "activation", "weights"])
def test_a_known_mistake_with_another_on_top_is_not_named(right, tmp_path, inner):
    """A name must explain all of the difference, not the most of it."""
    tap, mistake = taps_of(inner), mistakes_at(inner)[0]
    values = mistake.expect(MistakenOperation(open_trace(right), tap, read), slice(0, LENGTH)).value.copy()
    values[0, ..., 3, 1] += 1e-2
    assert signature(planted(right, tmp_path / "wrong", tap, values), tap) is None
