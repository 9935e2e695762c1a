"""Calls that PyTorch computes in one pass: attention gives each query the same bits, whatever else is in the call."""

import dataclasses

import numpy as np
import pytest
import torch

from gptj.config import GPTJConfig
from gptj.errors import InputError
from gptj.generation import Extension, extend_together
from gptj.generation.decoder import PIECE
from gptj.pt import GPTJForCausalLM
from gptj.pt.arguments import AttentionMask, causal_mask
from gptj.pt.model import Attention

CONFIG = GPTJConfig(n_embd=128, n_head=2, n_layer=2, n_positions=256, rotary_dim=8, vocab_size=300)
PIECES = {"whole": [93], "sixteens": [16] * 5 + [13], "sizes": [48, 16, 29], "last": [80, 13]}


def pieces_of(lengths):
    ends = np.cumsum(lengths).tolist()
    return list(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("lengths", PIECES.values(), ids=PIECES)
def test_attention_is_the_same_in_pieces(dtype, lengths):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 93, 64).to(getattr(torch, dtype)) for _ in range(3))
    attention = Attention(CONFIG, attn_implementation="sdpa").eval()

    def mixed(start, end):
        mask = AttentionMask(causal_mask(None, torch.arange(start, end), end), is_causal=start == 0)
        return attention._mix_apart(q[:, :, start:end], k[:, :, :end], v[:, :, :end], mask)

    with torch.inference_mode():
        found = torch.cat([mixed(*piece) for piece in pieces_of(lengths)], dim=1)
        assert torch.equal(found, mixed(0, 93))
        exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)
    error = (found.double() - exact.transpose(1, 2).flatten(2)).abs().max()
    assert error < (1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("lengths", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("beside", [0, 1, 6])
def test_a_prompt_in_pieces_beside_others_has_its_logits(lengths, beside):
    model = GPTJForCausalLM(CONFIG, seed=3)
    model.prepare_for_inference()
    ids = (np.arange(93) * 7 % 300)[None]
    expected = model._decoder(1, 93).extend(ids).logits[0]
    others = [model._decoder(1, 128) for _ in range(beside)]
    for number, other in enumerate(others):
        other.extend(ids[:, : 3 + number])
    decoder, found = model._decoder(1, 128), []
    assert decoder.joins and PIECE == 16
    for start, end in pieces_of(lengths):
        asked = [Extension(other, ids[:, end - 1 : end]) for other in others]
        piece = Extension(decoder, ids[:, start:end], last_only=False)
        found.append(extend_together([*asked, piece])[-1].logits[0])
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("lengths", [[1, 30, 63, 64, 120], [505, 3], [17, 700, 0]], ids=["short", "at 512", "long"])
def test_rows_of_lengths_of_their_own_have_the_logits_of_lone_rows(dtype, limit, lengths):
    """Two more tokens of each row, the first at slot `length`; slots of later tokens, and of nobody, hold 9s."""
    config = dataclasses.replace(CONFIG, n_positions=1024)
    model = GPTJForCausalLM(config, seed=3, dtype=dtype)
    model.prepare_for_inference()
    together = model._decoder(len(lengths) + 1, 1024)
    together.restart(1024)
    for kept in (*together.cache.keys, *together.cache.values):
        kept.fill_(9)
    lone, ids = [], np.arange(1024) * 7 % 300
    for row, length in enumerate(lengths):
        lone.append(model._decoder(1, length + 2))
        if length:
            lone[row].extend(ids[None, :length])
            together.write(row, 0, lone[row].read(0, 0, length))
    for more in range(2):
        tokens = ids[np.array(lengths) + more][:, None]
        slots = np.array(lengths) + more
        [found] = extend_together([Extension(together, tokens, slots=slots)])
        expected = [one.extend(tokens[row : row + 1], last_only=True).logits[0] for row, one in enumerate(lone)]
        np.testing.assert_allclose(found.logits, expected, rtol=0, atol=limit)
    assert together.length == 1024  # neither read nor moved
    with pytest.raises(InputError, match="at most"):
        extend_together([Extension(together, np.ones((len(lengths) + 2, 1), int), slots=np.arange(len(lengths) + 2))])
    with pytest.raises(InputError, match="slots below 1024"):
        extend_together([Extension(together, np.ones((1, 1), int), slots=np.array([1024]))])
