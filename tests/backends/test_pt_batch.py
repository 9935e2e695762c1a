"""`gptj batch` under fault: killed, started again, and twice on one share. In one wing: it is before all of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from gptj import GPTJConfig
from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_fill


def test_a_run_that_is_killed_goes_on_and_two_of_one_share_agree(tmp_path):
    """One process is killed while it writes, then two are given the same share at once: what is there is whole."""
    config = GPTJConfig(vocab_size=96, n_positions=512, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    model = write_checkpoint(tmp_path / "model", config, revealing_fill(0))
    files = [tmp_path / f"{n}.jsonl" for n in range(6)]
    for n, file in enumerate(files):
        file.write_text("".join(json.dumps({"token_ids": [n + 1, line]}) + "\n" for line in range(3)))
    words = [sys.executable, "-m", "gptj", "batch", model, tmp_path / "out", *files, "--backend", "pt"]
    options = ["--max-new-tokens", 200, "--temperature", 1, "--seed", 5]
    command = [*map(str, (*words, *options))]
    out = tmp_path / "out"

    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    while "written" not in (line := first.stderr.readline()) and line:
        pass
    first.send_signal(signal.SIGKILL)
    first.communicate()
    there = sorted(out.glob("*.jsonl"))
    before = {path: path.read_bytes() for path in there}
    assert 1 <= len(there) < 6

    pair = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert all(f"{len(there)} of them done before" in text for text in said)
    assert {path: path.read_bytes() for path in there} == before
    for n, path in enumerate(sorted(out.glob("*.jsonl"))):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert [record["line"] for record in records] == [1, 2, 3]
        assert [record["token_ids"][:2] for record in records] == [[n + 1, line] for line in range(3)]
    assert len(list(out.glob("*.jsonl"))) == 6
