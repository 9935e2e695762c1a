"""The pickle inside a PyTorch checkpoint, interpreted without being run.

Unpickling calls whatever the file names, so it is never done. A state dict needs some thirty opcodes and four
functions; this interpreter knows these and builds descriptions of tensors, never objects. Any other opcode is a
FormatError, any other name an UnsafeFileError that says the name, and nothing has been imported by then.
torch.load(weights_only=True) goes the same way with a longer list, and needs torch.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from gptj.errors import FormatError, GPTJError, LimitError, UnsafeFileError, shown, warn_of

__all__ = ["STORAGES", "PickledStorage", "PickledTensor", "read_legacy", "read_state_dict"]

MOST_OPCODES = 5_000_000
DEEPEST_STACK = 10_000
MOST_CONTAINERS = 200_000
"""Dicts, lists and tuples; a tensor takes some six."""
WIDEST_NUMBER = 8
"""Bytes of a LONG1; the numbers of a state dict count bytes of a file. Only `LEGACY_MAGIC` has ten."""
DEEPEST_NESTING = 4
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_SIGNS = (re.compile(r"wte\.weight$"), re.compile(r"(^|\.)(h\.\d+|ln_f|lm_head|score|qa_outputs)\."))

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""torch's storage classes by dtype; the integers are for old checkpoints' buffers, which are then dropped."""


@dataclasses.dataclass(frozen=True)
class PickledStorage:
    """A run of numbers in the archive: `key` is its member's name below data/."""

    dtype: str
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; offset and strides count elements."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    module: str
    name: str


class _Mark:
    """The object that MARK leaves on the stack."""


_MARK = _Mark()


def read_state_dict(data: bytes, *, file: Path, where: str) -> dict[str, PickledTensor]:
    """The tensors by name in a pickled state dict, or in the one that a training checkpoint holds.

    Args:
        data: the pickle.
        file, where: what errors name.

    Raises:
        UnsafeFileError: the pickle names anything but what tensors need.
        FormatError: it is cut short, has bytes after its end, uses another opcode, or is no state dict.
        LimitError: it is larger than any checkpoint's.
    """
    return _take_tensors(_Interpreter(data, file, where).run(), file=file, where=where)


def read_legacy(data: bytes, *, file: Path) -> tuple[dict[str, PickledTensor], list[PickledStorage], int]:
    """The tensors of a file from before PyTorch 1.6, its storages in their order, and where these begin.

    Such a file is five pickles in a row: a magic number, the protocol, the machine, the object, the storages' keys.
    The storages are all that lie in it, those of an optimizer beside the model too, or the next could not be found.

    Args:
        data: the beginning of the file, with all of the pickles.
        file: what errors name.

    Raises:
        GPTJError: see `read_state_dict`.
    """
    at, values = 0, []
    named: dict[str, set[PickledStorage]] = {}
    for part in ("magic number", "protocol", "sys_info", "state dict", "storage keys"):
        machine = _Interpreter(data, file, part, at)
        values.append(machine.run(whole=False))
        at = machine.at
        for storage in machine.storages:
            named.setdefault(storage.key, set()).add(storage)
        if part == "magic number" and values[0] != LEGACY_MAGIC:
            machine.refuse("a bare pickle, not one that torch.save wrote", UnsafeFileError,
                           hint="Load it in a sandbox and save the state_dict() with torch.save")  # fmt: skip
    _, protocol, machine_facts, value, keys = values
    little = isinstance(machine_facts, dict) and machine_facts.get("little_endian") is True
    if protocol != 1001 or not little:
        raise FormatError(
            "of another machine or version",
            file=file,
            where="sys_info",
            expected="protocol 1001, little-endian",
            hint="Load it with torch and save it anew",
        )
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or len(set(keys)) != len(keys):
        raise FormatError("not a list of keys", file=file, where="storage keys")
    tensors = _take_tensors(value, file=file, where="state dict")
    odd = next((key for key in keys if len(named.get(key, ())) != 1), None)
    if odd is not None:
        found = ", ".join(sorted(f"{one.numel} {one.dtype}" for one in named.get(odd, ()))) or "none"
        raise FormatError("not one storage that the state dict names", file=file, where=f"storage {shown(odd)}",
                          expected="one size and dtype", found=found)  # fmt: skip
    return tensors, [storage for key in keys for storage in named[key]], at


