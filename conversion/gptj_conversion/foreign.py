"""A checkpoint whose arrays have names: matched with the schema as a whole, then read one at a time.

The formats of Hugging Face's library differ in their containers and in how they spell and turn the tensors; what
is left is here, once: which array serves which row, and everything that is wrong with them in one error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.dtypes import numpy_dtype
from gptj.errors import FormatError, MissingFileError, SchemaError, UnsafeFileError, shown
from gptj.json_file import read_json_object
from gptj.room import Room
from gptj.safetensors_file import WEIGHT_DTYPES
from gptj.schema import BASE_PREFIX, HEADS, Head, TensorSpec, is_old_buffer, schema
from gptj.weight_files import listed, safe_path
from gptj_conversion.dialects import Dialect, Spelling, spell
from gptj_conversion.source import Facts
from gptj_conversion.stored_array import StoredArray

__all__ = ["ForeignCheckpoint", "match_arrays", "read_model_config", "require_index_agrees", "sharded_files"]

LARGEST_INDEX_BYTES = 16 * 2**20
MOST_LAYERS = 10_000
_HEAD_WORDS: dict[str, Head] = {
    "lm_head": "causal_lm",
    "score": "sequence_classification",
    "qa_outputs": "question_answering",
}


@dataclasses.dataclass(frozen=True)
class ForeignCheckpoint:
    """An opened checkpoint, every row of its head found with the right shape.

    Attributes:
        path: the folder.
        format: the format's name in plans and manifests.
        config: of config.json, or the one that was passed.
        head: what the names say stands on top of the blocks.
        arrays: for each canonical name, the array and how it is spelt.
        files: the weights files.
        dropped: names that were left out without harm.
    """

    path: Path
    format: str
    config: GPTJConfig
    head: Head
    arrays: Mapping[str, tuple[StoredArray, Spelling]]
    files: tuple[Path, ...]
    dropped: tuple[str, ...]

    @property
    def beside(self) -> tuple[Path, ...]:
        """The folder."""
        return (self.path,)

    @property
    def assumed(self) -> tuple[str, ...]:
        """Nothing: there is a config.json."""
        return ()

    @property
    def unread(self) -> tuple[Path, ...]:
        """Nothing."""
        return ()

    def dtype_of(self, name: str) -> str:
        """The dtype that a canonical tensor is stored in."""
        return self.arrays[name][0].dtype.name

    def read(
        self,
        row: TensorSpec,
        dtype: Any = None,
        *,
        allow_overflow: bool = False,
        room: Room | None = None,
    ) -> NDArray[Any]:
        """A canonical tensor in its own dtype or in `dtype`."""
        array, spelling = self.arrays[row.name]
        wanted = array.dtype if dtype is None else numpy_dtype(dtype)
        return array.read(
            wanted, transposed=spelling.transposed, where=spelling.name, allow_overflow=allow_overflow, room=room
        )

    def origin(self, name: str) -> str:
        """The file, the name in it, and whether it was transposed."""
        array, spelling = self.arrays[name]
        return f"{array.name} in {array.file.name}" + (", transposed" if spelling.transposed else "")

    def origin_files(self, name: str) -> tuple[str, ...]:
        """The file that holds it."""
        return (self.arrays[name][0].file.name,)

    def facts(self) -> Facts:
        """What it is."""
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
            problems=tuple(f"{shown(name)} is left out" for name in self.dropped),
        )


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
    firsts = {_first(n) for n in stored}
    head: Head = next((head for word, head in _HEAD_WORDS.items() if word in firsts), "base")
    if config.n_layer > MOST_LAYERS:
        raise SchemaError("an absurd number of layers", file=path, where="n_layer", found=config.n_layer)
    found: dict[str, tuple[StoredArray, Spelling]] = {}
    missing: list[str] = []
    wanted = {row.name: _spellings(row.name, dialect) for row in schema(config, head)}
    for row in schema(config, head):
        spelling = next((s for s in wanted[row.name] if s.name in stored), None)
        if spelling is None:
            missing.append(wanted[row.name][0].name)
            continue
        array = stored.pop(spelling.name)
        problems += _mismatches(array, row, spelling)
        found[row.name] = (array, spelling)
    dropped = [n for n in stored if dialect == "pt" and is_old_buffer(n)]
    tied = _tied_head(stored, config, head, dialect, found)
    dropped += tied
    unexpected = [shown(n) for n in stored if n not in dropped]
    if missing:
        problems.append(f"missing: {listed(missing)}")
    if unexpected:
        problems.append(f"unexpected: {listed(unexpected)}")
    if problems:
        raise SchemaError(
            f"not the tensors of a {HEADS[head]} of this config: {listed(problems)}",
            file=path,
            hint=f"Compare with {CONFIG_FILE}",
        )
    return ForeignCheckpoint(path, name, config, head, found, tuple(files), tuple(dropped))


def _first(name: str) -> str:
    return name.replace("/", ".").split(".")[0]


def _spellings(name: str, dialect: Dialect) -> list[Spelling]:
    """How the row may be spelt: a base model's names with or without the prefix, whoever saved it."""
    other = name.removeprefix(BASE_PREFIX)
    if other == name and _first(name) not in _HEAD_WORDS:
        other = BASE_PREFIX + name
    return [spell(n, dialect) for n in dict.fromkeys((name, other))]


