"""Each of the four classes takes every argument to the blocks, gives every output, and learns, in every wing."""

import numpy as np
import pytest
from mutants import revealing_batch
from wings import close

from gptj.config.schema import HEADS, schema
from gptj.errors import InputError
from gptj.parity.oracle import Oracle, causal_lm_loss, classification_loss, question_answering_loss
from gptj.parity.revealing import revealing_config, revealing_weights

CONFIG = revealing_config()
BATCH = revealing_batch(CONFIG)
IDS, MASK, POSITIONS = BATCH.input_ids[:4], BATCH.attention_mask[:4], BATCH.position_ids[:4]
EVERY = pytest.mark.parametrize("head", HEADS)
RNG = np.random.default_rng(0)

ARGUMENTS = {
    "attention_mask": MASK,
    "position_ids": POSITIONS,
    "token_type_ids": IDS[:, ::-1].copy(),
    "head_mask": RNG.uniform(0, 1.5, (CONFIG.n_layer, CONFIG.n_head)),
}
LABELS = {
    "causal_lm": {"labels": np.where(MASK == 1, IDS, -100)},
    "sequence_classification": {"labels": np.array([0, 4, 2, 1])},
    "question_answering": {"start_positions": np.array([0, 3, 2, 50]), "end_positions": np.array([4, -2, 9, 10])},
}


def answer(head, oracle, hidden):
    """What a class makes of the last hidden states, as the oracle has it."""
    if head == "base":
        return hidden
    if head == "causal_lm":
        return oracle.lm_head(hidden)
    if head == "sequence_classification":
        last = (np.arange(IDS.shape[1]) * (CONFIG.pad_token_id != IDS)).argmax(-1)
        return oracle.linear("score", hidden)[np.arange(len(IDS)), last]
    return oracle.linear("qa_outputs", hidden, bias=True)


def given(wing, head, out):
    """The same from a wing's output."""
    if head == "question_answering":
        return np.stack([wing.numpy(out.start_logits), wing.numpy(out.end_logits)], -1)
    return wing.numpy(out.last_hidden_state if head == "base" else out.logits)


def loss_of(head, logits, labels):
    if head == "causal_lm":
        return causal_lm_loss(logits, labels["labels"])
    if head == "sequence_classification":
        return classification_loss(logits, labels["labels"], problem_type="single_label_classification")
    return question_answering_loss(logits[..., 0], logits[..., 1], labels["start_positions"], labels["end_positions"])


@EVERY
@pytest.mark.feature("float64 to 1e-9, float32 to 2e-5 of the oracle", "every")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_answers_are_the_oracles(wing, revealing, oracle, head, dtype):
    out = wing.call(revealing(head, dtype=dtype), IDS, attention_mask=MASK, position_ids=POSITIONS)
    hidden = oracle(head).forward(IDS, MASK, POSITIONS, logits=False).hidden_states[-1]
    assert close(given(wing, head, out), answer(head, oracle(head), hidden), dtype)


@EVERY
@pytest.mark.feature("attention_mask, position_ids, token_type_ids, head_mask", "every")
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_each_argument_reaches_the_blocks(wing, revealing, oracle, head, argument):
    value = ARGUMENTS[argument]
    out = wing.call(revealing(head, dtype="float64"), input_ids=IDS, **{argument: value})
    hidden = oracle(head).forward(IDS, logits=False, **{argument: value}).hidden_states[-1]
    assert close(given(wing, head, out), answer(head, oracle(head), hidden), "float64")


@EVERY
@pytest.mark.feature("inputs_embeds", "every")
def test_embeddings_serve_in_place_of_ids(wing, revealing, oracle, head):
    embeds = RNG.normal(size=(*IDS.shape, CONFIG.n_embd))
    out = wing.call(revealing(head, dtype="float64"), inputs_embeds=embeds)
    hidden = oracle(head).forward(inputs_embeds=embeds, logits=False).hidden_states[-1]
    expected = answer(head, oracle(head), hidden)
    if head == "sequence_classification":  # without ids, the last place counts
        expected = oracle(head).linear("score", hidden)[:, -1]
    assert close(given(wing, head, out), expected, "float64")


@EVERY
@pytest.mark.feature("output_hidden_states, output_attentions", "every")
def test_hidden_states_and_attentions_come_when_asked(wing, revealing, oracle, head):
    model = revealing(head, dtype="float64")
    out = wing.call(model, IDS, attention_mask=MASK, output_hidden_states=True, output_attentions=True)
    expected = oracle(head).forward(IDS, MASK, logits=False, attentions=True)
    assert len(out.hidden_states) == CONFIG.n_layer + 1 and len(out.attentions) == CONFIG.n_layer
    for got, right in zip(
        (*out.hidden_states, *out.attentions), (*expected.hidden_states, *expected.attentions), strict=True
    ):
        assert close(wing.numpy(got), right, "float64")
    plain = wing.call(model, IDS)
    assert plain.hidden_states is None and plain.attentions is None


@EVERY
@pytest.mark.feature("return_dict, and the config's defaults of a call", "every")
def test_the_configs_defaults_hold_and_a_tuple_comes_when_asked(wing, folder, head):
    told = {"output_hidden_states": True, "return_dict": False, "use_cache": False}
    model = wing.model(head).from_pretrained(folder(head), **told)
    out = wing.call(model, IDS)
    again = wing.call(model, IDS, return_dict=True)
    assert isinstance(out, tuple) and len(out) == len(again) and again.hidden_states is not None
    assert all(
        np.array_equal(wing.numpy(a), wing.numpy(b)) for a, b in zip(out[:-1], again.to_tuple()[:-1], strict=True)
    )


