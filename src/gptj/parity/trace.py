"""A trace: a forward pass' named taps in a safetensors file, with who computed them and from what (docs/traces.md).

Whoever can write safetensors can write one, with ten lines of NumPy; whoever compares needs neither the framework
nor the model. Everything that the header says is checked when a trace is opened: that names are taps or mapped to one,
that the shapes fit the config and each other, that the facts are facts. Values are read when they are asked for, some
tokens at a time, and are given as they are: NaN is for the comparison to judge.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.calls.taps import list_taps, split_tap
from gptj.config import GPTJConfig
from gptj.config.dtypes import PARAMETER_DTYPES
from gptj.config.labels import IGNORED_LABEL
from gptj.config.rotary import rotary_table
from gptj.errors import ConfigError, FormatError, InputError, SchemaError, naming_file, shown, warn_of
from gptj.parity.extras import Extras, examine_extras
from gptj.parity.layout import Layout
from gptj.parity.tap_names import TapNames, find_tap
from gptj.paths.json_file import parse_json_object
from gptj.reading.files import BLOCK_BYTES
from gptj.reading.safetensors_file import WEIGHT_DTYPES, SafetensorsFile, StoredTensor, pack_header, read_safetensors
from gptj.writing.output_file import whole_file

__all__ = [
    "INPUTS",
    "Trace",
    "TraceFacts",
    "open_trace",
    "require_same",
    "rotary_sha256",
    "slices_of",
    "table_sha256",
    "write_trace",
]

FORMAT = "1"

INPUTS = {"input_ids": "bt", "attention_mask": "bs", "position_ids": "bt", "labels": "bt"}
"""The model's arguments, stored beside the taps under these names, whole numbers."""

SHAPES = ("n_layer", "n_head", "n_embd", "inner_width", "vocab_size", "rotary_width")
"""The config's sizes in which traces that are compared must agree."""

MEANINGS = ("n_positions", "layer_norm_epsilon", "activation_function", "tie_word_embeddings")
"""Those of a config's fields that change what its model computes from the same weights."""

_CALLED = {"inner_width": "n_inner", "rotary_width": "rotary_dim"}
"""The names in config.json of sizes that it may leave out."""

_SLICE = 2**19
"""Elements of a tap that are read at a time, of each trace: 4 MB in float64, of which some ten are held."""

_NUMBERS = ("seed", "threads")
_HASHES = ("weights_sha256", "rotary_sha256")
_TEXTS = ("path",)
_OTHERS = frozenset({"trace", "source", "dtype", "config", "versions", "format", *_NUMBERS, *_HASHES, *_TEXTS})
"""Keys of the metadata; `format` is what the safetensors library adds on its own."""


