"""Steps of optimizers in a trace: held to the definition and to each other, and every wrong number of one shows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from recorded import facts_of, inputs_of, small_batch

from gptj.config.dtypes import numpy_dtype
from gptj.errors import SchemaError
from gptj.parity import steps
from gptj.parity.bounds import Rounding
from gptj.parity.differences import compare_traces
from gptj.parity.gather import findings_of_comparison
from gptj.parity.oracle import Oracle
from gptj.parity.oracle_gradients import loss_gradients
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.trace import open_trace, write_trace

CONFIG = revealing_config(n_layer=1, n_positions=512)
BATCH = small_batch(CONFIG)
WEIGHTS = revealing_weights(CONFIG)


def read(name, dtype):
    return WEIGHTS[name].astype(numpy_dtype(dtype))


@dataclasses.dataclass(frozen=True)
class AdamW:
    """A framework's own, written once more, with a mistake where a number is another."""

    rate: float = steps.RATE
    betas: tuple[float, float] = steps.BETAS
    epsilon: float = steps.EPSILON
    decay: float = steps.DECAY
    corrected: bool = True
    inside: bool = False

    def __call__(self, p, g):
        one, f = np.float32, np.float32
        m, v = np.zeros_like(g), np.zeros_like(g)
        for number, share in enumerate((1, 0.25), 1):
            slope = f(share) * g
            m = f(self.betas[0]) * m + f(1 - self.betas[0]) * slope
            v = f(self.betas[1]) * v + f(1 - self.betas[1]) * slope * slope
            corrections = [one(1 - beta**number) if self.corrected else one(1) for beta in self.betas]
            v_hat, epsilon = v / corrections[1], f(self.epsilon)
            root = np.sqrt(v_hat + epsilon) if self.inside else np.sqrt(v_hat) + epsilon
            p = p * f(1 - self.rate * self.decay) - f(self.rate) * (m / corrections[0]) / root
        return p


def sgd(p, g, rate=steps.RATE):
    return p - np.float32(rate) * g


@pytest.fixture(scope="module")
def gradients():
    inputs = inputs_of(BATCH)
    _, found = loss_gradients(Oracle(CONFIG, WEIGHTS), BATCH.input_ids, BATCH.attention_mask, BATCH.position_ids,
                              labels=inputs["labels"])  # fmt: skip
    return {name: values.astype(np.float32) for name, values in found.items()}


def trace(path, gradients, adamw=AdamW(), sgd=sgd, **changes):
    extras = {}
    for name, slope in gradients.items():
        p = WEIGHTS[name].astype(np.float32)
        extras |= {f"grad.{name}": slope, f"step.sgd.{name}": sgd(p, slope), f"step.adamw.{name}": adamw(p, slope)}
    extras = {name: values for name, values in (extras | changes).items() if values is not None}
    write_trace(path, {}, facts_of(CONFIG, "float32"), inputs=inputs_of(BATCH), extras=extras)
    return open_trace(path)


def test_right_steps_hold_in_each_trace_and_between_two(tmp_path, gradients):
    """Also where the gradients differ by roundings, which AdamW makes large where one is near zero."""
    moved = {name: slope + np.float32(1e-7) * np.abs(slope).max() for name, slope in gradients.items()}
    a, b = trace(tmp_path / "a", gradients), trace(tmp_path / "b", moved)
    parameter = "transformer.h.0.mlp.fc_in.bias"
    small = {parameter: np.where(np.arange(136) % 2 == 0, 1e-9, -3e-8).astype(np.float32)}
    c, d = trace(tmp_path / "c", gradients | small), trace(tmp_path / "d", moved | {parameter: -small[parameter]})
    found = compare_traces([a, b], read)
    assert found.passed and len(found.steps) == 6 * len(gradients)
    assert f"all {len(found.steps)} steps of optimizers within what rounding explains" in [*found.lines()]
    apart = [one for one in compare_traces([c, d], read).steps if one.parameter == parameter]
    assert len(apart) == 6 and all(one.holds for one in apart)  # of opposite signs: their gradients say why


