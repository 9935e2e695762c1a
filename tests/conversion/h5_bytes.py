"""Change each byte of an HDF5 file's own structure, one at a time, and say what the reader makes of it.

`python tests/conversion/h5_bytes.py [SHARE [FOLDER [MINUTES]]]`; without a folder a model of one layer, written as
Keras writes it; of an index the smallest file. SHARE is the part of the mutants to try, spread evenly.

HDF5 as Keras writes it has no checksums, so a changed byte is found by what contradicts it, or not at all: what is
read must then be the same numbers under the same names. Every mutant that was neither refused nor read as if nothing
were is printed: the place in the file, the bytes that are put there, and what was said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from gptj_conversion.common.foreign import open_named, read_model_config
from gptj_conversion.common.stored_array import StoredArray
from gptj_conversion.hf import h5_process, h5_survey
from gptj_conversion.hf.h5_process import H5Process
from gptj_conversion.hf.keras_h5 import H5_FILE, H5_INDEX, read_h5

from gptj.config.schema import schema
from gptj.errors import CheckpointWarning, GPTJError

Outcome = Literal["refused", "ended", "said", "warned", "equal", "unnamed", "different", "traceback", "slow"]
GOOD = ("refused", "ended", "said", "warned", "equal")
"""Refused by name; the reader's process ended and the file named; the same numbers, or others, and a warning that names
the file; the same numbers."""

BASE = Path(__file__).parent.parent / "data" / "foreign" / "tf_base"
LONGEST_S = 10.0
"""For one mutant, however busy the machine."""
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
    """Each byte beside the numbers as 0, 255, and with its lowest or highest bit turned; each address as others.

    Inside a long run of zeros, which is most of the structure, a byte takes one of the three values in turn.
    """
    data, extents = path.read_bytes(), data_extents(path)
    numbers = np.zeros(len(data) + 8, bool)
    for begin, end in extents:
        numbers[begin:end] = True
    marks = [data.startswith((b"TREE", b"HEAP", b"SNOD", b"GCOL"), at) for at in range(len(data))]
    places = sorted({*np.flatnonzero(marks).tolist(), *(begin for begin, _ in extents), *headers(path)})
    for at in np.flatnonzero(~numbers[: len(data)]).tolist():
        old = data[at]
        values = [value for value in dict.fromkeys((0, 255, old ^ 1, old ^ 0x80)) if value != old]
        for value in values if any(data[at - 12 : at + 12]) else [values[at % 3]]:
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


def one_layer(folder: Path) -> Path:
    """A folder with the smallest whole model: no head, one layer, in the order in which Keras writes."""
    config = json.loads((BASE / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    with h5py.File(BASE / H5_FILE, "r") as source, h5py.File(folder / H5_FILE, "w") as file:
        group, old = file.create_group("transformer"), source["transformer"]
        names = [name for name in old.attrs["weight_names"] if "/h_._1/" not in name]
        file.attrs["layer_names"] = ["transformer"]
        file.attrs["backend"] = "tensorflow"
        group.attrs["weight_names"] = names
        for name in names:
            group.create_dataset(name, data=old[name][:])
        file.create_group("top_level_model_weights").attrs["weight_names"] = np.array([], "S1")
    return folder


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
        self.config = read_model_config(folder, None, follow_links=False)
        self.expected = self.read()

    def read(self) -> dict[str, tuple[str, bytes]]:
        """Every tensor's dtype and bytes, by name."""
        opened = open_named(
            self.folder, self._read_files, name=H5_FILE, dialect="tf", config=self.config, weights=self.weights
        )
        found = {}
        for row in schema(opened.config, opened.head):
            array = opened.read(row)
            found[row.name] = (str(array.dtype), array.tobytes())
        return found

    def _read_files(self, paths: Iterable[Path]) -> list[StoredArray]:
        return [array for path in paths for array in read_h5(path, process=self.process)]

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
            return ("said" if found == self.expected else "warned"), said
        if said:
            return "unnamed", said
        return ("equal", "") if found == self.expected else ("different", differences(self.expected, found))


def differences(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    """The names of the tensors that differ."""
    return ", ".join(sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)))


class Here(H5Process):
    """libhdf5 in this very process, which is limited as its own would be: many times faster, and it may die."""

    def _ask(self, path: Path) -> dict[str, Any]:
        return h5_survey.survey(str(path))


Result = tuple[Mutant, Outcome, str]


def try_here(door: Door, path: Path, listed: Sequence[Mutant], pipe: int) -> None:
    """What comes of each mutant, a line of JSON each, in a process that may die of one."""
    good = path.read_bytes()
    h5_survey.limit(h5_process.MEMORY_BYTES, 10**6)
    with os.fdopen(pipe, "w", buffering=1) as lines:
        for mutant in listed:
            signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
            lines.write(json.dumps(door.outcome(path, mutant.apply(good))) + "\n")


def try_all(source: Path, *, share: float = 1.0, longest_s: float = 1e9) -> tuple[Counter[Outcome], int, list[Result]]:
    """How many mutants came to what, of how many there are, and those that came to no good or ended the reader.

    What ends the process here is tried once more with libhdf5 in a process of its own.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as made, H5Process() as process:
        folder = Path(shutil.copytree(source, Path(made) / "in"))
        weights = H5_INDEX if (source / H5_INDEX).exists() else H5_FILE
        path = min(folder.glob("*.h5"), key=lambda file: file.stat().st_size)
        good, listed = path.read_bytes(), [*mutants(path)]
        random.Random(0).shuffle(listed)  # so that a part is spread evenly
        chosen = listed[: int(len(listed) * share)]
        doors = Door(folder, weights, Here()), Door(folder, weights, process)
        results: list[Result] = []
        end = time.perf_counter() + longest_s
        while len(results) < len(chosen) and time.perf_counter() < end:
            results += forked(doors[0], path, chosen[len(results) :], end)
            if len(results) < len(chosen) and time.perf_counter() < end:
                mutant = chosen[len(results)]
                results.append((mutant, *doors[1].outcome(path, mutant.apply(good))))
    return (
        Counter(came for _, came, _ in results),
        len(listed),
        [r for r in results if r[1] not in ("refused", "equal")],
    )


def forked(door: Door, path: Path, listed: Sequence[Mutant], end: float) -> list[Result]:
    """The results of a process until it dies, or has tried all, or the time is up."""
    good, (out, into) = path.read_bytes(), os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        with contextlib.suppress(BrokenPipeError):
            try_here(door, path, listed, into)
        os._exit(0)
    os.close(into)
    results: list[Result] = []
    with os.fdopen(out) as lines:
        for line in lines:
            if time.perf_counter() > end:
                os.kill(child, signal.SIGKILL)
                break
            results.append((listed[len(results)], *json.loads(line)))
    os.waitpid(child, 0)
    path.write_bytes(good)
    return results


def main() -> int:
    """Run one folder and print the counts."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    longest_s = 60 * float(sys.argv[3]) if len(sys.argv) > 3 else 1e9
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        source = Path(sys.argv[2]) if len(sys.argv) > 2 else one_layer(Path(made) / "one")
        counts, total, kept = try_all(source, share=share, longest_s=longest_s)
    for mutant, came, said in kept:
        print(f"{came:9} {mutant.at} {mutant.value.hex()}: {said[:300]}")
    took_s = time.perf_counter() - begin
    print(f"{counts.total()} of {total} mutants in {took_s:.0f} s: {', '.join(f'{n} {c}' for c, n in counts.items())}")
    return int(any(came not in GOOD for came in counts))


if __name__ == "__main__":
    sys.exit(main())