@dataclasses.dataclass(frozen=True)
class TraceFacts:
    """The facts of a trace: backend, versions, dtype, model and inputs.

    Attributes:
        source: in a word or two, "pt" or "transformers in PyTorch".
        dtype: computed in, one of `gptj.config.dtypes.PARAMETER_DTYPES`.
        config: of the model.
        versions: of libraries, by name.
        path: the way of computing, "plain", "prepared", "compiled" ...; None is not said.
        seed: of the inputs; None is not said.
        threads: that computed.
        weights_sha256: of the weights: the manifest's.
        rotary_sha256: of the rotary table that was used, see `rotary_sha256`.
    """

    source: str
    dtype: str
    config: GPTJConfig
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    path: str | None = None
    seed: int | None = None
    threads: int | None = None
    weights_sha256: str | None = None
    rotary_sha256: str | None = None

    def as_metadata(self) -> dict[str, str]:
        """The strings of a file's header."""
        said = {name: getattr(self, name) for name in (*_NUMBERS, *_HASHES, *_TEXTS)}
        return {
            "trace": FORMAT,
            "source": self.source,
            "dtype": self.dtype,
            "config": json.dumps(self.config.to_dict(), separators=(",", ":")),
            "versions": json.dumps(dict(self.versions), separators=(",", ":")),
            **{name: str(value) for name, value in said.items() if value is not None},
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, file: str | os.PathLike[str]) -> TraceFacts:
        """The facts in a header; a key that is none of ours changes nothing and is said.

        Raises:
            FormatError: a fact is missing or is none; the key is named.
            ConfigError: the config breaks a rule.
        """

        def refuse(key: str, expected: str) -> FormatError:
            found = metadata.get(key)
            problem = "is missing" if found is None else "breaks its rule"
            return FormatError(
                problem, file=file, where=f"__metadata__: {key}", expected=expected,
                found=None if found is None else shown(found),
            )  # fmt: skip

        if "trace" not in metadata:
            hint = "A trace is written as docs/traces.md says"
            raise FormatError("is no trace", file=file, where="__metadata__: trace", expected=shown(FORMAT), hint=hint)
        if metadata["trace"] != FORMAT:
            raise refuse("trace", shown(FORMAT))
        if not metadata.get("source", "").strip():
            raise refuse("source", "who computed it")
        if metadata.get("dtype") not in PARAMETER_DTYPES:
            raise refuse("dtype", " or ".join(PARAMETER_DTYPES))
        if "config" not in metadata:
            raise refuse("config", "the text of config.json")
        where = "__metadata__: config"
        members = parse_json_object(metadata["config"].encode("utf-8", "surrogatepass"), file=file, where=where)
        config = _config(members, file)
        said = metadata.get("versions", "{}").encode("utf-8", "surrogatepass")
        versions = parse_json_object(said, file=file, where="__metadata__: versions")
        if not all(isinstance(value, str) for value in versions.values()):
            raise refuse("versions", "a JSON object of texts")
        for key in _NUMBERS:
            if key in metadata and not re.fullmatch("0|[1-9][0-9]{0,18}", metadata[key]):
                raise refuse(key, "a whole number, 0 or above")
        for key in _HASHES:
            if key in metadata and not re.fullmatch("[0-9a-f]{64}", metadata[key]):
                raise refuse(key, "64 hexadecimal digits")
        for key in sorted(metadata.keys() - _OTHERS):
            warn_of("not a trace's key, and left out", file=file, where=f"__metadata__: {shown(key)}")
        numbers = {key: int(metadata[key]) for key in _NUMBERS if key in metadata}
        texts = {key: metadata[key] for key in (*_HASHES, *_TEXTS) if key in metadata}
        return cls(metadata["source"], metadata["dtype"], config, versions, **numbers, **texts)  # type: ignore[arg-type]


