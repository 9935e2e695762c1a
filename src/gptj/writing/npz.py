"""NumPy's .npz, written as np.savez does, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.errors import (
    InputError,
)
from gptj.reading.npz import DTYPES, npy_header
from gptj.writing.output_file import whole_file
from gptj.writing.stored_zip import StoredZipWriter

__all__ = ["write_npz"]


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by their names, as np.savez does; the file appears whole or not at all.

    Raises:
        InputError: an array is none of plain numbers.
        WriteError: it could not be written.
    """
    native = {}
    for name, array in arrays.items():
        plain = np.asarray(array, order="C")
        native[name] = plain.astype(plain.dtype.newbyteorder("="), copy=False)
        if native[name].dtype not in DTYPES.values():
            raise InputError("not an array of plain numbers", file=path, where=name, found=str(plain.dtype))
    with whole_file(path) as write:
        archive = StoredZipWriter(write)
        for name, plain in native.items():
            data = plain.reshape(-1).view(np.uint8).data
            archive.add(f"{name}.npy", npy_header(plain.dtype, plain.shape), data)
        archive.finish()
