"""Every lawful oddity opens in each wing, says what is odd, and computes and encodes what the good folder does."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gptj_conversion.convert import convert
from lawful import good_folder, oddities
from tokenizer_samples import CORPUS, small

from gptj import GPTJTokenizer

IDS = [[1, 2, 3, 250, 7]]


@pytest.fixture(scope="module")
def expected(wing, tmp_path_factory):
    model = wing.model("causal_lm").from_pretrained(good_folder(tmp_path_factory.mktemp("good") / "model"))
    return wing.numpy(wing.call(model, np.array(IDS)).logits)


@pytest.mark.parametrize("oddity", oddities(), ids=lambda oddity: oddity.what)
def test_a_lawful_oddity_opens_and_computes_the_same(wing, tmp_path, expected, oddity):
    folder = good_folder(tmp_path / "model")
    oddity.make(folder)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if oddity.direct:
            model = wing.model("causal_lm").from_pretrained(folder / oddity.inside, **oddity.arguments)
        else:
            converted = convert(folder / oddity.inside, tmp_path / "out", fingerprint=False, **oddity.arguments)
            model = wing.model("causal_lm").from_pretrained(converted)
        generated = model.generate(np.array(IDS), max_new_tokens=2)
        tokenizer = GPTJTokenizer.from_pretrained(folder)
    assert tokenizer.encode(CORPUS[0]) == small().encode(CORPUS[0])
    assert oddity.says is None or any(oddity.says in str(warning.message) for warning in heard)
    assert np.array_equal(wing.numpy(wing.call(model, np.array(IDS)).logits), expected)
    assert wing.numpy(generated).shape[1] > len(IDS[0])
