"""The places of an HDF5 file's datasets: the only code that lets libhdf5 read a file of unknown origin.

libhdf5 believes what it reads. A heap whose free block is its own successor, or a B-tree that is its own child, makes
it loop or allocate without end, in C code that Python cannot interrupt. So this program runs in a process of its own
(`h5_process` starts it), with limits on memory and on processor time, and says in JSON which bytes of
the file are which numbers. It reads none of the numbers, and imports nothing but h5py, `h5_blocks` and the standard
library.

A request is a line, the file's path in JSON; so is an answer: {"arrays": {...}, "loose": [...]} or {"refused": {...}}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from gptj_conversion.hf.h5_blocks import Blocks

MOST_OBJECTS = 100_000
DEEPEST = 16
LONGEST_LIST_BYTES = 16 * 2**20
BESIDE_BYTES = 4096
"""Looked at beside a dataset, where they belong to nothing; libhdf5 itself leaves at most 2048, and they are zero."""

TOP_LEVEL = "top_level_model_weights"
"""The group that Keras adds for weights of no layer."""


Beside = tuple[str, int, int, bool]
"""A dataset's path, begin and end of bytes beside it that belong to nothing, and whether they follow it."""


class RefusedError(Exception):
    """The file breaks a rule; the facts are those of a GPTJError."""

    def __init__(self, problem: str, *, kind: str = "FormatError", **facts: Any) -> None:
        super().__init__(problem)
        self.facts = {"kind": kind, "problem": problem, **facts}


