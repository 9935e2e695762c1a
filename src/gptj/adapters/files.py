"""An adapter's folder as PEFT writes it: adapter_config.json and adapter_model.safetensors, read and written whole."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.adapters.config import MERGE_HINT, OTHER_MODULES, AdapterConfig, stranger_hint
from gptj.adapters.rows import AdapterRow, adapter_rows
from gptj.config import CONFIG_FILE, GPTJConfig
from gptj.config.dtypes import PARAMETER_DTYPES
from gptj.config.schema import BASE_PREFIX, TensorSpec
from gptj.errors import FormatError, MissingFileError, SchemaError, naming_file, shown, warn_of
from gptj.paths import likely_folder, require_path, safe_path
from gptj.paths.json_file import read_json_object
from gptj.reading.safetensors_file import SafetensorsFile, StoredTensor, pack_header, read_safetensors
from gptj.writing.containers import Entry
from gptj.writing.safetensors_shards import SafetensorsFile as WrittenFile
from gptj.writing.shared_directory import SharedDirectory

__all__ = ["ADAPTER_CONFIG_FILE", "ADAPTER_WEIGHTS_FILE", "Adapter", "is_adapter", "read_adapter", "write_adapter"]

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
MLX_FILE = "adapters.safetensors"

PREFIX = "base_model.model."
"""The beginning of PEFT's names; transformers' own files may lack it."""

_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")

_ELSEWHERE = re.compile(rf"(?:.+\.)?(?P<module>{'|'.join(OTHER_MODULES)})\.(?:lora_|base_layer\.|modules_to_save\.).+")
"""A tensor beside what is no matrix of a block: PEFT adapts those, too."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's folder whose config and header are checked; its numbers are read when they are asked for.

    Attributes:
        directory: where it is.
        config: what its adapter_config.json says.
        stored: the tensors by plain names: `h.0.attn.q_proj.lora_A.weight`.
        file: the weights file.
    """

    directory: Path
    config: AdapterConfig
    stored: Mapping[str, StoredTensor]
    file: SafetensorsFile

    def rows(self, config: GPTJConfig) -> tuple[AdapterRow, ...]:
        """The rows of this adapter for a model.

        Raises:
            ConfigError: it means no matrix of the model.
            SchemaError: its tensors are not that model's: all that are missing, unexpected or misshapen are named.
        """
        with naming_file(self.directory / ADAPTER_CONFIG_FILE):
            rows = adapter_rows(self.config, config)
        for field, name in self.config.strangers(config.n_layer):
            path = self.directory / ADAPTER_CONFIG_FILE
            where = f"{field}: {shown(name)}"
            warn_of("means no matrix that is adapted", file=path, where=where, hint=stranger_hint(name))
        expected = {spec.name: spec for row in rows for spec in (row.a, row.b)}
        kinds = {
            "missing": [name for name in expected if name not in self.stored],
            "unexpected": [shown(name) for name in self.stored if name not in expected],
            "misshapen": [
                f"{name} expected {spec.shape}, found {self.stored[name].shape}"
                for name, spec in expected.items()
                if name in self.stored and self.stored[name].shape != spec.shape
            ],
        }
        problems = [f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in kinds.items() if names]
        if problems:
            raise SchemaError(
                f"its tensors do not fit the config and the model: {'; '.join(problems)}",
                file=self.file.path,
                hint="Is it another base's adapter, or was r, target_modules or a pattern changed?",
            )
        return rows

    def read(self, row: AdapterRow) -> tuple[NDArray[Any], NDArray[Any]]:
        """A and B of a row, as stored.

        Raises:
            SchemaError: a value is not finite.
            FormatError: the file changed since it was opened.
        """
        return self._values(row.a.name), self._values(row.b.name)

    def arrays(self, config: GPTJConfig) -> Iterator[tuple[AdapterRow, NDArray[Any], NDArray[Any]]]:
        """Every row for a model, with its A and B as stored, one at a time."""
        return ((row, *self.read(row)) for row in self.rows(config))

    def _values(self, name: str) -> NDArray[Any]:
        tensor = self.stored[name]
        values = self.file.read(tensor)
        if not np.isfinite(values.astype(np.float64)).all():
            count = int((~np.isfinite(values.astype(np.float64))).sum())
            raise SchemaError(
                "not finite", file=self.file.path, where=tensor.name, found=f"NaN or infinity in {count} element(s)",
                hint="Its training went wrong: take an earlier one",
            )  # fmt: skip
        return values


def is_adapter(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder is an adapter's, and no model's."""
    folder = Path(directory)
    return (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).exists()


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """The adapter in a folder, its config and its weights' header checked.

    Raises:
        MissingFileError: there is no such folder, or a file is missing in it.
        ConfigError: its config says what cannot be had.
        SchemaError: a tensor is none of an adapter's, or of another kind of numbers.
        FormatError: a file is not what its format says.
        UnsafeFileError: a file is a link out of the folder.
    """
    folder = require_path(directory)
    if not folder.is_dir():
        expected = f"a folder with {ADAPTER_CONFIG_FILE} and {ADAPTER_WEIGHTS_FILE}"
        problem = "not a folder" if os.path.lexists(folder) else "no such adapter"
        raise MissingFileError(problem, file=folder, expected=expected, hint=likely_folder(folder))
    if (folder / MLX_FILE).exists() and not (folder / ADAPTER_WEIGHTS_FILE).exists():
        raise FormatError(
            "an adapter of mlx_lm's, whose matrices lie the other way round under other names",
            file=folder / MLX_FILE,
            expected=ADAPTER_WEIGHTS_FILE,
            hint="Fuse it with mlx_lm.fuse, or write it in PEFT's format: lora_A = lora_a.T, lora_B = lora_b.T",
        )
    path = folder / ADAPTER_CONFIG_FILE
    if not os.path.lexists(path):
        hint = f"{folder} is a model's folder: the adapter's is another" if (folder / CONFIG_FILE).exists() else None
        if named := sorted(found.parent.name for found in folder.glob(f"*/{ADAPTER_CONFIG_FILE}")):
            hint = f"PEFT writes named adapters to folders of their own: here {', '.join(map(shown, named[:10]))}"
        raise MissingFileError("no such file", file=path, expected="an adapter's config, as PEFT writes it", hint=hint)
    config = AdapterConfig.from_dict(read_json_object(safe_path(folder, ADAPTER_CONFIG_FILE)), file=path)
    file = read_safetensors(_weights_file(folder))
    return Adapter(folder, config, _plain_names(file), file)


