"""The standard streams of the command line: what each does where it is closed, full, or cannot spell a character.

A stdout that cannot be written is an error. A stderr that cannot is none: nobody is there to be told, and the work and
the exit status stay what they are.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

__all__ = ["StdoutError", "abandon_stdout", "prepare_streams", "stdout_apart"]


def prepare_streams() -> None:
    """Let stdout raise a `StdoutError` and stderr nothing, and leave no descriptor of the three free."""
    _hold_descriptors()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Stdout(sys.stdout)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  (for as long as the process lives)
    elif isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Stderr(sys.stderr)


def _hold_descriptors() -> None:
    """Let the null device stand where 0, 1 or 2 is closed.

    The next file that is opened would be given the number, and what a library prints would go into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free: this one


def abandon_stdout() -> None:
    """Send stdout nowhere: what is left in its buffer would fail once more when Python ends.

    It is flushed there at once. Python 3.13 would do it when this module's names are gone already.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(OSError, ValueError, StdoutError):
        sys.stdout.close()


@contextlib.contextmanager
def stdout_apart() -> Iterator[None]:
    """While this is open, what C++ prints on stdout goes to stderr: gloo says there whom it is connected to."""
    before = sys.stdout
    try:
        number = before.fileno()
    except (AttributeError, OSError, ValueError):  # it is no descriptor's
        yield
        return
    before.flush()
    with os.fdopen(os.dup(number), "w", encoding=before.encoding, errors=before.errors) as stream:
        os.dup2(2, number)
        sys.stdout = ours = _Stdout(stream)
        try:
            yield
        finally:
            sys.stdout = before
            os.dup2(stream.fileno(), number)
            with contextlib.suppress(StdoutError, BrokenPipeError):
                ours.flush()
            ours.detach()


class StdoutError(Exception):
    """Stdout could not be written."""


class _Stdout(io.TextIOWrapper):
    """Stdout, whose errors are told from those of files; a reader who has left stays a BrokenPipeError."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering
        )

    def write(self, text: str) -> int:
        """As in TextIOWrapper."""
        with _naming_stdout():
            return super().write(text)

    def flush(self) -> None:
        """As in TextIOWrapper. Python 3.13 asks for it once more at its end, when this module's names are gone."""
        if _naming_stdout is not None:
            with _naming_stdout():
                super().flush()


@contextlib.contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StdoutError(error.strerror or str(error)) from None


class _Stderr(io.TextIOWrapper):
    """Stderr, which drops what cannot be written."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering
        )

    def write(self, text: str) -> int:
        """As in TextIOWrapper."""
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """As in TextIOWrapper."""
        with contextlib.suppress(OSError):
            super().flush()