def _take_tensors(value: object, *, file: Path, where: str) -> dict[str, PickledTensor]:
    """The one state dict in a value, and a warning of what lies beside it."""
    if not isinstance(value, dict):
        raise FormatError("not a state dict", file=file, where=where, found=type(value).__name__)
    found = dict(_state_dicts(value, (), set()))
    for sign in _SIGNS:  # the first sign of a model that any of them has
        if signed := {path: inner for path, inner in found.items() if _has(inner, sign)}:
            found = signed
            break
    else:
        found = {path: inner for path, inner in found.items() if not any(path[:n] in found for n in range(len(path)))}
    if len(found) != 1:
        first = next((n for n, t in value.items() if not isinstance(t, PickledTensor)), "nothing")
        raise FormatError(
            "not a plain state dict" if not found else "several state dicts",
            file=file,
            where=where,
            expected="a dict from names to tensors",
            found=", ".join(shown(".".join(path)) for path in found) or f"{shown(first)}",
            hint="Save the model's state_dict() by itself",
        )
    [(path, inner)] = found.items()
    tensors = {name: tensor for name, tensor in inner.items() if isinstance(tensor, PickledTensor)}
    beside = [shown(name) for name in inner if name not in tensors]
    step = value
    for key in path:
        beside += [shown(name) for name in step if name != key]
        step = step[key]
    if path or beside:
        place = f"the weights are its member {shown('.'.join(path))}" if path else "it holds more than weights"
        left = f"; left out: {', '.join(beside[:8])}{', ...' if len(beside) > 8 else ''}" if beside else ""
        warn_of(place + left, file=file)
    return tensors


