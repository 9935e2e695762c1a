"""What one writer promises, the writers of all formats promise."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import array_of, write_sample
from click.testing import CliRunner
from forked import gptj
from gptj_conversion.common.foreign_writer import write_foreign
from gptj_conversion.convert import convert
from gptj_conversion.hf.flax_msgpack import FLAX_FILE, MsgpackWriter
from gptj_conversion.hf.keras_h5 import H5_FILE, H5Writer
from gptj_conversion.hf.torch_bin import BIN_FILE, BinWriter
from gptj_conversion.mesh.writer import write_mesh
from gptj_conversion.verify import verify
from malformed.journals import CONFIG, FORMATS

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.command.main import gptj_command
from gptj.errors import CheckpointWarning, FormatError, InputError, SchemaError, WriteError
from gptj.writing.folder import WritingOptions
from gptj.writing.journal import Journal

NAMED: dict[str, tuple[str, Any, Any]] = {
    "bin": (BIN_FILE, "pt", BinWriter),
    "flax": (FLAX_FILE, "flax", MsgpackWriter),
    "tf": (H5_FILE, "tf", H5Writer),
}


def write(to: str, directory: Path, **options: Any) -> Path:
    """A model in a format, by the format's own writer."""
    if to == "safetensors":
        return write_checkpoint(directory, CONFIG, array_of, **options)
    if to == "mesh":
        return write_mesh(directory, CONFIG, array_of, shards=2, dtype="float32", options=WritingOptions(**options))
    file_name, dialect, writer = NAMED[to]
    head = options.pop("head", "causal_lm")
    return write_foreign(
        directory, CONFIG, array_of, writer, file_name=file_name, dialect=dialect, dtype_of=lambda name: "float32",
        weights_format=to, head=head, options=WritingOptions(**options),
    )  # fmt: skip


# ---- extra files


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "a\\b", "", ".", "..", ".hidden", "a\0b", "\udc80", 7, None])
def test_an_extra_file_has_a_plain_name(tmp_path, to, name):
    with pytest.raises(InputError, match="extra_files: not a plain file name"):
        write(to, tmp_path / "out", extra_files={name: b"x"})
    assert [*tmp_path.iterdir()] == []


OWN = {
    "safetensors": ["config.json", "manifest.json", "model.safetensors", "model.safetensors.index.json"],
    "bin": ["config.json", "manifest.json", BIN_FILE, "pytorch_model-00001-of-00002.bin", "model.safetensors"],
    "flax": ["config.json", "manifest.json", FLAX_FILE, f"{FLAX_FILE}.index.json"],
    "tf": ["config.json", "manifest.json", H5_FILE],
    "mesh": ["meta.json", "training_config.json", "manifest.json", "step_0"],
}


@pytest.mark.parametrize(("to", "name"), [(to, name) for to, names in OWN.items() for name in names])
def test_an_extra_file_has_none_of_the_checkpoints_own_names(tmp_path, to, name):
    with pytest.raises(InputError, match="extra_files: a name that the checkpoint itself uses"):
        write(to, tmp_path / "out", extra_files={name: b"x"})
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("to", FORMATS)
def test_an_extra_file_is_bytes_and_is_written_and_hashed(tmp_path, to):
    with pytest.raises(InputError, match=r"extra_files\['a\.txt'\]: not bytes \(found str\)"):
        write(to, tmp_path / "out", extra_files={"a.txt": "text"})
    out = write(to, tmp_path / "out", extra_files={"a.txt": b"text"})
    assert (out / "a.txt").read_bytes() == b"text" and "a.txt" in verify(out).files


FILES = [to for to in FORMATS if to != "mesh"]


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.bin", "adapter_model.safetensors", "vocab.msgpack"])
def test_a_file_that_is_no_models_weights_is_kept_by_every_format(tmp_path, to, name):
    out = write(to, tmp_path / "out")
    (out / name).write_bytes(b"mine")
    assert (write(to, out, overwrite=True) / name).read_bytes() == b"mine"
    assert (write(to, tmp_path / "other", extra_files={name: b"x"}) / name).read_bytes() == b"x"


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("other", [*FILES, "variant", "shard"])
def test_weights_of_another_format_are_not_thrown_away_by_any(tmp_path, to, other):
    named = {"safetensors": "model.safetensors", "variant": "model.fp16.safetensors"}
    named |= {"shard": "model-00001-of-00002.safetensors", **{key: row[0] for key, row in NAMED.items()}}
    if to == other or (to, other) == ("safetensors", "shard"):
        return
    out = write(to, tmp_path / "out")
    (out / named[other]).write_bytes(b"precious")
    with pytest.raises(WriteError, match="which would be lost"):
        write(to, out, overwrite=True)
    assert (out / named[other]).read_bytes() == b"precious"
    with pytest.raises(InputError, match="a name that the checkpoint itself uses"):
        write(to, tmp_path / "other", extra_files={named[other]: b"x"})


# ---- what is said


@pytest.mark.parametrize("to", FORMATS)
def test_an_all_zero_matrix_is_said_in_every_format(tmp_path, to, caplog):
    zero = "transformer.h.0.mlp.fc_in.weight"
    source = write_checkpoint(tmp_path / "in", CONFIG, lambda row: array_of(row) * (row.name != zero))
    caplog.clear()
    convert(source, tmp_path / "out", fingerprint=False, **FORMATS[to])
    assert f"{zero} is all zero" in caplog.text and caplog.text.count("is all zero") == 1


# ---- one key


def stopped(source: Path, directory: Path, **options: Any) -> Path:
    """What is left of a conversion that was interrupted in its midst."""
    told: list[str] = []

    def progress(name: str, nbytes: int) -> None:
        told.append(name)
        if len(told) == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, directory, progress=progress, resume=True, fingerprint=False, **options)
    [stage] = directory.parent.glob(f".{directory.name}.gptj-stage-*")
    assert Journal.has_notes([path.name for path in stage.iterdir()])
    return stage


