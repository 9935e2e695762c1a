"""examples/ray_batch.py on two actors writes the tokens that `gptj batch` writes; skipped where Ray is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptj import GPTJConfig
from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_fill

ROOT = Path(__file__).parents[2]
pytest.importorskip("ray", reason="pip install gptj-multibackend[ray]")


@pytest.mark.parametrize("options", [["--temperature", "0"], ["--temperature", "0.9"]])
def test_two_actors_write_what_one_command_does(tmp_path, options):
    config = GPTJConfig(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    model = write_checkpoint(tmp_path / "model", config, revealing_fill(0))
    files = [tmp_path / f"{n}.jsonl" for n in range(6)]
    for n, file in enumerate(files):
        file.write_text("".join(json.dumps({"token_ids": [n + 1, line]}) + "\n" for line in range(3)))
    said = ["--max-new-tokens", "12", "--seed", "5", *options]
    environment = {**os.environ, "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    for words in (
        ["-m", "gptj", "batch", model, tmp_path / "one", *files, "--backend", "pt", *said],
        [ROOT / "examples" / "ray_batch.py", model, tmp_path / "two", *files, "--actors", "2", *said],
    ):
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300,
                              env=environment)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    def tokens(folder: str, name: str) -> list[tuple[int, list[int]]]:
        lines = (tmp_path / folder / name).read_text().splitlines()
        return [(record["line"], record["token_ids"]) for record in map(json.loads, lines)]

    assert all(tokens("one", file.name) == tokens("two", file.name) for file in files)
