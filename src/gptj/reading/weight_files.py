"""The files of a directory that hold its weights: one file, or shards that an index names.

Names and links that lead out of the directory are refused, since an index is data from strangers. Of several sets of
weights side by side (a single file and an index) the first is taken if they hold the same names and shapes, and said.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gptj.errors import (
    CheckpointWarning,
    FormatError,
    GPTJError,
    MissingFileError,
    SchemaError,
    UnsafeFileError,
    shown,
    warn_again,
    warn_of,
)
from gptj.paths import WEIGHTS_SUFFIXES, safe_path
from gptj.paths.json_file import read_json_object
from gptj.reading.kinds import describe_folder
from gptj.reading.safetensors_file import SafetensorsFile, read_safetensors
from gptj.reading.weight_names import plain_variable

__all__ = [
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "Index",
    "choose_set",
    "convert_hint",
    "is_index_name",
    "is_weights_name",
    "list_some",
    "open_weights",
    "read_index",
    "refuse_folder",
    "require_index_agrees",
    "safe_path",
    "set_among",
    "split_weights",
    "variant_sets",
    "weight_sets",
    "weights_suffix",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FOREIGN_WEIGHTS = (("pytorch_model", ".bin"), ("tf_model", ".h5"), ("model.weights", ".h5"), ("flax_model", ".msgpack"))
"""The stems and the suffixes of other formats' weights files."""
LARGEST_INDEX_BYTES = 16 * 2**20
MOST_ENTRIES = 100_000

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<variant>\.[\w-]+)?\.(?P<suffix>safetensors|bin|h5|msgpack)")
_INDEX = re.compile(r"(?P<file>.+)\.index(\.(?P<variant>[\w-]+))?\.json")
_VARIANT = re.compile(r".+\.[\w-]+\.(safetensors|bin|h5|msgpack)(\.index\.json)?|.+\.index\.[\w-]+\.json")


def is_weights_name(name: str) -> bool:
    """Whether a writer of safetensors may leave a file of this name: the single file, a shard, the index.

    >>> is_weights_name("model-00001-of-00002.safetensors"), is_weights_name("adapter_model.safetensors")
    (True, False)
    """
    shard = _SHARD.fullmatch(name)
    of_model = shard and shard["stem"] == "model" and shard["suffix"] == "safetensors" and not shard["variant"]
    return name in (WEIGHTS_FILE, INDEX_FILE) or bool(of_model)


def weights_suffix(name: str) -> str:
    """The suffix of a weights file, or of the files that an index names; empty where it is neither.

    >>> weights_suffix("pytorch_model.bin.index.fp16.json"), weights_suffix("model.fp16.safetensors")
    ('.bin', '.safetensors')
    """
    index = _INDEX.fullmatch(name)
    suffix = Path(index["file"] if index else name).suffix
    return suffix if suffix in WEIGHTS_SUFFIXES else ""


def is_index_name(name: str) -> bool:
    """Whether a file of this name is an index, a variant's too."""
    return _INDEX.fullmatch(name) is not None


def weight_sets(directory: Path, stem: str, suffix: str) -> list[str]:
    """The sets of weights of one format in a folder: the file and the index, else those of variants such as fp16."""
    standard = (stem + suffix, f"{stem}{suffix}.index.json")
    present = [name for name in standard if os.path.lexists(directory / name)]
    return present or variant_sets(directory, stem, suffix)


def variant_sets(directory: Path, stem: str, suffix: str, variant: str | None = None) -> list[str]:
    """The sets of a format's variants, or of this one: its file, and its index in both spellings of transformers.

    `stem.fp16.suffix`, `stem.suffix.index.fp16.json` and `stem.fp16.suffix.index.json`.
    """
    if not directory.is_dir():
        return []
    word = r"[\w-]+" if variant is None else re.escape(variant)
    first, last = re.escape(stem), re.escape(suffix)
    names = re.compile(rf"{first}(\.{word}{last}(\.index\.json)?|{last}\.index\.{word}\.json)")
    found = sorted(path.name for path in directory.iterdir() if names.fullmatch(path.name))
    return [name for name in found if not _SHARD.fullmatch(name)]


def set_among(names: Iterable[str]) -> str | None:
    """The file that stands for a whole written set: the index, else the one weights file; None where none is one."""
    weights = [name for name in names if weights_suffix(name)]
    return next((name for name in weights if is_index_name(name)), weights[0] if len(weights) == 1 else None)


Opened = TypeVar("Opened")


