"""A conversion is planned, proved, and continued after it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gptj_conversion import convert as door
from gptj_conversion.common.plan import interim_dtype
from gptj_conversion.convert import convert, plan
from gptj_conversion.mesh import checkpoint as mesh
from gptj_conversion.mesh.reader import open_mesh
from gptj_conversion.proof import identify_input
from mesh_samples import MeshSample, write_mesh_sample

from gptj.checkpoint import open_checkpoint, verify_checkpoint, write_checkpoint
from gptj.config.schema import schema_by_name
from gptj.errors import MissingFileError, ParityError, SchemaError
from gptj.parity.fingerprint import check_fingerprint
from gptj.parity.revealing import revealing_config, revealing_fill

CONFIG = revealing_config()


@pytest.fixture
def sample(tmp_path: Path) -> MeshSample:
    return write_mesh_sample(tmp_path / "mesh", layers=3, shards=2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", CONFIG, revealing_fill(0))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- the plan


@pytest.mark.parametrize("max_shard_bytes", [2_000, 9_000, 10**9])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float64"])
def test_the_plan_names_the_files_that_are_then_written(sample, tmp_path, dtype, max_shard_bytes):
    options = {"config": sample.config_file, "dtype": dtype, "max_shard_bytes": max_shard_bytes}
    planned = plan(sample.path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists() and planned.fits
    checkpoint = open_checkpoint(convert(sample.path, tmp_path / "out", **options))
    assert [file.name for file in planned.files] == [path.name for path in checkpoint.weight_files]
    assert [file.tensors for file in planned.files] == [len(file.tensors) for file in checkpoint.files]
    assert planned.nbytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def test_two_threads_read_the_same_bits_as_one(sample, tmp_path, monkeypatch):
    options = {"config": sample.config_file, "fingerprint": False}
    one = convert(sample.path, tmp_path / "one", **options)
    monkeypatch.setattr(mesh, "_WORTH_THREADS_BYTES", 0)
    two = convert(sample.path, tmp_path / "two", **options)
    assert files(one) == files(two)


# ---- what a cast did


def test_a_narrowing_cast_is_counted_and_rounded_once(tmp_path):
    values = np.array([1.0, 70000.0, 1e-10, -3.0, 1 / 3], np.float32)

    def read(row):
        out = np.ones(row.shape, np.float32)
        if row.name == "transformer.wte.weight":
            out.reshape(-1)[: len(values)] = values
        return out

    source = write_checkpoint(tmp_path / "source", CONFIG, read)
    with pytest.raises(SchemaError, match=r"transformer\.wte\.weight.*float16"):
        convert(source, tmp_path / "out", dtype="float16")
    convert(source, tmp_path / "out", dtype="float16", allow_overflow=True, fingerprint=False)
    record = verify_checkpoint(tmp_path / "out").tensors["transformer.wte.weight"]
    assert (record.cast.source_dtype, record.cast.overflowed, record.cast.underflowed) == ("float32", 1, 1)
    third = np.float32(1 / 3)
    expected = abs(np.float32(np.float16(third)) - third) / third
    assert record.cast.largest_relative_rounding == pytest.approx(expected)
    assert (record.values.minimum, record.values.maximum, record.values.inf) == (-3.0, 1.0, 1)


def test_narrowing_16_bit_numbers_goes_by_way_of_float32():
    assert interim_dtype("bfloat16", "float16") == "float32"
    assert interim_dtype("bfloat16", "bfloat16") == "bfloat16"
    assert interim_dtype("float64", "float16") == "float64"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_mesh_has_the_bits_of_the_reader_that_casts_by_itself(tmp_path, dtype):
    sample = write_mesh_sample(tmp_path / "mesh", dtype=ml_dtypes.bfloat16, shards=4)
    written = open_checkpoint(convert(sample.path, tmp_path / "out", config=sample.config_file, dtype=dtype))
    direct = open_mesh(sample.path, config=sample.config_file)
    for name in written.tensors:
        assert written.read(name).tobytes() == direct.read(name, dtype).tobytes()


# ---- the fingerprint


def test_a_converted_directory_has_the_fingerprint_of_its_forward_pass(source, tmp_path):
    directory = convert(source, tmp_path / "out")
    assert check_fingerprint(directory).output == "logits"


@pytest.mark.parametrize("change", [{"n_head": 2}, {"n_head": 8, "rotary_dim": 6}, {"rotary_dim": 6}])
def test_C6_a_changed_config_of_the_same_shapes_is_seen(source, tmp_path, change):
    directory = convert(source, tmp_path / "out")
    config = open_checkpoint(directory).config.replace(**change)
    with pytest.raises(ParityError, match=r"fingerprint\.logits.*n_head and rotary_dim"):
        check_fingerprint(directory, config=config)


@pytest.mark.parametrize("layer", range(CONFIG.n_layer))
@pytest.mark.parametrize("kind", "qkv")
def test_W9_a_transposed_square_matrix_is_seen(source, tmp_path, layer, kind):
    directory = convert(source, tmp_path / "out")
    tensor = open_checkpoint(directory).tensors[f"transformer.h.{layer}.attn.{kind}_proj.weight"]
    values = open_checkpoint(directory).read(tensor.name)
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(np.ascontiguousarray(values.T).tobytes())
    with pytest.raises(ParityError, match="the forward pass is not the one that was recorded"):
        check_fingerprint(directory)


@pytest.mark.parametrize("head", ["base", "sequence_classification", "question_answering"])
def test_other_heads_have_a_fingerprint_of_hidden_states(tmp_path, head):
    source = write_checkpoint(tmp_path / "source", CONFIG, revealing_fill(0), head=head)
    assert check_fingerprint(convert(source, tmp_path / "out")).output == "hidden_state"


def test_a_directory_without_a_fingerprint_says_how_to_get_one(source):
    with pytest.raises(MissingFileError, match=r"no fingerprint in it.*--no-fingerprint"):
        check_fingerprint(source)


def test_a_model_that_is_not_finite_is_written_without_a_fingerprint(tmp_path):
    fill = revealing_fill(0)
    source = write_checkpoint(tmp_path / "s", CONFIG, lambda row: fill(row) * np.nan, allow_nonfinite=True)
    out = convert(source, tmp_path / "out", allow_nonfinite=True, verify=True)
    manifest = verify_checkpoint(out)
    assert manifest.fingerprint is None
    record = manifest.tensors["transformer.wte.weight"].values
    assert (record.minimum, record.maximum, record.nan) == (None, None, CONFIG.vocab_size * CONFIG.n_embd)


# ---- verified before it counts


def test_verify_accepts_what_was_written_right(sample, tmp_path):
    assert convert(sample.path, tmp_path / "out", config=sample.config_file, dtype="bfloat16", verify=True).is_dir()


@pytest.mark.parametrize("to", ["safetensors", "bin", "flax", "tf"])
def test_verify_refuses_what_computes_something_else_and_leaves_nothing(source, tmp_path, monkeypatch, to):
    honest, rows = door.open_source, schema_by_name(CONFIG)

    class Swapped:
        def __init__(self, opened):
            self.opened = opened

        def read(self, row):
            return self.opened.read(rows[row.name.replace("k_proj", "v_proj")])

    def open_source(path, **options):
        opened = honest(path, **options)
        return Swapped(opened) if ".gptj-stage-" in Path(path).name else opened

    monkeypatch.setattr(door, "open_source", open_source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ParityError, match="hidden state 1: the converted weights compute something else"):
        convert(source, tmp_path / "out", to=to, verify=True)
    assert sorted(tmp_path.iterdir()) == before


# ---- S7: resumed


KILLED = """
    import os, signal, sys
    from gptj_conversion.convert import convert
    src, dst, config, tensors = sys.argv[1:5]
    count = 0
    def progress(name, nbytes):
        global count
        count += 1
        if count == int(tensors):
            os.kill(os.getpid(), signal.SIGKILL)
    convert(src, dst, config=config, max_shard_bytes=9000, progress=progress, resume=len(sys.argv) > 5)
