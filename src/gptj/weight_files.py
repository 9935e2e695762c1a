"""Which files of a directory hold its weights: one file, or shards that an index names.

Names and links that lead out of the directory are refused, since an index is data from strangers. Where several
sets of weights lie side by side (safetensors and a .bin, a single file and an index), none is guessed.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj.errors import FormatError, MissingFileError, SchemaError, UnsafeFileError, shown
from gptj.json_file import read_json_object
from gptj.safetensors_file import SafetensorsFile, StoredTensor, read_safetensors

__all__ = ["INDEX_FILE", "WEIGHTS_FILE", "is_weights_name", "listed", "open_weights", "safe_path"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FOREIGN_WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "tf_model.h5.index.json",
    "model.weights.h5",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
)
LARGEST_INDEX_BYTES = 16 * 2**20
MOST_ENTRIES = 100_000

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")


def is_weights_name(name: str) -> bool:
    """Whether a writer of safetensors may leave a file of this name: the single file, a shard, the index.

    >>> is_weights_name("model-00001-of-00002.safetensors"), is_weights_name("adapter_model.safetensors")
    (True, False)
    """
    shard = _SHARD.fullmatch(name)
    return name in (WEIGHTS_FILE, INDEX_FILE) or bool(shard and shard["stem"] == "model")


def open_weights(directory: Path, weights: str | None, *, follow_links: bool) -> tuple[SafetensorsFile, ...]:
    """The files that hold the directory's weights, their headers checked and compared with the index.

    Raises:
        MissingFileError: there are no weights; the message says what was looked for.
        FormatError: there are several sets and `weights` does not choose, or a file is malformed.
        UnsafeFileError: a name or a link leads out of the directory.
        SchemaError: index and files contradict each other; all contradictions are listed.
    """
    chosen = _choose(directory, weights)
    path = safe_path(directory, chosen, follow_links=follow_links)
    if not chosen.endswith(".index.json"):
        return (read_safetensors(path),)
    return _open_shards(directory, path, follow_links=follow_links)


def _choose(directory: Path, weights: str | None) -> str:
    """The name of the file, or of the index, to read."""
    if weights is not None:
        _require_plain(weights, file=directory, where="weights")
        if not weights.endswith((".safetensors", ".safetensors.index.json")):
            raise FormatError(
                "not safetensors weights", file=directory / weights, hint="Convert it first: gptj convert"
            )
        return weights
    present = [name for name in (WEIGHTS_FILE, INDEX_FILE, *FOREIGN_WEIGHTS) if os.path.lexists(directory / name)]
    if len(present) > 1:
        raise FormatError(
            "several weight sets",
            file=directory,
            found=", ".join(present),
            hint=f"Choose one, as weights={present[0]!r}",
        )
    if present and present[0] in FOREIGN_WEIGHTS:
        raise FormatError("not safetensors weights", file=directory / present[0], hint="Convert it first: gptj convert")
    if present:
        return present[0]
    others = sorted(path.name for path in directory.iterdir() if path.name.endswith(".safetensors"))
    raise MissingFileError(
        "no weights",
        file=directory,
        expected=f"{WEIGHTS_FILE} or {INDEX_FILE}",
        found=listed(others) if others else None,
        hint=f"Choose one, as weights={others[0]!r}" if others else None,
    )


def _require_plain(name: Any, *, file: Path, where: str) -> None:
    """Refuse a name that is not one plain file name of this directory."""
    plain = isinstance(name, str) and name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..")
    if not plain or len(os.fsencode(name)) > 255:
        raise UnsafeFileError(
            "not a plain file name", file=file, where=where, expected="a name without folders", found=shown(name)
        )


def safe_path(directory: Path, name: str, *, follow_links: bool) -> Path:
    """The path of a regular file in the directory, which no link leads out of it.

    A link may lead to the directory's own files, or from a snapshot of the Hugging Face Hub's cache to its blobs
    (`models--x--y/snapshots/<revision>/name` to `models--x--y/blobs/<hash>`), or anywhere with `follow_links`.

    Raises:
        MissingFileError, FormatError, UnsafeFileError: it is not there, not a regular file, or outside.
    """
    path = directory / name
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            target = path.resolve(strict=True)
            if not follow_links and not _is_inside(directory.resolve(), target):
                raise UnsafeFileError(
                    "is a link out of its folder", file=path, found=shown(target), hint="Say follow_links to allow it"
                )
            status = target.stat()
    except FileNotFoundError:
        raise MissingFileError("no such file", file=path) from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, UnsafeFileError):
            raise
        raise FormatError(f"cannot be looked at: {error}", file=path) from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a FIFO, socket or device"
        raise FormatError("not a regular file", file=path, expected="a regular file", found=kind)
    return path


def _is_inside(directory: Path, target: Path) -> bool:
    """Whether the resolved target lies in the resolved directory, or in its Hub cache's blobs."""
    if target.is_relative_to(directory):
        return True
    is_snapshot = directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")
    return is_snapshot and target.parent == directory.parent.parent / "blobs"