def choose_set(
    directory: Path,
    names: list[str],
    open_set: Callable[[str], tuple[Opened, object]],
    *,
    say_others: bool = True,
) -> tuple[str, Opened | None]:
    """The name of the one set, or of the first of several that hold the same tensors, which is said.

    Several are opened to be compared, and the one that is taken comes back with its name, so that nobody opens it
    again. Of what opening them warned of, what concerns that one is said.

    Args:
        directory: the folder, which messages name.
        names: the sets, the best first.
        open_set: a set, opened, and its signature, compared with ==; raises GPTJError where it is no whole one.
        say_others: warn of sets beside them that were not read.

    Raises:
        FormatError: the sets differ, or one of them cannot be compared.
    """
    first: Opened | None = None
    if len(names) > 1:
        opened: list[tuple[Opened, object]] = []
        heard: list[list[warnings.WarningMessage]] = []
        problem = None
        for name in names:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", CheckpointWarning)
                try:
                    opened.append(open_set(name))
                except GPTJError as error:
                    problem = f"{name}: {error}"
            heard.append(caught)
        if problem or any(signature != opened[0][1] for _, signature in opened):
            raise FormatError(
                "several weight sets that differ by their names and shapes",
                file=directory,
                found=", ".join(names) + (f" ({problem})" if problem else ""),
                hint=f"Choose one, as weights={names[0]!r} (--weights {names[0]})",
            )
        warn_of(
            f"several weight sets of the same names and shapes: {names[0]} is taken",
            file=directory,
            found=", ".join(names),
            hint="Choose another with weights= or --weights",
        )
        warn_again(heard[0])
        first = opened[0][0]
    elif _VARIANT.fullmatch(names[0]):
        warn_of(f"the only weights are a variant's: {names[0]} is taken", file=directory)
    formats = (("model", ".safetensors"), *FOREIGN_WEIGHTS)
    every = [name for known in formats for name in (*weight_sets(directory, *known), *variant_sets(directory, *known))]
    beside = [name for name in dict.fromkeys(every) if name not in names]
    if beside and say_others:
        warn_of(
            f"{names[0]} is taken; other weights beside it were not read",
            file=directory,
            found=", ".join(beside),
            hint="Choose another with weights= or --weights",
        )
    if say_others and (directory / "adapter_config.json").is_file():
        warn_of(
            "an adapter's config beside whole weights: these are read, and no adapter is put to work",
            file=directory,
            where="adapter_config.json",
            hint="transformers would open the base that it names, with the adapter; here say --adapter DIR",
        )
    return names[0], first


def split_weights(path: str | os.PathLike[str], weights: str | None) -> tuple[Path, str | None]:
    """The folder, and which weights in it, of a path that is a folder or a weights file.

    A shard stands for the index that names it, where there is one, and `weights` may be a path into the folder.

    Raises:
        FormatError: `weights` is a folder, or not one of this folder's files.

    >>> split_weights("no/such/folder")
    (PosixPath('no/such/folder'), None)
    """
    path = Path(path)
    try:
        if weights is None:
            is_file = bool(weights_suffix(path.name)) and path.is_file()
            return (path.parent, _index_of(path) or path.name) if is_file else (path, None)
        given = path / weights if (path / weights).exists() else Path(weights)
        is_folder = given.is_dir()
        is_inside = given.exists() and given.parent.resolve() == path.resolve()
    except (OSError, ValueError, TypeError):
        return path, weights  # which whoever opens it refuses
    if is_folder:
        raise FormatError("a folder", file=given, where="weights", expected="the name of a weights file in DIR")
    return path, (_index_of(given) or given.name) if is_inside else weights


def _index_of(shard: Path) -> str | None:
    """The name of the index that lists the shard, which is said; None for a file that is a whole set."""
    names = _index_names(shard.name)
    index = next((name for name in names if (shard.parent / name).exists()), None)
    if index is not None:
        warn_of(f"one of several shards: all that {index} names are read", file=shard)
    return index


def _index_names(shard: str) -> tuple[str, ...]:
    """The names that the index of a shard may have; none for a name that is no shard's.

    >>> _index_names("model.fp16-00001-of-00002.safetensors")
    ('model.safetensors.index.fp16.json', 'model.fp16.safetensors.index.json')
    """
    match = _SHARD.fullmatch(shard)
    if match is None:
        return ()
    stem, _, infix = match["stem"].partition(".")
    variant = infix or (match["variant"] or "").removeprefix(".")
    if not variant:
        return (f"{stem}.{match['suffix']}.index.json",)
    return f"{stem}.{match['suffix']}.index.{variant}.json", f"{stem}.{variant}.{match['suffix']}.index.json"