@pytest.mark.parametrize("to", FORMATS)
def test_begun_with_allow_nonfinite_and_resumed_without_it_is_refused(tmp_path, to):
    def read(row):
        values = array_of(row)
        values.reshape(-1)[0] = np.nan if row.name == "transformer.wte.weight" else 1
        return values

    source = write_checkpoint(tmp_path / "in", CONFIG, read, allow_nonfinite=True)
    stopped(source, tmp_path / "out", allow_nonfinite=True, **FORMATS[to])
    with pytest.raises(SchemaError, match=r"transformer\.wte\.weight: holds values that are not finite"):
        convert(source, tmp_path / "out", resume=True, fingerprint=False, **FORMATS[to])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", FORMATS)
def test_begun_with_allow_overflow_and_resumed_without_it_is_refused(tmp_path, to):
    def read(row):
        values = array_of(row)
        values.reshape(-1)[0] = 70_000 if row.name == "transformer.wte.weight" else 1
        return values

    source = write_checkpoint(tmp_path / "in", CONFIG, read)
    stopped(source, tmp_path / "out", allow_overflow=True, dtype="float16", **FORMATS[to])
    with pytest.raises(SchemaError, match=r"transformer\.wte\.weight: a value does not fit float16"):
        convert(source, tmp_path / "out", resume=True, fingerprint=False, dtype="float16", **FORMATS[to])


def test_an_input_that_json_cannot_say_is_no_key(tmp_path):
    with pytest.raises(InputError, match="input_identity: not JSON"):
        write("safetensors", tmp_path / "out", input_identity=object())


# ---- S7: a stage that is somebody else's


@pytest.mark.parametrize("resume", [False, True])
def test_a_link_in_a_stages_place_is_removed_and_what_it_leads_to_stays(tmp_path, resume):
    source = write_sample(tmp_path / "in", CONFIG)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("three years of work")
    (precious / "shard-1.journal").write_text("{}")
    (tmp_path / ".out.gptj-stage-1").symlink_to(precious)
    verify(convert(source, tmp_path / "out", resume=resume, **FORMATS["bin"]))
    assert (precious / "thesis.txt").read_text() == "three years of work"
    assert not (tmp_path / ".out.gptj-stage-1").is_symlink()


# ---- the command line


def test_verify_names_what_it_did_not_check(tmp_path):
    out = write_sample(tmp_path / "out", CONFIG)
    for name in ("tokenizer.json", "README.md"):
        (out / name).write_text("{}")
    (out / "notes").mkdir()
    with pytest.warns(CheckpointWarning, match=r"not checked, since .*: 'tokenizer\.json'"):
        assert verify(out).unchecked == ("README.md", "notes/", "tokenizer.json")
    done = gptj("verify", out)
    assert done.returncode == 0 and "warning: " in done.stderr and "'tokenizer.json'" in done.stderr
    named = [line.removeprefix("not checked: ") for line in done.stdout.splitlines() if "not checked" in line]
    assert named == ["README.md", "notes/", "tokenizer.json"]
    facts = json.loads(gptj("verify", out, "--json").stdout)
    assert facts["unchecked"] == named and facts["files"] == 2
    assert facts["checked"]["files"] == ["model.safetensors", "config.json"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "--seed"),
        (["--seed", "x"], "--seed"),
        (["--backends", "jax"], "'jax' is not one of pt, tf, flax"),
        (["--backends", ""], "'' is not one of"),
        (["--backends", "pt,"], "'' is not one of"),
        (["--backends", "pt,pt"], "names one twice"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_an_option_of_parity_that_is_out_of_range_is_misuse(options, words):
    done = CliRunner().invoke(gptj_command, ["parity", "nowhere", *options])
    assert done.exit_code == 2 and words in done.output


def test_parity_names_a_transposed_matrix_before_any_framework_runs(tmp_path):
    out = write_sample(tmp_path / "out", CONFIG)
    path = out / "model.safetensors"
    opened, name = open_checkpoint(out), "transformer.h.0.attn.q_proj.weight"
    tensor, values = opened.tensors[name], opened.read(name)
    data = bytearray(path.read_bytes())
    data[tensor.offset : tensor.offset + tensor.nbytes] = np.ascontiguousarray(values.T).tobytes()
    path.write_bytes(data)
    done = gptj("parity", out)
    assert done.returncode == 2 and f"tensor {name} in model.safetensors differs" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_weights_of_another_format_beside_are_named_and_no_hindrance(tmp_path):
    out = write_sample(tmp_path / "out", CONFIG)
    (out / "pytorch_model.bin").write_bytes(b"")
    with pytest.warns(CheckpointWarning, match="pytorch_model"):
        assert verify(out).unchecked == ("pytorch_model.bin",)


@pytest.mark.parametrize("to", [to for to in FORMATS if to != "mesh"])
def test_a_head_that_is_none_is_refused_with_those_that_there_are(tmp_path, to):
    with pytest.raises(InputError, match=r"head: no such head .*causal_lm"):
        write(to, tmp_path / "out", head="lm")


def test_a_manifest_whose_tensors_are_gone_is_refused_though_its_hash_is_right(tmp_path):
    out = write_sample(tmp_path / "out", CONFIG)
    members = json.loads((out / "manifest.json").read_text())
    members |= {"tensors": {}, "sha256": hashlib.sha256(b"[]").hexdigest()}
    (out / "manifest.json").write_text(json.dumps(members))
    with pytest.raises(FormatError, match="tensors: no tensor is recorded"):
        verify(out)
