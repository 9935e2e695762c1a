"""Language models without lm_head.bias, in every format and dialect, and the same models with a bias of zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgpack
import numpy as np
from gptj_conversion.common.dialects import Dialect, spell
from gptj_conversion.convert import convert
from weight_changes import WEIGHTS, arrays, as_bin, sharded, store, write_bin, write_legacy

from gptj.checkpoint import write_checkpoint
from gptj.parity.revealing import revealing_config, revealing_fill

__all__ = ["FORMATS", "with_zeros", "without_bias"]

BIAS = "lm_head.bias"


def with_zeros(path: Path, **changes: Any) -> Path:
    """A whole model whose bias is zeros."""
    fill = revealing_fill(0)
    config = revealing_config(**changes)
    return write_checkpoint(
        path, config, lambda row: np.zeros(row.shape, np.float32) if row.name == BIAS else fill(row)
    )


def stored(dialect: Dialect) -> Callable[[Path], None]:
    """safetensors with a dialect's names and layout."""

    def make(folder: Path) -> None:
        spelt = {spell(name, dialect): array for name, array in arrays(folder).items() if name != BIAS}
        named = {s.name.replace("/", "." if dialect == "flax" else "/"): a.T if s.transposed else a
                 for s, a in spelt.items()}  # fmt: skip
        store(folder, named, form=dialect)

    return make


def pickled(write: Callable[..., None]) -> Callable[[Path], None]:
    return as_bin(lambda tensors: {name: array for name, array in tensors.items() if name != BIAS}, write=write)


def in_shards(folder: Path) -> None:
    stored("pt")(folder)
    sharded(folder)


def converted(to: str, name: str, cut: Callable[[Path], None]) -> Callable[[Path], None]:
    """Written by our own writer, without the bias."""

    def make(folder: Path) -> None:
        out = convert(folder, folder.parent / f"{folder.name}-{to}", to=to, fingerprint=False)
        (folder / WEIGHTS).unlink()
        (out / name).rename(folder / name)
        cut(folder / name)

    return make


def cut_msgpack(path: Path) -> None:
    tree = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    del tree["lm_head"]["bias"]
    if not tree["lm_head"]:
        del tree["lm_head"]
    path.write_bytes(msgpack.packb(tree))


def cut_h5(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        group = file["lm_head"]
        names = [name for name in group.attrs["weight_names"] if b"bias" not in np.bytes_(name)]
        [bias] = [name for name in group.attrs["weight_names"] if b"bias" in np.bytes_(name)]
        del group[bias]
        group.attrs["weight_names"] = np.array(names, dtype="S99")


FORMATS: dict[str, Callable[[Path], None]] = {
    "safetensors": stored("pt"),
    "safetensors in shards": in_shards,
    "safetensors of Flax": stored("flax"),
    "safetensors of TensorFlow": stored("tf"),
    "bin": pickled(write_bin),
    "bin of before 1.6": pickled(write_legacy),
    "flax": converted("flax", "flax_model.msgpack", cut_msgpack),
    "tf": converted("tf", "tf_model.h5", cut_h5),
}


def without_bias(path: Path, form: str, **changes: Any) -> Path:
    """The model of `with_zeros` in this format, without its bias."""
    FORMATS[form](with_zeros(path, **changes))
    (path / "manifest.json").unlink()
    return path
