"""Classification and question answering give the oracle's scores and losses in every wing."""

import numpy as np
import pytest
from mutants import revealing_batch
from wings import close

from gptj.errors import InputError
from gptj.parity.oracle import classification_loss, question_answering_loss
from gptj.parity.revealing import revealing_config

CONFIG = revealing_config()
PAD = CONFIG.pad_token_id
IDS = revealing_batch(CONFIG).input_ids[:4, :10].copy()
MASK = np.ones_like(IDS)
IDS[1, :4], MASK[1, :4] = PAD, 0
IDS[2, -3:], MASK[2, -3:] = PAD, 0
RNG = np.random.default_rng(0)
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
SC, QA = "sequence_classification", "question_answering"


@DTYPES
def test_a_row_is_classified_at_its_last_token_that_is_no_padding(wing, revealing, oracle, dtype):
    got = wing.numpy(wing.call(revealing(SC, dtype=dtype), IDS, attention_mask=MASK).logits)
    assert close(got, oracle(SC).classify(IDS, MASK), dtype)


PROBLEMS = {
    "single_label_classification": RNG.integers(0, 5, 4),
    "multi_label_classification": RNG.integers(0, 2, (4, 5)).astype("float32"),
    "regression": RNG.normal(size=(4, 5)).astype("float32"),
}


@DTYPES
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.feature("regression, single-label and multi-label", "sequence_classification")
def test_each_problem_has_the_oracles_loss(wing, revealing, oracle, dtype, problem):
    labels = PROBLEMS[problem]
    model = revealing(SC, dtype=dtype, problem_type=problem)
    loss = wing.numpy(wing.call(model, IDS, attention_mask=MASK, labels=labels).loss)
    expected = classification_loss(oracle(SC).classify(IDS, MASK), labels, problem_type=problem)
    assert close(loss, np.float64(expected), dtype)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_the_problem_is_told_by_the_labels_and_the_config_stays_as_it_is(wing, revealing, oracle, problem):
    model, labels = revealing(SC), PROBLEMS[problem]
    loss = wing.numpy(wing.call(model, IDS, attention_mask=MASK, labels=labels).loss)
    expected = classification_loss(oracle(SC).classify(IDS, MASK), labels, problem_type=problem)
    assert close(loss, np.float64(expected), "float32") and model.config.problem_type is None


def test_one_label_means_regression(wing, revealing, oracle):
    labels = np.array([0.5, -1, 2, 0], "float32")
    changes = {"num_labels": 1, "id2label": None, "label2id": None}
    loss = wing.numpy(wing.call(revealing(SC, **changes), IDS, attention_mask=MASK, labels=labels).loss)
    expected = classification_loss(oracle(SC, **changes).classify(IDS, MASK), labels, problem_type="regression")
    assert close(loss, np.float64(expected), "float32")


def test_without_a_pad_token_only_one_row_can_be_classified(wing, revealing, oracle):
    model = revealing(SC, pad_token_id=None)
    got = wing.numpy(wing.call(model, IDS[:1]).logits)
    assert close(got, oracle(SC, pad_token_id=None).classify(IDS[:1]), "float32")
    with pytest.raises(InputError, match="pad_token_id"):
        wing.call(model, IDS)


def test_embeddings_are_classified_at_the_last_place(wing, revealing, oracle):
    embeds = oracle(SC).embed(IDS).astype("float32")
    got = wing.numpy(wing.call(revealing(SC), inputs_embeds=embeds).logits)
    hidden = oracle(SC).forward(inputs_embeds=embeds, logits=False).hidden_states[-1]
    assert close(got, oracle(SC).linear("score", hidden)[:, -1], "float32")


@DTYPES
def test_spans_have_the_oracles_scores_and_loss(wing, revealing, oracle, dtype):
    starts, ends = np.array([0, 3, 2, 50]), np.array([4, -2, 9, 10])
    model = revealing(QA, dtype=dtype)
    out = wing.call(model, IDS, attention_mask=MASK, start_positions=starts, end_positions=ends)
    start, end = oracle(QA).answer(IDS, MASK)
    assert close(wing.numpy(out.start_logits), start, dtype) and close(wing.numpy(out.end_logits), end, dtype)
    expected = question_answering_loss(start, end, starts, ends)
    assert close(wing.numpy(out.loss), np.float64(expected), dtype)


WRONG = {
    "a class that there is not": (SC, {"labels": [0, 1, 2, 5]}, r"labels\[3\].*found 5"),
    "too few labels": (SC, {"labels": [0, 1]}, "labels: of another shape"),
    "a start without an end": (QA, {"start_positions": [0, 1, 2, 3]}, "given without end_positions"),
    "too few starts": (QA, {"start_positions": [0], "end_positions": [0, 1, 2, 3]}, "start_positions: of another"),
    "starts of floats": (
        QA,
        {"start_positions": np.ones(4), "end_positions": [0, 1, 2, 3]},
        "start_positions: not whole",
    ),
}


@pytest.mark.parametrize(("head", "arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_label_is_named(wing, revealing, head, arguments, message):
    with pytest.raises(InputError, match=message):
        wing.call(revealing(head), IDS, **arguments)