def _config(members: Mapping[str, Any], file: str | os.PathLike[str]) -> GPTJConfig:
    try:
        return GPTJConfig.from_dict(members, file=file)
    except ConfigError as error:
        if error.file is None:
            error.file = os.fspath(file)
        raise


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tap lies.

    Attributes:
        tensor: in the file.
        layout: of its axes.
        axes: of the tap.
    """

    tensor: StoredTensor
    layout: Layout
    axes: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """An opened trace; no value has been read.

    Attributes:
        name: of the file, for messages.
        file: whose header was checked.
        facts: who computed it, and from what.
        places: of the taps, by name, in the order of the computation.
        inputs: of what the model was given, by the names of `INPUTS`.
        sizes: of every letter of the taps' axes.
        extras: gradients and texts.
    """

    name: str
    file: SafetensorsFile
    facts: TraceFacts
    places: Mapping[str, Place]
    inputs: Mapping[str, Place]
    sizes: Mapping[str, int]
    extras: Extras = dataclasses.field(default_factory=Extras)

    def require_model(
        self, config: GPTJConfig, *, file: str | os.PathLike[str], fields: Sequence[str] = SHAPES
    ) -> None:  # fmt: skip
        """Make sure that a config's model is this trace's, as far as some fields tell.

        Raises:
            InputError: see `require_same`.
        """
        require_same(self.facts.config, config, file=file, fields=fields)

    def shape(self, tap: str) -> tuple[int, ...]:
        """The tap's own shape, however it is stored."""
        return tuple(self._sizes(self.places[tap])[letter] for letter in self.places[tap].axes)

    def read(self, tap: str, tokens: slice | None = None) -> NDArray[Any]:
        """A tap in its own order of axes and stored dtype.

        Args:
            tap: one of `places`.
            tokens: which of axis t, of step 1; None is all. The rest is not read, unless t is merged with another
                axis where it is stored.
        """
        return self._read(self.places[tap], tokens)

    def read_input(self, name: str) -> NDArray[np.int64] | None:
        """The model's argument of this name, int64, None where the trace does not say.

        Raises:
            SchemaError: a value is none that a model can be given.
        """
        place = self.inputs.get(name)
        if place is None:
            return None
        values = self._read(place, None).astype(np.int64)
        config = self.facts.config
        most = {"attention_mask": 1, "position_ids": config.n_positions - 1}.get(name, config.vocab_size - 1)
        wrong = ((values < 0) | (values > most)) & ~((values == IGNORED_LABEL) & (name == "labels"))
        if wrong.any():
            raise SchemaError("a value that a model cannot be given", file=self.file.path, where=name,
                              expected=f"0 to {most}", found=int(values[wrong][0]))  # fmt: skip
        return values

    def _read(self, place: Place, tokens: slice | None) -> NDArray[Any]:
        sizes, tensor = dict(self._sizes(place)), place.tensor
        if tokens is None or "t" not in place.axes:
            return place.layout.arrange(self.file.read(tensor), place.axes, sizes)
        start, stop, _ = tokens.indices(sizes["t"])
        axis = place.layout.axis_of("t")
        if axis is None:
            return np.take(
                place.layout.arrange(self.file.read(tensor), place.axes, sizes),
                np.arange(start, stop),
                place.axes.index("t"),
            )
        part = self.file.read_slice(tensor, axis, start, stop)
        return place.layout.arrange(part, place.axes, {**sizes, "t": stop - start})

    def _sizes(self, place: Place) -> Mapping[str, int]:
        """The sizes of a place's letters: one row of `visible` or positions may stand for all."""
        axis = place.layout.axis_of("b")
        once = axis is not None and place.tensor.shape[axis] == 1  # checked: only where one may stand for all
        return {**self.sizes, "1": 1, "b": 1} if once else {**self.sizes, "1": 1}


def require_same(
    ours: GPTJConfig, config: GPTJConfig, *, file: str | os.PathLike[str], fields: Sequence[str]
) -> None:  # fmt: skip
    """Make sure that two configs agree in some fields.

    Raises:
        InputError: they do not; naming the second's file, or its trace's, and every field that differs.
    """
    apart = [field for field in fields if getattr(ours, field) != getattr(config, field)]
    if apart:
        raise InputError(
            "of another model", file=file, where=f"config: {', '.join(_CALLED.get(field, field) for field in apart)}",
            expected=", ".join(shown(getattr(ours, field)) for field in apart),
            found=", ".join(shown(getattr(config, field)) for field in apart),
        )  # fmt: skip


