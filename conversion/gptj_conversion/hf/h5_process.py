"""Reads where the datasets of HDF5 files lie, by libhdf5 in a process of its own with limits; see `h5_survey`.

A file that makes libhdf5 loop, allocate or crash ends that process, and is refused by name. Memory and processor time
are limited by the system where it can (Linux, and most of it on macOS); everywhere an answer that does not come in
time ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

from gptj import errors
from gptj.errors import FormatError, GPTJError, LimitError, shown, warn_of
from gptj_conversion.hf import h5_survey

__all__ = ["H5Process"]

MEMORY_BYTES = 256 * 2**20
"""Beyond h5py's own; of a file of 285 tensors libhdf5 keeps less than a megabyte."""

PROCESSOR_S = 4
"""For one file; the 285 tensors of GPT-J-6B take 0.1 s."""

LONGEST_WAIT_S = 60.0
"""For one answer, however busy the machine; a hang takes processor time, which is limited much sooner."""


class H5Process:
    """libhdf5 in a process of its own, while this is open. It is started when it is first needed, and after a death.

    >>> with H5Process() as process:                        # doctest: +SKIP
    ...     places = process.survey(Path("tf_model.h5"))
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def survey(self, path: Path) -> dict[str, dict[str, Any]]:
        """For each dataset, by its path in the file: dtype, shape, offset, nbytes and swapped.

        Raises:
            FormatError, SchemaError, UnsafeFileError, LimitError: the file breaks a rule.
        """
        answer = self._ask(path)
        if "arrays" in answer:
            if answer["loose"]:
                begin, end = answer["loose"][0]
                warn_of(
                    f"bytes {begin} to {end} lie beside a dataset and belong to none, but are not zero",
                    file=path,
                    hint="What was deleted from a file leaves such, and so does a damaged address",
                )
            return dict(answer["arrays"])
        facts = answer["refused"]
        kind: type[GPTJError] = getattr(errors, facts.pop("kind"))
        where = facts.pop("where", None)
        raise kind(facts.pop("problem"), file=path, where=None if where is None else shown(where)[1:-1], **facts)

    def _ask(self, path: Path) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(os.fsdecode(path.absolute())) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=LONGEST_WAIT_S)
        except queue.Empty:
            self.close()
            raise FormatError("malformed HDF5: it cannot be read in reasonable time", file=path) from None
        except BaseException as error:  # an interrupt among them
            self.close()
            if not isinstance(error, BrokenPipeError):
                raise
            line = ""
        if line.endswith("\n"):  # else it died while it wrote
            return dict(json.loads(line))
        status = process.wait()
        self.close()
        raise LimitError(
            "malformed HDF5: libhdf5 takes time or memory without end, or crashes over it",
            file=path,
            expected=f"at most {PROCESSOR_S} s and {MEMORY_BYTES // 2**20} MB",
            found=f"the reader's exit status {status}",
            hint="Fetch the file again, or write it anew in the framework that made it",
        )

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            arguments = json.dumps([sys.path, MEMORY_BYTES, PROCESSOR_S])
            program = Path(h5_survey.__file__).read_text(encoding="utf-8")
            # Given as text, since a file that is run by its path finds the modules beside it before the library's.
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                errors="surrogateescape",
            )
            self._answers = queue.Queue()
            threading.Thread(target=_pass_on, args=(self._process, self._answers), daemon=True).start()
        return self._process


def _pass_on(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    """Hand on each line of the process, and an empty one at its end."""
    assert process.stdout is not None
    with contextlib.suppress(OSError, ValueError):
        for line in process.stdout:
            answers.put(line)
    answers.put("")
