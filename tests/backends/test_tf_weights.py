"""What is TensorFlow's alone in weights and in import: paths, memory, settings of Keras, names of the classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from wings import named_backends

__test__ = "tf" in named_backends()  # where it is not under test, TensorFlow may not be there
if __test__:
    import keras
    import tensorflow as tf

    from gptj import tf as wing
    from gptj.checkpoint import write_checkpoint
    from gptj.config import GPTJConfig
    from gptj.config.schema import schema
    from gptj.errors import InputError
    from gptj.parity.revealing import revealing_config
    from gptj.tf import GPTJForCausalLM, GPTJModel, from_numpy, to_numpy


KERAS_ON_NUMPY_2 = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
"""Keras 3.15 makes arrays of its variables as NumPy 1 wanted it."""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, silent unless it fails."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_transformers_names_are_the_same_classes():
    for name in wing.__all__:
        if name.startswith("GPTJFor") or name == "GPTJModel":
            assert getattr(wing, f"TF{name}") is getattr(wing, name)
            assert issubclass(getattr(wing, name), keras.Model)


@pytest.mark.parametrize("tied", [False, True])
def test_paths_without_the_models_name_are_the_schemas_names(tied):
    config = revealing_config(tie_word_embeddings=tied)
    model = GPTJForCausalLM(config, name="any")
    assert {weight.path for weight in model.weights} == {"any/" + r.name.replace(".", "/") for r in schema(config)}
    assert model.variables == model.weights


def test_paths_stay_after_calls_and_resizing():
    model = GPTJForCausalLM(revealing_config(n_layer=1))
    paths = {weight.path for weight in model.weights}
    model(np.array([[1, 2, 3]]))
    model.resize_token_embeddings(300)
    assert {weight.path for weight in model.weights} == paths
    assert model.num_parameters() == sum(row.size for row in schema(model.config))


@pytest.mark.parametrize("tied", [False, True])
def test_another_embeddings_values_are_taken_and_counted_once(tied):
    model = GPTJForCausalLM(revealing_config(n_layer=1, tie_word_embeddings=tied), seed=1)
    count, other = model.num_parameters(), GPTJModel(revealing_config(n_layer=1), seed=2)
    model.set_input_embeddings(other.get_input_embeddings())
    assert np.array_equal(model.get_input_embeddings().weight, other.wte.weight)
    assert model.num_parameters() == count
    assert (model.get_output_embeddings().weight is model.transformer.wte.weight) == tied


def test_starting_afresh_keeps_the_variables():
    model = GPTJModel(revealing_config(n_layer=1), seed=1)
    weights = model.weights
    model.initialise(seed=2)
    assert all(one is other for one, other in zip(weights, model.weights, strict=True))
    assert np.array_equal(model.wte.weight, GPTJModel(model.config, seed=2).wte.weight)


def test_another_dtype_than_the_models_is_refused():
    with pytest.raises(InputError, match="expected float64, found float32"):
        GPTJModel(revealing_config(n_layer=1), dtype="float64").initialise(dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("offset", [0, 8])
def test_arrays_come_and_go_whole_aligned_or_not(dtype, offset):
    room = np.arange(4096, dtype=np.uint8)
    start = -room.ctypes.data % 64 + offset
    array = room[start : start + 1024].view(dtype)
    tensor = from_numpy(array)
    assert tensor.dtype.as_numpy_dtype == array.dtype
    assert to_numpy(tensor).tobytes() == array.tobytes()
    room[:] = 0
    assert to_numpy(tensor).any() == (offset != 0), "without a copy where it is aligned, and only there"


def test_read_only_and_scalar_arrays_are_copied():
    array = np.ones((4, 4), np.float32)
    array.setflags(write=False)
    assert np.array_equal(to_numpy(from_numpy(array)), array)
    assert to_numpy(from_numpy(np.array(3.0))) == 3


def test_training_does_not_change_the_file(folder):
    path = folder(n_layer=1) / "model.safetensors"
    before = path.read_bytes()
    model = GPTJForCausalLM.from_pretrained(path.parent, mmap=True)
    for weight in model.weights:
        weight.assign_add(tf.ones_like(weight))
    assert path.read_bytes() == before


def test_loading_needs_little_more_than_the_weights(tmp_path):
    # 14 tensors of 8 to 17 MB, so that the one being copied is a small part
    config = GPTJConfig(vocab_size=4096, n_positions=64, n_embd=1024, n_layer=4, n_head=8, rotary_dim=64)
    rows = schema(config)
    write_checkpoint(tmp_path / "model", config, lambda row: np.full(row.shape, 0.01, np.float32))
    code = f"""
import gptj.tf
def megabytes(key):
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key)) / 1024
before = megabytes('VmRSS')
model = gptj.tf.GPTJForCausalLM.from_pretrained({str(tmp_path / "model")!r})
print(megabytes('VmHWM') - before)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    weights = sum(row.size for row in rows) * 4 / 2**20
    assert float(done.stdout) <= 1.1 * weights + 12, weights  # what Keras makes of a first model is some 10 MB


@pytest.mark.parametrize("name", ["numpy", "jax", "no-such-framework"])
def test_keras_on_another_framework_is_refused_by_name(name):
    done = python("import gptj.tf", KERAS_BACKEND=name)
    assert f"BackendError: gptj.tf: Keras runs on another framework (expected tensorflow, found {name})" in done.stderr
    assert "KERAS_BACKEND=tensorflow" in done.stderr


def test_R5_keras_json_of_another_framework_is_refused_by_name(tmp_path):
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "numpy"}))
    # Keras' NumPy backend imports scipy: without it the import itself fails, with it Keras says where it runs
    hidden = "import sys; sys.modules['scipy'] = None; import gptj.tf"
    for code in ("import gptj.tf", hidden):
        done = python(code, KERAS_HOME=str(tmp_path), KERAS_BACKEND="")
        assert "BackendError: gptj.tf: Keras runs on another framework (expected tensorflow, found" in done.stderr


def test_import_sets_no_environment_variable():
    code = "import os; before = dict(os.environ); import tensorflow; left = dict(os.environ); import gptj.tf; "
    done = python(code + "print(dict(os.environ) == left)")
    assert done.stdout.strip() == "True", done.stderr


def test_R5_a_float16_of_keras_own_settings_is_not_taken_up(tmp_path, folder):
    (tmp_path / "keras.json").write_text(json.dumps({"floatx": "float16", "backend": "tensorflow"}))
    code = f"""
import keras, numpy as np, gptj.tf
assert keras.config.floatx() == 'float16'
model = gptj.tf.GPTJForCausalLM.from_pretrained({str(folder(n_layer=1))!r})
output = model(np.array([[1, 2, 3]]), output_hidden_states=True, output_attentions=True)
made = gptj.tf.GPTJModel(model.config)
dtypes = {{w.dtype for w in (*model.weights, *made.weights)}}
print(dtypes | {{x.dtype.name for x in (*output.hidden_states, *output.attentions)}})
"""
    done = python(code, KERAS_HOME=str(tmp_path))
    assert done.stdout.strip() == "{'float32'}", done.stderr


@pytest.mark.filterwarnings(KERAS_ON_NUMPY_2)
def test_weights_of_keras_own_file_are_the_same_again(folder, tmp_path):
    model = GPTJModel.from_pretrained(folder(n_layer=1))
    model.save_weights(tmp_path / "a.weights.h5")
    other = GPTJModel(model.config)
    other.load_weights(tmp_path / "a.weights.h5")
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), other.get_weights(), strict=True))