def _mismatches(array: StoredArray, row: TensorSpec, spelling: Spelling) -> list[str]:
    problems = []
    if array.dtype.name not in WEIGHT_DTYPES:
        problems.append(f"{spelling.name} is {array.dtype.name}, expected a floating-point dtype")
    expected = row.shape[::-1] if spelling.transposed else row.shape
    if array.shape != expected:
        turned = " (looks transposed: from another framework's layout?)" if array.shape == expected[::-1] else ""
        problems.append(f"{spelling.name} has shape {array.shape}, expected {expected}{turned}")
    return problems


def _tied_head(
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
    if array is None or embedding is None or spelling.transposed:
        return []
    same = (array.file, array.extents, array.shape) == (embedding[0].file, embedding[0].extents, embedding[0].shape)
    return [spelling.name] if same else []


# ---- folders


def read_model_config(directory: Path, config: GPTJConfig | None, *, follow_links: bool) -> GPTJConfig:
    """The config that was passed, or the folder's config.json."""
    if config is not None:
        return config
    return GPTJConfig.from_file(safe_path(directory, CONFIG_FILE, follow_links=follow_links))


def sharded_files(directory: Path, name: str, *, follow_links: bool) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weights files that `name` stands for, and which array an index says is in which of them.

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
    if not name.endswith(".index.json"):
        return (path,), None
    suffix = "." + name.removesuffix(".index.json").rpartition(".")[2]
    weight_map = read_json_object(path, limit_bytes=LARGEST_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("breaks its rule", file=path, where="weight_map", expected="an object of tensors")
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file.isprintable() and not set(file) & set("/\\:") and len(file) <= 200
        if not plain or not file.endswith(suffix) or file == suffix:
            raise UnsafeFileError(
                "not a plain file name",
                file=path,
                where=f"weight_map[{shown(tensor)}]",
                expected=f"*{suffix} in the same folder",
                found=shown(file),
            )
    names = tuple(dict.fromkeys(weight_map.values()))
    try:
        return tuple(safe_path(directory, file, follow_links=follow_links) for file in names), weight_map
    except MissingFileError as error:
        raise MissingFileError("a shard that the index names is missing", file=error.file, where=name) from None


def require_index_agrees(index: Path, weight_map: Mapping[str, str] | None, arrays: Iterable[tuple[str, str]]) -> None:
    """Refuse shards that hold other arrays than the index says.

    Args:
        index: what errors name.
        weight_map: of the index; None where there is none.
        arrays: each array's name and its file's, as found.

    Raises:
        SchemaError: all contradictions are listed.
    """
    if weight_map is None:
        return
    found: dict[str, list[str]] = {}
    for name, file in arrays:
        found.setdefault(name, []).append(file)
    problems = [f"{shown(n)} lies in {' and '.join(files)}" for n, files in found.items() if len(files) > 1]
    problems += [
        f"{shown(n)} lies in {files[0]}, not in {weight_map[n]}"
        for n, files in found.items()
        if n in weight_map and len(files) == 1 and files[0] != weight_map[n]
    ]
    problems += [f"{shown(n)} is not in {file}" for n, file in weight_map.items() if n not in found]
    problems += [f"{shown(n)} in {files[0]} is not listed" for n, files in found.items() if n not in weight_map]
    if problems:
        raise SchemaError(f"the index and the files contradict each other: {listed(problems)}", file=index)
