"""Feed each reader mutants of a good file, and count what it says: `python tests/conversion/fuzz.py [CASES] [SEED]`.

`python tests/conversion/fuzz.py replay READER FILE` feeds it one file. A mutant that was found to crash or to hang a
reader is kept in tests/data/fuzz/READER/, where a test replays it; so it is found once.

A mutant may be read or be refused by one of our errors; anything else is a crash, is printed with its bytes, and makes
the exit status 1. Pytest runs a bounded slice (test_fuzz.py); the recorded figures stand in benchmarks/README.md.
"""

from __future__ import annotations

import atexit
import functools
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import msgpack
import numpy as np
from gptj_conversion.hf.flax_msgpack import read_msgpack
from gptj_conversion.hf.h5_process import H5Process
from gptj_conversion.hf.keras_h5 import read_h5
from gptj_conversion.hf.torch_bin import pickle_state_dict, read_bin
from gptj_conversion.hf.torch_pickle import read_state_dict
from gptj_conversion.mesh.tar import _find_root as read_tar

from gptj.errors import GPTJError
from gptj.reading.npz import open_npz
from gptj.reading.safetensors_file import read_safetensors

FOREIGN = Path(__file__).parent.parent / "data" / "foreign"
INTERESTING = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b"PK\x03\x04",
]


def mutant(data: bytes, random: np.random.Generator) -> bytes:
    """One to four edits: a byte flipped, an interesting value put in or over, a run removed, doubled or moved."""
    out = bytearray(data)
    for _ in range(int(random.integers(1, 5))):
        at = int(random.integers(0, len(out) + 1))
        length = int(random.integers(0, 9))
        kind = int(random.integers(0, 7))
        if kind == 0 and at < len(out):
            out[at] ^= 1 << int(random.integers(0, 8))
        elif kind == 1 and at < len(out):
            out[at] = int(random.integers(0, 256))
        elif kind == 2:
            value = INTERESTING[int(random.integers(0, len(INTERESTING)))]
            out[at : at + len(value)] = value
        elif kind == 3:
            out[at:at] = INTERESTING[int(random.integers(0, len(INTERESTING)))]
        elif kind == 4:
            del out[at : at + length]
        elif kind == 5:
            out[at:at] = out[at : at + length]
        else:
            other = int(random.integers(0, len(out) + 1))
            out[at : at + length] = out[other : other + length]
    return bytes(out)


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, np.arange(6, dtype=np.float32).reshape(2, 3), np.int32(7))
    return stream.getvalue()


@functools.cache
def _process() -> H5Process:
    """One for all mutants: to start it takes longer than to read one."""
    process = H5Process()
    atexit.register(process.close)
    return process


def _h5() -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file.create_dataset("lm_head/tfgptj_for_causal_lm/lm_head/bias:0", data=np.arange(6, dtype=np.float32))
        file.attrs["layer_names"] = ["lm_head"]
        file["lm_head"].attrs["weight_names"] = ["tfgptj_for_causal_lm/lm_head/bias:0"]
    return stream.getvalue()


def _tar() -> bytes:
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("step_1/shard_0/0.npz", "step_1/shard_0/1.npz"):
            member = tarfile.TarInfo(name)
            member.size = 512
            archive.addfile(member, io.BytesIO(b"x" * 512))
    return stream.getvalue().rstrip(b"\0") + bytes(1024)


def _msgpack() -> bytes:
    def array(shape: tuple[int, ...]) -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb((shape, "float32", bytes(4 * int(np.prod(shape))))))

    chunks = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 3},
        "chunks": {"0": array((4,)), "1": array((2,))},
    }
    return msgpack.packb({"a": {"kernel": array((2, 3)), "bias": array((3,))}, "b": chunks})


def _arrays(read: Callable[[Path], list]) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        for array in read(path):
            if array.nbytes < 2**20:
                array.read(array.dtype)

    return run


def _read_npz(path: Path) -> None:
    file = open_npz(path)
    for array in file.arrays:
        file.read(array)


def _read_tar(path: Path) -> None:
    read_tar(path, path)


def _read_safetensors(path: Path) -> None:
    file = read_safetensors(path)
    for tensor in file.tensors.values():
        file.read(tensor)


def _bin() -> bytes:
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("x/data.pkl", pickle_state_dict([("w", "float32", (2, 3))]))
        file.writestr("x/data/0", bytes(24))
    return stream.getvalue()


def _pickle() -> bytes:
    return pickle_state_dict([("a", "float32", (2, 3)), ("b", "bfloat16", (5,))])


def _safetensors() -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    header += b'"b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]}}'
    return len(header).to_bytes(8, "little") + header + bytes(28)


def _read_pickle(path: Path) -> None:
    read_state_dict(path.read_bytes(), file=path, where="data.pkl")


READERS: dict[str, tuple[Callable[[], bytes], Callable[[Path], None]]] = {
    "npz": (_npz, _read_npz),
    "bin": (_bin, _arrays(read_bin)),
    "pickle": (_pickle, _read_pickle),
    "msgpack": (_msgpack, _arrays(read_msgpack)),
    "h5": (_h5, _arrays(lambda path: read_h5(path, process=_process()))),
    "tar": (_tar, _read_tar),
    "safetensors": (_safetensors, _read_safetensors),
}


def fuzz(reader: str, cases: int, seed: int) -> tuple[int, int, list[tuple[str, bytes]]]:
    """How many mutants were read, how many refused, and the crashes with their bytes."""
    make, read = READERS[reader]
    good = make()
    random = np.random.default_rng([seed, *reader.encode()])
    accepted, refused, crashes = 0, 0, []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "mutant"
        path.write_bytes(good)
        read(path)  # the good file must be good
        for _ in range(cases):
            data = mutant(good, random)
            path.write_bytes(data)
            try:
                read(path)
                accepted += 1
            except GPTJError:
                refused += 1
            except Exception as error:
                crashes.append((f"{type(error).__name__}: {error}", data))
    return accepted, refused, crashes


def replay(reader: str, path: Path) -> None:
    """Read one file, which may be refused by one of our errors."""
    try:
        READERS[reader][1](path)
        print("read")
    except GPTJError as error:
        print(error)


def main() -> int:
    """Run all readers and print a line for each."""
    if sys.argv[1:2] == ["replay"]:
        replay(sys.argv[2], Path(sys.argv[3]))
        return 0
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    failed = False
    for reader in READERS:
        start = time.perf_counter()
        accepted, refused, crashes = fuzz(reader, cases, seed)
        took_s = time.perf_counter() - start
        print(
            f"{reader:12} {cases} mutants, {refused} refused, {accepted} read, {len(crashes)} crashes, {took_s:.0f} s"
        )
        for what, data in crashes[:5]:
            print("   ", what, data.hex())
        failed |= bool(crashes)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
