"""Whatever format is written has a manifest, is verified without its source, and is continued after a kill."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import array_of, write_sample
from gptj_conversion.common.foreign import ForeignCheckpoint
from gptj_conversion.common.foreign_writer import write_foreign
from gptj_conversion.convert import convert, open_source, plan
from gptj_conversion.hf.flax_msgpack import FLAX_FILE, MsgpackWriter
from gptj_conversion.hf.keras_h5 import H5_FILE, H5Writer, _Sink
from gptj_conversion.hf.torch_bin import BIN_FILE, BinWriter
from gptj_conversion.mesh.checkpoint import MeshCheckpoint
from gptj_conversion.mesh.writer import write_mesh
from gptj_conversion.verify import verify

from gptj.config import GPTJConfig
from gptj.config.schema import schema
from gptj.errors import (
    CheckpointWarning,
    FormatError,
    GPTJError,
    MissingFileError,
    ParityError,
    SchemaError,
    WriteError,
)
from gptj.reading.manifest import Manifest
from gptj.writing.file_system import FileSystem
from gptj.writing.folder import ManifestFacts, WritingOptions

CONFIG = GPTJConfig(vocab_size=24, n_positions=16, n_embd=16, n_layer=2, n_head=4, rotary_dim=2)
FC_IN = "transformer.h.1.mlp.fc_in.weight"
FORMATS: dict[str, dict[str, Any]] = {
    "safetensors": {"to": "safetensors"},
    "safetensors, sharded": {"to": "safetensors", "max_shard_bytes": 4000},
    "bin": {"to": "bin"},
    "bin, sharded": {"to": "bin", "max_shard_bytes": 4000},
    "flax": {"to": "flax"},
    "flax, sharded": {"to": "flax", "max_shard_bytes": 4000},
    "tf": {"to": "tf"},
    "tf, sharded": {"to": "tf", "max_shard_bytes": 4000},
    "mesh, 1 shard": {"to": "mesh", "shards": 1},
    "mesh, 4 shards": {"to": "mesh", "shards": 4},
    "mesh, 2 shards, full": {"to": "mesh", "shards": 2, "layout": "full"},
}
OTHERS = [name for name in FORMATS if "safetensors" not in name]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_sample(tmp_path / "source", CONFIG)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def place_of(directory: Path, tensor: str) -> tuple[Path, int]:
    """A file that holds the tensor, and the offset of one of its bytes there."""
    opened = open_source(directory)
    if isinstance(opened, MeshCheckpoint):
        [(number, _), *_] = opened.leaves(tensor)
        archive, array = opened.parameters[-1][number]
        return archive.path, array.member.offset + array.member.nbytes - 3
    if isinstance(opened, ForeignCheckpoint):
        array = opened.arrays[tensor][0]
        return array.file, array.extents[0][0] + 5
    stored = opened.checkpoint.tensors[tensor]
    return stored.file, stored.offset + 5


# ---- one manifest, whatever the format


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_manifests_of_one_model_agree_tensor_by_tensor_in_every_format(tmp_path, dtype):
    source = write_sample(tmp_path / "source", CONFIG, dtype=dtype)
    expected = Manifest.from_file(source / "manifest.json")
    fingerprints = set()
    for name, options in FORMATS.items():
        if (dtype == "bfloat16" and options["to"] == "tf") or (dtype != "float32" and "full" in name):
            continue
        found = verify(convert(source, tmp_path / name, **options))
        assert found.sha256 == expected.sha256, name
        assert found.weights_format == options["to"]
        assert list(found.tensors) == list(expected.tensors)
        for key, record in found.tensors.items():
            other = expected.tensors[key]
            assert (record.sha256, record.values, record.cast) == (other.sha256, other.values, None)
            assert record.origin is not None and record.origin.files == ("model.safetensors",)
        fingerprints.add(found.fingerprint)
        assert set(found.files) | {"manifest.json"} == files(tmp_path / name).keys()
    assert len(fingerprints) == 1 and None not in fingerprints


def test_another_model_has_another_hash_in_every_format(tmp_path):
    sources = [write_sample(tmp_path / f"source{seed}", CONFIG, seed=seed) for seed in (0, 1)]
    for name, options in FORMATS.items():
        one, other = (verify(convert(s, tmp_path / f"{name}{n}", **options)) for n, s in enumerate(sources))
        assert one.sha256 != other.sha256


def test_where_a_narrowing_cast_loses_is_counted_in_every_format(tmp_path):
    def read(row):
        values = array_of(row)
        values.reshape(-1)[:2] = [70_000, 1e-10]
        return values

    from gptj.checkpoint import write_checkpoint

    source = write_checkpoint(tmp_path / "source", CONFIG, read)
    for name in ("bin", "flax", "tf", "mesh, 4 shards"):
        with pytest.raises(SchemaError, match="float16"):
            convert(source, tmp_path / name, dtype="float16", **FORMATS[name])
        options = {**FORMATS[name], "dtype": "float16", "allow_overflow": True, "fingerprint": False}
        record = verify(convert(source, tmp_path / name, **options)).tensors[FC_IN]
        assert (record.cast.source_dtype, record.cast.overflowed, record.cast.underflowed) == ("float32", 1, 1)
        assert record.values.inf == 1 and 0 < record.cast.largest_relative_rounding < 1e-3


# ---- verified without the source


@pytest.mark.parametrize("name", FORMATS)
def test_W12_a_flipped_bit_is_noticed_in_every_format_and_its_tensor_named(source, tmp_path, name):
    out = convert(source, tmp_path / "out", fingerprint=False, **FORMATS[name])
    file, offset = place_of(out, FC_IN)
    flip(file, offset)
    place = re.escape(str(file.relative_to(out)))
    problem = rf"not what was written: tensor {FC_IN} in {place} (differs|cannot be read \(.*\))\. Fetch"
    with pytest.raises(FormatError, match=problem):
        verify(out)


@pytest.mark.parametrize("name", OTHERS)
def test_what_lies_between_the_tensors_is_hashed_too(source, tmp_path, name):
    out = convert(source, tmp_path / "out", fingerprint=False, **FORMATS[name])
    for path in (out / "config.json", out / "meta.json"):
        if path.exists():
            path.write_bytes(path.read_bytes() + b" ")
            with pytest.raises(FormatError, match=rf"not what was written: '{path.name}' differs"):
                verify(out)


def test_a_moment_of_the_optimizer_is_hashed_though_it_is_no_tensor_of_the_model(source, tmp_path):
    out = convert(source, tmp_path / "out", fingerprint=False, **FORMATS["mesh, 2 shards, full"])
    opened = open_source(out)
    archive = opened.archives[1][0]
    flip(archive.path, archive.arrays[1].member.offset + 1)
    with pytest.raises(FormatError, match=r"not what was written: 'step_0/shard_1/0\.npz' differs"):
        verify(out)


@pytest.mark.parametrize("name", OTHERS)
def test_a_missing_file_is_named_in_every_format(source, tmp_path, name):
    out = convert(source, tmp_path / "out", fingerprint=False, **FORMATS[name])
    file, _ = place_of(out, FC_IN)
    file.unlink()
    with pytest.raises(FormatError, match=rf"'{file.relative_to(out)}' is missing"):
        verify(out)


@pytest.mark.parametrize("name", ["bin", "flax", "tf"])
def test_C6_a_changed_n_head_is_seen_by_the_fingerprint_in_every_format(source, tmp_path, name):
    out = convert(source, tmp_path / "out", **FORMATS[name])
    members = json.loads((out / "config.json").read_text()) | {"n_head": 2}
    (out / "config.json").write_text(json.dumps(members))
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files"]["config.json"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"manifest\.json: config_sha256: the config is not the one"):
        verify(out)
    manifest["config_sha256"] = GPTJConfig.from_dict(members).architecture_sha256
    (out / "manifest.json").write_text(json.dumps(manifest))
    with (
        pytest.warns(CheckpointWarning, match=r"not checked.*'config\.json'"),
        pytest.raises(ParityError, match="the forward pass is not the one that was recorded"),
    ):
        verify(out, fingerprint=True)


def test_a_folder_that_gptj_did_not_write_has_no_manifest_to_verify(source, tmp_path):
    out = convert(source, tmp_path / "out", to="bin")
    (out / "manifest.json").unlink()
    with pytest.raises(MissingFileError, match=r"manifest\.json: no such file\. Only what gptj wrote has one"):
        verify(out)
    with pytest.raises(MissingFileError, match=r"nowhere: no such directory"):
        verify(tmp_path / "nowhere")


def test_an_unknown_format_in_a_manifest_is_named(source, tmp_path):
    out = convert(source, tmp_path / "out", to="bin")
    manifest = json.loads((out / "manifest.json").read_text()) | {"weights_format": "onnx"}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"manifest\.json: weights_format: no such format .*onnx"):
        verify(out)


@pytest.mark.parametrize("name", FORMATS)
def test_an_overwritten_directory_has_the_new_manifest(source, tmp_path, name):
    other = write_sample(tmp_path / "other", CONFIG, seed=1)
    convert(source, tmp_path / "out", fingerprint=False, **FORMATS[name])
    convert(other, tmp_path / "out", fingerprint=False, overwrite=True, **FORMATS[name])
    assert verify(tmp_path / "out").sha256 == Manifest.from_file(other / "manifest.json").sha256


# ---- S7: continued

KILLED = """
    import json, os, signal, sys
    from gptj_conversion.convert import convert
    src, dst, options, tensors = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    count = 0
    def progress(name, nbytes):
        global count
        count += 1
        if count == tensors:
            os.kill(os.getpid(), signal.SIGKILL)
    convert(src, dst, progress=progress, **options)
