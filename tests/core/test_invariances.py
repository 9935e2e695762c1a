"""The matrix's judgement and the ladder's numbers, with NumPy alone; each is shown what it must refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptj.errors import FormatError
from gptj.parity.bounds import Rounding
from gptj.parity.invariance_record import rows_of
from gptj.parity.invariances import INT8, ROWS, Answer, Reference, judge, quantised
from gptj.parity.ladder import LadderQuestion, measure_rung
from gptj.parity.matrix import findings_of_matrix
from gptj.parity.oracle import Oracle
from gptj.parity.revealing import revealing_config, revealing_weights
from gptj.parity.steps import BETAS, DECAY, EPSILON, RATE, SHARES, apply_steps, step_limit

CONFIG = revealing_config(n_layer=2)
ORACLE = Oracle(CONFIG, revealing_weights(CONFIG))
IDS = np.arange(12).reshape(2, 6) * 7


def answer(found, expected=0.0, limit=1.0):
    found = np.asarray(found, np.float64)
    return Answer("logits", found, np.broadcast_to(np.float64(expected), found.shape), np.asarray(limit))


# ---- the judgement


def test_a_row_is_its_worst_answer_and_names_the_place():
    row = judge("pt", "cached", [answer([0.5, 0.1]), answer([[0.1, 0.2], [0.9, 0.3]])])
    assert (row.holds, row.difference, row.limit, row.where) == (True, 0.9, 1.0, "axis 0 1, axis 1 0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["found", "expected", "limit"])
def test_what_is_not_finite_never_holds(value, side):
    sides = {"found": np.zeros(3), "expected": np.zeros(3), "limit": np.ones(3)}
    sides[side][1] = value
    assert not judge("pt", "cached", [Answer("logits", **sides), answer([0.0])]).holds
    both = Answer("logits", np.full(2, value), np.full(2, value), np.ones(2))  # the same, and still no answer
    assert not judge("pt", "cached", [both]).holds


def test_neither_another_shape_nor_nothing_holds():
    assert not judge("pt", "saved", [Answer("w", np.zeros(2), np.zeros(3), np.ones(()))]).holds
    assert not judge("pt", "saved", [Answer("w", np.zeros(0), np.zeros(0), np.ones(()))]).holds
    assert not judge("pt", "saved", []).holds


def test_a_limit_of_nothing_takes_equal_values_alone():
    assert judge("pt", "saved", [answer([1.0], 1.0, 0.0)]).holds
    assert not judge("pt", "saved", [answer([np.nextafter(1.0, 2.0)], 1.0, 0.0)]).holds


def test_findings_say_what_differs_first():
    rows = [judge("tf", "cached", [answer([0.0])]), judge("tf", "saved", [answer([2.0])])]
    found = findings_of_matrix(rows, "model", CONFIG, ["tf"])
    assert found.verdict == "differs"
    assert found.headline == "1 of 2 rows differ; first tf, saved: logits"
    assert type(found).from_json(found.to_json()).matrix == tuple(rows)
    assert findings_of_matrix(rows[:1], "model", CONFIG, ["tf"]).passed


def test_only_pytorch_has_a_row_of_whole_numbers():
    assert rows_of("pt") == [*ROWS]
    assert set(ROWS) - {*rows_of("tf")} == {"int8"}
    assert rows_of("flax", {"h5": ""})[-1] == "through h5"


# ---- the limits


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_step_in_float32_is_within_its_limit_and_a_mistake_is_not(kind):
    random = np.random.default_rng(0)
    parameter, slope = (random.standard_normal(4_000).astype(np.float32) for _ in range(2))
    slope *= np.float32(10.0) ** random.integers(-9, 1, 4_000).astype(np.float32)
    limit = step_limit(parameter, slope, kind, Rounding.of("float32"))

    def step(decay=DECAY, epsilon=EPSILON, rate=RATE):
        if kind == "sgd":
            return parameter - np.float32(rate) * slope
        moved, first, second = parameter, np.zeros_like(slope), np.zeros_like(slope)
        for number, share in enumerate(SHARES[kind], 1):
            given = np.float32(share) * slope
            first = np.float32(BETAS[0]) * first + np.float32(1 - BETAS[0]) * given
            second = np.float32(BETAS[1]) * second + np.float32(1 - BETAS[1]) * given**2
            root = np.sqrt(second / np.float32(1 - BETAS[1] ** number)) + np.float32(epsilon)
            moved = moved * np.float32(1 - rate * decay)
            moved = moved - np.float32(rate) * (first / np.float32(1 - BETAS[0] ** number)) / root
        return moved

    def holds(**change):
        return judge("pt", kind, [Answer("w", step(**change), apply_steps(parameter, slope, kind), limit)]).holds

    assert holds()
    assert not holds(rate=RATE * 1.001)
    if kind == "adamw":
        assert not holds(decay=0.0)
        assert not holds(epsilon=EPSILON * (1 - BETAS[1]) ** 0.5)  # Keras' place for it


def test_the_limit_of_logits_takes_float32_and_no_wrong_position():
    exact, limit = Reference(ORACLE, "float32").logits(IDS)
    single = Oracle(CONFIG, ORACLE._read, dtype="float32")
    assert judge("pt", "whole pass", [Answer("logits", single.forward(IDS).logits, exact, limit)]).holds
    moved = single.forward(IDS, position_ids=np.arange(6)[None] * 2).logits
    assert not judge("pt", "whole pass", [Answer("logits", moved, exact, limit)]).holds
    assert limit < 5e-5


def test_the_limit_of_gradients_notices_a_thousandth():
    labels = IDS
    exact, limits = Reference(ORACLE, "float32").gradients({"input_ids": IDS, "labels": labels})
    assert exact.keys() == limits.keys()
    for name, slope in exact.items():
        assert np.abs(slope).max() * 1e-3 > limits[name] > 0, name


def test_float64_is_held_to_float64():
    _, wide = Reference(ORACLE, "float32").logits(IDS)
    _, narrow = Reference(ORACLE, "float64").logits(IDS)
    assert narrow == pytest.approx(wide * 2.0**-29, rel=1e-6)


# ---- whole numbers


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_weights_are_whole_numbers_of_a_scale_a_row(tied):
    config = revealing_config(n_layer=1, tie_word_embeddings=tied)
    oracle = Oracle(config, revealing_weights(config))
    found = quantised(oracle)
    name = "transformer.h.0.mlp.fc_in.weight"
    steps = found.read(name) / (np.abs(oracle.read(name)).max(1, keepdims=True).astype(np.float32) / np.float32(127))
    assert np.allclose(steps, np.rint(steps), atol=1e-5)
    assert np.abs(np.rint(steps)).max() == 127
    assert (found.read("transformer.wte.weight") == oracle.read("transformer.wte.weight")).all()
    head = "transformer.wte.weight" if tied else "lm_head.weight"
    assert 0 < np.abs(found.read("lm_head.weight") - oracle.read(head)).max() < np.abs(oracle.read(head)).max() / 250
    assert (found.read("lm_head.bias") == oracle.read("lm_head.bias")).all()


def test_the_two_products_into_the_stream_share_their_scales():
    found, names = quantised(ORACLE), ("attn.out_proj", "mlp.fc_out")
    rows = [np.abs(ORACLE.read(f"transformer.h.1.{name}.weight")).max(1) for name in names]
    scale = np.maximum(*rows).astype(np.float32)[:, None] / np.float32(127)
    for name in names:
        steps = found.read(f"transformer.h.1.{name}.weight") / scale
        assert np.allclose(steps, np.rint(steps), atol=1e-5)


def test_the_limit_of_int8_is_less_than_what_the_weights_lose():
    stood_for, limit = Reference(quantised(ORACLE), "float32").logits(IDS, rounding=INT8)
    assert np.abs(stood_for - ORACLE.forward(IDS).logits).max() > limit


# ---- the ladder


def question():
    logits = np.random.default_rng(0).standard_normal((2, 3, 5))
    return LadderQuestion(np.ones((2, 3), np.int64), np.array([[0, 1, 1], [1, 1, 1]]), logits, np.zeros((2, 4), int))


def test_the_same_answers_are_without_error():
    asked = question()
    rung = measure_rung("pt", "float64", asked, asked.logits, asked.greedy)
    assert (rung.error, rung.kl, rung.top1, rung.greedy, rung.prompts) == (0, 0, 1, 1, 2)


def test_padding_is_not_measured_and_a_shift_is_no_divergence():
    asked = question()
    logits = asked.logits + 0.5
    logits[0, 0] = np.nan
    rung = measure_rung("pt", "float32", asked, logits, asked.greedy)
    assert rung.error == pytest.approx(0.5)
    assert rung.kl == pytest.approx(0, abs=1e-15)
    assert rung.top1 == 1


def test_the_divergence_is_that_of_the_exact_distribution_from_the_other():
    logits = np.log(np.array([[[0.5, 0.5]]]))
    asked = LadderQuestion(np.ones((1, 1)), np.ones((1, 1)), logits, np.zeros((1, 2), int))
    rung = measure_rung("pt", "int8", asked, np.log(np.array([[[0.25, 0.75]]])), np.array([[0, 1]]))
    assert rung.kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert (rung.top1, rung.greedy) == (0, 0.5)


def test_answers_that_are_not_finite_are_no_numbers():
    asked = question()
    logits = asked.logits.copy()
    logits[1, 1, 1] = np.inf
    rung = measure_rung("pt", "float16", asked, logits, asked.greedy)
    assert math.isnan(rung.error) and math.isnan(rung.kl) and math.isnan(rung.top1)


def test_an_answer_of_another_shape_is_refused():
    asked = question()
    with pytest.raises(FormatError, match="greedy: of another shape"):
        measure_rung("pt", "float32", asked, asked.logits, asked.greedy[:, :3])


def test_a_question_is_read_as_it_was_written(tmp_path):
    asked = question()
    asked.save(tmp_path / "question.npz")
    found = LadderQuestion.load(tmp_path / "question.npz")
    assert all((getattr(found, name) == getattr(asked, name)).all() for name in ("ids", "mask", "logits", "greedy"))