"""


def kill_after(sample: MeshSample, directory: Path, tensors: int, *, resume: bool = False) -> list[str]:
    """Convert, and die by SIGKILL after so many tensors; returns the names of the finished shards' notes."""
    arguments = [str(sample.path), str(directory), str(sample.config_file), str(tensors), *(["r"] if resume else [])]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [stage] = directory.parent.glob(f".{directory.name}.gptj-stage-*")
    return sorted(path.name for path in stage.glob("*.journal"))


@pytest.fixture
def uninterrupted(sample: MeshSample, tmp_path: Path) -> dict[str, bytes]:
    return files(convert(sample.path, tmp_path / "whole", config=sample.config_file, max_shard_bytes=9000))


@pytest.mark.parametrize("tensors", [1, 7, 14, 21, 35])
def test_S7_a_killed_conversion_is_resumed_to_the_same_bytes(sample, tmp_path, uninterrupted, tensors, caplog):
    directory = tmp_path / "out"
    notes = kill_after(sample, directory, tensors)
    told: list[tuple[str, int]] = []
    options = {"config": sample.config_file, "max_shard_bytes": 9000}
    convert(sample.path, directory, **options, resume=True, progress=lambda *event: told.append(event))
    assert files(directory) == uninterrupted
    assert sum(nbytes == 0 for _, nbytes in told) >= len(notes)
    assert (f"{len(notes)} finished weights file(s) kept" in caplog.text) == bool(notes)
    assert not [path for path in tmp_path.iterdir() if "gptj-" in path.name]


def test_S7_a_resumed_conversion_can_be_killed_and_resumed_again(sample, tmp_path, uninterrupted):
    directory = tmp_path / "out"
    first = kill_after(sample, directory, 12)
    second = kill_after(sample, directory, 24, resume=True)
    assert 0 < len(first) < len(second)
    convert(sample.path, directory, config=sample.config_file, max_shard_bytes=9000, resume=True)
    assert files(directory) == uninterrupted


