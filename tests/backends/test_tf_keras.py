"""What is TensorFlow's alone in training and keeping: Keras' compile, fit, evaluate, predict, save and export."""

from __future__ import annotations

import numpy as np
import pytest
from wings import FLOAT32_ABSOLUTE, named_backends

__test__ = "tf" in named_backends()  # where it is not under test, TensorFlow may not be there
if __test__:
    import keras
    import tensorflow as tf

    from gptj.calls.outputs import CausalLMOutputWithPast
    from gptj.errors import InputError
    from gptj.generation import GenerationConfig
    from gptj.parity.revealing import revealing_config
    from gptj.tf import GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel

pytestmark = pytest.mark.filterwarnings(
    # Keras 3.15 makes arrays of its variables as NumPy 1 wanted it.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # Keras warns of every dataset, since shuffle is True by default.
    "ignore:`shuffle=True` was passed, but will be ignored:UserWarning",
)

FEW = {"n_layer": 1, "n_positions": 32}
IDS = np.random.default_rng(0).integers(0, 214, (5, 6))
MASK = np.ones_like(IDS)
CLASSES = IDS[:, 0] % 5
STARTS, ENDS = IDS[:, 1] % 6, IDS[:, 2] % 6
STEP = {"shuffle": False, "verbose": 0, "batch_size": 5}


@pytest.fixture
def model(folder):
    return GPTJForCausalLM.from_pretrained(folder(**FEW))


def from_logits():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def values(model):
    return {weight.path.split("/", 1)[1]: weight.numpy() for weight in model.weights}