"""


def kill_after(source: Path, directory: Path, tensors: int, **options: Any) -> Path:
    """Convert, and die by SIGKILL after so many tensors; returns the stage that is left."""
    arguments = [str(source), str(directory), json.dumps(options), str(tensors)]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [stage] = directory.parent.glob(f".{directory.name}.gptj-stage-*")
    return stage


@pytest.mark.parametrize("name", ["bin, sharded", "flax, sharded", "tf, sharded", "mesh, 4 shards"])
def test_S7_a_killed_conversion_to_any_format_is_continued_to_the_same_bytes(source, tmp_path, name, caplog):
    options = FORMATS[name]
    whole = files(convert(source, tmp_path / "whole", **options))
    stage = kill_after(source, tmp_path / "out", 21, **options)
    notes = len([*stage.glob("*.journal")])
    told: list[tuple[str, int]] = []
    convert(source, tmp_path / "out", resume=True, progress=lambda *event: told.append(event), **options)
    assert files(tmp_path / "out") == whole
    assert notes and f"{notes * options.get('shards', 1)} finished weights file(s) kept" in caplog.text
    assert len(told) == len(verify(tmp_path / "out").tensors) and 0 < sum(not nbytes for _, nbytes in told) < 21
    assert not [path for path in tmp_path.iterdir() if "gptj-" in path.name]


@pytest.mark.parametrize("name", ["bin", "flax", "tf"])
def test_S7_a_single_file_begins_again_and_says_so(source, tmp_path, name, caplog):
    whole = files(convert(source, tmp_path / "whole", **FORMATS[name]))
    kill_after(source, tmp_path / "out", 21, **FORMATS[name])
    convert(source, tmp_path / "out", resume=True, **FORMATS[name])
    assert "it had finished no weights file, so all begins again" in caplog.text
    assert files(tmp_path / "out") == whole


@pytest.mark.parametrize("name", ["bin, sharded", "mesh, 4 shards"])
def test_S7_a_finished_file_that_was_damaged_meanwhile_is_made_again(source, tmp_path, name):
    whole = files(convert(source, tmp_path / "whole", **FORMATS[name]))
    stage = kill_after(source, tmp_path / "out", 21, **FORMATS[name])
    note = json.loads((stage / "shard-2.journal").read_text())
    flip(stage / next(iter(note["files"])), 60)
    convert(source, tmp_path / "out", resume=True, **FORMATS[name])
    assert files(tmp_path / "out") == whole


PAIRS = [*itertools.permutations(["bin, sharded", "mesh, 4 shards", "safetensors, sharded"], 2)]


@pytest.mark.parametrize(("first", "then"), PAIRS)
@pytest.mark.parametrize("resume", [False, True])
def test_S7_what_a_writer_of_another_format_left_is_cleared(source, tmp_path, first, then, resume):
    kill_after(source, tmp_path / "out", 21, **FORMATS[first])
    convert(source, tmp_path / "out", resume=resume, **FORMATS[then])
    assert files(tmp_path / "out") == files(convert(source, tmp_path / "whole", **FORMATS[then]))
    assert not [path for path in tmp_path.iterdir() if "gptj-" in path.name]


# ---- the plan


@pytest.mark.parametrize("name", FORMATS)
def test_the_plan_names_the_weights_files_of_any_format(source, tmp_path, name):
    planned = plan(source, tmp_path / "out", **FORMATS[name])
    assert not (tmp_path / "out").exists()
    out = convert(source, tmp_path / "out", fingerprint=False, **FORMATS[name])
    written = {file for record in Manifest.from_file(out / "manifest.json").tensors.values() for file in record.files}
    if FORMATS[name]["to"] == "mesh":
        shards = FORMATS[name]["shards"]
        assert [file.name for file in planned.files] == [f"step_0/shard_{n}/0.npz to 15.npz" for n in range(shards)]
        assert all((out / file.name.removesuffix("0.npz to 15.npz") / "15.npz").exists() for file in planned.files)
        assert {file.tensors for file in planned.files} == {len(schema(CONFIG))}
    else:
        assert {file.name for file in planned.files} == written
    stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert planned.nbytes < stored


def test_what_cannot_be_written_is_refused_by_the_plan_already(source, tmp_path):
    for options, words in (
        ({"to": "mesh"}, "shards: is needed: how many cores"),
        ({"to": "mesh", "shards": 3}, "n_head = 4"),
        ({"to": "bin", "shards": 2}, "shards: is for TPU checkpoints alone"),
        ({"to": "tf", "dtype": "bfloat16"}, "has no bfloat16"),
        ({"to": "onnx"}, "one of safetensors, mesh"),
    ):
        for do in (plan, convert):
            with pytest.raises(GPTJError, match=words):
                do(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ---- S3, S7: the n-th system call fails, or is the last


def _wrapped(name: str) -> Callable[..., Any]:
    def call(self: Any, *arguments: Any) -> Any:
        self.count += 1
        if self.count == self.n:
            raise self.failure
        return None if name == "fsync" else getattr(FileSystem, name)(self, *arguments)

    return call


class StoppedFileSystem(FileSystem):
    """The n-th system call raises `failure`."""

    def __init__(self, n: int, failure: BaseException) -> None:
        self.n, self.failure, self.count = n, failure, 0


for _name in [name for name in vars(FileSystem) if not name.startswith("_")]:
    setattr(StoppedFileSystem, _name, _wrapped(_name))

SMALL = CONFIG.replace(n_layer=1)


def write(to: str, directory: Path, *, fs: FileSystem | None = None, seed: int = 1, resume: bool = False) -> Path:
    def read(row):
        return array_of(row, seed=seed)

    facts = ManifestFacts(input_identity=seed, resume=resume)
    options = WritingOptions(max_shard_bytes=5000, overwrite=True, facts=facts, fs=fs)
    if to == "mesh":
        return write_mesh(directory, SMALL, read, shards=2, dtype="float32", options=options)
    kinds = {
        "bin": (BIN_FILE, "pt", BinWriter),
        "flax": (FLAX_FILE, "flax", MsgpackWriter),
        "tf": (H5_FILE, "tf", H5Writer),
    }
    file_name, dialect, writer = kinds[to]
    return write_foreign(
        directory, SMALL, read, writer, file_name=file_name, dialect=dialect, dtype_of=lambda name: "float32",
        weights_format=to, options=options,
    )  # fmt: skip


STEPS = {"bin": 7, "flax": 7, "tf": 29, "mesh": 41}
"""Every so many calls one is stopped; all of them would take minutes."""


@pytest.mark.parametrize("to", STEPS)
def test_S3_whichever_call_fails_the_old_directory_still_stands(tmp_path, to):
    target = write(to, tmp_path / "x", seed=0)
    old = files(target)
    for n in itertools.count(1, STEPS[to]):
        fs = StoppedFileSystem(n, OSError(5, "Input/output error"))
        try:
            write(to, target, fs=fs)
        except GPTJError as error:
            assert isinstance(error, WriteError) and "Input/output error" in str(error)
            assert files(target) == old
        else:
            if fs.count < n:
                break
            assert verify(target)  # what failed was the removal of the old directory
            write(to, target, seed=0)
            assert files(target) == old
    assert n > 10 * STEPS[to]


@pytest.mark.parametrize("to", STEPS)
def test_S7_wherever_a_writer_is_interrupted_the_next_goes_on_to_the_same_bytes(tmp_path, to, caplog):
    whole = files(write(to, tmp_path / "whole"))
    kept = 0
    for n in itertools.count(1, STEPS[to]):
        target = tmp_path / str(n) / "x"
        target.parent.mkdir()
        try:
            write(to, target, fs=StoppedFileSystem(n, KeyboardInterrupt()), resume=True)
        except KeyboardInterrupt:
            caplog.clear()
            write(to, target, resume=True)
            kept += "kept" in caplog.text
        else:
            break
        finally:
            assert files(target) == whole
            assert [path.name for path in target.parent.iterdir()] == ["x"]
    assert kept > 3


def test_an_interrupt_inside_hdf5_waits_until_it_has_returned():
    class Interrupted:
        nbytes = 0

        def write_at(self, at, data):
            raise KeyboardInterrupt

    sink = _Sink(Interrupted())
    assert sink.write(b"abc") == 3 and sink.write(b"def") == 3
    assert isinstance(sink.failure, KeyboardInterrupt)
