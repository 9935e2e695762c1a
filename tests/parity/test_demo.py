"""The demo, whole: what it prints is what the README shows, and what it keeps can be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from demo_block import BLOCK, block, shape

from gptj import GPTJConfig, GPTJTokenizer
from gptj.checkpoint import verify_checkpoint


@pytest.fixture(scope="module")
def demo(tmp_path_factory, backend_names) -> tuple[str, Path]:
    """What the command printed, and the folder that it was told to keep."""
    kept = tmp_path_factory.mktemp("demo") / "verse"
    command = [sys.executable, "-m", "gptj", "demo", "--keep", kept, "--backends", ",".join(backend_names)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, kept


def test_the_readme_shows_what_the_command_prints(demo):
    """But for seconds and rounding errors, and the folder that this run was told to keep."""
    output, kept = demo
    printed = output.replace(str(kept), "verse").replace("Try next\n", "Try next\n  gptj demo --keep verse\n")
    assert shape(BLOCK.read()) == shape(block(printed)), "run: python tests/documents/demo_block.py --write"


def test_the_block_that_is_compared_has_the_verse_and_the_verdict(demo):
    text = shape(demo[0])
    assert "ROMEO:" in text and "wrote the same 100 tokens" in text and "All agree" in text


def test_the_kept_folder_is_whole(demo):
    _, kept = demo
    assert len(verify_checkpoint(kept).tensors) == 55
    config, tokenizer = GPTJConfig.from_file(kept), GPTJTokenizer.from_pretrained(kept)
    assert len(tokenizer) == config.vocab_size and tokenizer.eos_token_id == config.eos_token_id == 1023
