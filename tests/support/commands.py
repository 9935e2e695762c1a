"""`gptj generate` in a process of its own, on a model that takes long enough to be interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizer_samples import small

from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_config, revealing_fill

LETTER = "a"


def endless_model(path: Path) -> Path:
    """A model with a tokenizer that says LETTER until its 2,056 positions end."""
    config = revealing_config(vocab_size=300, eos_token_id=None, n_layer=12)
    write_checkpoint(path, config, revealing_fill(0))
    small().save_pretrained(path)
    bias = [[small().encode(LETTER), 1000.0]]
    (path / "generation_config.json").write_text(json.dumps({"sequence_bias": bias}))
    return path


def started(backend: str, model: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`gptj generate`, begun."""
    return begun("generate", str(model), *arguments, "--backend", backend)


def begun(*words: str) -> subprocess.Popen[bytes]:
    """A command, begun. It hears an interrupt even where the tests do not, as a shell's job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "gptj", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def ended(process: Any) -> SimpleNamespace:
    """Its status, what was left of its output, and what it said on stderr."""
    out, err = process.communicate(timeout=600)
    return SimpleNamespace(rc=process.returncode, out=out.decode(), err=err.decode())