def test_S7_a_finished_shard_that_was_damaged_meanwhile_is_made_again(sample, tmp_path, uninterrupted):
    directory = tmp_path / "out"
    notes = kill_after(sample, directory, 30)
    assert len(notes) >= 2
    [stage] = tmp_path.glob(".out.gptj-stage-*")
    data = bytearray((stage / "shard-2").read_bytes())
    data[-1] ^= 1
    (stage / "shard-2").write_bytes(data)
    convert(sample.path, directory, config=sample.config_file, max_shard_bytes=9000, resume=True)
    assert files(directory) == uninterrupted


def test_S7_a_note_that_was_cut_short_counts_for_nothing(sample, tmp_path, uninterrupted):
    directory = tmp_path / "out"
    kill_after(sample, directory, 30)
    [stage] = tmp_path.glob(".out.gptj-stage-*")
    note = stage / "shard-1.journal"
    note.write_bytes(note.read_bytes()[:-20])
    convert(sample.path, directory, config=sample.config_file, max_shard_bytes=9000, resume=True)
    assert files(directory) == uninterrupted


def test_S7_changed_input_is_noticed_and_begun_anew(sample, tmp_path, caplog):
    directory = tmp_path / "out"
    kill_after(sample, directory, 30)
    shutil.rmtree(sample.path)
    other = write_mesh_sample(sample.path, layers=3, shards=2, seed=1)
    options = {"config": other.config_file, "max_shard_bytes": 9000}
    expected = files(convert(other.path, tmp_path / "whole", **options))
    convert(other.path, directory, **options, resume=True)
    assert "begun anew: other input or options" in caplog.text
    assert files(directory) == expected


def test_S7_other_options_begin_anew(sample, tmp_path, caplog):
    kill_after(sample, tmp_path / "out", 30)
    options = {"config": sample.config_file, "max_shard_bytes": 9000, "dtype": "bfloat16"}
    convert(sample.path, tmp_path / "out", **options, resume=True)
    assert "begun anew" in caplog.text
    assert open_checkpoint(tmp_path / "out").tensors["lm_head.weight"].dtype == "bfloat16"


def test_S7_without_resume_the_stage_is_cleared_and_said(sample, tmp_path, caplog):
    kill_after(sample, tmp_path / "out", 30)
    convert(sample.path, tmp_path / "out", config=sample.config_file)
    assert "cleared, the unfinished output of a process that died" in caplog.text
    assert not list(tmp_path.glob(".out.gptj-*"))


def test_S7_an_interrupt_leaves_the_stage_only_where_resume_was_said(sample, tmp_path):
    def interrupt(name: str, nbytes: int) -> None:
        raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            convert(sample.path, tmp_path / "out", config=sample.config_file, resume=resume, progress=interrupt)
        assert bool(list(tmp_path.glob(".out.gptj-stage-*"))) == resume


def test_the_identity_of_the_input_follows_the_ends_of_files_even_where_size_and_time_stay(sample):
    before = identify_input(sample.step_directory)
    path = sample.step_directory / "shard_0" / "3.npz"
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert identify_input(sample.step_directory) != before


# ---- W11, R1, R2


def test_W11_an_all_zero_matrix_is_written_and_said(tmp_path, caplog):
    write_checkpoint(
        tmp_path / "out", CONFIG, lambda row: np.zeros(row.shape, np.float32) if "fc_in.weight" in row.name else
        np.ones(row.shape, np.float32),
    )  # fmt: skip
    assert "transformer.h.0.mlp.fc_in.weight is all zero" in caplog.text
    assert "wte" not in caplog.text


def run_limited(limit: str, source: Path, target: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = f"""
        import resource, sys
        import gptj.command.main, gptj_conversion.convert, gptj.parity.fingerprint
        {limit}
        sys.argv = ["gptj", "convert", {str(source)!r}, {str(target)!r}, *{list(options)!r}]
        gptj.command.main.main()
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment
    )


def test_R1_too_little_memory_says_about_how_much_is_needed(tmp_path):
    config = CONFIG.replace(vocab_size=2_000_000)  # two tensors of 384 MB
    ones = np.ones((1, 1), np.float32)
    source = write_checkpoint(tmp_path / "source", config, lambda row: np.broadcast_to(ones.reshape(-1)[0], row.shape))
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (300 * 2**20, 300 * 2**20))"
    done = run_limited(limit, source, tmp_path / "out")
    assert done.returncode == 1 and "LimitError" in done.stderr and "needs" in done.stderr
    assert "GB of memory" in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_R2_a_hundred_shards_need_few_file_descriptors(tmp_path):
    source = write_checkpoint(tmp_path / "source", CONFIG, revealing_fill(0), max_shard_bytes=1)
    shards = len(open_checkpoint(source).files)
    assert shards == 35
    deep = CONFIG.replace(n_layer=10)
    source = write_checkpoint(tmp_path / "deep", deep, revealing_fill(0), max_shard_bytes=1)
    assert len(open_checkpoint(source).files) > 100
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))"
    done = run_limited(limit, source, tmp_path / "out", "--max-shard-gb", "0.001", "--verify", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == 105