@pytest.mark.feature("Keras compile, fit, predict", "causal_lm")
@pytest.mark.parametrize("options", [{"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}], ids=str)
def test_labels_inside_the_dict_train_with_the_models_own_loss(model, oracle, options):
    from gptj.parity.oracle import causal_lm_loss

    model.compile(keras.optimizers.SGD(0.1), **options)
    history = model.fit({"input_ids": IDS, "attention_mask": MASK, "labels": IDS}, epochs=2, **STEP).history["loss"]
    assert abs(history[0] - causal_lm_loss(oracle(**FEW).forward(IDS).logits, IDS)) <= FLOAT32_ABSOLUTE
    assert history[1] < history[0]


def test_a_step_of_fit_is_the_step_of_a_loop(folder, model):
    model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    model.fit({"input_ids": IDS, "labels": IDS}, **STEP)
    other = GPTJForCausalLM.from_pretrained(folder(**FEW))
    with tf.GradientTape() as tape:
        loss = other(IDS, labels=IDS, training=True).loss
    for weight, slope in zip(other.trainable_weights, tape.gradient(loss, other.trainable_weights), strict=True):
        weight.assign_sub(0.1 * tf.convert_to_tensor(slope))
    for name, value in values(other).items():
        assert np.abs(values(model)[name] - value).max() <= FLOAT32_ABSOLUTE, name


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_that_occurs_twice_counts_as_one_to_adam(folder, tied):
    model = GPTJForCausalLM.from_pretrained(folder(tie_word_embeddings=tied, **FEW))
    with tf.GradientTape() as tape:
        loss = model(IDS * 0 + 7, labels=IDS, training=True).loss
    table = model.transformer.wte.weight
    before, slope = table.numpy(), tape.gradient(loss, [table])[0]
    assert isinstance(slope, tf.Tensor), "Keras squares each row of tf.IndexedSlices on its own"
    keras.optimizers.Adam(0.01, epsilon=1e-30).apply([slope], [table])
    step = np.abs(table.numpy() - before)[7]
    assert np.abs(step - 0.01).max() <= 1e-4  # Adam's first step is the rate, whatever the gradient


def test_a_loss_given_to_compile_gets_the_logits_and_y(model, oracle):
    model.compile(keras.optimizers.SGD(0.0), from_logits(), metrics=["accuracy"], jit_compile=False)
    history = model.fit({"input_ids": IDS}, IDS, **STEP).history
    logits = oracle(**FEW).forward(IDS).logits
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, IDS[..., None], -1)).mean()
    assert abs(history["loss"][0] - expected) <= FLOAT32_ABSOLUTE
    assert history["accuracy"] == [pytest.approx((logits.argmax(-1) == IDS).mean())]


@pytest.mark.feature("Keras compile, fit, predict", "question_answering")
@pytest.mark.parametrize("as_dict", [False, True])
def test_spans_train_with_a_loss_for_each_end(as_dict):
    model = GPTJForQuestionAnswering(revealing_config(**FEW))
    names = ("start_positions", "end_positions")
    losses, y = [from_logits(), from_logits()], (STARTS, ENDS)
    if as_dict:
        losses, y = dict(zip(names, losses, strict=True)), dict(zip(names, y, strict=True))
    model.compile("sgd", losses, jit_compile=False)
    before = model(IDS, start_positions=STARTS, end_positions=ENDS).loss
    assert model.fit(IDS, y, **STEP).history["loss"] == [pytest.approx(2 * float(before), rel=1e-5)]


@pytest.mark.feature("Keras compile, fit, predict", "sequence_classification")
@pytest.mark.parametrize("data", ["arrays", "dataset"])
def test_classes_train_evaluate_and_are_predicted(data):
    model = GPTJForSequenceClassification(revealing_config(**FEW))
    model.compile("adam", jit_compile=False)
    x = {"input_ids": IDS, "labels": CLASSES}
    if data == "dataset":
        x = tf.data.Dataset.from_tensor_slices(x).batch(5)
    options = {} if data == "dataset" else {"batch_size": 5}
    model.fit(x, verbose=0, shuffle=False, **options)
    own = float(model(IDS, labels=CLASSES).loss)
    assert model.evaluate(x, verbose=0, **options) == pytest.approx(own, rel=1e-5)
    assert np.abs(model.predict(x, verbose=0, **options).logits - model(IDS).logits).max() <= FLOAT32_ABSOLUTE


def test_predict_returns_an_output_of_all_rows_without_cache_and_loss(model):
    predicted = model.predict({"input_ids": IDS, "labels": IDS}, batch_size=2, verbose=0)
    assert type(predicted) is CausalLMOutputWithPast and predicted.keys() == ("logits",)
    assert isinstance(predicted.logits, np.ndarray)
    assert np.abs(predicted.logits - model(IDS).logits).max() <= FLOAT32_ABSOLUTE


def test_a_loss_without_a_y_is_refused(model):
    model.compile("sgd", from_logits(), jit_compile=False)
    with pytest.raises(InputError, match=r"the labels are inside x.*Pass the labels as y"):
        model.fit({"input_ids": IDS, "labels": IDS}, **STEP)


@pytest.mark.parametrize("data", ["arrays", "dataset", "generator"])
@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_without_a_compiled_loss_y_are_the_models_labels(folder, data, options):
    x, inside = IDS, GPTJForCausalLM.from_pretrained(folder(**FEW))
    inside.compile(keras.optimizers.SGD(0.1), **options)
    expected = inside.fit({"input_ids": IDS, "labels": IDS}, epochs=2, **STEP).history["loss"]
    model = GPTJForCausalLM.from_pretrained(folder(**FEW))
    model.compile(keras.optimizers.SGD(0.1), metrics=["accuracy"], **options)
    steps = dict(STEP)
    if data != "arrays":
        del steps["batch_size"]
    if data == "dataset":
        given = (tf.data.Dataset.from_tensor_slices((IDS, IDS)).batch(5),)
    elif data == "generator":
        given, steps["steps_per_epoch"] = ((batch for batch in [(IDS, IDS)] * 2),), 1
    else:
        given = (x, IDS)
    history = model.fit(*given, epochs=2, **steps).history
    assert history["loss"] == pytest.approx(expected, rel=1e-5) and 0 <= history["accuracy"][0] <= 1
    if data == "arrays":
        own = float(model(IDS, labels=IDS).loss)
        assert model.evaluate(IDS, IDS, batch_size=5, verbose=0)[0] == pytest.approx(own, rel=1e-5)


def test_the_other_heads_know_their_labels_too(folder):
    model = GPTJForSequenceClassification(revealing_config(**FEW))
    model.compile("sgd", jit_compile=False)
    own = float(model(IDS, labels=CLASSES).loss)
    assert model.fit(IDS, CLASSES, **STEP).history["loss"] == [pytest.approx(own, rel=1e-5)]
    model = GPTJForQuestionAnswering(revealing_config(**FEW))
    model.compile("sgd", jit_compile=False)
    own = float(model(IDS, start_positions=STARTS, end_positions=ENDS).loss)
    assert model.evaluate(IDS, (STARTS, ENDS), batch_size=5, verbose=0) == pytest.approx(own, rel=1e-5)
    named = {"end_positions": ENDS, "start_positions": STARTS}
    assert model.evaluate(IDS, named, batch_size=5, verbose=0) == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (IDS + 214, r"labels\[\d\]\[\d\]: no such class"),
        (IDS[:, 1:], "labels: of another shape"),
        ((IDS, IDS), r"y: not the model's labels .*labels.*2 arrays"),
    ],
)
def test_wrong_labels_as_y_are_refused_before_xla_computes(model, labels, message):
    model.compile("sgd", jit_compile=True)
    with pytest.raises(InputError, match=message):
        model.fit(IDS, labels, **STEP)


