"""Gradients and greedy texts in a trace: what is refused, what is compared, and what is said."""

from __future__ import annotations

import numpy as np
import pytest
from recorded import facts_of, inputs_of, recorded_taps, small_batch

from gptj.config.dtypes import numpy_dtype
from gptj.errors import InputError, SchemaError
from gptj.parity.differences import compare_traces
from gptj.parity.oracle import Oracle
from gptj.parity.oracle_gradients import loss_gradients
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.trace import open_trace, write_trace

CONFIG = revealing_config(n_layer=2, n_positions=512)
BATCH = small_batch(CONFIG)
WEIGHTS = revealing_weights(CONFIG)


def read(name, dtype):
    return WEIGHTS[name].astype(numpy_dtype(dtype))


@pytest.fixture(scope="module")
def gradients():
    inputs = inputs_of(BATCH)
    _, found = loss_gradients(Oracle(CONFIG, WEIGHTS), BATCH.input_ids, BATCH.attention_mask, BATCH.position_ids,
                              labels=inputs["labels"])  # fmt: skip
    return found


def text(tokens, seconds, margins):
    """The tensors of one prompt's text."""
    top = np.stack([np.full(len(tokens), 2.0), 2.0 - np.asarray(margins)], -1)
    return {
        "generated.prompt_ids": np.array([[1, 2]]), "generated.prompt_mask": np.array([[1, 1]]),
        "generated.token_ids": np.array([tokens]), "generated.top_ids": np.stack([tokens, seconds], -1)[None],
        "generated.top_logits": top.astype(np.float32)[None],
    }  # fmt: skip


def trace(path, extras, dtype="float32", taps=True):
    recorded = recorded_taps(CONFIG, BATCH, dtype) if taps else {}
    write_trace(path, recorded, facts_of(CONFIG, dtype), inputs=inputs_of(BATCH), extras=extras)
    return open_trace(path)


def named(gradients, dtype="float64"):
    return {f"grad.{name}": values.astype(dtype) for name, values in gradients.items()}


def test_gradients_are_held_to_each_other_and_to_the_oracle(tmp_path, gradients):
    a, b = trace(tmp_path / "a", named(gradients), "float64"), trace(tmp_path / "b", named(gradients, "float32"))
    bare, told = compare_traces([a, b]), compare_traces([a, b], read)
    assert bare.passed and len(bare.gradients) == len(gradients)
    assert told.passed and len(told.gradients) == 3 * len(gradients)
    assert "all 25 gradients within what rounding explains" in [*bare.lines()]


@pytest.mark.parametrize("value", [np.nan, 1.002])
def test_a_wrong_gradient_is_named_with_its_place(tmp_path, gradients, value):
    wrong, name = named(gradients, "float32"), "transformer.h.1.mlp.fc_in.bias"
    place = int(np.abs(gradients[name]).argmax())
    wrong[f"grad.{name}"][place] *= value
    a, b = trace(tmp_path / "a", named(gradients), "float64"), trace(tmp_path / "b", wrong)
    found = compare_traces([a, b], read)
    assert not found.passed
    assert [(one.base, one.parameter, one.where) for one in found.gradients if not one.holds] == [
        ("a", name, (place,)), ("oracle", name, (place,)),
    ]  # fmt: skip
    assert any(f"b: the gradient of {name} differs from a's" in line for line in found.lines())


def test_gradients_alone_are_a_trace(tmp_path, gradients):
    a, b = (trace(tmp_path / name, named(gradients), taps=False) for name in "ab")
    found = compare_traces([a, b])
    assert found.passed and not found.pairs[0].taps and len(found.gradients) == len(gradients)


