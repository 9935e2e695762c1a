"""`gptj batch`: files in, files out, each whole or not there, in shares that together are all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from wings import Wing

from gptj.command.main import gptj_command


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
    for part, files in ((1, "2 files"), (2, "1 file")):
        shared = run(*words, tmp_path / "two", *prompts, "--shard", f"{part}/2", *options)
        assert shared.exit_code == 0 and f"{files}, 0 of them done before" in shared.stderr
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


@pytest.mark.parametrize("kind", ["a folder", "a link to nothing"])
def test_what_is_in_the_way_of_an_output_is_not_taken_for_one(prompts, tmp_path, kind):
    way = tmp_path / "out" / "b.jsonl"
    way.parent.mkdir()
    way.mkdir() if kind == "a folder" else way.symlink_to("nowhere")
    done = run("batch", tmp_path, tmp_path / "out", *prompts)
    assert done.exit_code == 1 and "b.jsonl: in the way of an output" in str(done.exception)


@pytest.mark.parametrize("share", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_share_that_is_none_is_misuse(wing: Wing, folder, prompts, tmp_path, share):
    assert run("batch", folder(), tmp_path / "out", *prompts, "--shard", share).exit_code == 2


def test_two_files_of_one_name_are_refused(wing: Wing, folder, prompts, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "a.txt"
    twin.write_text("x\n")
    done = run("batch", folder(), tmp_path / "out", prompts[0], twin, "--backend", wing.name)
    assert done.exit_code == 1 and "another" in str(done.exception)


def test_an_out_that_is_a_file_is_named_before_the_files_are(prompts):
    done = run("batch", prompts[0], prompts[1], "nowhere/c.txt")
    assert done.exit_code == 1
    assert "not a folder" in str(done.exception) and "DIR OUT FILE..." in str(done.exception)
    assert "b.jsonl" in str(done.exception) and not done.stderr