def test_labels_in_x_and_in_y_are_refused(model):
    model.compile("sgd", jit_compile=False)
    with pytest.raises(InputError, match="labels: labels in x and in y"):
        model.fit({"input_ids": IDS, "labels": IDS}, IDS, **STEP)


def test_a_base_model_has_no_labels():
    model = GPTJModel(revealing_config(**FEW))
    model.compile("sgd", jit_compile=False)
    with pytest.raises(InputError, match=r"y: not the model's labels .*a loss given to compile"):
        model.fit(IDS, IDS, **STEP)


def test_weights_of_samples_need_a_compiled_loss(model):
    model.compile("sgd", jit_compile=False)
    with pytest.raises(InputError, match="compile: a loss or weights"):
        model.fit(IDS, IDS, sample_weight=np.ones(5), **STEP)


def test_training_on_nothing_is_refused(model):
    model.compile("sgd", jit_compile=False)
    with pytest.raises(InputError, match="x: no labels to train on"):
        model.fit({"input_ids": IDS}, **STEP)


@pytest.mark.parametrize("run", ["fit", "evaluate", "predict"])
def test_wrong_arrays_are_refused_before_xla_computes(model, run):
    model.compile("sgd", jit_compile=True)
    wrong = IDS.copy()
    wrong[3, 2] = 216
    with pytest.raises(InputError, match=r"input_ids\[3\]\[2\]: no such token .*found 216"):
        getattr(model, run)({"input_ids": wrong, "labels": IDS}, verbose=0)


def test_a_wrong_batch_of_a_dataset_is_refused_before_xla_computes(model):
    model.compile("sgd", jit_compile=True)
    wrong = IDS.copy()
    wrong[3, 2] = 216
    batches = tf.data.Dataset.from_tensor_slices(({"input_ids": wrong, "labels": IDS},)).batch(2)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"input_ids: no such token .*216"):
        model.predict(batches, verbose=0)


