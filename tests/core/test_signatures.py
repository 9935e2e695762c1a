"""Every known mistake is told from every other by the trace alone, and what is none of them is not named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mutants import revealing_batch
from recorded import facts_of, inputs_of, recorded_taps

from gptj.calls.taps import IN_BLOCK
from gptj.config.dtypes import numpy_dtype
from gptj.parity.differences import compare_traces
from gptj.parity.mistaken import MistakenOperation
from gptj.parity.mutants import MISTAKES, mistakes_at
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.signatures import find_signature
from gptj.parity.spread import Spread
from gptj.parity.trace import open_trace, write_trace

CONFIG = revealing_config(n_layer=2)
WEIGHTS = revealing_weights(CONFIG)
BATCH = revealing_batch(CONFIG)
LENGTH = BATCH.input_ids.shape[1]

ALIKE = {
    "layers in lexicographic order": None, "ignored labels counted in the mean": None,
    "activation gelu_new": None, "activation gelu_pytorch_tanh": None,
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
    return inner if inner in ("embedding", "ln_f", "logits", "loss") else f"h.1.{inner}"


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


def normed(right, path, variance_of, *, first=0):
    """A layer norm of a stream whose mean is large, with another variance from one token on.

    `variance_of` is given the stream, and its mean and variance in two passes, all float32.
    """
    trace = open_trace(right)
    taps = {name: trace.read(name) for name in trace.places}
    stream = (taps["h.0.sum"] + np.float32(3)).astype(np.float32)
    mean = stream.mean(-1, keepdims=True)
    two = ((stream - mean) ** 2).mean(-1, keepdims=True)
    variance = np.where(np.arange(LENGTH)[:, None] >= first, variance_of(stream, mean, two), two).astype(np.float32)
    scale, offset = (WEIGHTS[f"transformer.h.1.ln_1.{kind}"] for kind in ("weight", "bias"))
    taps["h.0.sum"] = stream
    taps["h.1.ln_1"] = ((stream - mean) / np.sqrt(variance + np.float32(1e-5)) * scale + offset).astype(np.float32)
    write_trace(path, taps, facts_of(CONFIG, "float32"), inputs=inputs_of(BATCH))
    return signature(open_trace(path), "h.1.ln_1")


def one_pass(stream, mean, two):
    return (stream * stream).mean(-1, keepdims=True) - mean * mean


FAST = "variance in one pass, as by Flax's fast variance"


@pytest.mark.parametrize("first", [0, 12], ids=["everywhere", "in the second slice"])
def test_a_variance_in_one_pass_is_told_from_an_epsilon(right, tmp_path, first):
    """Where the mean is large: elsewhere one pass loses nothing, and is not called a mistake."""
    assert normed(right, tmp_path / "wrong", one_pass, first=first) == FAST


@pytest.mark.parametrize(("variance_of", "name"), [
    (lambda stream, mean, two: two * np.float32(1.01), "variance times 1.01"),
    (lambda stream, mean, two: two * (1 + 0.05 * np.sign(np.sin(1e3 * stream[..., :1]))), None),
    (lambda stream, mean, two: one_pass(stream, mean, two) * np.where(np.arange(LENGTH) == 20, 1.2, 1)[:, None], None),
], ids=["a multiple", "a factor of each token's own", "one pass, and one token of the second slice wrong"])  # fmt: skip
def test_another_wrong_variance_is_not_called_one_pass(right, tmp_path, variance_of, name):
    assert normed(right, tmp_path / "wrong", variance_of) == name


def at(**places):
    """Adds to the values at an index of each named axis alone."""
    axes = {"row": -4, "head": -3, "token": -2, "last": -1}

    def change(x):
        changed, index = x.copy(), [slice(None)] * x.ndim
        for name, place in places.items():
            index[max(axes[name] + x.ndim, 0) if x.ndim == 4 or name != "row" else 0] = place
        kept = changed[tuple(index)]
        noise = np.random.Generator(np.random.Philox(5)).normal(size=kept.shape)
        changed[tuple(index)] = kept + (0.1 * np.abs(x).max() * (0.5 + np.abs(noise))).astype(x.dtype)
        return changed

    return change


ALONE = [
    ("h.1.q", at(row=0), "row 0 alone"),
    ("h.1.q", at(row=1), "row 1 alone"),  # one of four that are padded
    ("h.1.scores", at(row=4, last=3), "row 4, key 3 alone"),
    ("h.1.scores", at(last=23), "key 23 alone"),
    ("h.1.k_rotated", at(token=17), "token 17 alone"),
    ("h.1.k_rotated", at(head=2), "head 2 alone"),
    ("h.1.v", at(head=2, token=5), "head 2, token 5 alone"),
    ("h.1.mixed", at(last=40), "channel 40 alone"),
    ("h.1.fc_out", at(last=40), "channel 40 alone"),  # of another weight, or none: no row of one explains it
    ("h.1.fc_in", at(last=40), "channel 40 alone"),
    ("logits", at(token=9), "token 9 alone"),
    ("logits", at(token=9, last=3), "token 9, vocabulary 3 alone"),
    ("h.1.sum", at(row=2, token=9), "row 2, token 9 alone"),
]


@pytest.mark.parametrize(("tap", "change", "name"), ALONE, ids=[f"{tap}: {name}" for tap, _, name in ALONE])
def test_one_row_token_head_channel_or_key_alone_is_called_that(right, tmp_path, tap, change, name):
    values = change(open_trace(right).read(tap))
    assert signature(planted(right, tmp_path / "wrong", tap, values), tap) == name


@pytest.mark.parametrize(("tap", "changes"), [
    ("h.1.q", [at(row=0), at(row=2, head=1, token=3, last=2)]),  # and one value of another row
    ("h.1.q", [at(row=0), at(row=2)]),
    ("h.1.k_rotated", [at(token=17), at(token=3)]),
    ("h.1.q", [at(row=0, head=1, token=3, last=2)]),  # of one value nothing can be said
    ("h.1.q", [at(row=0, token=3, last=slice(0, 2)), at(row=0, token=5, last=4)]),  # here and there in one row
    ("loss", [lambda x: x * 1.07]),  # any one number is a multiple of another
], ids=["a value of another row", "two rows", "two tokens", "one value", "here and there in a row", "one number"],
)  # fmt: skip
def test_what_is_wrong_elsewhere_too_is_not_called_alone(right, tmp_path, tap, changes):
    values = open_trace(right).read(tap)
    for change in changes:
        values = change(values)
    assert signature(planted(right, tmp_path / "wrong", tap, values), tap) is None


def test_the_only_row_with_padding_is_said_to_be_padded():
    spread = Spread("btm", (3, 4, 2))
    wrong = np.zeros((3, 4, 2), bool)
    wrong[1] = True
    spread.add(wrong[:, :2], 0)
    spread.add(wrong[:, 2:], 2)
    mask = np.ones((3, 4), int)
    assert spread.spell() == spread.spell(mask) == "row 1 alone"
    mask[1, 0] = 0
    assert spread.spell(mask) == "row 1 alone, which is padded"
    mask[2, 0] = 0
    assert spread.spell(mask) == "row 1 alone"


@pytest.mark.parametrize(("tap", "weight", "row"), [
    ("h.1.q", "transformer.h.1.attn.q_proj.weight", 30),  # of 48 weights, told from 120 tokens
    ("h.1.fc_in", "transformer.h.1.mlp.fc_in.weight", 130),
    ("logits", "lm_head.weight", 3),
])  # fmt: skip
def test_another_row_of_a_weight_is_told_where_there_are_tokens_enough(right, tmp_path, tap, weight, row):
    op = MistakenOperation(open_trace(right), tap, read)
    changed = WEIGHTS[weight].copy()
    changed[row] = np.random.Generator(np.random.Philox(5)).normal(size=changed.shape[1])
    values = op.multiplied(slice(0, LENGTH), weight=changed).value
    assert signature(planted(right, tmp_path / "wrong", tap, values), tap) == f"row {row} alone of its weight"


@pytest.mark.parametrize(("kind", "name"), [
    ("weight", "row 7 alone of its weight"), ("bias", "another bias, in row 7 alone"),
])  # fmt: skip
def test_one_scale_or_offset_of_a_layer_norm_is_told(right, tmp_path, kind, name):
    op = MistakenOperation(open_trace(right), "ln_f", read)
    values = op.normed(slice(None), **{kind: lambda x: np.where(np.arange(48) == 7, x * 1.5 + 0.25, x)}).value
    assert signature(planted(right, tmp_path / "wrong", "ln_f", values), "ln_f") == name


def test_one_row_of_the_embedding_is_told_by_its_token(right, tmp_path):
    ids = inputs_of(BATCH)["input_ids"]
    found, counts = np.unique(ids, return_counts=True)
    token = int(found[counts.argmax()])
    values = open_trace(right).read("embedding")
    values = np.where((ids == token)[..., None], values[..., ::-1], values)
    name = f"row {token} alone of its weight"
    assert counts.max() >= 2 and signature(planted(right, tmp_path / "a", "embedding", values), "embedding") == name
    row, place = np.argwhere(ids == token)[0]
    values[row, place] += 1  # not alike wherever it stands
    assert signature(planted(right, tmp_path / "b", "embedding", values), "embedding") is None


@pytest.mark.parametrize("tap", ["embedding", "h.1.out_proj", "h.1.fc_out"])
def test_dropout_is_told_from_what_it_drops_and_makes_up_for(right, tmp_path, tap):
    values = open_trace(right).read(tap)
    kept = np.random.Generator(np.random.Philox(5)).random(values.shape) >= 0.2
    dropped = np.where(kept, values / np.float32(0.8), 0)
    assert signature(planted(right, tmp_path / "a", tap, dropped), tap) == "dropout of 0.2 left on"
    assert signature(planted(right, tmp_path / "b", tap, np.where(kept, values, 0)), tap) is None  # nothing makes up


def test_of_tokens_that_are_all_the_same_no_bias_is_told(right, tmp_path):
    trace = open_trace(right)
    taps = {name: trace.read(name) for name in trace.places}
    taps["h.1.ln_1"][:] = taps["h.1.ln_1"][0, 0]
    same = MistakenOperation(planted(right, tmp_path / "same", "h.1.ln_1", taps["h.1.ln_1"]), "h.1.fc_in", read)
    taps["h.1.fc_in"] = (same.expect(slice(0, LENGTH)).value * np.linspace(1, 2, 136)).astype(np.float32)
    write_trace(tmp_path / "wrong", taps, facts_of(CONFIG, "float32"), inputs=inputs_of(BATCH))
    assert signature(open_trace(tmp_path / "wrong"), "h.1.fc_in") is None


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


def stepped_pair(right, folder, spoil):
    """Two traces of a step over a cache of 16, of which the other's scores and what follows are spoilt."""
    trace = open_trace(right)
    given = {name: values if name == "attention_mask" else values[:, 16:] for name, values in inputs_of(BATCH).items()}
    taps = {name: trace.read(name)[..., 16:, :] for name in trace.places if name != "loss"}
    scores = taps["h.0.scores"].copy()
    spoil(scores)
    for name, change in (("base", {}), ("other", {"h.0.scores": scores})):
        write_trace(folder / name, taps | change, facts_of(CONFIG, "float32"), inputs=given)
    [pair] = compare_traces([open_trace(folder / name) for name in ("base", "other")], read).pairs
    assert pair.first.tap == "h.0.scores" and all(origin.verdict == "cannot be told" for origin in pair.origins)
    return pair


def slot_late(scores):
    scores[..., 1:16] = scores[..., :15].copy()
    scores[..., 0] = 0


def slot_early(scores):
    scores[..., :15] = scores[..., 1:16].copy()
    scores[..., 15] = 0


def one_slot(scores):
    scores[2, ..., 5] += 1


def one_value(scores):
    scores[2, 1, 3, 5] += 1


def noise(scores):
    scores += np.random.Generator(np.random.Philox(3)).normal(size=scores.shape).astype(scores.dtype)


@pytest.mark.parametrize(("spoil", "name"), [
    (slot_late, "cached keys one slot late"), (slot_early, "cached keys one slot early"),
    (one_slot, "row 2, key 5 alone"), (lambda scores: one_slot(scores[:, :, ::2]), "row 2, key 5 alone"),
    (one_value, None), (noise, None),
])  # fmt: skip
def test_a_cache_whose_keys_no_trace_holds_is_told_by_the_pair(right, tmp_path, spoil, name):
    pair = stepped_pair(right, tmp_path, spoil)
    assert pair.looks_like == name and (name is None or pair.headline.endswith(f"; looks like: {name}"))
