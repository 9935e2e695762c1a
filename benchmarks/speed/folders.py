"""The weights on disk: one folder of random values as gptj writes it, and of it a copy for each who wants another form.

Copies are made once and kept; each is written beside its place and renamed, so an interrupted one is made anew. The
values are such that who drops, swaps or misreads a tensor writes other tokens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.speed.shapes import Shape
from gptj.checkpoint import write_checkpoint
from gptj.config.schema import TensorSpec
from gptj.parity.revealing import revealing_tensor

ROOT = Path(__file__).parents[2]


class Folders:
    """A shape's folders.

    Args:
        root: where they are, or will be: `root/M/folder`, `root/M/ctranslate2-int8`, ...
        shape: whose.
        peers_python, openvino_python: interpreters that have the peers.
    """

    def __init__(self, root: Path, shape: Shape, *, peers_python: Path, openvino_python: Path) -> None:
        self.root, self.shape = root / shape.name, shape
        self.pythons = {"ctranslate2": peers_python, "openvino": openvino_python}

    def find(self, copy: str) -> Path:
        """The copy's folder, made if it is not there.

        Raises:
            subprocess.CalledProcessError: it could not be made.
        """
        if copy == self.shape.dtype:
            copy = "folder"
        place = self.root / copy
        if not place.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            partial = self.root / f"{copy}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self._make(copy, partial)
            partial.rename(place)
        return place

    def _make(self, copy: str, place: Path) -> None:
        if copy == "folder":
            write_checkpoint(place, self.shape.config, lively_tensor, dtype=self.shape.dtype)
            return
        source = self.find("folder")
        kind, _, dtype = copy.partition("-")
        if kind in self.pythons:
            code = "import sys; from benchmarks.speed import engines; " + (
                f"engines.{ {'ctranslate2': 'CTranslate2', 'openvino': 'OpenVINO'}[kind] }"
                ".make_copy(sys.argv[1], sys.argv[2], sys.argv[3] or None)"
            )
            command = [str(self.pythons[kind]), "-c", code, str(source), str(place), dtype]
        else:
            options = ["--dtype", "bfloat16"] if copy == "bfloat16" else ["--to", copy]
            command = [sys.executable, "-m", "gptj", "convert", str(source), str(place), *options, "--no-fingerprint"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)


def lively_tensor(spec: TensorSpec) -> NDArray[np.float32]:
    """A tensor's random values: the parity check's, with a louder embedding and a softer bias of the head.

    So the next token hangs on the last as much as on the blocks; as they are, one token wins everywhere.
    """
    values = revealing_tensor(spec, seed=0)
    if spec.kind == "embedding":
        return values * np.float32(4)
    return values * np.float32(0.2) if spec.name == "lm_head.bias" else values


def forget_pages(folder: Path) -> None:
    """Have the system drop the files from its page cache, so that the next reader waits for the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # only clean pages can be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
