"""Change each byte of an HDF5 file's own structure, one at a time, and say what the reader makes of it.

`python tests/conversion/h5_bytes.py FOLDER [SHARE [MINUTES]]` takes the folder's tf_model.h5 (or what its index
names). HDF5 as Keras writes it has no checksums, so a changed byte is found by what contradicts it, or not at all:
what is read must then be the same numbers under the same names. SHARE is the part of the mutants to try, spread evenly.
Every mutant that came to something bad is printed; each is a place in the file and the bytes that are put there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal
from unittest import mock

import h5py
import numpy as np
from gptj_conversion.hf import keras_h5 as hf_tf
from gptj_conversion.hf.h5_process import H5Process

from gptj.errors import CheckpointWarning, GPTJError
from gptj.schema import schema

Outcome = Literal["refused", "ended", "said", "equal", "unnamed", "different", "traceback", "slow"]
GOOD = ("refused", "ended", "said", "equal")
"""Refused by name, the reader's process ended and the file named, read with a warning, and the same numbers."""

LONGEST_S = 20.0
UNDEFINED = 2**64 - 1


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Bytes that are put over others."""

    at: int
    value: bytes

    def apply(self, data: bytes) -> bytes:
        """The file with them."""
        return data[: self.at] + self.value + data[self.at + len(self.value) :]


def data_extents(path: Path) -> list[tuple[int, int]]:
    """Begin and end of each dataset's numbers, in order."""
    found: list[tuple[int, int]] = []

    def note(_: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.id.get_offset() is not None:
            found.append((item.id.get_offset(), item.id.get_offset() + item.id.get_storage_size()))

    with h5py.File(path, "r") as file:
        file.visititems(note)
    return sorted(found)


def mutants(path: Path) -> Iterator[Mutant]:
    """Each byte beside the numbers as 0, 255, and with its lowest or highest bit turned; each address as others."""
    data, extents = path.read_bytes(), data_extents(path)
    numbers = np.zeros(len(data) + 8, bool)
    for begin, end in extents:
        numbers[begin:end] = True
    marks = [data.startswith((b"TREE", b"HEAP", b"SNOD", b"GCOL"), at) for at in range(len(data))]
    places = sorted({*np.flatnonzero(marks).tolist(), *(begin for begin, _ in extents), *headers(path)})
    for at in np.flatnonzero(~numbers[: len(data)]).tolist():
        old = data[at]
        for value in dict.fromkeys((0, 255, old ^ 1, old ^ 0x80)):
            if value != old:
                yield Mutant(at, bytes([value]))
        if numbers[at : at + 8].any() or at + 8 > len(data):
            continue
        (word,) = struct.unpack_from("<Q", data, at)
        if word in places or word in (len(data), UNDEFINED):
            nearest = np.searchsorted(places, word)
            near = places[max(0, nearest - 1) : nearest + 2]
            for other in dict.fromkeys((0, at, at - at % 8, len(data), len(data) - 8, word - 8, word + 8, *near)):
                if other not in (word, UNDEFINED - 7) and 0 <= other <= UNDEFINED:
                    yield Mutant(at, struct.pack("<Q", other))


def headers(path: Path) -> list[int]:
    """Where the object headers begin."""
    found: list[int] = []
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.append(h5py.h5o.get_info(item.id).addr))
    return found


class Door:
    """A folder that is opened again and again with one of its files changed, as `convert` would open and read it."""

    def __init__(self, folder: Path, weights: str, process: H5Process) -> None:
        self.folder = folder
        self.weights = weights
        self.process = process
        self.expected = self.read()

    def read(self) -> dict[str, tuple[str, bytes]]:
        """Every tensor's dtype and bytes, by name."""
        with mock.patch.object(hf_tf, "H5Process", lambda: contextlib.nullcontext(self.process)):
            opened = hf_tf.open_h5(self.folder, weights=self.weights)
        found = {}
        for row in schema(opened.config, opened.head):
            array = opened.read(row)
            found[row.name] = (str(array.dtype), array.tobytes())
        return found

    def outcome(self, path: Path, data: bytes) -> tuple[Outcome, str]:
        """What comes of the folder with `data` at `path`, and what was said."""
        path.write_bytes(data)
        begin = time.perf_counter()
        came, said = self._outcome(path.name)
        took_s = time.perf_counter() - begin
        return ("slow", f"{took_s:.0f} s; {said}") if took_s > LONGEST_S else (came, said)

    def _outcome(self, name: str) -> tuple[Outcome, str]:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                found = self.read()
            except GPTJError as error:
                ended = "exit status" in str(error)
                return ("unnamed" if name not in str(error) else "ended" if ended else "refused"), str(error)
            except Exception as error:
                return "traceback", f"{type(error).__name__}: {error}"
        said = "; ".join(str(warning.message) for warning in heard)
        if any(issubclass(w.category, CheckpointWarning) and name in str(w.message) for w in heard):
            return "said", said
        if said:
            return "unnamed", said
        return ("equal", "") if found == self.expected else ("different", differences(self.expected, found))


def differences(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    """The names of the tensors that differ."""
    return ", ".join(sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)))


def try_all(
    source: Path, *, share: float = 1.0, longest_s: float = 1e9
) -> tuple[Counter[Outcome], int, list[tuple[Mutant, Outcome, str]]]:
    """How many mutants came to what, of how many there are, and those that came to no good or ended the reader."""
    index = (source / hf_tf.H5_INDEX).exists()
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made,
        H5Process() as process,
    ):
        folder = Path(shutil.copytree(source, Path(made) / "in"))
        door = Door(folder, hf_tf.H5_INDEX if index else hf_tf.H5_FILE, process)
        path = sorted(folder.glob("*.h5"), key=lambda file: file.stat().st_size)[0]
        good, listed = path.read_bytes(), [*mutants(path)]
        chosen = [listed[int(n / share)] for n in range(int(len(listed) * share))]
        counts: Counter[Outcome] = Counter()
        kept: list[tuple[Mutant, Outcome, str]] = []
        end = time.perf_counter() + longest_s
        for mutant in chosen:
            if time.perf_counter() > end:
                break
            came, said = door.outcome(path, mutant.apply(good))
            counts[came] += 1
            if came not in ("refused", "equal"):
                kept.append((mutant, came, said))
    return counts, len(listed), kept


def main() -> int:
    """Run one folder and print the counts."""
    share = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    longest_s = 60 * float(sys.argv[3]) if len(sys.argv) > 3 else 1e9
    begin = time.perf_counter()
    counts, total, kept = try_all(Path(sys.argv[1]), share=share, longest_s=longest_s)
    for mutant, came, said in kept:
        print(f"{came:9} {mutant.at} {mutant.value.hex()}: {said[:300]}")
    took_s = time.perf_counter() - begin
    print(f"{counts.total()} of {total} mutants in {took_s:.0f} s: {', '.join(f'{n} {c}' for c, n in counts.items())}")
    return int(any(came not in GOOD for came in counts))


if __name__ == "__main__":
    sys.exit(main())