def convert_hint(directory: Path, weights: str | None = None) -> str:
    """The command that makes a model's folder of what is in this one, or of these weights in it."""
    words = [os.fspath(directory), "OUT", *([] if weights is None else ["--weights", weights])]
    quoted = [word if re.fullmatch(r"[\w./~+-]+", word) else shlex.quote(word) for word in words]
    return f"Convert it first: gptj convert {' '.join(quoted)}"


def open_weights(directory: Path, weights: str | None, *, follow_links: bool) -> tuple[SafetensorsFile, ...]:
    """The files that hold the directory's weights, their headers checked and compared with the index.

    Raises:
        MissingFileError: there are no weights; the message says what was looked for.
        FormatError: there are several sets and `weights` does not choose, or a file is malformed.
        UnsafeFileError: a name or a link leads out of the directory.
        SchemaError: index and files contradict each other; all contradictions are listed.
    """
    name, files = _choose(directory, weights, follow_links=follow_links)
    return _open_set(directory, name, follow_links=follow_links) if files is None else files


def _open_set(directory: Path, name: str, *, follow_links: bool) -> tuple[SafetensorsFile, ...]:
    path = safe_path(directory, name, follow_links=follow_links)
    if not _INDEX.fullmatch(name):
        return (read_safetensors(path),)
    return _open_shards(directory, path, follow_links=follow_links)


def _choose(
    directory: Path, weights: str | None, *, follow_links: bool
) -> tuple[str, tuple[SafetensorsFile, ...] | None]:
    """The name of the file, or of the index, to read; and its files where they had to be opened to be compared."""
    if weights is not None:
        _require_plain(weights, file=directory, where="weights")
        if weights_suffix(weights) != ".safetensors":
            path = safe_path(directory, weights, follow_links=follow_links)
            raise FormatError("not safetensors weights", file=path, hint=convert_hint(directory, weights))
        return weights, None
    names = weight_sets(directory, "model", ".safetensors")
    if names:

        def open_set(name: str) -> tuple[tuple[SafetensorsFile, ...], object]:
            files = _open_set(directory, name, follow_links=follow_links)
            return files, {tensor.name: tensor.shape for file in files for tensor in file.tensors.values()}

        return choose_set(directory, names, open_set)
    if foreign := [name for known in FOREIGN_WEIGHTS for name in weight_sets(directory, *known)]:
        raise FormatError("not safetensors weights", file=directory / foreign[0], hint=convert_hint(directory))
    refuse_folder(directory, f"{WEIGHTS_FILE} or {INDEX_FILE}")


def refuse_folder(directory: Path, expected: str) -> NoReturn:
    """Say what a folder without a model's weights is, where that can be seen by its names, or that it is none.

    Raises:
        FormatError: it is something else.
        MissingFileError: there is no sign of weights.
    """
    shards = sorted(p.name for p in directory.iterdir() if _SHARD.fullmatch(p.name)) if directory.is_dir() else []
    if shards:
        raise MissingFileError(
            "no weights that are whole: shards without their index",
            file=directory,
            expected=_index_names(shards[0])[0],
            found=list_some(shards),
            hint="Fetch the index too",
        )
    if directory.is_file():
        raise FormatError("a file that holds no model's weights", file=directory, expected=expected)
    kind = describe_folder(directory)
    if kind is not None:
        raise FormatError(f"no model's folder, but {kind[0]}", file=directory, expected=expected, hint=kind[1])
    raise MissingFileError("no weights", file=directory, expected=expected)


def _require_plain(name: Any, *, file: Path, where: str) -> None:
    """Refuse a name that is not one plain file name of this directory."""
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..")
    if not plain or len(os.fsencode(name)) > 255:
        raise UnsafeFileError(
            "not a plain file name", file=file, where=where, expected="a name without folders", found=shown(name)
        )


def _open_shards(directory: Path, path: Path, *, follow_links: bool) -> tuple[SafetensorsFile, ...]:
    index = read_index(path)
    missing: list[str] = []
    shards = []
    for name in index.files:
        try:
            shards.append(read_safetensors(safe_path(directory, name, follow_links=follow_links)))
        except MissingFileError:
            missing.append(name)
    places = [(tensor.name, shard.path.name, tensor.nbytes) for shard in shards for tensor in shard.tensors.values()]
    models = {shard.metadata.get("gptj.config_sha256") for shard in shards}
    more = ["the shards belong to different models (gptj.config_sha256)"] if len(models) > 1 else []
    require_index_agrees(index, places, missing=missing, more=more)
    return tuple(shards)


