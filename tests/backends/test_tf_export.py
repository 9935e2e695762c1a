"""A SavedModel of a model is reloaded, and steps over a cache as the model does."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from pages import block
from tokenizer_samples import small

from gptj import GPTJConfig
from gptj.checkpoint import write_checkpoint
from gptj.command.export import FORMATS, write
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.tf.export import cache_names

CONFIG = revealing_config()
SIZES = ((1, 5), (2, 1), (3, 7), (1, 1))


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "out"
    write(folder(), out, FORMATS["savedmodel"], dtype=None, weights=None)
    assert (out / "config.json").read_bytes() == (folder() / "config.json").read_bytes()
    return tf.saved_model.load(str(out))


def arguments(ids, start, mask, past):
    end = mask.shape[1]
    places = np.maximum(np.cumsum(mask, 1) - 1, 0)[:, start:]
    given = {"input_ids": ids[:, start:end], "attention_mask": mask, "position_ids": places}
    return {name: tf.constant(value, tf.int64) for name, value in given.items()} | past


@pytest.mark.feature("a step over a cache exported: SavedModel", "causal_lm")
def test_a_reloaded_model_steps_over_a_cache_of_any_length(served, oracle):
    names = cache_names(CONFIG.n_layer, "past_key_values")
    for b, t in SIZES:
        ids = np.random.default_rng(t).integers(0, CONFIG.vocab_size, (b, t + 2))
        expected = oracle().forward(ids).logits
        past = {name: tf.zeros((b, CONFIG.n_head, 0, CONFIG.head_dim)) for name in names}
        for start, end in ((0, t), (t, t + 2)):
            outputs = served.step(arguments(ids, start, np.ones((b, end), np.int64), past))
            assert np.abs(outputs["logits"] - expected[:, start:end]).max() <= 2e-5
            past = {name: outputs[name.replace("past_key_values", "present")] for name in names}
            assert past[names[0]].shape == (b, CONFIG.n_head, end, CONFIG.head_dim)


def test_padding_is_masked_and_a_wrong_id_refused(served, oracle):
    ids, mask = np.array([[0, 0, 5, 6], [7, 8, 9, 1]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    past = {
        name: tf.zeros((2, CONFIG.n_head, 0, CONFIG.head_dim))
        for name in cache_names(CONFIG.n_layer, "past_key_values")
    }
    logits = served.step(arguments(ids, 0, mask, past))["logits"].numpy()
    assert np.abs(logits[0, 2:] - oracle().forward([[5, 6]]).logits[0]).max() <= 2e-5
    with pytest.raises(tf.errors.InvalidArgumentError, match="input_ids: no such token"):
        served.step(arguments(ids + CONFIG.vocab_size, 0, mask, past))


def test_a_reloaded_model_serves_without_a_cache_by_its_signatures(served, oracle):
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 6))
    expected = oracle().forward(ids).logits
    given = {"input_ids": tf.constant(ids), "attention_mask": tf.ones_like(ids)}
    assert np.abs(served.serve(given)["logits"] - expected).max() <= 2e-5
    assert np.abs(served.signatures["serve"](**given)["logits"] - expected).max() <= 2e-5
    assert {"input_ids", "past_key_values_0_key"} <= served.signatures["step"].structured_input_signature[1].keys()


def test_a_mask_longer_than_the_tokens_is_none_of_theirs_in_a_graph_of_any_size(folder, oracle):
    """Where neither size is known, the mask of the keys was taken for one of the tokens."""
    from gptj.calls.outputs import KVCache
    from gptj.tf import GPTJForCausalLM

    model = GPTJForCausalLM.from_pretrained(folder())
    unknown = tf.TensorSpec((None, None), tf.int64)
    slots = [tf.TensorSpec((None, CONFIG.n_head, None, CONFIG.head_dim), tf.float32)] * (2 * CONFIG.n_layer)

    @tf.function(input_signature=[unknown, unknown, slots], autograph=False)
    def step(ids, mask, past):
        cache = KVCache(tuple(past[::2]), tuple(past[1::2]), tf.shape(past[0])[2])
        return model(ids, cache, mask, use_cache=False).logits

    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 6))
    held = model(ids[:, :4], use_cache=True).past_key_values
    past = [x for pair in zip(held.keys, held.values, strict=True) for x in pair]
    logits = step(tf.constant(ids[:, 4:]), tf.ones_like(ids), past)
    assert np.abs(logits - oracle().forward(ids).logits[:, 4:]).max() <= 2e-5


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_tensorflow_lite_steps_with_its_own_operations(folder, oracle, tmp_path):
    write(folder(), tmp_path / "out", FORMATS["savedmodel"], dtype=None, weights=None)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "out"), signature_keys=["step"])
    step = tf.lite.Interpreter(model_content=converter.convert()).get_signature_runner("step")
    names = cache_names(CONFIG.n_layer, "past_key_values")
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 7))
    expected = oracle().forward(ids).logits
    past = {name: np.zeros((2, CONFIG.n_head, 0, CONFIG.head_dim), np.float32) for name in names}
    for start, end in ((0, 5), (5, 7)):
        outputs = step(**arguments(ids, start, np.ones((2, end), np.int64), past))
        assert np.abs(outputs["logits"] - expected[:, start:end]).max() <= 2e-5
        past = {name: outputs[name.replace("past_key_values", "present")] for name in names}


def test_the_pages_program_writes_the_models_own_text(folder, tmp_path, monkeypatch):
    from gptj.tf import GPTJForCausalLM

    tokenizer = small()
    config = GPTJConfig(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    source = write_checkpoint(tmp_path / "model", config, revealing_fill(0), extra_files=tokenizer.files())
    write(source, tmp_path / "for-tensorflow", FORMATS["savedmodel"], dtype=None, weights=None)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("export.md", "In TensorFlow"), names)
    prompt = tokenizer.encode("Hello, my dog is cute")
    ours = GPTJForCausalLM.from_pretrained(source).generate(
        [prompt], max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert names["ids"] == ours[0].numpy().tolist()
