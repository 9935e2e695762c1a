"""The command line as a user meets it: results on stdout, one message on stderr, exit status 0, 1 or 2, no debris."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from reference import MESH_FIXTURE

from gptj import GPTJConfig, GPTJTokenizer

CONFIG = MESH_FIXTURE / "config.json"
V2 = MESH_FIXTURE.parent / "mesh_v2_refuse"
COMMANDS = ("adapter", "convert", "demo", "doctor", "generate", "init", "inspect", "parity", "verify")


def gptj(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    if not environment:
        return forked.gptj(*arguments, cwd=cwd)
    return subprocess.run(
        [sys.executable, "-m", "gptj", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def step(tmp_path):
    """A copy of the original's full checkpoint, to be spoilt."""
    return Path(shutil.copytree(MESH_FIXTURE / "full" / "step_120", tmp_path / "step_120"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "model"
    done = gptj("convert", MESH_FIXTURE / "full", path, "--config", CONFIG)
    assert done.returncode == 0, done.stderr
    return path


def refused(done: subprocess.CompletedProcess[str], dst: Path, *words: str, status: int = 1) -> None:
    """The call failed with one message that has these words, and left nothing at `dst` or beside it."""
    assert done.returncode == status, (done.returncode, done.stderr)
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not dst.exists() and not [p for p in dst.parent.iterdir() if "stage" in p.name]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = gptj(command, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"Usage: python -m gptj {command}") and not done.stderr


def test_the_help_lists_every_command():
    done = gptj("--help")
    assert done.returncode == 0 and all(f"  {command} " in done.stdout for command in COMMANDS)


def test_no_arguments_is_misuse_and_shows_the_help():
    done = gptj()
    assert done.returncode == 2 and "Commands:" in done.stdout + done.stderr


def test_convert_prints_what_it_wrote_and_nothing_else_on_stdout(tmp_path):
    done = gptj("convert", MESH_FIXTURE / "full", tmp_path / "model", "--config", CONFIG, "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and facts["tensors"] == 35 and facts["dtype"] == "float32" and facts["problems"] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_convert_casts_when_asked(tmp_path, dtype):
    done = gptj("convert", MESH_FIXTURE / "full", tmp_path / "m", "--config", CONFIG, "--dtype", dtype, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["dtype"] == dtype


def test_inspect_reads_a_tpu_checkpoint_and_a_folder(converted):
    for path in (MESH_FIXTURE / "full_slim" / "step_120", converted):
        done = gptj("inspect", path, "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["parameters"] == 48_000


def test_W12_verify_knows_a_flipped_bit(converted, tmp_path):
    assert gptj("verify", converted).returncode == 0
    spoilt = Path(shutil.copytree(converted, tmp_path / "spoilt"))
    with (spoilt / "model.safetensors").open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-10, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    done = gptj("verify", spoilt)
    assert done.returncode == 1 and "model.safetensors" in done.stderr


def test_a_truncated_shard_is_named(step, tmp_path):
    file = step / "shard_1" / "7.npz"
    file.write_bytes(file.read_bytes()[:-500])
    refused(gptj("convert", step, tmp_path / "out" / ".." / "dst", "--config", CONFIG), tmp_path / "dst", "7.npz")


def test_a_missing_shard_is_named(step, tmp_path):
    shutil.rmtree(step / "shard_1")
    refused(gptj("convert", step, tmp_path / "dst", "--config", CONFIG), tmp_path / "dst", "shard")


def test_a_missing_file_of_a_shard_is_named(step, tmp_path):
    (step / "shard_0" / "3.npz").unlink()
    refused(gptj("convert", step, tmp_path / "dst", "--config", CONFIG), tmp_path / "dst", "3.npz")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [("layers", 4, "layers"), ("d_model", 64, "d_model"), ("n_vocab", 320, "n_vocab"), ("n_heads", 3, "n_heads"),
     ("norm", "rmsnorm", "norm"), ("pe", "t5", "pe"), ("cores_per_replica", 4, "cores_per_replica")],
)  # fmt: skip
def test_a_wrong_training_config_is_named_by_its_key(tmp_path, key, value, word):
    members = json.loads(CONFIG.read_text()) | {key: value}
    (tmp_path / "train.json").write_text(json.dumps(members))
    done = gptj("convert", MESH_FIXTURE / "full", tmp_path / "dst", "--config", tmp_path / "train.json")
    refused(done, tmp_path / "dst", word)


def test_a_v2_checkpoint_is_refused_by_name(tmp_path):
    refused(gptj("convert", V2 / "step_0", tmp_path / "dst", "--config", V2 / "config.json"), tmp_path / "dst", "v2")


@pytest.mark.parametrize("options", [(), ("--to", "mesh", "--shards", 2), ("--to", "bin")])
def test_the_folder_that_one_stands_in_is_not_replaced_under_ones_feet(tmp_path, options):
    (tmp_path / "here").mkdir()
    done = gptj("convert", MESH_FIXTURE / "full", ".", "--config", CONFIG, *options, cwd=tmp_path / "here")
    assert done.returncode == 1 and "is the current folder" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*") if not path.name.endswith("lock")] == ["here"]


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(gptj("convert", tmp_path / "empty", tmp_path / "dst", "--config", CONFIG), tmp_path / "dst", "empty")


def test_S5_a_filled_destination_is_left_as_it_is(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "thesis.txt").write_text("mine")
    done = gptj("convert", MESH_FIXTURE / "full", tmp_path / "dst", "--config", CONFIG)
    assert done.returncode == 1 and "dst" in done.stderr and "overwrite" in done.stderr
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["thesis.txt"]


def test_an_error_can_be_read_by_a_program(tmp_path):
    done = gptj("inspect", tmp_path / "nowhere", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1 and error["code"] == "MissingFileError" and "nowhere" in error["file"]


def test_debug_shows_the_traceback(tmp_path):
    assert "Traceback" in gptj("--debug", "inspect", tmp_path / "nowhere").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert",),
        ("convert", "a"),
        ("inspect",),
        ("generate",),
        ("generate", "dir"),
        ("fly",),
        ("inspect", "a", "--fly"),
        ("generate", "dir", "text", "--token-ids", "1"),
        ("generate", "dir", "text", "--prompts", "file"),
        ("generate", "dir", "text", "--stream", "--json"),
        ("generate", "dir", "text", "--stream", "--batch-size", "2"),
        ("generate", "dir", "text", "--token-ids", "1 x"),
        ("generate", "dir", "text", "--set", "top_k"),
        ("generate", "dir", "text", "--set", "top_k=1", "--set", "top_k=2"),
        ("generate", "dir", "-", "-i"),
        ("generate", "dir", "-i", "--json"),
        ("generate", "dir", "-i", "--token-ids", "1"),
        ("convert", "a", "b", "--dtype", "int8"),
    ],
    ids=str,
)
def test_misuse_is_status_2(arguments):
    done = gptj(*arguments)
    assert done.returncode == 2 and "Usage" in done.stderr and "Traceback" not in done.stderr


def test_T3_bytes_on_stdin_that_are_no_text_are_named_with_their_place(tmp_path):
    for arguments in (["-"], ["--prompts", "-"]):
        done = subprocess.run(
            [sys.executable, "-m", "gptj", "generate", str(tmp_path), *arguments], input=b"abc\xff", capture_output=True
        )
        assert done.returncode == 1 and done.stdout == b""
        assert done.stderr == b"gptj: InputError: stdin: line 1: not UTF-8 (found byte 0xff at offset 3)\n"


def test_G6_closed_stdin_is_named(tmp_path):
    command = f'"{sys.executable}" -m gptj generate "{tmp_path}" - <&-'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 1 and "InputError: stdin: is closed" in done.stderr and "Traceback" not in done.stderr


def test_init_writes_a_folder_that_inspect_reads(tmp_path):
    assert gptj("init", "tiny", cwd=tmp_path).returncode == 0
    assert json.loads(gptj("inspect", "tiny", "--json", cwd=tmp_path).stdout)["format"] == "safetensors"
    again = gptj("init", "tiny", cwd=tmp_path)
    assert again.returncode == 1 and "tiny" in again.stderr


def test_R4_results_do_not_depend_on_the_terminal(converted):
    plain = gptj("inspect", converted).stdout
    for environment in ({"TERM": "dumb"}, {"NO_COLOR": "1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"COLUMNS": "20"}):
        assert gptj("inspect", converted, **environment).stdout == plain


def test_a_closed_pipe_ends_quietly(converted):
    done = subprocess.run(
        f'"{sys.executable}" -m gptj inspect "{converted}" | head -c 1', shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_convert_writes_a_tokenizer_beside_the_weights(tmp_path):
    (tmp_path / "config.json").write_text(GPTJConfig(vocab_size=320, n_embd=16, n_layer=1, n_head=2).to_json())
    assert gptj("init", tmp_path / "model", "--config", tmp_path / "config.json").returncode == 0
    GPTJTokenizer.train(["to be or not to be"] * 9, 264).save_pretrained(tmp_path / "tokenizer")
    done = gptj("convert", tmp_path / "model", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer")
    assert done.returncode == 0, done.stderr
    written = GPTJTokenizer.from_pretrained(tmp_path / "out")
    assert written.decode(written.encode("to be")) == "to be"


def test_C8_a_tokenizer_that_is_larger_than_the_embedding_is_refused(tmp_path):
    arguments = ("--config", CONFIG, "--tokenizer", "gpt2")
    refused(gptj("convert", MESH_FIXTURE / "full", tmp_path / "dst", *arguments), tmp_path / "dst", "50257", "160")