class Survey:
    """Visits every object of a file once and notes where the datasets lie.

    Attributes:
        arrays: for each dataset its path, dtype, shape, first byte, length, and whether its byte order is foreign.
    """

    def __init__(self, h5py: Any, file: Any, size_bytes: int) -> None:
        self.h5py = h5py
        self.file = file
        self.size_bytes = size_bytes
        self.seen: set[int] = set()
        self.arrays: dict[str, dict[str, Any]] = {}

    def refuse(self, where: str, problem: str, *, kind: str = "FormatError", **facts: Any) -> NoReturn:
        """Refuse the file for what lies at `where`."""
        shown = {name: str(value)[:200] for name, value in facts.items()}
        raise RefusedError(problem, kind=kind, where=where or None, **shown)

    def visit(self, group: Any, prefix: str = "", depth: int = 0) -> None:
        """Note what is in a group."""
        if depth > DEEPEST:
            self.refuse(prefix, "nested too deeply", kind="LimitError", expected=f"at most {DEEPEST} levels")
        for name in group:
            where = f"{prefix}{name}"
            link = group.get(name, getlink=True)
            if type(link) is not self.h5py.HardLink:
                problem = f"a link of kind {type(link).__name__}"
                self.refuse(where, problem, kind="UnsafeFileError", expected="no links")
            item = group[name]
            address = self.h5py.h5o.get_info(item.id).addr
            if address in self.seen:
                self.refuse(where, "stands twice in the file")
            self.seen.add(address)
            if len(self.seen) > MOST_OBJECTS:
                self.refuse(where, "too many objects", kind="LimitError", expected=f"at most {MOST_OBJECTS}")
            if isinstance(item, self.h5py.Group):
                self.visit(item, f"{where}/", depth + 1)
            elif isinstance(item, self.h5py.Dataset):
                self.arrays[where] = self.place(item, where)
            else:
                self.refuse(where, "neither group nor dataset", found=type(item).__name__)

    def place(self, dataset: Any, where: str) -> dict[str, Any]:
        """The place of the dataset, after it has been found to be a plain run of numbers."""
        h5py = self.h5py
        plist = dataset.id.get_create_plist()
        layout = plist.get_layout()
        if layout == h5py.h5d.VIRTUAL or plist.get_external_count():
            problem = "keeps its data in other files"
            self.refuse(where, problem, kind="UnsafeFileError", expected="data in this file")
        dtype = dataset.dtype
        if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8) or dtype.names or dtype.subdtype:
            expected = "float16, 32 or 64"
            self.refuse(where, "not a dtype of weights", kind="SchemaError", expected=expected, found=self.kind(dtype))
        if layout != h5py.h5d.CONTIGUOUS or plist.get_nfilters():
            expected = "one plain run of numbers, as Keras writes it"
            self.refuse(where, "is chunked, compressed or compact", expected=expected)
        if not dataset.id.get_type().equal(h5py.h5t.py_create(dtype)):
            self.refuse(where, "numbers that are not IEEE", kind="SchemaError", found=dtype)
        shape = tuple(int(n) for n in dataset.shape or ())
        offset, nbytes = dataset.id.get_offset(), dtype.itemsize
        for count in shape:
            nbytes *= count
        stored = dataset.id.get_storage_size()
        if stored != nbytes or offset is None or offset + nbytes > self.size_bytes:
            expected = f"{nbytes} bytes for {dtype} {shape}"
            found = f"{stored} at {offset} of {self.size_bytes}"
            self.refuse(where, "its bytes are not in the file", expected=expected, found=found)
        return {
            "dtype": dtype.newbyteorder("=").name,
            "shape": shape,
            "offset": offset,
            "nbytes": nbytes,
            "swapped": not dtype.isnative,
        }

    def kind(self, dtype: Any) -> str:
        """A dtype in words; h5py shows references and texts as NumPy's objects."""
        reference = self.h5py.check_ref_dtype(dtype)
        if reference is not None:
            return "region references" if reference is self.h5py.RegionReference else "object references"
        return "text" if self.h5py.check_string_dtype(dtype) else str(dtype)

    def require_apart(self, blocks: Blocks) -> list[Beside]:
        """Make sure that no dataset's bytes are the file's own structure, which libhdf5 would read as numbers.

        Returns:
            For each dataset beside bytes that belong to nothing: its path, their begin and end, whether they follow it.
        """
        taken = [(begin, end, what, False) for begin, (end, what) in blocks.found.items()]
        taken += [(at, at + 1, "object header", False) for at in self.seen - blocks.found.keys()]
        for where, place in self.arrays.items():
            if place["nbytes"]:
                taken.append((place["offset"], place["offset"] + place["nbytes"], where, True))
        beside: list[Beside] = []
        last = (0, 0, "", False)
        for one in [*sorted(taken), (self.size_bytes, self.size_bytes, "", False)]:
            begin, _, what, is_data = one
            if begin < last[1]:
                self.refuse_shared(what, last[2], is_data=(is_data, last[3]), begin=begin)
            if begin > last[1]:
                beside += [(last[2], last[1], begin, True)] if last[3] else []
                beside += [(what, last[1], begin, False)] if is_data else []
            last = max(last, one, key=lambda block: block[1])
        return beside if blocks.complete else []

    def loose_numbers(self, stream: BinaryIO, beside: list[Beside]) -> list[tuple[int, int]]:
        """Begin and end of what lies beside a dataset, belongs to none, and is not zero.

        Where as much at the dataset's other end is zero, it has been moved into an empty place, and is refused.
        """
        loose = []
        for where, begin, end, follows in beside:
            at = begin if follows else max(begin, end - BESIDE_BYTES)
            stream.seek(at)
            data = stream.read(min(end - at, BESIDE_BYTES))
            count = len(data.rstrip(b"\0") if follows else data.lstrip(b"\0"))
            if not count:
                continue
            loose.append((at, at + count) if follows else (end - count, end))
            place = self.arrays[where]
            stream.seek(place["offset"] if follows else max(0, place["offset"] + place["nbytes"] - count))
            if count <= place["nbytes"] and not any(stream.read(count)):
                found = f"bytes {loose[-1][0]} to {loose[-1][1]} beside it, which belong to no dataset and are not zero"
                self.refuse(where, "its numbers do not begin where it says", found=found)
        return loose

    def refuse_shared(self, one: str, other: str, *, is_data: tuple[bool, bool], begin: int) -> NoReturn:
        """Refuse two blocks that share bytes."""
        if all(is_data):
            self.refuse(one, "shares bytes with another dataset", found=other)
        if any(is_data):
            where, structure = (one, other) if is_data[0] else (other, one)
            self.refuse(where, "its bytes are the file's own structure", found=f"a {structure} at byte {begin}")
        self.refuse("", f"malformed HDF5: a {one} at byte {begin} in a {other}")

    # ---- the lists that Keras keeps

    def require_listed(self) -> None:
        """Make sure that the file's own lists name the layers and weights that are there, and no others."""
        parts = [where.split("/") for where in self.arrays]
        if not any(len(path) > 2 and path[1].startswith("tfgptj_") for path in parts):
            self.compare(self.file, "layer_names", "", [*self.arrays])
            return
        self.compare(self.file, "layer_names", "", [name for name in self.file if name != TOP_LEVEL])
        for layer in dict.fromkeys([*(path[0] for path in parts), *self.file]):
            weights = [where.removeprefix(f"{layer}/") for where in self.arrays if where.startswith(f"{layer}/")]
            self.compare(self.file[layer], "weight_names", layer, weights)

    def compare(self, group: Any, key: str, where: str, there: list[str]) -> None:
        """Compare a list of names with what is there."""
        names = self.names(group, key, where)
        problems = [f"{n!a} is listed twice" for n in sorted(set(names)) if names.count(n) > 1]
        problems += [f"{n!a} is listed and missing" for n in dict.fromkeys(names) if n not in there]
        problems += [f"{n!a} is not listed" for n in there if n not in names]
        if problems:
            rest = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
            text = f"the list {key} and the datasets disagree: {', '.join(problems[:10])}{rest}"
            self.refuse(where, text, kind="SchemaError")

    def names(self, group: Any, key: str, where: str) -> list[str]:
        """The names that a list has. Keras cuts one of more than 64 kB into key0, key1, ..."""
        keys = [key] if key in group.attrs else [*self.numbered_keys(group, key)]
        if not keys:
            self.refuse(where or key, f"has no {key}", kind="SchemaError", expected="a file that Keras wrote")
        found: list[str] = []
        for one in keys:
            attribute = group.attrs.get_id(one)
            shape, dtype = attribute.shape, attribute.dtype
            fits = len(shape or ()) == 1 and shape[0] <= MOST_OBJECTS
            if not fits or (shape[0] and attribute.get_storage_size() > LONGEST_LIST_BYTES):
                self.refuse(where or one, f"{one} breaks its rule", expected="a list of names", found=shape)
            if dtype.kind != "S" and self.h5py.check_string_dtype(dtype) is None and shape[0]:
                expected = "a list of names"
                self.refuse(where or one, f"{one} breaks its rule", expected=expected, found=self.kind(dtype))
            found += [self.text(value, one, where) for value in (group.attrs[one].tolist() if shape[0] else [])]
        return found

    def text(self, value: Any, key: str, where: str) -> str:
        """A name of a list."""
        if isinstance(value, bytes):
            return value.decode("utf-8", "backslashreplace")
        if not isinstance(value, str):
            self.refuse(where or key, f"{key} breaks its rule", expected="names", found=type(value).__name__)
        return value

    def numbered_keys(self, group: Any, key: str) -> Iterator[str]:
        """The parts of a list that was cut."""
        number = 0
        while f"{key}{number}" in group.attrs:
            yield f"{key}{number}"
            number += 1