@pytest.mark.feature("mixed_float16 and mixed_bfloat16 policies", "causal_lm")
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_mixed_policy_keeps_float32_and_computes_in_16_bits(folder, oracle, policy):
    model = GPTJForCausalLM.from_pretrained(folder(**FEW), dtype=policy)
    output = model(IDS, output_hidden_states=True)
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert {x.dtype.name for x in output.hidden_states} == {policy.removeprefix("mixed_")}
    assert output.logits.dtype == tf.float32
    assert np.abs(output.logits - oracle(**FEW).forward(IDS).logits).max() <= 0.2  # bf16 holds 8 bits of logits of 5
    model.compile("sgd", jit_compile=False)
    # float16's loss scale starts too high, and is halved at every step until the gradient is finite
    losses = model.fit({"input_ids": IDS, "labels": IDS}, epochs=9, **STEP).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.feature("model.save and reload", "causal_lm")
@pytest.mark.parametrize("tied", [False, True])
def test_a_keras_file_brings_back_model_and_optimizer(folder, tmp_path, tied):
    model = GPTJForCausalLM.from_pretrained(folder(tie_word_embeddings=tied, **FEW))
    model.generation_config = GenerationConfig(max_new_tokens=3)
    model.compile("adam", jit_compile=False)
    model.fit({"input_ids": IDS, "labels": IDS}, **STEP)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is GPTJForCausalLM and loaded.config == model.config
    assert loaded.generation_config == model.generation_config
    assert np.array_equal(loaded(IDS).logits, model(IDS).logits)
    assert int(loaded.optimizer.iterations) == 1
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied


@pytest.mark.feature("model.export to a SavedModel", "every")
@pytest.mark.parametrize(
    "class_",
    [GPTJModel, GPTJForCausalLM, GPTJForSequenceClassification, GPTJForQuestionAnswering] if __test__ else [],
)
def test_a_saved_model_serves_without_this_library(tmp_path, class_):
    model = class_(revealing_config(**FEW), seed=3)
    model.export(tmp_path / "served")
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    served = loaded.serve({"input_ids": IDS, "attention_mask": MASK})
    expected = model(IDS, attention_mask=MASK)
    assert set(served) == set(expected.keys()) - {"past_key_values"}
    for name, value in served.items():
        assert np.abs(value - expected[name]).max() <= FLOAT32_ABSOLUTE


def test_an_exported_model_refuses_what_the_model_refuses(tmp_path):
    GPTJModel(revealing_config(**FEW)).export(tmp_path / "served")
    served = tf.saved_model.load(str(tmp_path / "served"))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"input_ids: no such token .*216"):
        served.serve({"input_ids": IDS * 0 + 216, "attention_mask": MASK})


@pytest.mark.parametrize("jit_compile", [False, True])
def test_recomputed_blocks_drop_the_same_elements_again(folder, jit_compile):
    drops = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
    model = GPTJForCausalLM.from_pretrained(folder(**drops, **FEW))

    @tf.function(autograph=False, jit_compile=jit_compile)
    def slopes(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        return loss, [tf.convert_to_tensor(slope) for slope in tape.gradient(loss, model.trainable_weights)]

    found = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        slopes = tf.function(slopes.python_function, autograph=False, jit_compile=jit_compile)
        model.transformer.seed_generator.state.assign([7, 0])
        found.append(slopes(tf.constant(IDS)))
    assert abs(found[0][0] - found[1][0]) <= FLOAT32_ABSOLUTE
    for kept, recomputed in zip(found[0][1], found[1][1], strict=True):
        assert np.abs(kept - recomputed).max() <= FLOAT32_ABSOLUTE


def test_two_calls_in_training_drop_different_elements(folder):
    model = GPTJForCausalLM.from_pretrained(folder(resid_pdrop=0.2, **FEW))
    assert np.abs(model(IDS, training=True).logits - model(IDS, training=True).logits).max() > 1e-3


@pytest.mark.parametrize("head", ["GPTJModel", "GPTJForCausalLM"])
def test_a_config_in_place_of_keras_settings_gets_the_call_that_is_meant(head):
    with pytest.raises(InputError, match=rf"config: .*found GPTJConfig.*{head}\(config\)"):
        globals()[head].from_config(revealing_config())
