"""A checkpoint whose arrays have names: matched with the schema as a whole, then read one at a time.

The formats of Hugging Face's library differ in their containers and in how they spell and turn the tensors; what
is left is here, once: which array serves which row, and everything that is wrong with them in one error.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.config.dtypes import numpy_dtype
from gptj.config.schema import BASE_PREFIX, HEADS, Head, TensorSpec, schema
from gptj.errors import MissingFileError, SchemaError, shown, warn_of
from gptj.reading.buffers import ReusedBuffer
from gptj.reading.load_plan import LM_HEAD_BIAS, describe_left, warn_of_zero_bias
from gptj.reading.safetensors_file import WEIGHT_DTYPES
from gptj.reading.weight_files import Index, is_index_name, list_some, read_index, require_index_agrees, safe_path
from gptj.reading.weight_names import HEAD_WORDS, PlainNames, head_of, plain_names
from gptj_conversion.common.dialects import Dialect, Spelling, spell
from gptj_conversion.common.source import Context, Facts, describe_head
from gptj_conversion.common.stored_array import StoredArray

__all__ = [
    "LIKE",
    "ZEROS_ORIGIN",
    "ForeignCheckpoint",
    "match_arrays",
    "open_named",
    "read_model_config",
]

MOST_LAYERS = 10_000
ZEROS_ORIGIN = "not in the files: zeros"
LIKE = "transformer.wte.weight"  # whose dtype a row of zeros takes


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """An opened checkpoint, every row of its head found with the right shape.

    Attributes:
        path: the folder.
        format: the format's name in plans and manifests.
        config: of config.json, or the one that was passed.
        head: on top of the blocks, as the names say.
        arrays: for each canonical name, the array and how it is spelt.
        files: the weights files.
        dropped: names that were left out without harm.
        zeros: rows that the files lack and that are zeros then.
        names: of all stored arrays.
    """

    path: Path
    format: str
    config: GPTJConfig
    head: Head
    arrays: Mapping[str, tuple[StoredArray, Spelling]]
    files: tuple[Path, ...]
    dropped: tuple[str, ...]
    zeros: tuple[str, ...] = ()
    names: PlainNames = dataclasses.field(default_factory=lambda: PlainNames({}))

    @property
    def context(self) -> Context:
        """The directory, in which all lies that belongs to it."""
        return Context((self.path,))

    def dtype_of(self, name: str) -> str:
        """The dtype that a canonical tensor is stored in."""
        return self.arrays[LIKE if name in self.zeros else name][0].dtype.name

    def read(
        self,
        row: TensorSpec,
        dtype: Any = None,
        *,
        allow_overflow: bool = False,
        buffer: ReusedBuffer | None = None,
    ) -> NDArray[Any]:
        """A canonical tensor in its own dtype or in `dtype`."""
        if row.name in self.zeros:
            return np.zeros(row.shape, numpy_dtype(self.dtype_of(row.name) if dtype is None else dtype))
        array, spelling = self.arrays[row.name]
        wanted = array.dtype if dtype is None else numpy_dtype(dtype)
        return array.read(
            wanted, transposed=spelling.transposed, where=spelling.name, allow_overflow=allow_overflow, buffer=buffer
        )

    def origin(self, name: str) -> str:
        """The file, the name in it, and whether it was transposed."""
        if name in self.zeros:
            return ZEROS_ORIGIN
        array, spelling = self.arrays[name]
        return f"{array.name} in {array.file.name}" + (", transposed" if spelling.transposed else "")

    def origin_files(self, name: str) -> tuple[str, ...]:
        """The file that holds it."""
        return () if name in self.zeros else (self.arrays[name][0].file.name,)

    def facts(self) -> Facts:
        """Its sizes and kinds."""
        rows = schema(self.config, self.head)
        return Facts(
            path=str(self.path),
            format=self.format,
            step=None,
            shards=len(self.files),
            layers=self.config.n_layer,
            width=self.config.n_embd,
            heads=self.config.n_head,
            rotary_width=self.config.rotary_width,
            positions=self.config.n_positions,
            vocab=self.config.vocab_size,
            dtype=", ".join(sorted({array.dtype.name for array, _ in self.arrays.values()})),
            tensors=len(rows),
            parameters=sum(row.size for row in rows),
            bytes=sum(file.stat().st_size for file in self.files),
            problems=(*describe_left(self.names, self.dropped, self.zeros), *describe_head(self.head)),
        )


def open_named(
    directory: str | os.PathLike[str],
    read: Callable[[Iterable[Path]], Iterable[StoredArray]],
    *,
    name: str,
    dialect: Dialect,
    config: GPTJConfig | None,
    weights: str | None,
    follow_links: bool = False,
) -> ForeignCheckpoint:
    """The checkpoint in a folder of config.json and weights files. No array is read.

    Args:
        directory: the folder.
        read: finds the arrays of its files.
        name: of the weights file, where it is one.
        dialect: how the names are spelt.
        config: in place of the folder's config.json.
        weights: the file, or the index of several, where it is not `name`.
        follow_links: accept links that lead out of the folder.

    Raises:
        MissingFileError: a file is not there.
        FormatError: a file is malformed.
        UnsafeFileError: a name or link leads out of the folder, or a file would run or open something.
        SchemaError: the arrays are not the model's.
    """
    directory = Path(directory)
    config = read_model_config(directory, config, follow_links=follow_links)
    files, index = _sharded_files(directory, weights or name, follow_links=follow_links)
    arrays = [*read(files)]
    _require_shards_agree(index, arrays)
    return match_arrays(directory, name, dialect, config, arrays)


def match_arrays(
    path: Path, name: str, dialect: Dialect, config: GPTJConfig, arrays: Iterable[StoredArray]
) -> ForeignCheckpoint:
    """The checkpoint whose arrays these are, after each row of the schema has been found among them.

    Args:
        path: the folder, which errors name.
        name: the format's.
        dialect: how the names are spelt.
        config: the model.
        arrays: everything that the files hold.

    Raises:
        SchemaError: arrays are missing, unexpected, misshapen, of a wrong dtype or there twice; all are listed.
    """
    stored: dict[str, StoredArray] = {}
    problems: list[str] = []
    files: dict[Path, None] = {}
    for array in arrays:
        files[array.file] = None
        if array.name in stored:
            problems.append(f"{shown(array.name)} is there twice")
        stored[array.name] = array
    names = plain_names(stored, file=path, dialect=dialect)
    by_plain: dict[str, StoredArray] = {}
    for stored_name, plain in names.plain.items():
        if plain in by_plain:
            problems.append(f"{shown(stored_name)} and {shown(by_plain[plain].name)} are there twice")
        by_plain[plain] = stored[stored_name]
    head = head_of(by_plain, tied=config.tie_word_embeddings)
    if config.n_layer > MOST_LAYERS:
        raise SchemaError("an absurd number of layers", file=path, where="n_layer", found=config.n_layer)
    found: dict[str, tuple[StoredArray, Spelling]] = {}
    missing: dict[str, str] = {}
    for row in schema(config, head):
        wanted = _list_spellings(row.name, dialect)
        spelling = next((s for s in wanted if s.name in by_plain), None)
        if spelling is None:
            missing[row.name] = wanted[0].name
            continue
        array = by_plain.pop(spelling.name)
        problems += _list_mismatches(array, row, spelling)
        found[row.name] = (array, spelling)
    zeros = tuple(missing) if [*missing] == [LM_HEAD_BIAS] else ()
    dropped = [*names.buffers, *names.other_heads, *_find_tied_head(by_plain, config, head, dialect, found)]
    unexpected = [shown(array.name) for array in by_plain.values() if array.name not in dropped]
    if missing and not zeros:
        problems.append(f"missing: {list_some([*missing.values()])}")
    if unexpected:
        problems.append(f"unexpected: {list_some(unexpected)}")
    if problems:
        raise SchemaError(
            f"not the tensors of a {HEADS[head]} of this config: {list_some(problems)}",
            file=path,
            hint=f"Compare with {CONFIG_FILE}",
        )
    names.say(path)
    if zeros:
        warn_of_zero_bias(path)
    _warn_of_shared_bytes(found)
    return ForeignCheckpoint(path, name, config, head, found, tuple(files), tuple(dropped), zeros, names)


def _warn_of_shared_bytes(found: Mapping[str, tuple[StoredArray, Spelling]]) -> None:
    """Say which rows lie on the same bytes of a file, although the config does not tie them."""
    first: dict[Any, str] = {}
    for name, (array, _) in found.items():
        other = first.setdefault((array.file, array.extents), name)
        if other != name and array.nbytes:
            warn_of(
                "lies on the bytes of another tensor, although nothing ties them: each gets a copy",
                file=array.file,
                where=name,
                found=other,
            )


def _take_first_word(name: str) -> str:
    return name.replace("/", ".").split(".")[0]


def _list_spellings(name: str, dialect: Dialect) -> list[Spelling]:
    """The spellings that a row may have: a base model's names with or without the prefix, whoever saved it."""
    other = name.removeprefix(BASE_PREFIX)
    if other == name and _take_first_word(name) not in HEAD_WORDS:
        other = BASE_PREFIX + name
    return [spell(n, dialect) for n in dict.fromkeys((name, other))]