def _state_dicts(
    value: dict[Any, Any], path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """The dicts of named tensors inside, each once, with the keys that lead there; none inside a whole model's."""
    seen.add(id(value))
    if all(isinstance(name, str) for name in value) and any(isinstance(t, PickledTensor) for t in value.values()):
        yield path, value
        if _has(value, _SIGNS[0]):
            return
    if len(path) < DEEPEST_NESTING:
        for key, inner in value.items():
            if isinstance(key, str) and isinstance(inner, dict) and id(inner) not in seen:
                yield from _state_dicts(inner, (*path, key), seen)


def _has(tensors: dict[Any, Any], sign: re.Pattern[str]) -> bool:
    """Whether a tensor's name has the sign; a random generator's state among a trainer's things has none."""
    return any(isinstance(t, PickledTensor) and isinstance(n, str) and sign.search(n) for n, t in tensors.items())


def _brief(value: object) -> str:
    """A few words for any value; containers may hold themselves, or each other a million times."""
    if isinstance(value, str):
        return shown(value, longest=100)[1:-1]
    return shown(value) if value is None or isinstance(value, int) else f"a {type(value).__name__}"


class _Interpreter:
    """A stack machine with a whitelist."""

    def __init__(self, data: bytes, file: Path, where: str, at: int = 0) -> None:
        self.data = data
        self.at = at
        self.file = file
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: set[PickledStorage] = set()
        self.containers = 0

    def refuse(self, problem: str, error: type[GPTJError] = FormatError, **facts: Any) -> NoReturn:
        raise error(problem, file=self.file, where=self.where, **facts)

    def run(self, *, whole: bool = True) -> Any:
        """The value that the pickle describes; `whole` if nothing may follow it."""
        for _ in range(MOST_OPCODES):
            opcode = self.take(1)[0]
            if opcode == ord("."):
                if whole and self.at != len(self.data):
                    self.refuse("bytes after the end of the pickle", found=f"{len(self.data) - self.at} bytes")
                value = self.pop()
                if self.stack:
                    self.refuse("values are left on the stack")
                return value
            step = _OPCODES.get(opcode)
            if step is None:
                self.refuse("an opcode that no state dict needs", found=f"0x{opcode:02x} at byte {self.at - 1}")
            step(self)
            if len(self.stack) > DEEPEST_STACK:
                self.refuse("a stack too deep", LimitError, expected=f"at most {DEEPEST_STACK}")
        self.refuse("too many opcodes", LimitError, expected=f"at most {MOST_OPCODES}")

    # ---- reading

    def take(self, count: int) -> bytes:
        data = self.data[self.at : self.at + count]
        if len(data) != count:
            self.refuse("the pickle is cut short", expected=f"{self.at + count} bytes", found=f"{len(self.data)} bytes")
        self.at += count
        return data

    def number(self, layout: str) -> int:
        value: int = struct.unpack(layout, self.take(struct.calcsize(layout)))[0]
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 300)
        if end < 0:
            self.refuse("a name without an end")
        text = self.data[self.at : end]
        self.at = end + 1
        return self.text(text)

    def text(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse("text that is not UTF-8", found=shown(data, longest=60))

    # ---- the stack

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            self.refuse("the stack is empty")
        return self.stack.pop()

    def pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple(reversed([self.pop() for _ in range(count)]))

    def pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)
        self.refuse("a mark is missing")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def contain(self, value: Any) -> None:
        """Push a new container."""
        self.containers += 1
        if self.containers > MOST_CONTAINERS:
            self.refuse("too many dicts, lists and tuples", LimitError, expected=f"at most {MOST_CONTAINERS}")
        self.push(value)

    def top(self) -> Any:
        value = self.pop()
        self.push(value)
        return value

    # ---- what tensors need

    def name_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self.refuse(
                "the pickle calls something whose name is no text",
                UnsafeFileError,
                found=f"{_brief(module)}.{_brief(name)}",
            )
        allowed = (module, name) in (
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("collections", "OrderedDict"),
        ) or (module == "torch" and name in STORAGES)
        if not allowed:
            self.refuse(
                f"the pickle calls {_brief(module)}.{_brief(name)}",
                UnsafeFileError,
                expected="tensors and nothing else",
                hint="Do not load this file with any other tool either",
            )
        self.push(_Global(module, name))

    def reduce(self) -> None:
        function, arguments = self.pop_many(2)
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            self.refuse("a call of something that is no function", UnsafeFileError)
        if function.name == "OrderedDict" and arguments == ():
            self.contain({})
        elif function.name == "_rebuild_tensor_v2":
            self.push(self.tensor(arguments))
        elif function.name == "_rebuild_parameter" and arguments and isinstance(arguments[0], PickledTensor):
            self.push(arguments[0])
        else:
            self.refuse("a call that no state dict makes", UnsafeFileError, found=f"{function.module}.{function.name}")

    def tensor(self, arguments: tuple[Any, ...]) -> PickledTensor:
        """_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks, metadata=None)."""
        counts = all(
            isinstance(sizes, tuple) and len(sizes) <= 8 and all(type(n) is int and n >= 0 for n in sizes)
            for sizes in arguments[2:4]
        )
        fits = len(arguments) in (6, 7) and isinstance(arguments[0], PickledStorage) and type(arguments[1]) is int
        if not fits or not counts or len(arguments[2]) != len(arguments[3]) or arguments[1] < 0 or arguments[5] != {}:
            self.refuse("a tensor that breaks its rule", found=_brief(arguments))
        storage, offset, shape, strides = arguments[:4]
        return PickledTensor(storage, offset, shape, strides)

    def storage(self) -> None:
        """("storage", class, key, device, number of elements), which is how torch names a storage."""
        name = self.pop()
        fits = (
            isinstance(name, tuple)
            and (len(name) == 5 or (len(name) == 6 and name[5] is None))  # no view of another, in legacy files
            and name[0] == "storage"
            and isinstance(name[1], _Global)
            and name[1].name in STORAGES
            and isinstance(name[2], str)
            and name[2].isascii()
            and name[2].isdecimal()
            and type(name[4]) is int
            and name[4] >= 0
        )
        if not fits:
            self.refuse("a storage that breaks its rule", found=_brief(name))
        storage = PickledStorage(STORAGES[name[1].name], name[2], name[4])
        self.storages.add(storage)
        self.push(storage)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, dict) or len(pairs) % 2:
            self.refuse("items for something that is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):
                self.refuse("a key that is no name", found=type(key).__name__)
            if key in target:
                self.refuse("a name stands twice", found=shown(key))
            target[key] = value

    def build(self) -> None:
        """An OrderedDict's attributes: torch leaves `_metadata` there, which says nothing about the weights."""
        state = self.pop()
        if not isinstance(self.top(), dict) or not isinstance(state, dict) or state.keys() != {"_metadata"}:
            self.refuse("attributes for something that has none", UnsafeFileError, found=_brief(state))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, list):
            self.refuse("elements for something that is no list")
        target.extend(values)

    def memoize(self, number: int) -> None:
        self.memo[number] = self.top()

    def recall(self, number: int) -> None:
        if number not in self.memo:
            self.refuse("a value that was never remembered", found=number)
        self.push(self.memo[number])

    def protocol(self) -> None:
        if (number := self.take(1)[0]) not in (2, 3, 4, 5):
            self.refuse("an unknown pickle protocol", expected="2 to 5", found=number)

    def long(self) -> None:
        count = self.take(1)[0]
        most = 10 if self.where == "magic number" else WIDEST_NUMBER
        if count > most:
            self.refuse("a number too large", LimitError, expected=f"at most {most} bytes", found=count)
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def unicode(self, layout: str) -> None:
        count = self.number(layout)
        if count > 4096:
            self.refuse("a name too long", LimitError, expected="at most 4096 bytes", found=count)
        self.push(self.text(self.take(count)))

    def tuple_from_mark(self) -> None:
        self.contain(tuple(self.pop_to_mark()))


