"""`gptj batch`: files in, files out, each whole or not there, in shares that together are all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from wings import Wing, named_backends

from gptj import GPTJConfig
from gptj.checkpoint import write_checkpoint
from gptj.command.main import gptj_command
from gptj.parity.revealing import revealing_fill


def run(*words):
    return CliRunner().invoke(gptj_command, list(map(str, words)))


@pytest.fixture
def prompts(tmp_path) -> list[Path]:
    files = []
    for name in "abc":
        files.append(tmp_path / f"{name}.jsonl")
        lines = [{"token_ids": [ord(name) - 96, n + 1]} for n in range(2)]
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def test_shares_are_together_what_one_process_writes(wing: Wing, folder: Callable[..., Path], prompts, tmp_path):
    words = ("batch", folder())
    options = ("--backend", wing.name, "--max-new-tokens", 3, "--seed", 1, "--batch-size", 2)
    done = run(*words, tmp_path / "one", *prompts, *options)
    assert done.exit_code == 0, done.output
    for part in (1, 2):
        assert run(*words, tmp_path / "two", *prompts, "--shard", f"{part}/2", *options).exit_code == 0
    names = ["a.jsonl", "b.jsonl", "c.jsonl"]
    for place in ("one", "two"):
        assert sorted(path.name for path in (tmp_path / place).iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    first = [json.loads(line) for line in (tmp_path / "one" / "a.jsonl").read_text().splitlines()]
    assert [record["line"] for record in first] == [1, 2] and all(len(record["token_ids"]) == 5 for record in first)

    (tmp_path / "one" / "b.jsonl").write_text("mine")  # what is there stays, what is missing is made
    (tmp_path / "one" / "c.jsonl").unlink()
    done = run(*words, tmp_path / "one", *prompts, *options)
    assert done.exit_code == 0 and "3 files, 2 of them done before" in done.stderr
    assert (tmp_path / "one" / "b.jsonl").read_text() == "mine"
    assert (tmp_path / "one" / "c.jsonl").read_bytes() == (tmp_path / "two" / "c.jsonl").read_bytes()


def test_a_bad_line_of_any_file_is_named_before_anything_is_computed(wing: Wing, folder, prompts, tmp_path):
    prompts[2].write_text('{"token_ids": [1]}\n{"token_ids": ["x"]}\n')
    done = run("batch", folder(), tmp_path / "out", *prompts, "--backend", wing.name)
    assert done.exit_code == 1 and "c.jsonl" in str(done.exception) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_share_that_is_none_is_misuse(wing: Wing, folder, prompts, tmp_path, share):
    assert run("batch", folder(), tmp_path / "out", *prompts, "--shard", share).exit_code == 2


def test_two_files_of_one_name_are_refused(wing: Wing, folder, prompts, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "a.txt"
    twin.write_text("x\n")
    done = run("batch", folder(), tmp_path / "out", prompts[0], twin, "--backend", wing.name)
    assert done.exit_code == 1 and "another" in str(done.exception)


def test_a_run_that_is_killed_goes_on_and_two_of_one_share_agree(tmp_path):
    """One process is killed while it writes, then two are given the same share at once: what is there is whole."""
    if "pt" not in named_backends():
        pytest.skip("one wing is enough: what stands here is before all wings")
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