def slices_of(trace: Trace, tap: str) -> Iterator[slice]:
    """All tokens, some at a time."""
    shape, t = trace.shape(tap), max(1, trace.sizes.get("t", 1))
    step = max(1, _SLICE * t // max(1, math.prod(shape)))
    whole = t if "t" in trace.places[tap].axes else 1
    return (slice(start, min(start + step, whole)) for start in range(0, whole, step))


# ---- opening


def open_trace(path: str | os.PathLike[str], names: TapNames | None = None) -> Trace:
    """The trace at `path`, with everything that its header says checked.

    Args:
        path: a safetensors file as docs/traces.md specifies.
        names: maps another program's names onto taps; None knows ours alone.

    Raises:
        MissingFileError, FormatError, LimitError, SchemaError: it is not there, is no safetensors file or no trace.
        SchemaError: a name, shape or dtype of a tensor is no tap's.
        ConfigError: the metadata's config breaks a rule.
    """
    file = read_safetensors(path)
    facts = TraceFacts.from_metadata(file.metadata, file=path)
    with naming_file(path):
        return _examine(file, facts, names or TapNames())


def _examine(file: SafetensorsFile, facts: TraceFacts, names: TapNames) -> Trace:
    """The trace of a file's header.

    Raises:
        SchemaError: a tensor is no tap or input, or the shapes do not fit.
    """
    extras, others = examine_extras(facts.config, file.tensors)
    places, inputs = _places(others, names)
    if not places and not extras:
        raise SchemaError("holds no tap", expected="at least one tensor with a tap's name")
    taps = {name: number for number, name in enumerate(list_taps(facts.config.n_layer))}
    if beyond := next((name for name in places if name not in taps), None):
        raise SchemaError("a block that the config does not have", where=shown(beyond),
                          expected=f"h.0 to h.{facts.config.n_layer - 1}", found=split_tap(beyond)[0])  # fmt: skip
    sizes = _solve(facts.config, [*inputs.items(), *places.items()])
    ordered = dict(sorted(places.items(), key=lambda item: taps[item[0]]))
    return Trace(file.path.name, file, facts, ordered, inputs, sizes, extras)


def _places(tensors: Iterable[StoredTensor], names: TapNames) -> tuple[dict[str, Place], dict[str, Place]]:
    """The places of taps and of inputs, by name, their dtypes checked."""
    places: dict[str, Place] = {}
    inputs: dict[str, Place] = {}
    for tensor in tensors:
        if tensor.name in INPUTS and not any(rule.apply(tensor.name) for rule in names.rules):
            axes = INPUTS[tensor.name]
            _require_dtype(tensor, ("int64", "int32", "uint8", "bool"))
            inputs[tensor.name] = Place(tensor, Layout(tuple(axes)), axes)
            continue
        try:
            found = names.resolve(tensor.name)
        except InputError as error:
            raise SchemaError(error.problem, where=error.where, found=error.found, hint=error.hint) from None
        if found is None:
            continue
        name, layout = found
        if name in places:
            first = places[name].tensor.name
            raise SchemaError("two tensors of one tap", where=name, found=f"{shown(first)} and {shown(tensor.name)}")
        tap = find_tap(name)
        assert tap is not None
        _require_dtype(tensor, ("bool",) if tap.name == "visible" else WEIGHT_DTYPES)
        places[name] = Place(tensor, layout, tap.axes)
    return places, inputs


def _require_dtype(tensor: StoredTensor, dtypes: tuple[str, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise SchemaError("of another dtype", where=shown(tensor.name), expected=" or ".join(dtypes),
                          found=tensor.dtype)  # fmt: skip


def _solve(config: GPTJConfig, places: list[tuple[str, Place]]) -> dict[str, int]:
    """The size of every letter, from the config and from the shapes, each shape found to fit.

    Raises:
        SchemaError: one does not fit, or does not tell.
    """
    sizes = {
        "h": config.n_head, "d": config.head_dim, "m": config.n_embd, "f": config.inner_width, "v": config.vocab_size,
    }  # fmt: skip
    told_by: dict[str, str] = {}
    for _ in range(4):  # a round settles a letter at least, and three are open
        for name, place in places:
            found = _solved(name, place, sizes, told_by)
            told_by |= dict.fromkeys(found, place.tensor.name)
            sizes |= found
    for name, place in places:
        if open_letters := sorted(set(place.layout.letters) - sizes.keys() - {"1"}):
            raise SchemaError("its shape does not tell its axes apart", where=name, expected="input_ids beside it",
                              found=", ".join(open_letters))  # fmt: skip
    if empty := next((letter for letter in "bts" if sizes.get(letter) == 0), None):
        raise SchemaError("holds nothing", expected=f"an axis {empty} of 1 at least", found=0)
    if sizes.get("s", sizes.get("t", 0)) < sizes.get("t", 0):
        raise SchemaError("fewer keys than queries", expected=f"at least {sizes['t']}", found=sizes["s"])
    if sizes.get("s", sizes.get("t", 0)) > config.n_positions:
        raise SchemaError("more tokens than the config has positions", expected=f"at most {config.n_positions}",
                          found=sizes.get("s", sizes.get("t")))  # fmt: skip
    return {"s": sizes.get("t", 0), **sizes}


def _solved(name: str, place: Place, sizes: Mapping[str, int], told_by: Mapping[str, str]) -> dict[str, int]:
    """Letters that a place's shape tells. `visible` and positions may have one row for all of the batch."""
    tensor, layout = place.tensor, place.layout
    axis = layout.axis_of("b")
    may_be_one = name.endswith(".visible") or name == "position_ids"
    once = may_be_one and axis is not None and len(tensor.shape) > axis and tensor.shape[axis] == 1
    try:
        return layout.solve(tensor.shape, {**sizes, "b": 1} if once else sizes)
    except InputError as error:
        told = [f"{letter} is {sizes[letter]} in {told_by[letter]}" for letter in layout.letters if letter in told_by]
        facts = error.facts(where=shown(tensor.name), hint=", ".join(told) or None)
        raise SchemaError(error.problem, **facts) from None


# ---- writing


def write_trace(
    path: str | os.PathLike[str],
    taps: Mapping[str, NDArray[Any]],
    facts: TraceFacts,
    *,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    extras: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write a trace, whole or not at all; no more than a block of bytes is held beside the arrays.

    Args:
        path: of the file; one that is there is replaced.
        taps: by their full names, `h.3.q_rotated`, in their own order of axes.
        facts: who computed them, and from what.
        inputs: what the model was given, by the names of `INPUTS`.
        extras: gradients and texts, by the names of `gptj.parity.extras`.

    Raises:
        SchemaError, InputError: a name, shape or dtype is no tap's; nothing has been written.
        WriteError: it could not be written.
    """
    arrays = {**(inputs or {}), **taps, **(extras or {})}
    if wrong := sorted((inputs or {}).keys() - INPUTS.keys()):
        raise InputError("no input of a model", where=shown(wrong[0]), expected=", ".join(INPUTS))
    tensors = {
        name: StoredTensor(name, array.dtype.name, tuple(array.shape), Path(path), 0, array.nbytes)
        for name, array in arrays.items()
    }
    metadata = facts.as_metadata()
    with naming_file(path):
        _examine(SafetensorsFile(Path(path), tensors, metadata, (0, 0, 0, 0)), facts, TapNames())
    TraceFacts.from_metadata(metadata, file=path)
    with whole_file(Path(path)) as write:
        write(pack_header([(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()], metadata))
        for array in arrays.values():
            _write_blocks(array, write)


def _write_blocks(array: NDArray[Any], write: Callable[[bytes | memoryview], object]) -> None:
    """Write an array's bytes in C order, some of its first axis at a time."""
    if not array.size:
        return
    rows = array.reshape(1) if array.ndim == 0 else array
    step = max(1, BLOCK_BYTES // max(1, rows.nbytes // len(rows)))
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step], rows.dtype.newbyteorder("<"))
        write(block.reshape(-1).view(np.uint8).data)


def rotary_sha256(config: GPTJConfig, dtype: str = "float32") -> str:
    """The hash of the rotary table that a config's model should have."""
    return table_sha256(*rotary_table(config.n_positions, config.rotary_width, dtype))


def table_sha256(sin: NDArray[Any], cos: NDArray[Any]) -> str:
    """The hash of a rotary table: all sines, then all cosines, (n_positions, rotary_width / 2) each, in C order."""
    return hashlib.sha256(sin.tobytes() + cos.tobytes()).hexdigest()