def _set_item(machine: _Interpreter) -> None:
    machine.set_items([*machine.pop_many(2)])


def _append(machine: _Interpreter) -> None:
    machine.append([machine.pop()])


def _global(machine: _Interpreter) -> None:
    module = machine.line()
    machine.name_global(module, machine.line())


_OPCODES: dict[int, Callable[[_Interpreter], None]] = {
    0x80: _Interpreter.protocol,
    0x95: lambda m: void(m.take(8)),  # FRAME, a length that helps streaming readers
    ord("("): lambda m: m.push(_MARK),
    ord("}"): lambda m: m.contain({}),
    ord("]"): lambda m: m.contain([]),
    ord(")"): lambda m: m.push(()),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    ord("J"): lambda m: m.push(m.number("<i")),
    0x8A: _Interpreter.long,
    ord("X"): lambda m: m.unicode("<I"),
    0x8C: lambda m: m.unicode("<B"),
    0x85: lambda m: m.contain(m.pop_many(1)),
    0x86: lambda m: m.contain(m.pop_many(2)),
    0x87: lambda m: m.contain(m.pop_many(3)),
    ord("t"): _Interpreter.tuple_from_mark,
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),
    ord("a"): _append,
    ord("e"): lambda m: m.append(m.pop_to_mark()),
    ord("b"): _Interpreter.build,
    ord("q"): lambda m: m.memoize(m.number("<B")),
    ord("r"): lambda m: m.memoize(m.number("<I")),
    0x94: lambda m: m.memoize(len(m.memo)),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("c"): _global,
    0x93: lambda m: m.name_global(*m.pop_many(2)),
    ord("Q"): _Interpreter.storage,
    ord("R"): _Interpreter.reduce,
}


def void(_: object) -> None:
    """Nothing; what was taken is not needed."""