def _list_mismatches(array: StoredArray, row: TensorSpec, spelling: Spelling) -> list[str]:
    problems = []
    if array.dtype.name not in WEIGHT_DTYPES:
        problems.append(f"{spelling.name} is {array.dtype.name}, expected a floating-point dtype")
    expected = row.shape[::-1] if spelling.transposed else row.shape
    if array.shape != expected:
        turned = " (looks transposed: from another framework's layout?)" if array.shape == expected[::-1] else ""
        problems.append(f"{spelling.name} has shape {array.shape}, expected {expected}{turned}")
    return problems


def _find_tied_head(
    stored: Mapping[str, StoredArray],
    config: GPTJConfig,
    head: Head,
    dialect: Dialect,
    found: Mapping[str, tuple[StoredArray, Spelling]],
) -> list[str]:
    """The name of a tied model's lm_head.weight, which is stored all the same, where it is the embedding itself."""
    if not config.tie_word_embeddings or head != "causal_lm":
        return []
    spelling = spell("lm_head.weight", dialect)
    array, embedding = stored.get(spelling.name), found.get("transformer.wte.weight")
    if array is None or embedding is None:
        return []
    return [array.name] if array.holds_same(embedding[0], transposed=spelling.transposed) else []


# ---- folders


def read_model_config(directory: Path, config: GPTJConfig | None, *, follow_links: bool) -> GPTJConfig:
    """The config that was passed, or the folder's config.json."""
    if config is not None:
        return config
    return GPTJConfig.from_file(safe_path(directory, CONFIG_FILE, follow_links=follow_links))


def _sharded_files(directory: Path, name: str, *, follow_links: bool) -> tuple[tuple[Path, ...], Index | None]:
    """The weights files that `name` stands for, and the index where it is one.

    Args:
        directory: the folder.
        name: a weights file, or an index (`*.index.json`).
        follow_links: accept links that lead out of the folder.

    Raises:
        MissingFileError: a file is not there.
        FormatError: the index breaks its rule.
        UnsafeFileError: a name or link leads out of the folder.
    """
    path = safe_path(directory, name, follow_links=follow_links)
    if not is_index_name(name):
        return (path,), None
    index = read_index(path)
    try:
        return tuple(safe_path(directory, file, follow_links=follow_links) for file in index.files), index
    except MissingFileError as error:
        raise MissingFileError("a shard that the index names is missing", file=error.file, where=name) from None


def _require_shards_agree(index: Index | None, arrays: Iterable[StoredArray]) -> None:
    """Refuse shards that hold other arrays than the index says; see `gptj.reading.weight_files`."""
    if index is not None:
        require_index_agrees(index, ((array.name, array.file.name, array.nbytes) for array in arrays))