def survey(path: str) -> dict[str, Any]:
    """The answer for one file."""
    import h5py

    from gptj_conversion.hf.h5_blocks import Blocks

    try:
        with open(path, "rb") as stream:  # noqa: PTH123 - this program starts as fast as it can
            size_bytes = stream.seek(0, 2)
            blocks = Blocks(stream, size_bytes)
            with h5py.File(path, "r") as file:
                found = Survey(h5py, file, size_bytes)
                found.visit(file)
                beside = found.require_apart(blocks)
                found.require_listed()
            loose = found.loose_numbers(stream, beside)
    except RefusedError as refused:
        return {"refused": refused.facts}
    except MemoryError:
        return {"refused": {"kind": "LimitError", "problem": "asks for more memory than its size explains"}}
    except Exception as error:  # whatever h5py makes of a structure that contradicts itself
        text = str(error) or type(error).__name__
        return {"refused": {"kind": "FormatError", "problem": f"malformed HDF5: {text[:120]!a}"}}
    return {"arrays": found.arrays, "loose": loose}


def limit(memory_bytes: int, processor_s: int) -> None:
    """Bound what this process may take beyond what it has now, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + memory_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        so_far = int(used.ru_utime + used.ru_stime) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (so_far + processor_s, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def main() -> None:
    """Answer requests until there are no more: argv is the search path, and the limits, in JSON."""
    search_path, memory_bytes, processor_s = json.loads(sys.argv[1])
    sys.path[:] = search_path
    import h5py

    import gptj_conversion.hf.h5_blocks  # noqa: F401 - before the limits begin

    h5py.get_config()
    for line in sys.stdin:
        limit(memory_bytes, processor_s)
        print(json.dumps(survey(json.loads(line))), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