WRONG = {
    "the first beta": AdamW(betas=(0.9, steps.BETAS[1])),
    "the second beta": AdamW(betas=(steps.BETAS[0], 0.999)),
    "the betas swapped": AdamW(betas=steps.BETAS[::-1]),
    "epsilon": AdamW(epsilon=steps.EPSILON * 2),
    "no epsilon": AdamW(epsilon=1e-12),
    "epsilon within the root": AdamW(inside=True),
    "no decay": AdamW(decay=0.0),
    "another decay": AdamW(decay=steps.DECAY * 1.1),
    "decay without the rate": AdamW(decay=steps.DECAY / steps.RATE),
    "no correction": AdamW(corrected=False),
    "the rate": AdamW(rate=steps.RATE * 1.001),
    "the sign": lambda p, g: AdamW()(p, -g),
    "one step": lambda p, g: steps.apply_steps(p, g, "adamw") * 0 + p - steps.RATE * (np.sign(g) + steps.DECAY * p),
    "decay in the gradient, as of Adam": lambda p, g: AdamW(decay=0.0)(p, g + np.float32(steps.DECAY) * p),
    "not finite": lambda p, g: np.full_like(p, np.nan),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_of_adamw_is_named_in_both_comparisons(tmp_path, gradients, name):
    a = trace(tmp_path / "a", gradients)
    b = trace(tmp_path / "b", gradients, lambda p, g: np.asarray(WRONG[name](p, g), np.float32))
    found = compare_traces([a, b], read)
    wrong = [one for one in found.steps if not one.holds]
    assert not found.passed and {(one.base, one.other) for one in wrong} == {("a", "b"), ("oracle", "b")}
    assert {one.kind for one in wrong} == {"adamw"} and all(one.holds for one in found.gradients)
    assert any("after a step of AdamW differs from" in line for line in found.lines())
    rows = findings_of_comparison(found, [a, b]).matrix
    assert any(row.against == "step of AdamW against oracle" and not row.holds for row in rows)


def test_a_wrong_step_of_sgd_is_named_with_its_place(tmp_path, gradients):
    def wrong(p, g):
        after = sgd(p, g)
        if p.shape == (216,):
            after[7] += 1e-5
        return after

    a, b = trace(tmp_path / "a", gradients), trace(tmp_path / "b", gradients, sgd=wrong)
    found = compare_traces([a, b], read)
    assert [(one.base, one.kind, one.parameter, one.where) for one in found.steps if not one.holds] == [
        ("a", "sgd", "lm_head.bias", (7,)), ("oracle", "sgd", "lm_head.bias", (7,)),
    ]  # fmt: skip


def test_a_wrong_gradient_is_no_wrong_step(tmp_path, gradients):
    doubled = {name: 2 * slope for name, slope in gradients.items()}
    found = compare_traces([trace(tmp_path / "a", gradients), trace(tmp_path / "b", doubled)], read)
    assert not any(one.holds for one in found.gradients if one.other == "b")
    assert all(one.holds for one in found.steps)
    assert all(one.looks_like == "a factor of 2" for one in found.gradients if one.other == "b")


def test_a_bound_counts_a_square_that_underflows():
    slope = np.array([1e-25, -3e-20, 1e-19])
    limit = steps.step_limit(np.zeros(3), slope, "adamw", Rounding.of("float32"))
    kept = 1 - steps.RATE * steps.DECAY
    flushed = -steps.RATE * (1 * kept + 0.6) * slope / steps.EPSILON  # the moments' ratios, over roots of zero
    assert (np.abs(steps.apply_steps(np.zeros(3), slope, "adamw") - flushed) <= limit).all() and (limit < 1e-16).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step.adam.lm_head.bias": np.zeros(216)}, "Did you mean adamw"),
        ({"step.sgd.lm_head.bais": np.zeros(216)}, r"Did you mean lm_head\.bias"),
        ({"step.sgd.lm_head.bias": np.zeros(3)}, "of another shape"),
        ({"grad.lm_head.bias": None}, r"grad\.lm_head\.bias: is missing"),
    ],
)
def test_a_step_that_is_none_or_stands_alone_is_refused(tmp_path, gradients, changes, said):
    with pytest.raises(SchemaError, match=said):
        trace(tmp_path / "a", gradients, **changes)
