"""Every wing computes the oracle's numbers: in float64 to 1e-9 of the largest, in float32 to 2e-5."""

import numpy as np
import pytest
from gptj_conversion.convert import convert
from mutants import FAR, revealing_batch
from reference import MESH_FIXTURE, mesh_outputs
from wings import FLOAT32_ABSOLUTE, close

from gptj.config import ACTIVATIONS
from gptj.config.schema import schema
from gptj.parity.oracle import Oracle, causal_lm_loss, token_losses
from gptj.parity.revealing import revealing_config, revealing_weights

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
CONFIG = revealing_config()
BATCH = revealing_batch(CONFIG)
CALL = {"attention_mask": BATCH.attention_mask, "position_ids": BATCH.position_ids}


@DTYPES
def test_logits_are_the_oracles(wing, revealing, oracle, dtype):
    got = wing.numpy(wing.call(revealing(dtype=dtype), BATCH.input_ids, **CALL).logits)
    assert close(got, oracle().forward(BATCH.input_ids, **CALL).logits, dtype)


@DTYPES
def test_hidden_states_are_the_oracles_layer_by_layer(wing, revealing, oracle, dtype):
    out = wing.call(revealing(dtype=dtype), BATCH.input_ids, **CALL, output_hidden_states=True)
    expected = oracle().forward(BATCH.input_ids, **CALL).hidden_states
    assert len(out.hidden_states) == CONFIG.n_layer + 1
    assert all(close(wing.numpy(h), e, dtype) for h, e in zip(out.hidden_states, expected, strict=True))


@DTYPES
def test_attention_weights_are_the_oracles(wing, revealing, oracle, dtype):
    out = wing.call(revealing(dtype=dtype), BATCH.input_ids, **CALL, output_attentions=True)
    expected = oracle().forward(BATCH.input_ids, **CALL, attentions=True).attentions
    assert all(close(wing.numpy(a), e, dtype) for a, e in zip(out.attentions, expected, strict=True))


@DTYPES
def test_the_loss_is_the_oracles_and_ignores_minus_100(wing, revealing, oracle, dtype):
    labels = np.where(BATCH.attention_mask == 1, BATCH.input_ids, -100)
    loss = wing.numpy(wing.call(revealing(dtype=dtype), BATCH.input_ids, **CALL, labels=labels).loss)
    expected = causal_lm_loss(oracle().forward(BATCH.input_ids, **CALL).logits, labels)
    assert loss.shape == () and close(loss, np.float64(expected), dtype)


def test_a_loss_of_no_labels_is_zero(wing, revealing):
    ids = BATCH.input_ids[:2]
    assert wing.numpy(wing.call(revealing(), ids, labels=np.full_like(ids, -100)).loss) == 0


@DTYPES
def test_positions_default_to_counting_from_the_left(wing, revealing, oracle, dtype):
    got = wing.numpy(wing.call(revealing(dtype=dtype), BATCH.input_ids).logits)
    assert close(got, oracle().forward(BATCH.input_ids).logits, dtype)


@DTYPES
def test_a_shift_of_all_positions_changes_nothing(wing, revealing, dtype):
    near, far = (
        wing.numpy(
            wing.call(
                revealing(dtype=dtype), BATCH.input_ids, attention_mask=BATCH.attention_mask, position_ids=p
            ).logits
        )
        for p in (BATCH.position_ids - FAR, BATCH.position_ids)
    )
    assert close(near, far, dtype)


@DTYPES
def test_G3_a_row_that_sees_nothing_attends_to_nothing(wing, revealing, oracle, dtype):
    mask = np.ones((2, 6), np.int64)
    mask[1] = 0
    ids = BATCH.input_ids[:2, :6]
    out = wing.call(revealing(dtype=dtype), ids, attention_mask=mask, output_attentions=True)
    assert not wing.numpy(out.attentions[0])[1].any()
    assert close(wing.numpy(out.logits), oracle().forward(ids, mask).logits, dtype)


@DTYPES
def test_token_types_add_their_embeddings(wing, revealing, oracle, dtype):
    types = BATCH.input_ids[:, ::-1].copy()
    got = wing.numpy(wing.call(revealing(dtype=dtype), BATCH.input_ids, token_type_ids=types).logits)
    assert close(got, oracle().forward(BATCH.input_ids, token_type_ids=types).logits, dtype)


@DTYPES
def test_embeddings_may_come_in_place_of_ids(wing, revealing, oracle, dtype):
    embeds = np.random.default_rng(0).normal(size=(2, 5, CONFIG.n_embd)).astype(dtype)
    got = wing.numpy(wing.call(revealing(dtype=dtype), inputs_embeds=embeds).logits)
    assert close(got, oracle().forward(inputs_embeds=embeds).logits, dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(CONFIG.n_head,), (CONFIG.n_layer, CONFIG.n_head)])
def test_a_head_mask_weighs_each_head(wing, revealing, oracle, dtype, shape):
    factors = np.linspace(0, 1.5, int(np.prod(shape))).reshape(shape).astype("float32")
    got = wing.numpy(wing.call(revealing(dtype=dtype), BATCH.input_ids, **CALL, head_mask=factors).logits)
    assert close(got, oracle().forward(BATCH.input_ids, **CALL, head_mask=factors).logits, dtype)


