"""A model prepared for inference: what it computes, and what it refuses from then on."""

import pytest

from gptj.errors import InputError


def test_a_quantization_that_nobody_has_is_named(wing, folder):
    with pytest.raises(InputError, match=r"quantize: no such quantization here \(expected None.*, found 'int3'\)"):
        wing.model("causal_lm").from_pretrained(folder(), inference=True, quantize="int3")


def test_a_quantization_without_inference_is_refused(wing, folder):
    with pytest.raises(InputError, match=r"given without inference.*Add inference=True"):
        wing.model("causal_lm").from_pretrained(folder(), quantize="int8")


@pytest.mark.parametrize("head", ["base", "sequence_classification", "question_answering"])
def test_a_class_without_a_fast_path_says_so(wing, folder, head):
    with pytest.raises(InputError, match=r"expected GPTJForCausalLM, found GPTJ(Model|For)"):
        wing.model(head).from_pretrained(folder(head), inference=True)
