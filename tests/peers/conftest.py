"""A small model and tokenizer, as a user of other libraries has them."""

import pytest

from gptj.checkpoint import write_checkpoint
from gptj.config import GPTJConfig
from gptj.parity.revealing import revealing_fill
from gptj.text.tokenizer import GPTJTokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "


@pytest.fixture(scope="session")
def tokenizer():
    return GPTJTokenizer.train([TEXT], 280)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A model's folder as `gptj convert` leaves it."""
    path = tmp_path_factory.mktemp("peers") / "model"
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    write_checkpoint(path, config, revealing_fill(0))
    tokenizer.save_pretrained(path)
    return path