@pytest.mark.feature("past_key_values, use_cache", "base", "causal_lm", "sequence_classification")
@pytest.mark.parametrize("head", ["base", "causal_lm", "sequence_classification"])
def test_a_cached_call_answers_as_the_whole(wing, revealing, oracle, head):
    model = revealing(head, dtype="float64", pad_token_id=None)
    row = IDS[:1]
    past = wing.call(model, row[:, :15], use_cache=True).past_key_values
    got = given(wing, head, wing.call(model, row[:, 15:], past_key_values=past))
    whole = given(wing, head, wing.call(model, row))
    assert close(got, whole[:, 15:] if whole.ndim == 3 else whole, "float64")


@pytest.mark.feature("labels and loss", "causal_lm", "sequence_classification", "question_answering")
@pytest.mark.parametrize("head", LABELS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_losses_are_the_oracles(wing, revealing, oracle, head, dtype):
    out = wing.call(revealing(head, dtype=dtype), input_ids=IDS, attention_mask=MASK, **LABELS[head])
    hidden = oracle(head).forward(IDS, MASK, logits=False).hidden_states[-1]
    expected = np.float64(loss_of(head, answer(head, oracle(head), hidden), LABELS[head]))
    assert close(wing.numpy(out.loss), expected, dtype)


STEP = 1e-4
SLOPE_RELATIVE = 1e-7
SLOPE_ABSOLUTE = 1e-10
"""See test_training.py: a five-point difference along a direction as long as the tensor. A span's scores do not
change when all move alike, so some gradients are zero, and there only the difference's own rounding is left."""


@pytest.mark.feature(
    "gradients against the oracle's slopes", "causal_lm", "sequence_classification", "question_answering"
)
@pytest.mark.parametrize("head", LABELS)
def test_gradients_are_the_oracles_slopes(wing, folder, head):
    model = wing.model(head).from_pretrained(folder(head), param_dtype="float64")
    _, gradients = wing.gradients(model, input_ids=IDS, attention_mask=MASK, **LABELS[head])
    rows = schema(CONFIG, head)
    assert gradients.keys() == {row.name for row in rows}
    stored = {name: value.astype("float64") for name, value in revealing_weights(CONFIG, head=head).items()}

    def loss_at(name, shift):
        oracle = Oracle(CONFIG, {**stored, name: stored[name] + shift})
        hidden = oracle.forward(IDS, MASK, logits=False).hidden_states[-1]
        return loss_of(head, answer(head, oracle, hidden), LABELS[head])

    last = [row.name for row in rows if ".h.1." in row.name or ".h." not in row.name]
    for name in last:
        direction = RNG.normal(size=stored[name].shape)
        direction *= np.linalg.norm(stored[name]) / np.linalg.norm(direction)
        near, far = (loss_at(name, h * direction) - loss_at(name, -h * direction) for h in (STEP, 2 * STEP))
        slope = (8 * near - far) / (12 * STEP)
        scale = np.linalg.norm(gradients[name]) * np.linalg.norm(direction)
        bound = SLOPE_RELATIVE * scale + SLOPE_ABSOLUTE
        assert abs((gradients[name] * direction).sum() - slope) <= bound, name


@pytest.mark.feature("gradient checkpointing", "causal_lm", "sequence_classification", "question_answering")
@pytest.mark.parametrize("head", LABELS)
def test_recomputed_blocks_give_the_same_gradients(wing, folder, head):
    model = wing.model(head).from_pretrained(folder(head), param_dtype="float64")
    loss, gradients = wing.gradients(model, input_ids=IDS, attention_mask=MASK, **LABELS[head])
    model.gradient_checkpointing_enable()
    again, recomputed = wing.gradients(model, input_ids=IDS, attention_mask=MASK, **LABELS[head])
    assert abs(loss - again) <= 1e-14 * abs(loss)
    for name, gradient in gradients.items():
        assert np.abs(gradient - recomputed[name]).max() <= 1e-12 * max(np.abs(gradient).max(), 1e-3), name


@EVERY
@pytest.mark.feature("resize_token_embeddings, get and set_input_embeddings", "every")
def test_the_vocabulary_can_grow(wing, folder, head):
    model = wing.model(head).from_pretrained(folder(head))
    before = wing.parameters(model)
    model.resize_token_embeddings(CONFIG.vocab_size + 8)
    after = wing.parameters(model)
    assert model.config.vocab_size == CONFIG.vocab_size + 8
    for name, value in before.items():
        assert (after[name][: len(value)] == value).all()
    assert model.get_input_embeddings() is not None
    wing.call(model, np.full((1, 2), CONFIG.vocab_size + 7))


@EVERY
def test_the_base_model_of_a_head_is_saved_as_one(wing, folder, tmp_path, head):
    model = wing.model(head).from_pretrained(folder(head))
    model.base_model.save_pretrained(tmp_path / "base")
    alone = wing.module.GPTJModel.from_pretrained(tmp_path / "base")
    hidden = [wing.numpy(wing.call(m, IDS).last_hidden_state) for m in (model.base_model, alone)]
    assert np.array_equal(*hidden)


@pytest.mark.parametrize("head", ["causal_lm", "sequence_classification", "question_answering"])
def test_the_base_model_of_a_head_is_never_resized_alone(wing, folder, head):
    model = wing.model(head).from_pretrained(folder(head))
    with pytest.raises(InputError, match=r"resize_token_embeddings: this model is a part .*Call model\.resize"):
        model.base_model.resize_token_embeddings(CONFIG.vocab_size + 8)
    assert model.config.vocab_size == CONFIG.vocab_size
    wing.call(model, IDS)
