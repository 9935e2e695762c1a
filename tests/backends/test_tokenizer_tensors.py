"""A tokenizer's tensors are the framework's own, with the values of NumPy's, and its model takes them as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizer_samples import small
from wings import Wing

from gptj import GPTJConfig

KINDS: dict[str, Any] = {"pt": "pt", "tf": "tf", "flax": "jax"}
WIDTHS = {"pt": "int64", "tf": "int32", "flax": "int32"}


def test_tensors_have_numpys_values_and_the_frameworks_own_type(wing: Wing) -> None:
    arguments: Any = {"padding": True, "return_offsets": True}
    batch = small()([("The dog", " é"), ("a", "b")], return_tensors=KINDS[wing.name], **arguments)
    expected = small()([("The dog", " é"), ("a", "b")], return_tensors="np", **arguments)
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
        assert type(value).__module__.startswith({"pt": "torch", "tf": "tensorflow", "flax": "jax"}[wing.name])
        assert str(np.asarray(value).dtype) == WIDTHS[wing.name]
        np.testing.assert_array_equal(np.asarray(value), expected[name])


def test_the_models_ids_are_decoded_as_they_come(wing: Wing) -> None:
    ids = small()(["The dog", "a fox"], padding=True, return_tensors=KINDS[wing.name]).input_ids
    assert small().batch_decode(ids, skip_special_tokens=True) == ["The dog", "a fox"]
    assert small().decode(ids[0], skip_special_tokens=True) == "The dog"
    assert small().decode([one for one in ids[0]], skip_special_tokens=True) == "The dog"  # noqa: C416
    assert small().stream(skip_special_tokens=True).push(ids[1][-1]) == small().decode(int(ids[1][-1]))


def test_a_model_takes_an_encoding_as_its_arguments(wing: Wing) -> None:
    config = GPTJConfig(vocab_size=304, n_positions=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=4)
    small().check_fits(config)
    model = wing.model("causal_lm")(config)
    encoding = small()(["The dog", "a"], padding=True, return_tensors=KINDS[wing.name])
    assert tuple(model(**encoding).logits.shape) == (*encoding.input_ids.shape, 304)


@pytest.mark.parametrize("wrong", [-1, 300])
def test_an_unknown_id_in_a_tensor_is_refused(wing: Wing, wrong: int) -> None:
    ids = small()(["The dog"], return_tensors=KINDS[wing.name]).input_ids
    with pytest.raises(ValueError, match=rf"sequences\[0\]\[\d+\]: unknown token id .*found {wrong}"):
        small().batch_decode(ids * 0 + wrong)
