"""A tied head that is stored apart is compared with the embedding some rows at a time, in every layout."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gptj_conversion.common import stored_array
from gptj_conversion.common.dialects import spell
from gptj_conversion.common.stored_array import StoredArray
from gptj_conversion.convert import convert
from weight_changes import arrays, as_bin, store

from gptj.checkpoint import open_checkpoint, write_checkpoint
from gptj.errors import FormatError, GPTJError, SchemaError
from gptj.parity.revealing import revealing_config, revealing_fill
from gptj.reading.files import file_identity

SHAPE = (300, 70)


def lying(path: Path, values: np.ndarray, *, column_major: bool = False, swapped: bool = False) -> StoredArray:
    """The values in a file of their own, whichever way they lie there."""
    path.write_bytes((values.byteswap() if swapped else values).tobytes("F" if column_major else "C"))
    with path.open("rb") as stream:
        identity = file_identity(stream)
    half = values.nbytes // 2 // 4 * 4
    extents = ((0, half), (half, values.nbytes - half))
    return StoredArray(path.name, values.dtype, values.shape, path, identity, extents, swapped, column_major)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(stored_array, "BLOCK_BYTES", 5_000)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_any_two_layouts_are_compared(tmp_path, values, small_blocks, transposed, first, second, swapped):
    one = lying(tmp_path / "one", values, column_major=first)
    turned = np.ascontiguousarray(values.T) if transposed else values
    other = lying(tmp_path / "other", turned, column_major=second, swapped=swapped)
    assert one.holds_same(other, transposed=transposed)
    for place in ((0, 0), (299, 69), (150, 3), (17, 68)):
        changed = values.copy()
        changed[place] += 1
        turned = np.ascontiguousarray(changed.T) if transposed else changed
        other = lying(tmp_path / "other", turned, column_major=second, swapped=swapped)
        assert not one.holds_same(other, transposed=transposed)


def test_another_shape_or_dtype_is_not_the_same(tmp_path, values):
    one = lying(tmp_path / "one", values)
    assert not one.holds_same(lying(tmp_path / "other", values[:-1]))
    assert not one.holds_same(lying(tmp_path / "other", values.astype(np.float16)))
    assert not one.holds_same(lying(tmp_path / "other", np.ascontiguousarray(values.T)))


def test_a_file_that_changed_is_refused(tmp_path, values):
    one, other = lying(tmp_path / "one", values), lying(tmp_path / "other", values)
    with pytest.raises(FormatError, match="changed"):
        one.holds_same(dataclasses.replace(other, identity=(*other.identity[:-1], -1)))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_memory_is_bounded(tmp_path, monkeypatch, transposed):
    values = np.random.default_rng(0).standard_normal((2048, 512)).astype(np.float32)  # 4 MB
    one = lying(tmp_path / "one", values)
    other = lying(tmp_path / "other", np.ascontiguousarray(values.T) if transposed else values)
    monkeypatch.setattr(stored_array, "BLOCK_BYTES", 2**17)
    tracemalloc.start()
    try:
        assert one.holds_same(other, transposed=transposed)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def tied(path: Path, dialect: str, *, change: bool) -> Path:
    """A tied model whose head is stored apart."""
    config = revealing_config(tie_word_embeddings=True, n_layer=1)
    write_checkpoint(path, config, revealing_fill(0))
    (path / "manifest.json").unlink()
    tensors = arrays(path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    if change:
        tensors["lm_head.weight"][-1, -1] += 1
    if dialect == "bin":
        as_bin(lambda _: tensors)(path)
    else:
        spelt = {spell(name, dialect): array for name, array in tensors.items()}
        names = {s.name.replace("/", "." if dialect == "flax" else "/"): s for s in spelt}
        store(path, {n: spelt[s].T if s.transposed else spelt[s] for n, s in names.items()}, form=dialect)
    return path


@pytest.mark.parametrize("dialect", ["pt", "bin", "flax", "tf"])
def test_a_tied_head_stored_apart_is_left_out_where_it_is_the_embedding(tmp_path, dialect):
    converted = convert(tied(tmp_path / "model", dialect, change=False), tmp_path / "out", fingerprint=False)
    opened = open_checkpoint(converted)
    assert "lm_head.weight" not in opened.tensors and opened.config.tie_word_embeddings


@pytest.mark.parametrize("dialect", ["pt", "bin", "flax", "tf"])
def test_a_tied_head_that_is_another_matrix_is_refused(tmp_path, dialect):
    with pytest.raises(SchemaError, match="lm_head") as caught:
        convert(tied(tmp_path / "model", dialect, change=True), tmp_path / "out")
    assert isinstance(caught.value, GPTJError) and not (tmp_path / "out").exists()