@DTYPES
@pytest.mark.feature("tie_word_embeddings", "causal_lm")
def test_tied_embeddings_share_the_weight_and_keep_the_bias(wing, revealing, oracle, dtype):
    model = revealing(dtype=dtype, tie_word_embeddings=True)
    assert model.num_parameters() == sum(row.size for row in schema(model.config))
    got = wing.numpy(wing.call(model, BATCH.input_ids).logits)
    assert close(got, oracle(tie_word_embeddings=True).forward(BATCH.input_ids).logits, dtype)


UNUSUAL = {
    "rotary_dim above head_dim": {"rotary_dim": 64},
    "rotary_dim None": {"rotary_dim": None},
    "rotary_dim 2": {"rotary_dim": 2},
    "n_inner None": {"n_inner": None},
    "one layer": {"n_layer": 1},
    "one head": {"n_head": 1},
    **{f"activation {name}": {"activation_function": name} for name in ACTIVATIONS},
}


@pytest.mark.parametrize("changes", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.feature("unusual rotary, inner and head sizes, every activation", "causal_lm")
def test_unusual_shapes_and_activations_are_the_oracles(wing, revealing, oracle, changes):
    ids = BATCH.input_ids[:2, :9]
    got = wing.numpy(wing.call(revealing(dtype="float64", **changes), ids).logits)
    assert close(got, oracle(**changes).forward(ids).logits, "float64")


def test_one_token_in_one_row(wing, revealing, oracle):
    got = wing.numpy(wing.call(revealing(dtype="float64"), [[5]]).logits)
    assert close(got, oracle().forward([[5]]).logits, "float64")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.feature("bfloat16 and float16 parameters, float32 logits", "causal_lm")
def test_logits_and_loss_of_a_16_bit_model_are_float32_and_near(wing, revealing, dtype):
    # 8 bits of mantissa: each of about 30 roundings on the way costs at most 2**-9 of logits of size 5.
    bound = {"bfloat16": 0.15, "float16": 0.02}[dtype]
    out = wing.call(revealing(dtype=dtype), BATCH.input_ids, **CALL, labels=BATCH.input_ids)
    raw = np.asarray(wing.module.to_numpy(out.logits))
    assert raw.dtype == np.float32 and np.asarray(wing.module.to_numpy(out.loss)).dtype == np.float32
    weights = {name: value.astype("float32") for name, value in revealing_weights(CONFIG).items()}
    expected = Oracle(CONFIG, weights).forward(BATCH.input_ids, **CALL).logits
    assert 0 < np.abs(raw - expected).max() < bound


LAYOUTS = {"fp32": "full", "bf16": "full_slim", "f16": "full_slim_f16"}
"""What the original calls its outputs, and the checkpoint that it computed them from."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The original's checkpoints, converted and loaded as float32, which is what the original computes in."""
    folders = {}

    def find(tag):
        if tag not in folders:
            folders[tag] = convert(
                MESH_FIXTURE / LAYOUTS[tag] / "step_120",
                tmp_path_factory.mktemp(tag) / "model",
                config=MESH_FIXTURE / "config.json",
                dtype="float32",
            )
        return folders[tag]

    return find


@pytest.mark.feature("logits, losses and tokens of the original TPU code", "causal_lm")
@pytest.mark.parametrize("tag", LAYOUTS)
def test_logits_are_those_of_the_original_implementation(wing, converted, tag):
    outputs = mesh_outputs()
    model = wing.model("causal_lm").from_pretrained(converted(tag))
    got = wing.numpy(wing.call(model, outputs["input_ids"]).logits)
    assert np.abs(got - outputs[f"logits_{tag}"]).max() <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize("tag", LAYOUTS)
def test_losses_are_those_of_the_original_implementation(wing, converted, tag):
    outputs = mesh_outputs()
    model = wing.model("causal_lm").from_pretrained(converted(tag))
    ids, targets, every = outputs["input_ids"], outputs["targets"], outputs[f"all_loss_{tag}"]
    logits = wing.numpy(wing.call(model, ids).logits)
    assert np.abs(token_losses(logits, targets) - every).max() <= FLOAT32_ABSOLUTE
    # Our labels are shifted inside, so a row with its last target behind it gives the loss of all its targets.
    for row, following, expected in zip(ids, targets, every, strict=True):
        labels = np.concatenate([row[:1], following[:-1]])[None]
        loss = wing.numpy(wing.call(model, row[None], labels=labels).loss)
        assert abs(loss - expected[:-1].mean()) <= FLOAT32_ABSOLUTE


@pytest.mark.parametrize("tag", ["fp32", "bf16"])
def test_greedy_tokens_are_those_of_the_original_implementation(wing, converted, tag):
    outputs = mesh_outputs()
    model = wing.model("causal_lm").from_pretrained(converted(tag))
    prompts, lengths = outputs["gen_context_right_aligned"], outputs["gen_ctx_length"]
    longest, new = int(lengths.max()), outputs[f"gen_tokens_{tag}"].shape[1]
    assert longest + new == model.config.n_positions
    mask = (np.arange(longest) >= longest - lengths[:, None]).astype(np.int64)
    made = wing.numpy(model.generate(prompts[:, -longest:], attention_mask=mask, max_new_tokens=new))
    assert made[:, longest:].tolist() == outputs[f"gen_tokens_{tag}"].tolist()
