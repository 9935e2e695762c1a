"""Several decoders of one model in one pass: each gets the logits and the cache that it gets alone."""

import numpy as np
import pytest
from adapter_samples import write_sample_adapter
from mutants import revealing_batch

from gptj.errors import InputError
from gptj.generation import Extension, extend_together
from gptj.parity.revealing import revealing_config

CONFIG = revealing_config()
IDS = revealing_batch(CONFIG).input_ids
THERE = np.ones((3, 5), bool)
THERE[1, :3] = THERE[2] = False  # a row that is padded, and one that is nobody's


def grown(model):
    """Decoders of three rows, after five columns, and of a row that is still empty."""
    rows, prompt = model._decoder(3, 24), model._decoder(1, 16)
    rows.extend(IDS[:3, :5], THERE, last_only=True)
    return rows, prompt


def extensions(rows, prompt, piece, last_only=True):
    step = Extension(rows, IDS[:3, 5 + piece : 6 + piece], np.array([[True], [True], [False]]))
    part = slice(4 * piece, 4 * piece + 4)
    return [step, Extension(prompt, IDS[3:4, part], None, last_only)]


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
def test_each_decoder_gets_what_it_gets_alone(wing, folder, tmp_path, prepared, adapted):
    model = wing.model("causal_lm").from_pretrained(folder("causal_lm"))
    if adapted:
        model.load_adapter(write_sample_adapter(tmp_path))
    if prepared:
        model.prepare_for_inference()
    together, alone = grown(model), grown(model)
    for piece in range(2):  # the prompt begins, and goes on
        found = extend_together(extensions(*together, piece, last_only=piece == 0))
        expected = [
            one.decoder.extend(one.token_ids, one.mask, last_only=one.last_only)
            for one in extensions(*alone, piece, last_only=piece == 0)
        ]
        for ours, its in zip(found, expected, strict=True):
            assert ours.logits.shape == its.logits.shape
            np.testing.assert_allclose(ours.logits[:2], its.logits[:2], rtol=0, atol=2e-5)
    for ours, its in zip(together, alone, strict=True):
        assert ours.length == its.length
        one, other = (decoder.read(0, 0, decoder.length) for decoder in (ours, its))
        for pair in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
            a, b = (wing.numpy(array)[:, one.first : one.first + one.count] for array in pair)
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_a_pass_that_is_refused_grows_no_decoder(revealing):
    rows, prompt = grown(revealing())
    good, bad = extensions(rows, prompt, 0)
    with pytest.raises(InputError, match="no such token"):
        extend_together([good, Extension(prompt, bad.token_ids + CONFIG.vocab_size)])
    assert (rows.length, prompt.length) == (5, 0)
    extend_together([good, bad])
    assert (rows.length, prompt.length) == (6, 4)


def test_one_decoder_alone_is_joined_with_nobody(revealing, monkeypatch):
    (rows, _), (same, _) = grown(revealing()), grown(revealing())
    monkeypatch.setattr(type(rows), "_run_together", None)
    [found] = extend_together([Extension(rows, IDS[:3, 5:6])])
    assert (found.logits == same.extend(IDS[:3, 5:6], last_only=True).logits).all()
    assert rows.length == 6