def _open_shards(directory: Path, index: Path, *, follow_links: bool) -> tuple[SafetensorsFile, ...]:
    weight_map, total_bytes = _read_index(index)
    problems: list[str] = []
    shards = []
    for name in dict.fromkeys(weight_map.values()):
        try:
            shards.append(read_safetensors(safe_path(directory, name, follow_links=follow_links)))
        except MissingFileError:
            problems.append(f"shard {shown(name)} is missing")
    problems += _contradictions(directory, weight_map, shards)
    if problems:
        raise SchemaError(f"the index and the files contradict each other: {listed(problems)}", file=index)
    found = sum(tensor.nbytes for shard in shards for tensor in shard.tensors.values())
    if total_bytes is not None and total_bytes != found:
        raise FormatError("wrong sum", file=index, where="metadata.total_size", expected=found, found=total_bytes)
    return tuple(shards)


def _read_index(index: Path) -> tuple[dict[str, str], int | None]:
    """The map from tensor to shard, and total_size where the index has one."""
    members = read_json_object(index, limit_bytes=LARGEST_INDEX_BYTES)
    weight_map, metadata = members.get("weight_map"), members.get("metadata", {})
    if not isinstance(weight_map, dict) or not 0 < len(weight_map) <= MOST_ENTRIES:
        raise FormatError(
            "breaks its rule", file=index, where="weight_map", expected=f"an object of 1 to {MOST_ENTRIES} tensors"
        )
    for tensor, name in weight_map.items():
        _require_plain(name, file=index, where=f"weight_map[{shown(tensor)}]")
        if not name.endswith(".safetensors"):
            raise UnsafeFileError(
                "not a safetensors file", file=index, where=f"weight_map[{shown(tensor)}]", found=shown(name)
            )
    folded = Counter(name.casefold() for name in set(weight_map.values()))
    if twins := sorted(name for name in set(weight_map.values()) if folded[name.casefold()] > 1):
        raise FormatError("names that differ only in case", file=index, where="weight_map", found=listed(twins))
    if not isinstance(metadata, dict):
        raise FormatError("breaks its rule", file=index, where="metadata", expected="an object", found=shown(metadata))
    total = metadata.get("total_size")
    if total is not None and (isinstance(total, bool) or not isinstance(total, int | float) or total != int(total)):
        raise FormatError(
            "breaks its rule", file=index, where="metadata.total_size", expected="a whole number", found=shown(total)
        )
    return weight_map, None if total is None else int(total)


def _contradictions(directory: Path, weight_map: Mapping[str, str], shards: list[SafetensorsFile]) -> list[str]:
    """Every way in which the shards are not what the index says."""
    problems = []
    places: dict[str, list[str]] = {}
    tensor: StoredTensor | str
    for shard in shards:
        for tensor in shard.tensors.values():
            places.setdefault(tensor.name, []).append(shard.path.name)
    opened = {shard.path.name for shard in shards}
    for tensor, name in weight_map.items():
        found = places.get(tensor, [])
        if len(found) > 1:
            problems.append(f"{tensor} lies in {' and in '.join(found)}")
        elif found and found != [name]:
            problems.append(f"{tensor} lies in {found[0]}, not in {name}")
        elif not found and name in opened:
            problems.append(f"{shown(tensor)} is not in {name}")
    problems += [
        f"{tensor} in {found[0]} is not listed" for tensor, found in places.items() if tensor not in weight_map
    ]
    stems = {match["stem"] for name in weight_map.values() if (match := _SHARD.fullmatch(name))}
    for path in sorted(directory.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if match and match["stem"] in stems and path.name not in weight_map.values():
            problems.append(f"{shown(path.name)} is not listed")
    models = {shard.metadata.get("gptj.config_sha256") for shard in shards}
    if len(models) > 1:
        problems.append("the shards belong to different models (gptj.config_sha256)")
    return problems


def listed(items: list[str], most: int = 10) -> str:
    """The first `most` items, and how many more there are."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
