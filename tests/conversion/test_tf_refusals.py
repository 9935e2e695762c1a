"""HDF5 can point anywhere; whatever is not a plain run of numbers inside the file is refused, with its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5_bytes
import h5py
import numpy as np
import pytest
from gptj_conversion.convert import convert
from gptj_conversion.hf import h5_process, h5_survey
from gptj_conversion.hf.h5_blocks import Blocks
from gptj_conversion.hf.h5_process import H5Process
from gptj_conversion.hf.keras_h5 import read_h5
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed.hdf5 import with_endless_heap

from gptj.errors import CheckpointWarning, FormatError, GPTJError, LimitError, SchemaError, UnsafeFileError

FOREIGN = Path(__file__).parent.parent / "data" / "foreign"
WTE = "transformer/tfgptj_for_causal_lm/transformer/wte/weight:0"
SHAPE = (40, 12)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    for name in ("config.json", "tf_model.h5"):
        (tmp_path / "src" / name).write_bytes((FOREIGN / "tf" / name).read_bytes())
    return tmp_path / "src"


@pytest.fixture(scope="module")
def process() -> Iterator[H5Process]:
    """One for many files: to start it takes longer than to read a small file."""
    with H5Process() as process:
        yield process


def replaced(file: h5py.File, **options: object) -> None:
    """Put another dataset where wte.weight was."""
    del file[WTE]
    file.create_dataset(WTE, **options)


def external_storage(file: h5py.File) -> None:
    del file[WTE]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_external(b"/etc/passwd", 0, 40 * 12 * 4)
    space = h5py.h5s.create_simple(SHAPE)
    h5py.h5d.create(file.id, WTE.encode(), h5py.h5t.IEEE_F32LE, space, plist)


def external_link(file: h5py.File) -> None:
    del file[WTE]
    file[WTE] = h5py.ExternalLink("/etc/passwd", "/x")


def soft_link(file: h5py.File) -> None:
    del file[WTE]
    file[WTE] = h5py.SoftLink("/transformer")


def soft_link_loop(file: h5py.File) -> None:
    file["a"] = h5py.SoftLink("/b")
    file["b"] = h5py.SoftLink("/a")


def hard_link_loop(file: h5py.File) -> None:
    file["transformer/again"] = file["transformer"]


def virtual(file: h5py.File) -> None:
    del file[WTE]
    layout = h5py.VirtualLayout(SHAPE, "<f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", SHAPE)
    file.create_virtual_dataset(WTE, layout)


def sparse_bomb(file: h5py.File) -> None:
    replaced(file, shape=(2**40, 2**10), dtype="<f4", chunks=(2**10, 2**10))


def unwritten(file: h5py.File) -> None:
    replaced(file, shape=SHAPE, dtype="<f4")


def no_weight_names(file: h5py.File) -> None:
    del file["transformer"].attrs["weight_names"]


def no_layer_names(file: h5py.File) -> None:
    del file.attrs["layer_names"]


def duplicate_names(file: h5py.File) -> None:
    names = list(file["transformer"].attrs["weight_names"])
    file["transformer"].attrs["weight_names"] = [*names, names[0]]


def unlisted(file: h5py.File) -> None:
    file["transformer"].attrs["weight_names"] = list(file["transformer"].attrs["weight_names"])[1:]


def listed_only(file: h5py.File) -> None:
    del file[WTE]


def no_such_layer(file: h5py.File) -> None:
    file.attrs["layer_names"] = ["transformer", "lm_head", "ghost"]


FAULTS: dict[str, tuple[Callable[[h5py.File], None], type[GPTJError], str]] = {
    "external storage": (external_storage, UnsafeFileError, "keeps its data in other files"),
    "external link": (external_link, UnsafeFileError, "a link of kind ExternalLink"),
    "soft link": (soft_link, UnsafeFileError, "a link of kind SoftLink"),
    "soft link loop": (soft_link_loop, UnsafeFileError, "a link of kind SoftLink"),
    "hard link loop": (hard_link_loop, FormatError, "stands twice in the file"),
    "virtual dataset": (virtual, UnsafeFileError, "keeps its data in other files"),
    "sparse bomb": (sparse_bomb, FormatError, "chunked, compressed"),
    "compressed": (
        lambda file: replaced(file, data=np.zeros(SHAPE, "<f4"), compression="gzip"),
        FormatError,
        "chunked, compressed",
    ),
    "never written": (unwritten, FormatError, "its bytes are not in the file"),
    "string dtype": (lambda file: replaced(file, data=np.full(SHAPE, b"ab")), SchemaError, "not a dtype of weights"),
    "compound dtype": (
        lambda file: replaced(file, data=np.zeros(SHAPE, [("a", "<f4")])),
        SchemaError,
        "not a dtype of weights",
    ),
    "variable-length dtype": (
        lambda file: replaced(file, shape=SHAPE, dtype=h5py.vlen_dtype(np.float32)),
        SchemaError,
        "not a dtype of weights",
    ),
    "integers": (lambda file: replaced(file, data=np.zeros(SHAPE, "<i4")), SchemaError, "not a dtype of weights"),
    "wrong shape of the same size": (
        lambda file: replaced(file, data=np.zeros((24, 20), "<f4")),
        SchemaError,
        "has shape (24, 20), expected (40, 12)",
    ),
    "another rank": (lambda file: replaced(file, data=np.zeros(480, "<f4")), SchemaError, "has shape (480,)"),
    "no weight_names": (no_weight_names, SchemaError, "has no weight_names"),
    "no layer_names": (no_layer_names, SchemaError, "has no layer_names"),
    "duplicate names": (duplicate_names, SchemaError, "is listed twice"),
    "an array that no list names": (unlisted, SchemaError, "is not listed"),
    "a name without an array": (listed_only, SchemaError, "is listed and missing"),
    "a layer without a group": (no_such_layer, SchemaError, "'ghost' is listed and missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_W19_a_hostile_or_broken_h5_is_refused_by_name(source, tmp_path, fault):
    change, kind, words = FAULTS[fault]
    with h5py.File(source / "tf_model.h5", "r+") as file:
        change(file)
    with pytest.raises(kind) as caught:
        convert(source, tmp_path / "out")
    assert words in str(caught.value) and "src" in str(caught.value)
    assert not (tmp_path / "out").exists()


def fixed_length(names: list[str]) -> np.ndarray:
    return np.array([name.encode() for name in names])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda names: names, None),
        (lambda names: [*names[1:], names[1]], "is listed twice"),
        (lambda names: [*names[1:], "tfgptj_for_causal_lm/ghost:0"], "is listed and missing"),
        (lambda names: names[1:], "is not listed"),
    ],
)
def test_W19_names_of_fixed_length_are_compared_one_by_one(source, change, words):
    with h5py.File(source / "tf_model.h5", "r+") as file:
        attributes = file["transformer"].attrs
        attributes["weight_names"] = fixed_length(change(list(attributes["weight_names"])))
    if words is None:
        assert len(read_h5(source / "tf_model.h5")) == 25
    else:
        with pytest.raises(SchemaError, match=words):
            read_h5(source / "tf_model.h5")


def test_big_endian_and_half_precision_datasets_are_read(source, tmp_path):
    values = np.arange(480, dtype=np.float32).reshape(SHAPE)
    with h5py.File(source / "tf_model.h5", "r+") as file:
        replaced(file, data=values.astype(">f4"))
    array = next(a for a in read_h5(source / "tf_model.h5") if a.name == "transformer/wte/weight:0")
    assert np.array_equal(array.read(array.dtype), values)


def with_bytes(path: Path, value: str) -> None:
    """Put a big-endian number, again and again, where wte.weight was."""
    with h5py.File(path, "r+") as file:
        replaced(file, data=np.frombuffer(bytes.fromhex(value) * 480, ">f4").reshape(SHAPE))


def test_a_dataset_alone_in_its_byte_order_is_believed_only_where_its_numbers_are_weights(source, process):
    path = source / "tf_model.h5"
    with_bytes(path, "3f800040")  # 1.0000076 as it says, 2.0078 otherwise: who knows
    with pytest.warns(CheckpointWarning, match=r"tf_model\.h5: .*wte/weight:0: its byte order is not that of"):
        read_h5(path, process=process)
    with_bytes(path, "cdcc8c3f")  # -4.3e8, and otherwise 1.1
    with pytest.raises(FormatError, match=r"tf_model\.h5: .*wte/weight:0: its numbers make sense in the other byte"):
        read_h5(path, process=process)
    for value in ("3f8ccccd", "00000000"):
        with_bytes(path, value)
        assert len(read_h5(path, process=process)) == 25


@pytest.mark.parametrize("path", sorted(FOREIGN.glob("tf*/*.h5")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_byte_of_a_file_that_keras_wrote_is_structure_or_a_number_or_zero(path):
    data = np.frombuffer(path.read_bytes(), np.uint8)
    with path.open("rb") as stream:
        blocks = Blocks(stream, data.size)
    assert blocks.complete
    taken = np.zeros(data.size, int)
    for begin, (end, _) in blocks.found.items():
        taken[begin:end] += 1
    for begin, end in h5_bytes.data_extents(path):
        taken[begin:end] += 1
    assert taken.max() == 1 and not data[taken == 0].any()


LIBRARY_OPTIONS = {
    "v108": {"libver": ("earliest", "v108")},
    "latest": {"libver": "latest"},
    "tracked": {"track_order": True},
}


@pytest.mark.parametrize("options", LIBRARY_OPTIONS)
def test_files_of_newer_structures_are_read(tmp_path, process, options):
    """What is not followed without libhdf5 is still read by it."""
    name, values = "lm_head/tfgptj_for_causal_lm/lm_head/bias:0", np.arange(6, dtype=np.float32)
    with h5py.File(tmp_path / "tf_model.h5", "w", **LIBRARY_OPTIONS[options]) as file:
        file.create_dataset(name, data=values)
        file.attrs["layer_names"] = ["lm_head"]
        file["lm_head"].attrs["weight_names"] = [name.split("/", 1)[1]]
    [array] = read_h5(tmp_path / "tf_model.h5", process=process)
    assert np.array_equal(array.read(array.dtype), values)


def test_what_a_deleted_dataset_left_is_said(source, process):
    bias = "lm_head/tfgptj_for_causal_lm/lm_head/bias:0"
    path = source / "tf_model.h5"
    with h5py.File(path, "r+") as file:
        values = file[bias][:]
        del file[bias]
        file["lm_head/tfgptj_for_causal_lm"].create_dataset("lm_head/spare", data=np.zeros(1, "f4"))
        file.create_dataset(bias, data=values.astype("<f8"))
        del file["lm_head/tfgptj_for_causal_lm/lm_head/spare"]
    with pytest.warns(CheckpointWarning, match=r"tf_model\.h5: bytes \d+ to \d+ lie beside a dataset"):
        arrays = read_h5(path, process=process)
    assert len(arrays) == 25


def test_W19_every_truncation_is_refused(source, process):
    whole = (source / "tf_model.h5").read_bytes()
    for length in range(0, len(whole), 997):
        (source / "tf_model.h5").write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"tf_model\.h5"):
            read_h5(source / "tf_model.h5", process=process)


@settings(deadline=None, max_examples=100)
@given(at=st.integers(0, 8000), flip=st.integers(1, 255))
def test_W19_a_mutated_file_gives_arrays_or_one_of_our_errors(process, tmp_path_factory, at, flip):
    data = bytearray((FOREIGN / "tf" / "tf_model.h5").read_bytes())
    data[at] ^= flip
    path = tmp_path_factory.getbasetemp() / "mutant.h5"
    path.write_bytes(data)
    try:
        for array in read_h5(path, process=process):
            array.read(array.dtype)
    except GPTJError as error:
        assert "mutant.h5" in str(error)


def test_W19_an_endless_heap_is_named_and_the_next_file_is_read(source, process, tmp_path):
    """A free block of a local heap that is its own successor: libhdf5 would allocate until the machine is full."""
    path = tmp_path / "heap.h5"
    path.write_bytes(with_endless_heap((source / "tf_model.h5").read_bytes()))
    with pytest.raises(FormatError, match=r"heap\.h5: malformed HDF5: .*a local heap at byte \d+ whose free part"):
        read_h5(path, process=process)
    assert len(read_h5(source / "tf_model.h5", process=process)) == 25


ENDLESS = {
    "memory": "[bytes(2**20) for _ in range(1000)]",  # where there is no limit, a gigabyte, and an answer
    "time": "end = time.monotonic() + 30\n    while time.monotonic() < end: pass",
}


@pytest.mark.parametrize("what", ENDLESS)
def test_W19_a_reader_that_takes_all_is_ended_and_named_and_the_next_file_is_read(source, monkeypatch, tmp_path, what):
    program = Path(h5_survey.__file__).read_text()
    body = f"import time\n    {ENDLESS[what]}\n    return {{'arrays': {{}}, 'loose': []}}\n\n\n"
    main = "if __name__ =="
    (tmp_path / "endless.py").write_text(program.replace(main, f"def survey(path):\n    {body}{main}"))
    with H5Process() as process:
        with monkeypatch.context() as patched:
            patched.setattr(h5_survey, "__file__", str(tmp_path / "endless.py"))
            patched.setattr(h5_process, "PROCESSOR_S", 0)
            with pytest.raises(LimitError, match=r"tf_model\.h5: malformed HDF5: libhdf5 takes time or memory"):
                read_h5(source / "tf_model.h5", process=process)
        assert len(read_h5(source / "tf_model.h5", process=process)) == 25


def test_W19_an_answer_that_does_not_come_is_not_waited_for(source, monkeypatch):
    monkeypatch.setattr(h5_process, "LONGEST_WAIT_S", 0.2)
    monkeypatch.setattr(h5_survey, "__file__", str(source / "sleeper.py"))
    (source / "sleeper.py").write_text("import time; time.sleep(60)")
    with pytest.raises(FormatError, match=r"tf_model\.h5: malformed HDF5: it cannot be read in reasonable time"):
        read_h5(source / "tf_model.h5")


def test_a_reader_that_dies_in_the_middle_of_its_answer_is_named(source, monkeypatch):
    monkeypatch.setattr(h5_survey, "__file__", str(source / "stutterer.py"))
    (source / "stutterer.py").write_text('import sys; sys.stdin.readline(); sys.stdout.write(\'{"arrays": {"a\')')
    with pytest.raises(LimitError, match=r"tf_model\.h5: malformed HDF5: libhdf5 takes time or memory"):
        read_h5(source / "tf_model.h5")


def test_an_interrupt_ends_the_reader_too(source, monkeypatch):
    process = H5Process()
    monkeypatch.setattr(process._answers, "get", lambda **options: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(h5_process.queue, "Queue", lambda: process._answers)
    with pytest.raises(KeyboardInterrupt):
        process.survey(source / "tf_model.h5")
    assert process._process is None