@dataclasses.dataclass(frozen=True)
class Index:
    """The shard of each tensor.

    Attributes:
        path: the index.
        weight_map: the shard's name by the tensor's.
        total_size: what the index says of the bytes of all tensors, of whatever type; None where it says nothing.
    """

    path: Path
    weight_map: Mapping[str, str]
    total_size: Any

    @property
    def files(self) -> tuple[str, ...]:
        """The shards' names."""
        return tuple(dict.fromkeys(self.weight_map.values()))


def read_index(path: Path) -> Index:
    """The index of a sharded set of any format; its shards have the suffix that its own name says.

    Raises:
        FormatError: it breaks its rule.
        UnsafeFileError: a shard's name is not a plain one, or not of this format.
    """
    suffix = weights_suffix(path.name)
    members = read_json_object(path, limit_bytes=LARGEST_INDEX_BYTES)
    weight_map, metadata = members.get("weight_map"), members.get("metadata", {})
    if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= MOST_ENTRIES:
        raise FormatError(
            "breaks its rule", file=path, where="weight_map", expected=f"an object of 1 to {MOST_ENTRIES} tensors"
        )
    for tensor, name in weight_map.items():
        where = f"weight_map[{shown(tensor)}]"
        _require_plain(name, file=path, where=where)
        if not name.endswith(suffix) or name == suffix:
            problem = f"not a {suffix.removeprefix('.')} file"
            raise UnsafeFileError(problem, file=path, where=where, expected=f"*{suffix}", found=shown(name))
    folded = Counter(name.casefold() for name in set(weight_map.values()))
    if twins := sorted(name for name in set(weight_map.values()) if folded[name.casefold()] > 1):
        raise FormatError("names that differ only in case", file=path, where="weight_map", found=list_some(twins))
    if not isinstance(metadata, dict):
        raise FormatError("breaks its rule", file=path, where="metadata", expected="an object", found=shown(metadata))
    plain = {plain_variable(tensor): name for tensor, name in weight_map.items()}
    if len(plain) != len(weight_map):
        raise FormatError("a tensor stands twice, with and without its model's name", file=path, where="weight_map")
    return Index(path, plain, metadata.get("total_size"))


def require_index_agrees(
    index: Index, places: Iterable[tuple[str, str, int]], *, missing: Iterable[str] = (), more: Iterable[str] = ()
) -> None:
    """Refuse shards that hold something else than the index says, and warn of a wrong sum.

    `metadata.total_size` is a note for people: nothing is read by it, and old releases counted some dtypes wrongly.

    Args:
        index: the index.
        places: each tensor's name, its file's name and its bytes, as found.
        missing: shards that are not there.
        more: further contradictions.

    Raises:
        SchemaError: all contradictions are listed.
    """
    found: dict[str, list[str]] = {}
    total, lost, weight_map = 0, dict.fromkeys(missing), index.weight_map
    for name, file, nbytes in places:
        found.setdefault(plain_variable(name), []).append(file)
        total += nbytes
    problems = [f"shard {shown(name)} is missing" for name in lost]
    for name, file in weight_map.items():
        files = found.get(name, [])
        if len(files) > 1:
            problems.append(f"{name} lies in {' and in '.join(files)}")
        elif files and files != [file]:
            problems.append(f"{name} lies in {files[0]}, not in {file}")
        elif not files and file not in lost:
            problems.append(f"{shown(name)} is not in {file}")
    problems += [f"{name} in {files[0]} is not listed" for name, files in found.items() if name not in weight_map]
    problems += [f"{shown(name)} is not listed" for name in _stray_shards(index)]
    problems += more
    if problems:
        raise SchemaError(f"the index and the files contradict each other: {list_some(problems)}", file=index.path)
    said = index.total_size
    if said is not None and (isinstance(said, bool) or said != total):
        warn_of("not the bytes of its tensors", file=index.path, where="metadata.total_size", expected=total,
                found=shown(said))  # fmt: skip


def _stray_shards(index: Index) -> list[str]:
    """Shards of the same set that the index does not name."""
    matches = [match for name in index.files if (match := _SHARD.fullmatch(name))]
    sets = {match.group("stem", "variant", "suffix") for match in matches}
    present = [(path.name, _SHARD.fullmatch(path.name)) for path in sorted(index.path.parent.iterdir())]
    return [
        name
        for name, match in present
        if match and match.group("stem", "variant", "suffix") in sets and name not in index.files
    ]


def list_some(items: list[str], most: int = 10) -> str:
    """The first `most` items, and how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
