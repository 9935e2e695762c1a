"""An HDF5 file's structures are read by our own reader: fast, in little memory, and never twice."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from gptj_conversion.hf_tf import read_h5

from gptj.errors import FormatError, GPTJError

FOREIGN = Path(__file__).parent.parent / "data" / "foreign"
SMALLEST = FOREIGN / "tf_sharded" / "tf_model-00002-of-00002.h5"


def listing(path: Path) -> list[tuple[object, ...]]:
    return [(array.name, array.shape, array.dtype, array.extents) for array in read_h5(path)]


def test_every_byte_of_the_metadata_may_lie_without_cost(tmp_path):
    """Every 53rd byte here; every byte with eight values each was done once: see benchmarks/README.md."""
    data = bytearray(SMALLEST.read_bytes())
    payload = {n for array in read_h5(SMALLEST) for n in range(array.extents[0][0], sum(array.extents[0]))}
    path = tmp_path / "mutant.h5"
    slowest = 0.0
    tracemalloc.start()
    try:
        for at in sorted({*range(0, len(data), 53), *range(0, 110)} - payload):
            for value in {0, 1, 255, data[at] ^ 1, data[at] ^ 0x10} - {data[at]}:
                path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
                begun = time.process_time()
                try:
                    read_h5(path)
                except GPTJError as error:
                    assert "mutant.h5" in str(error)
                slowest = max(slowest, time.process_time() - begun)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert slowest < 5


@pytest.mark.parametrize("made_by", ["earliest", "v108", "latest"])
@pytest.mark.parametrize("members", [2, 7])
def test_what_h5py_writes_in_each_layout_is_read_alike(tmp_path, made_by, members):
    names = [f"layer/weight{n}:0" for n in range(members)]
    with h5py.File(tmp_path / "x.h5", "w", libver=made_by) as file:
        for number, name in enumerate(names):
            file.create_dataset(name, data=np.full((3, 2), number, ">f4" if number else "<f8"))
        file.attrs["layer_names"] = names
    arrays = sorted(read_h5(tmp_path / "x.h5"), key=lambda array: array.name)
    assert [array.name for array in arrays] == names
    for number, array in enumerate(arrays):
        assert np.array_equal(array.read(array.dtype), np.full((3, 2), number))


def test_a_group_of_hundreds_of_members_is_a_tree_of_several_levels(tmp_path):
    names = [f"layer/weight{n:04d}:0" for n in range(900)]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in names:
            file.create_dataset(name, data=np.zeros(2, "<f4"))
        file.attrs["layer_names"] = np.array([name.encode() for name in names])
    assert [array.name for array in read_h5(tmp_path / "x.h5")] == names


def test_a_group_whose_links_lie_in_a_fractal_heap_is_named(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w", libver="latest") as file:
        for number in range(40):
            file.create_dataset(f"layer/{number}", data=np.zeros(2, "<f4"))
    with pytest.raises(FormatError, match=r"x\.h5: layer: its links lie in a fractal heap"):
        read_h5(tmp_path / "x.h5")


@pytest.mark.parametrize("folder", ["tf", "tf_base", "tf_classifier"])
def test_our_reader_and_h5py_agree_on_every_dataset(folder):
    path = FOREIGN / folder / "tf_model.h5"
    found: dict[int, tuple[object, ...]] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[item.id.get_offset()] = (item.shape, item.dtype)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    assert {array.extents[0][0]: (array.shape, array.dtype) for array in read_h5(path)} == found
