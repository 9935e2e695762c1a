"""A writer that was stopped at any call is continued to the bytes of one that was not."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import CONFIG, array_of, arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj.checkpoint import verify_checkpoint, write_checkpoint
from gptj.errors import FormatError, InputError
from gptj.reading.tally import CastTally, ValueTally
from gptj.writing.column_sums import ColumnSums
from gptj.writing.file_system import FileSystem

SMALL = CONFIG.replace(n_layer=1)
CALLS = [name for name in vars(FileSystem) if not name.startswith("_")]


def _wrapped(name: str) -> Any:
    def call(self: Any, *arguments: Any) -> Any:
        self.count += 1
        if self.count == self.n:
            raise KeyboardInterrupt
        return None if name == "fsync" else getattr(FileSystem, name)(self, *arguments)

    return call


class InterruptedFileSystem(FileSystem):
    """Ctrl-C at the n-th system call."""

    def __init__(self, n: int) -> None:
        self.n, self.count = n, 0


for _name in CALLS:
    setattr(InterruptedFileSystem, _name, _wrapped(_name))


def write(directory: Path, *, n: int = -1, seed: int = 1, **options: Any) -> Path:
    return write_checkpoint(
        directory, SMALL, lambda row: array_of(row, seed=seed), max_shard_bytes=4000, overwrite=True,
        fs=InterruptedFileSystem(n), input_identity=seed, **options,
    )  # fmt: skip


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("has_old", [False, True], ids=["a new directory", "an old directory"])
def test_S7_wherever_a_writer_is_interrupted_the_next_one_goes_on_to_the_same_bytes(
    tmp_path: Path, has_old: bool, caplog: pytest.LogCaptureFixture
) -> None:
    whole = files(write(tmp_path / "whole"))
    n, kept = 0, 0
    while True:
        n += 1
        target = tmp_path / str(n) / "x"
        target.parent.mkdir()
        if has_old:
            write(target, seed=0)
        old = files(target) if has_old else None
        try:
            write(target, n=n, resume=True)
        except KeyboardInterrupt:
            assert not target.exists() or files(target) in (old, whole)
            caplog.clear()
            write(target, resume=True)
            kept += "kept" in caplog.text
            assert files(target) == whole
            assert [path.name for path in target.parent.iterdir()] == ["x"]
        else:
            break
    assert kept > n / 4  # the first file is not finished at once, and the last calls come after the swap


def test_a_note_of_a_finished_file_is_not_in_the_finished_directory(tmp_path: Path) -> None:
    assert not list(write(tmp_path / "x").glob("*.journal"))


def test_resuming_needs_to_know_the_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="input_identity"):
        write_checkpoint(tmp_path / "x", CONFIG, array_of, resume=True)


# ---- the manifest's figures


DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_tally_finds_what_numpy_finds(dtype: str, data: st.DataObject) -> None:
    scalar = np.dtype(DTYPES[dtype])
    infinity = int(np.array(np.inf, np.float64).astype(scalar).view(f"u{scalar.itemsize}"))
    sign = 1 << (8 * scalar.itemsize - 1)
    edges = [0, 1, sign, sign + 1, infinity - 1, infinity, infinity + 1, sign + infinity, 2 * sign - 1]
    word = st.sampled_from(edges) | st.integers(0, 2 * sign - 1)
    bits = np.array(data.draw(st.lists(word, min_size=1, max_size=40)), f"u{scalar.itemsize}")
    tally = ValueTally(scalar)
    for part in np.array_split(bits, 3):
        tally.add(part.view(scalar))
    with np.errstate(invalid="ignore"):  # a signalling NaN
        wide = bits.view(scalar).astype(np.float64)
    finite = wide[np.isfinite(wide)]
    found = tally.record()
    assert (found.nan, found.inf) == (int(np.isnan(wide).sum()), int(np.isinf(wide).sum()))
    assert found.minimum == (finite.min() if finite.size else None)
    assert found.maximum == (finite.max() if finite.size else None)


@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_a_cast_is_counted_as_the_plainest_code_counts_it(source: str, target: str) -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal(70_000) * 10.0 ** random.integers(-30, 30, 70_000)).astype(DTYPES[source])
    values[:3] = 0, -0.0, np.finfo(values.dtype).max
    with np.errstate(over="ignore"):
        stored = values.astype(DTYPES[target])
    tally = CastTally(values.dtype)
    tally.add(values, stored)
    before, after = values.astype(np.float64), stored.astype(np.float64)
    kept = np.isfinite(after) & (after != 0)
    found = tally.record()
    assert found.overflowed == int(np.isinf(after).sum())
    assert found.underflowed == int(((after == 0) & (before != 0)).sum())
    expected = np.abs((after[kept] - before[kept]) / before[kept]).max()
    assert found.largest_relative_rounding == pytest.approx(expected, rel=1e-6)


def test_the_hash_of_the_whole_does_not_depend_on_the_files(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", CONFIG, array_of)
    many = write_checkpoint(tmp_path / "many", CONFIG, array_of, max_shard_bytes=1000)
    other = write_checkpoint(tmp_path / "other", CONFIG, lambda row: array_of(row, seed=9))
    hashes = [verify_checkpoint(directory).sha256 for directory in (one, many, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "x", CONFIG, array_of)
    members = json.loads((directory / "manifest.json").read_text())
    members["tensors"]["lm_head.bias"]["sha256"] = hashlib.sha256(b"").hexdigest()
    (directory / "manifest.json").write_text(json.dumps(members))
    with pytest.raises(FormatError, match=r"manifest\.json.*sha256.*edited"):
        verify_checkpoint(directory)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\\b", "", "\ud800", "a\0b"])
def test_a_manifest_that_names_a_path_is_refused(tmp_path: Path, name: str) -> None:
    directory = write_checkpoint(tmp_path / "x", CONFIG, array_of)
    members = json.loads((directory / "manifest.json").read_text())
    members["files"][name] = members["files"].pop("config.json")
    (directory / "manifest.json").write_text(json.dumps(members))
    with pytest.raises(FormatError, match="not a plain file name"):
        verify_checkpoint(directory)


# ---- the checksum of what is read back


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 700_000), st.lists(st.integers(0, 700_000), max_size=4), st.integers(0, 2**32))
def test_column_sums_do_not_depend_on_where_the_data_is_cut(size: int, cuts: list[int], seed: int) -> None:
    data = np.random.default_rng(seed).bytes(size)
    whole, parts = ColumnSums(), ColumnSums()
    whole.update(data)
    places = [0, *sorted(min(cut, size) for cut in cuts), size]
    for start, stop in itertools.pairwise(places):
        parts.update(memoryview(data)[start:stop])
    assert whole.hexdigest() == parts.hexdigest()
    if size:
        changed = bytearray(data)
        changed[seed % size] ^= 1 << seed % 8
        other = ColumnSums()
        other.update(bytes(changed))
        assert other.hexdigest() != whole.hexdigest()


def test_the_sample_has_tensors_of_many_sizes() -> None:
    assert len({array.nbytes for array in arrays().values()}) > 5
