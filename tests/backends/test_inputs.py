"""A wrong argument is the same InputError in every wing, before anything is computed: it names argument and value."""

import ml_dtypes
import numpy as np
import pytest

from gptj.errors import ConfigError, InputError
from gptj.parity.revealing import revealing_config

CONFIG = revealing_config()
V, N = CONFIG.vocab_size, CONFIG.n_positions
IDS = np.arange(10).reshape(2, 5)

WRONG = {
    "an id that the vocabulary lacks": ({"input_ids": [[1, V]]}, rf"input_ids\[0\]\[1\]: no such token .*found {V}"),
    "a negative id": ({"input_ids": [[1, -1]]}, r"input_ids\[0\]\[1\]: no such token .*found -1"),
    "an id that overflowed int8": ({"input_ids": np.array([[-56]], np.int8)}, "found -56"),
    "floats": ({"input_ids": [[1.0]]}, "input_ids: not whole numbers"),
    "bools": ({"input_ids": [[True]]}, "input_ids: not whole numbers"),
    "one axis": ({"input_ids": [1, 2]}, r"input_ids: of another shape .*found \(2,\)"),
    "three axes": ({"input_ids": [[[1]]]}, r"input_ids: of another shape .*found \(1, 1, 1\)"),
    "no token": ({"input_ids": np.zeros((1, 0), int)}, r"input_ids: of another shape .*found \(1, 0\)"),
    "no row": ({"input_ids": np.zeros((0, 1), int)}, r"input_ids: of another shape .*found \(0, 1\)"),
    "ragged rows": ({"input_ids": [[1, 2], [3]]}, "input_ids: rows of different lengths"),
    "neither ids nor embeddings": ({}, "give exactly one of them .*neither"),
    "both ids and embeddings": (
        {"input_ids": IDS, "inputs_embeds": np.zeros((2, 5, CONFIG.n_embd), "float32")},
        "both",
    ),
    "embeddings of another width": (
        {"inputs_embeds": np.zeros((2, 5, 3), "float32")},
        "inputs_embeds: of another shape",
    ),
    "more tokens than positions": (
        {"input_ids": np.zeros((1, N + 1), int)},
        f"n_positions = {N} tokens, found {N + 1}",
    ),
    "a position too far": ({"input_ids": IDS, "position_ids": IDS + N - 9}, rf"position_ids\[1\]\[4\].*found {N}"),
    "a negative position": ({"input_ids": IDS, "position_ids": IDS - 1}, r"position_ids\[0\]\[0\].*found -1"),
    "positions of another length": ({"input_ids": IDS, "position_ids": IDS[:, 1:]}, "position_ids: of another shape"),
    "a mask of another length": (
        {"input_ids": IDS, "attention_mask": np.ones((2, 4), int)},
        "attention_mask: of another",
    ),
    "a mask with a 2": (
        {"input_ids": IDS, "attention_mask": np.full((2, 5), 2)},
        r"attention_mask\[0\]\[0\]: not a mask",
    ),
    "a mask of parts": ({"input_ids": IDS, "attention_mask": np.full((2, 5), 0.5)}, r"\[0\]\[0\]: not a mask .*0\.5"),
    "a mask of NaN": ({"input_ids": IDS, "attention_mask": np.full((2, 5), np.nan)}, r"\[0\]\[0\]: not a mask .*nan"),
    "a mask of words": ({"input_ids": IDS, "attention_mask": np.full((2, 5), "1")}, "attention_mask: not numbers"),
    "types of another shape": ({"input_ids": IDS, "token_type_ids": IDS[:1]}, "token_type_ids: of another shape"),
    "a type that the vocabulary lacks": ({"input_ids": IDS, "token_type_ids": IDS + V}, r"token_type_ids\[0\]\[0\]"),
    "a head mask of another shape": ({"input_ids": IDS, "head_mask": np.ones(99, "float32")}, "head_mask: of another"),
    "labels of another shape": ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels: of another shape"),
    "a label that the vocabulary lacks": ({"input_ids": IDS, "labels": IDS + V}, r"labels\[0\]\[0\]: no such class"),
    "a label of -1": ({"input_ids": IDS, "labels": np.full((2, 5), -1)}, r"labels\[0\]\[0\]: no such class .*found -1"),
    "labels of floats": ({"input_ids": IDS, "labels": IDS + 0.5}, "labels: not whole numbers"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.feature("wrong arguments named on the host", "causal_lm")
def test_G1_G3_a_wrong_argument_is_named(wing, revealing, arguments, message):
    with pytest.raises(InputError, match=message):
        wing.call(revealing(), **arguments)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint16])