def _weights_file(folder: Path) -> Path:
    path = folder / ADAPTER_WEIGHTS_FILE
    if os.path.lexists(path):
        return safe_path(folder, ADAPTER_WEIGHTS_FILE)
    if (folder / PICKLED_FILE).exists():
        raise MissingFileError(
            "only pickled weights are here, which are not read",
            file=folder / PICKLED_FILE,
            expected=ADAPTER_WEIGHTS_FILE,
            hint="Open it with PEFT and save it again: PeftModel.from_pretrained(model, DIR).save_pretrained(DIR)",
        )
    raise MissingFileError("no such file", file=path, expected="the adapter's weights, as PEFT writes them")


def _plain_names(file: SafetensorsFile) -> dict[str, StoredTensor]:
    """The tensors by their names without PEFT's prefix and a head's."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        plain = name.removeprefix(PREFIX).removeprefix(BASE_PREFIX)
        if elsewhere := _ELSEWHERE.fullmatch(plain):
            problem = f"an adapter of {elsewhere['module']}, which is no matrix of a block"
            raise SchemaError(problem, file=file.path, where=shown(name), hint=MERGE_HINT)
        if _PART.fullmatch(plain) is None:
            hint = "A stored adapter has lora_A.weight and lora_B.weight alone: save it with PEFT's save_pretrained"
            raise SchemaError("no tensor of a LoRA adapter", file=file.path, where=shown(name), hint=hint)
        if tensor.dtype not in PARAMETER_DTYPES:
            expected = " or ".join(PARAMETER_DTYPES)
            raise SchemaError(
                "not a dtype of weights", file=file.path, where=shown(name), expected=expected, found=tensor.dtype
            )
        if plain in found:
            raise SchemaError("stands there twice", file=file.path, where=shown(name), found=shown(found[plain].name))
        found[plain] = tensor
    return found


def write_adapter(
    directory: str | os.PathLike[str],
    config: AdapterConfig,
    rows: tuple[AdapterRow, ...],
    read: Callable[[AdapterRow], tuple[NDArray[Any], NDArray[Any]]],
    *,
    bare: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write an adapter's folder as PEFT reads it, whole or not at all. Returns the folder.

    Args:
        directory: where; its parent must exist. Other files in it stay.
        config: what adapter_config.json says.
        rows: what is written.
        read: gives A and B of a row.
        bare: whether it is a GPTJModel's, whose names lack the head's prefix.
        overwrite: replace the adapter that the folder holds.

    Raises:
        WriteError: it holds one and `overwrite` is False, or it cannot be written.
        SchemaError: a value is not finite.
    """
    require_path(directory)
    own = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
    prefix = PREFIX + ("" if bare else BASE_PREFIX)
    with _AdapterDirectory(
        directory, overwrite=overwrite, fate=lambda name: "replace" if name in own else "keep"
    ) as output:
        arrays = [(spec, values) for row in rows for spec, values in zip((row.a, row.b), read(row), strict=True)]
        entries = [Entry(spec, values.dtype, prefix + spec.name) for spec, values in arrays]
        metadata = {"format": "pt"}
        size = len(pack_header([(entry.name, entry.dtype.name, entry.shape) for entry in entries], metadata))
        written = WrittenFile(output, ADAPTER_WEIGHTS_FILE, size, metadata)
        for entry, (spec, values) in zip(entries, arrays, strict=True):
            written.add(entry, [_bytes_of(spec, values)])
        written.finish()
        # Patterns keep their order, since the first that fits counts.
        text = json.dumps(dict(sorted(config.to_dict().items())), indent=2) + "\n"
        output.write_file(ADAPTER_CONFIG_FILE, text.encode())
        output.commit()
    return Path(directory)


class _AdapterDirectory(SharedDirectory):
    """The folder that an adapter is written to, beside what else is there."""

    last = ADAPTER_CONFIG_FILE


def _bytes_of(spec: TensorSpec, values: NDArray[Any]) -> memoryview:
    if values.shape != spec.shape:
        raise SchemaError("of another shape", where=spec.name, expected=spec.shape, found=values.shape)
    if not np.isfinite(values.astype(np.float64)).all():
        raise SchemaError("not finite", where=spec.name, hint="The training went wrong: nothing was written")
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
