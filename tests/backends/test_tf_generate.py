"""What is TensorFlow's alone in generation: steps that XLA compiles, few shapes, a cache that is updated in place."""

from __future__ import annotations

import operator
import re
import subprocess
import sys

import numpy as np
import pytest
from wings import FLOAT32_ABSOLUTE, named_backends

__test__ = "tf" in named_backends()  # where it is not under test, TensorFlow may not be there
if __test__:
    import tensorflow as tf

    from gptj.tf import Decoder, GPTJForCausalLM
    from gptj.tf.generate import CompiledModel

FEW = {"n_layer": 1, "n_positions": 200}


@pytest.fixture(scope="module")
def model(folder):
    return GPTJForCausalLM.from_pretrained(folder(**FEW))


def prompt(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 214, (2, length))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31])
def test_padding_to_a_compiled_shape_changes_nothing(model, oracle, length):
    step = Decoder(model, 2, 40).extend(prompt(length), want=frozenset({"hidden_states", "attentions"}))
    whole = oracle(**FEW).forward(prompt(length), attentions=True)
    for got, expected in zip(
        (step.logits, *step.hidden_states, *step.attentions),
        (whole.logits, *whole.hidden_states, *whole.attentions),
        strict=True,
    ):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= FLOAT32_ABSOLUTE


def test_a_prompt_that_fills_the_cache_to_its_last_slot_fits(model, oracle):
    decoder = Decoder(model, 2, 200)  # rounded up it would have more slots than the model has positions
    decoder.prefill(prompt(200)[:, :150])
    step = decoder.extend(prompt(200)[:, 150:])  # 50 columns would be rounded to 64, and 50 slots are left
    assert np.abs(step.logits - oracle(**FEW).forward(prompt(200)).logits[:, 150:]).max() <= FLOAT32_ABSOLUTE


def test_prompts_and_results_of_many_lengths_compile_few_shapes(folder):
    model = GPTJForCausalLM.from_pretrained(folder(**FEW))
    for length in range(9, 17):
        model.generate(prompt(length), max_new_tokens=length, eos_token_id=None)
    compiled = CompiledModel.of(model).functions
    assert len(compiled) == 6  # a prompt of 16 and a step, in a cache of 64: the graph, its block and its head
    assert [function.experimental_get_tracing_count() for function in compiled.values()] == [1] * 6


def test_one_program_serves_every_block(folder):
    model = GPTJForCausalLM.from_pretrained(folder(n_layer=3))
    Decoder(model, 1, 64).prefill(prompt(5)[:1])
    assert program(model, "compiled_block").experimental_get_tracing_count() == 1


def test_a_second_model_of_the_same_config_compiles_nothing(folder):
    def programs(model):
        model.generate(prompt(5), max_new_tokens=4, eos_token_id=None)
        return {id(one) for key, one in CompiledModel.of(model).functions.items() if key[0] != "_run"}

    first, second = (GPTJForCausalLM.from_pretrained(folder(**FEW)) for _ in range(2))
    assert programs(first) == programs(second)
    second.lm_head.bias.assign(tf.one_hot(17, 216) * 1000)
    first.lm_head.bias.assign(tf.one_hot(18, 216) * 1000)
    for model, token in ((first, 18), (second, 17)):
        assert (model.generate(prompt(5), max_new_tokens=4, eos_token_id=None).numpy()[:, 5:] == token).all()


def program(model, *begin):
    """The one of this name and shape."""
    functions = CompiledModel.of(model).functions
    return next(functions[key] for key in functions if key[: len(begin)] == begin)


def compiled_text(model, name: str, stage: str) -> str:
    """What XLA was given, or made, of a step's block or head."""
    decoder = Decoder(model, 1, 64)
    decoder.prefill(prompt(5)[:1])
    decoder.step(np.array([3]))
    c, number = model.config, tf.constant(7)
    x, angles = tf.zeros((1, 1, c.n_embd)), tf.zeros((1, 1, c.rotary_width // 2))
    block, head = model.transformer.h[0], (model.transformer.ln_f, model.lm_head)
    parameters = {name: operator.attrgetter(name)(block).value for name in CompiledModel.of(model).names}
    arguments = {
        "compiled_block": (
            parameters,
            {},
            decoder.keys[0],
            decoder.values[0],
            x,
            (angles, angles),
            tf.ones((1, 1, 1, 64), tf.bool),
            number,
        ),
        "compiled_head": (*({"weight": one.weight.value, "bias": one.bias.value} for one in head), x, number),
    }
    return program(model, name, 1, 1).experimental_get_compiler_ir(*arguments[name])(stage=stage)


def test_a_step_is_not_compiled_anew_for_another_token_or_slot(model):
    header = compiled_text(model, "compiled_block", "hlo").splitlines()[0]
    layout = header[header.index("entry_computation_layout") :]
    assert layout.count("f32[1,1,48]") >= 1, "the stream must be an input of the program, not a constant"
    assert layout.count("s32[]") >= 1 and layout.count("pred[1,1,1,64]") >= 1


def test_a_step_updates_its_cache_in_place(model):
    text = compiled_text(model, "compiled_block", "optimized_hlo")
    assert "may-alias" in text.splitlines()[0]
    assert not re.findall(r"f32\[4,64,12\]\S* copy\(", text), "a copy of a whole cache at every step"


@pytest.mark.parametrize(("name", "products"), [("compiled_block", 6), ("compiled_head", 1)])
def test_a_step_multiplies_on_every_thread(model, name, products):
    text = compiled_text(model, name, "optimized_hlo")
    entry = text[text.index("\nENTRY") :]
    alone = re.findall(r" dot\(", entry)
    assert "dot_add" not in text, "XLA computes a product that it fused an addition into on one thread"
    assert len(alone) >= products


def test_new_weights_are_compiled_in(folder):
    model = GPTJForCausalLM.from_pretrained(folder(**FEW))
    before = model.generate(prompt(5), max_new_tokens=4, eos_token_id=None).numpy()
    model.lm_head.bias.assign(tf.one_hot(17, 216) * 1000)
    assert (model.generate(prompt(5), max_new_tokens=4, eos_token_id=None).numpy()[:, 5:] == 17).all()
    model.resize_token_embeddings(300)
    model.lm_head.bias.assign(tf.one_hot(250, 300) * 1000)
    after = model.generate(prompt(5), max_new_tokens=4, eos_token_id=None).numpy()
    assert (after[:, 5:] == 250).all() and (before[:, 5:] != 250).all()


def test_a_model_that_has_generated_can_be_exported(model, tmp_path):
    model.generate(prompt(3), max_new_tokens=2, eos_token_id=None)
    model.export(tmp_path / "served")
    served = tf.saved_model.load(str(tmp_path / "served"))
    ids = prompt(3)
    got = served.serve({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    assert np.abs(got - model(ids).logits).max() <= FLOAT32_ABSOLUTE


def test_the_command_line_imports_nothing_that_tensorflow_uses_for_other_things(folder):
    """Where they are installed, tensorflow.lite imports jax, and Keras matplotlib; afterwards both can be imported."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom gptj.command.continuation import continue_prompts\n"
        "from gptj.command.opened_model import Request\n"
        "from gptj.command.prompts import Prompt\n"
        f"continue_prompts(Request(directory=Path({str(folder())!r}), backend='tf', settings={{'max_new_tokens': 1}}),"
        " [Prompt(token_ids=(1, 2))], batch_size=1, as_json=False, write=print)\n"
        "print(*sorted({'jax', 'matplotlib', 'tensorflow'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tensorflow"