def test_any_integer_type_serves(wing, revealing, dtype):
    expected = wing.numpy(wing.call(revealing(), IDS).logits)
    assert (wing.numpy(wing.call(revealing(), IDS.astype(dtype)).logits) == expected).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.bool_, np.int8])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_mask_of_zeros_and_ones_may_be_of_any_type(wing, revealing, dtype, call):
    model, mask = revealing(), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def run(mask):
        if call == "generate":
            return wing.numpy(model.generate(IDS, attention_mask=mask, max_new_tokens=3))
        return wing.numpy(wing.call(model, IDS, attention_mask=mask).logits)

    assert np.array_equal(run(wing.module.from_numpy(mask.astype(dtype))), run(mask))


def test_lists_serve(wing, revealing):
    expected = wing.numpy(wing.call(revealing(), IDS).logits)
    assert (wing.numpy(wing.call(revealing(), IDS.tolist()).logits) == expected).all()


def test_return_dict_false_gives_the_tuple(wing, revealing):
    out = wing.call(revealing(), IDS, labels=IDS, return_dict=False, output_hidden_states=True)
    full = wing.call(revealing(), IDS, labels=IDS, output_hidden_states=True)
    assert isinstance(out, tuple) and len(out) == 4 == len(full)
    assert full.keys() == ("loss", "logits", "past_key_values", "hidden_states")
    assert (wing.numpy(out[1]) == wing.numpy(full[1])).all() and full["logits"] is full.logits is full[1]


class Nothing:
    """An object without any of the methods that an argument needs."""


CALLS = {
    "a config of another kind": ({"generation_config": 3}, "generation_config: cannot be used .*found 3"),
    "a streamer that is a number": ({"streamer": 3}, r"streamer: cannot be used .*put\(\) and end\(\)"),
    "a streamer without end": ({"streamer": Nothing()}, "streamer: cannot be used"),
    "a ragged mask": ({"attention_mask": [[1] * 5, [1]]}, "attention_mask: rows of different lengths"),
    "a mask that is a number": ({"attention_mask": 3}, "attention_mask: "),
    "a mask that is text": ({"attention_mask": "1"}, "attention_mask: no array"),
    "a mask of nulls": ({"attention_mask": [[1, None]]}, "attention_mask: not numbers"),
    "ragged ids": ({"input_ids": [[1, 2], [1]]}, "input_ids: rows of different lengths"),
    "ids that are a set": ({"input_ids": {1, 2}}, "input_ids: no array"),
    "ids that are an object": ({"input_ids": Nothing()}, "input_ids: no array"),
    "embeddings that are text": ({"input_ids": None, "inputs_embeds": "x"}, "inputs_embeds: no array"),
    "ragged embeddings": ({"input_ids": None, "inputs_embeds": [[[1.0], [1.0, 2.0]]]}, "inputs_embeds: rows of diff"),
    "types that are a number": ({"token_type_ids": Nothing()}, "token_type_ids: no array"),
    "a processor that is a number": ({"logits_processor": 3}, "logits_processor: not a list of functions"),
    "a processor by itself": ({"logits_processor": max}, "logits_processor: not a list of functions"),
    "a criterion that is text": ({"stopping_criteria": ["x"]}, "stopping_criteria: not a list of functions"),
    "a seed that is text": ({"seed": "x"}, "seed: no such seed .*found 'x'"),
    "a seed of 5,000 digits": ({"seed": 10**5000}, "seed: no such seed .*found int of 16,610 bits"),
    "a tokenizer that is a number": ({"tokenizer": 3}, r"tokenizer: cannot be used .*decode\(\)"),
    "an assistant that is a number": ({"assistant_model": 3}, "assistant_model: cannot be used"),
    "allowed tokens that are a list": ({"prefix_allowed_tokens_fn": [1]}, "prefix_allowed_tokens_fn: not a function"),
}


@pytest.mark.parametrize(("arguments", "message"), CALLS.values(), ids=CALLS)
def test_a_wrong_argument_of_generate_is_named(wing, revealing, arguments, message):
    with pytest.raises(InputError, match=message):
        revealing().generate(**{"input_ids": IDS, "max_new_tokens": 2, **arguments})


def test_a_dict_is_a_generation_config_and_as_strict(wing, revealing):
    model = revealing()
    by_keyword = model.generate(IDS, max_new_tokens=2)
    assert (wing.numpy(model.generate(IDS, {"max_new_tokens": 2})) == wing.numpy(by_keyword)).all()
    with pytest.raises(ConfigError, match=r"'max_new_token': no such field\. Did you mean max_new_tokens\?"):
        model.generate(IDS, {"max_new_token": 2})


@pytest.mark.parametrize("field", ["attention_mask", "position_ids", "token_type_ids", "head_mask"])
def test_a_ragged_argument_of_a_model_call_is_named(wing, revealing, field):
    with pytest.raises(InputError, match=f"{field}: rows of different lengths"):
        wing.call(revealing(), input_ids=IDS, **{field: [[1] * 5, [1]]})
