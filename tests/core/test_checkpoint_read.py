"""What is read is what was written: whole, in slices, mapped, cast; and a file that changes is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import CONFIG, arrays, entry, safetensors_bytes, write_raw, write_sample

from gptj.checkpoint import Checkpoint, open_checkpoint
from gptj.errors import FormatError, InputError, LimitError, MissingFileError, SchemaError
from gptj.reading import safetensors_file
from gptj.reading.safetensors_file import read_safetensors

NAME = "transformer.h.1.mlp.fc_in.weight"  # (20, 12)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_sample(tmp_path / "x", max_shard_bytes=4000))


@pytest.fixture(params=[64, 16 * 2**20], ids=["small blocks", "large blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_reads_back_bit_for_bit(tmp_path: Path, dtype: str, block_bytes: int) -> None:
    checkpoint = open_checkpoint(write_sample(tmp_path / "x", dtype=dtype))
    for name, array in arrays().items():
        read = checkpoint.read(name)
        assert read.dtype == DTYPES[dtype]
        assert read.flags.c_contiguous
        assert read.flags.owndata or read.base.flags.owndata
        assert read.tobytes() == array.astype(DTYPES[dtype]).tobytes()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", DTYPES)
def test_reading_casts_when_asked(tmp_path: Path, stored: str, asked: str, block_bytes: int) -> None:
    checkpoint = open_checkpoint(write_sample(tmp_path / "x", dtype=stored))
    expected = arrays()[NAME].astype(DTYPES[stored]).astype(DTYPES[asked])
    for dtype in (asked, np.dtype(DTYPES[asked]), DTYPES[asked]):
        read = checkpoint.read(NAME, dtype)
        assert read.dtype == DTYPES[asked]
        assert read.tobytes() == expected.tobytes()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [None, "float64", "bfloat16"])
@pytest.mark.parametrize("short_run_bytes", [8, 2**16])
def test_a_slice_is_that_part_of_the_whole(
    checkpoint: Checkpoint, axis: int, dtype: Any, block_bytes: int, short_run_bytes: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(safetensors_file, "_SHORT_RUN_BYTES", short_run_bytes)
    whole = checkpoint.read(NAME, dtype)
    size = whole.shape[axis]
    for start, stop in ((0, size), (0, 5), (3, 7), (size - 1, size), (4, 4)):
        part = checkpoint.read_slice(NAME, axis, start, stop, dtype)
        expected = whole[start:stop] if axis == 0 else whole[:, start:stop]
        assert part.flags.c_contiguous
        assert (part.shape, part.tobytes()) == (expected.shape, expected.tobytes())


def test_a_slice_of_three_axes_is_that_part_of_the_whole(tmp_path: Path, block_bytes: int) -> None:
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    path = tmp_path / "t.safetensors"
    path.write_bytes(safetensors_bytes({"t": entry("F32", (3, 4, 5), 0, 240)}, values.tobytes()))
    file = read_safetensors(path)
    for axis in range(3):
        part = file.read_slice(file.tensors["t"], axis, 1, 3)
        np.testing.assert_array_equal(part, values.take([1, 2], axis))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_tensors_are_read_and_mapped(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.full(shape, 1.5, np.float32)
    path = tmp_path / "t.safetensors"
    path.write_bytes(safetensors_bytes({"t": entry("F32", shape, 0, values.nbytes)}, values.tobytes()))
    file = read_safetensors(path)
    for read in (file.read(file.tensors["t"]), file.read(file.tensors["t"], "float64"), file.map(file.tensors["t"])):
        np.testing.assert_array_equal(read, values)
        assert read.shape == shape


@pytest.mark.parametrize(("axis", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 21), (0, 5, 4)])
def test_a_slice_outside_the_tensor_is_refused(checkpoint: Checkpoint, axis: int, start: int, stop: int) -> None:
    with pytest.raises(InputError, match=NAME):
        checkpoint.read_slice(NAME, axis, start, stop)


@pytest.mark.parametrize("dtype", ["int8", "F32", np.int32, ">f4", object])
def test_a_dtype_that_no_weight_has_is_refused(checkpoint: Checkpoint, dtype: Any) -> None:
    with pytest.raises(InputError, match="not a dtype of weights"):
        checkpoint.read(NAME, dtype)


def test_W11_a_cast_that_would_overflow_is_refused_by_name(tmp_path: Path) -> None:
    tensors = arrays()
    tensors[NAME][3, 4] = -70_000
    checkpoint = open_checkpoint(write_raw(tmp_path / "x", tensors))
    with pytest.raises(SchemaError, match=r"does not fit float16 .*at most 65504, found 70000 in 1 element"):
        checkpoint.read(NAME, "float16")
    assert checkpoint.read(NAME, "bfloat16")[3, 4] == ml_dtypes.bfloat16(-70_000)


def test_infinity_in_the_file_stays_infinity(tmp_path: Path) -> None:
    tensors = arrays()
    tensors[NAME][0, 0] = np.inf
    assert open_checkpoint(write_raw(tmp_path / "x", tensors)).read(NAME, "float16")[0, 0] == np.inf


def test_W7_whole_numbers_are_never_cast(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_raw(tmp_path / "x", {"a": np.arange(3)}))
    np.testing.assert_array_equal(checkpoint.read("a"), np.arange(3))
    with pytest.raises(SchemaError, match="cannot be cast"):
        checkpoint.read("a", "float32")


def test_a_misspelt_name_gets_a_suggestion(checkpoint: Checkpoint) -> None:
    with pytest.raises(SchemaError, match=r"Did you mean lm_head\.bias\?"):
        checkpoint.read("lm_head.bais")


# ---- maps


def test_a_map_is_a_view_whose_writes_never_reach_the_file(checkpoint: Checkpoint) -> None:
    before = {path: path.read_bytes() for path in checkpoint.weight_files}
    view = checkpoint.map(NAME)
    assert not view.flags.owndata
    view[...] = 7
    assert float(view.sum()) == 7 * view.size
    assert {path: path.read_bytes() for path in checkpoint.weight_files} == before
    np.testing.assert_array_equal(checkpoint.map(NAME), arrays()[NAME])


def test_a_map_of_bfloat16_is_bfloat16(tmp_path: Path) -> None:
    view = open_checkpoint(write_sample(tmp_path / "x", dtype="bfloat16")).map(NAME)
    assert view.dtype == ml_dtypes.bfloat16
    assert view.tobytes() == arrays()[NAME].astype(ml_dtypes.bfloat16).tobytes()


def test_a_tensor_that_lies_unaligned_is_read_instead_of_mapped(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_raw(tmp_path / "x", {"a": np.zeros(1, bool), "b": np.ones(3, np.float32)}))
    view = checkpoint.map("b")
    assert view.flags.aligned
    assert view.tolist() == [1, 1, 1]


# ---- files that change


def test_W15_a_file_that_shrank_is_noticed(checkpoint: Checkpoint) -> None:
    os.truncate(checkpoint.tensors[NAME].file, 2000)
    for read in (checkpoint.read, checkpoint.map, lambda name: checkpoint.read_slice(name, 0, 0, 1)):
        with pytest.raises(FormatError, match="changed while being read"):
            read(NAME)


def test_W15_a_file_that_was_written_to_is_noticed(checkpoint: Checkpoint) -> None:
    path = checkpoint.tensors[NAME].file
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(FormatError, match="changed while being read"):
        checkpoint.read(NAME)


def test_W15_a_file_that_shrinks_in_the_middle_of_a_read_is_noticed(checkpoint: Checkpoint, monkeypatch: Any) -> None:
    real = safetensors_file.read_into

    def shrink_first(*args: Any, **named: Any) -> None:
        os.truncate(checkpoint.tensors[NAME].file, 2000)
        real(*args, **named)

    monkeypatch.setattr(safetensors_file, "read_into", shrink_first)
    with pytest.raises(FormatError, match="changed while being read"):
        checkpoint.read(NAME)


def test_a_file_that_vanished_is_missing(checkpoint: Checkpoint) -> None:
    checkpoint.tensors[NAME].file.unlink()
    with pytest.raises(MissingFileError, match=r"model-\d+-of-\d+\.safetensors"):
        checkpoint.read(NAME)


def test_S4_a_directory_replaced_after_it_was_opened_is_never_mixed_in(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_sample(tmp_path / "x"))
    write_sample(tmp_path / "x", seed=1, overwrite=True)
    with pytest.raises(FormatError, match="changed while being read"):
        checkpoint.read(NAME)


# ---- memory and descriptors


def test_R1_reading_with_a_cast_holds_one_tensor_and_a_block(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 2**16)
    config = CONFIG.replace(vocab_size=40_000)
    checkpoint = open_checkpoint(write_sample(tmp_path / "x", config))
    tracemalloc.start()
    try:
        array = checkpoint.read("transformer.wte.weight", "float64")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < array.nbytes + 8 * 2**16


def test_R1_a_tensor_larger_than_memory_is_a_limit_error(tmp_path: Path) -> None:
    """A sparse file of 2^46 bytes with an honest header: more than any machine has."""
    path = tmp_path / "t.safetensors"
    path.write_bytes(safetensors_bytes({"t": entry("F32", (2**44,), 0, 2**46)}))
    try:
        os.truncate(path, path.stat().st_size + 2**46)
    except OSError:  # the file system's largest file is smaller (ext4: 16 TiB)
        path.write_bytes(safetensors_bytes({"t": entry("F32", (2**41,), 0, 2**43)}))
        os.truncate(path, path.stat().st_size + 2**43)
    file = read_safetensors(path)
    code = textwrap.dedent(
        f"""
        import resource
        from gptj.errors import LimitError
        from gptj.reading.safetensors_file import read_safetensors
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        file = read_safetensors({str(path)!r})
        try:
            file.read(file.tensors["t"])
        except LimitError as error:
            print(error)
        """
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "GB of memory" in answer.stdout
    assert issubclass(LimitError, MemoryError)
    assert file.tensors["t"].nbytes >= 2**43


def test_R2_forty_shards_are_read_with_few_descriptors(tmp_path: Path) -> None:
    write_sample(tmp_path / "x", max_shard_bytes=1)
    code = textwrap.dedent(
        f"""
        import resource
        from gptj.checkpoint import open_checkpoint
        resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
        checkpoint = open_checkpoint({str(tmp_path / "x")!r})
        print(len(checkpoint.weight_files), sum(checkpoint.read(name).size for name in checkpoint.tensors))
        """
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [str(len(arrays())), str(sum(a.size for a in arrays().values()))]