@pytest.mark.parametrize(
    ("seconds", "margins", "tie"),
    [((9, 8), (1e-7, 2e-7), True), ((9, 8), (1e-7, 0.5), False), ((9, 8), (0.5, 1e-7), False)],
)
def test_texts_part_in_a_tie_or_not(tmp_path, seconds, margins, tie):
    a = trace(tmp_path / "a", text([7, 8, 3], [1, seconds[0], 1], [1, margins[0], 1]), "float64")
    b = trace(tmp_path / "b", text([7, 9, 4], [1, seconds[1], 1], [1, margins[1], 1]))
    found = compare_traces([a, b])
    [one] = found.texts
    assert (one.first, one.chosen, one.tie, found.passed) == (1, (8, 9), tie, tie)
    assert one.margins == pytest.approx(margins, rel=0.2)  # float32 near 2
    assert len(one.errors) == 2 and one.errors[0] == pytest.approx(0, abs=1e-6)
    said = next(line for line in found.lines() if "part at new token 1 of prompt 0" in line)
    assert ("a tie, which rounding explains" in said) is tie and "9 (ahead by" in said and "8 (ahead by" in said
    assert one.to_json()["tie"] is tie and one.to_json()["first_difference"] == 1


def test_the_weights_tell_what_rounding_may_do_at_the_very_token(tmp_path):
    """Sizes of a batch's logits allow more: between the two lies a margin that only the weights call no tie."""

    def compared(margin, weights=None, dtype="float32"):
        (tmp_path / f"{margin}").mkdir(exist_ok=True)
        a = trace(tmp_path / f"{margin}" / "a", text([7, 8, 3], [1, 9, 1], [1, margin, 1]), "float64")
        b = trace(tmp_path / f"{margin}" / "b", text([7, 9, 4], [1, 8, 1], [1, margin, 1]), dtype)
        return compare_traces([a, b], weights).texts[0]

    estimate, derived = compared(1e-7).bound, compared(1e-7, read).bound
    assert 1e-6 < derived < estimate / 3
    between = derived + estimate  # a margin is held to two bounds
    assert compared(between).tie and not compared(between, read).tie
    assert compared(derived, read).tie
    assert compared(1e-7, read, "bfloat16").bound > 1000 * derived, "of other weights, in 16 bits"


def test_texts_that_are_the_same_or_of_other_prompts(tmp_path):
    a, b = (trace(tmp_path / name, text([7, 8], [1, 2], [1, 1])) for name in "ab")
    found = compare_traces([a, b])
    assert found.passed and found.texts[0].first is None and "all 1 greedy texts the same" in [*found.lines()]
    other = text([7, 8], [1, 2], [1, 1]) | {"generated.prompt_ids": np.array([[1, 3]])}
    with pytest.raises(InputError, match="prompt_ids"):
        compare_traces([a, trace(tmp_path / "other", other)])


def test_a_tie_without_logits_cannot_be_told(tmp_path):
    a, b = (trace(tmp_path / name, text([number], [1], [1e-9]), taps=False) for name, number in (("a", 7), ("b", 8)))
    found = compare_traces([a, b])
    assert found.texts[0].bound is None and not found.passed
    assert any("whether that is a tie needs logits" in line for line in found.lines())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"grad.transformer.h.7.ln_1.weight": np.zeros(48)}, "no parameter of the config's model"),
        ({"grad.transformer.ln_f.weigth": np.zeros(48)}, r"Did you mean transformer\.ln_f\.weight"),
        ({"grad.transformer.ln_f.weight": np.zeros(47)}, r"of another shape \(expected \[48\], found \[47\]"),
        ({"grad.transformer.ln_f.weight": np.zeros(48, np.int64)}, "of another dtype"),
        ({"generated.tokens": np.zeros((1, 2), np.int64)}, "no tensor of a text"),
        ({"generated.prompt_ids": np.zeros((1, 2), np.int64)}, "is missing"),
        (text([7, 8], [1, 2], [1, 1]) | {"generated.top_ids": np.zeros((1, 3, 2), np.int64)}, "of another shape"),
        (text([7, 8], [1, 2], [1, 1]) | {"generated.top_ids": np.zeros((1, 2, 2))}, "of another dtype"),
        (text([7, 8], [1, 2], [1, 1]) | {"generated.prompt_mask": np.ones((1, 3), np.int64)}, "of another shape"),
    ],
)  # fmt: skip
def test_an_extra_that_is_none_is_refused(tmp_path, change, said):
    with pytest.raises(SchemaError, match=said):
        trace(tmp_path / "a", change, taps=False)
