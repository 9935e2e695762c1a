"""Every error that gptj raises on purpose, in one small tree.

    GPTJError
    ├── FormatError (ValueError)            the bytes of a file are not what its format says
    │   └── MissingFileError (FileNotFoundError)   a file or folder that must be there is not
    ├── SchemaError (ValueError)            tensors are missing, unexpected, misshapen or of a wrong dtype
    ├── ConfigError (ValueError)            a field of config.json or generation_config.json breaks its rule
    ├── TokenizerError (ValueError)         tokenizer files are incomplete or contradict themselves
    ├── InputError (ValueError)             an argument of a call: token ids, masks, positions, options
    ├── UnsafeFileError (ValueError)        a file would run code, or reach outside its folder
    ├── LimitError (MemoryError)            more tensors, bytes or nesting than is allowed or than there is
    ├── WriteError (OSError)                an output could not be written; what stood there still stands
    ├── ParityError (AssertionError)        two backends, or a backend and the oracle, disagree
    ├── BackendError (ImportError)          the backend asked for is unknown or not installed
    └── BackendAttributeError (AttributeError)   a class of a backend, asked of gptj where none can be had

Each is also the built-in exception that a caller would expect, so code that knows nothing of gptj still
catches it. A message is one line that says where, what was expected, what was found and what to do; the
same facts are attributes, and `as_dict` gives them to `--json`.

What is odd in a file and changes nothing here is no error but a `CheckpointWarning`, in the same words (`warn_of`).
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = [
    "DISTRIBUTION",
    "BackendAttributeError",
    "BackendError",
    "CheckpointWarning",
    "ConfigError",
    "FormatError",
    "GPTJError",
    "InputError",
    "LimitError",
    "MissingFileError",
    "ParityError",
    "ProcessError",
    "SchemaError",
    "TokenizerError",
    "UnsafeFileError",
    "WriteError",
    "counted",
    "harmless",
    "install_line",
    "install_one_of",
    "is_out_of_memory",
    "naming_file",
    "requirement",
    "shown",
    "warn_of",
]


DISTRIBUTION = "gptj-multibackend"
"""The name that pip knows us by; `[project] name` in pyproject.toml."""


def requirement(*extras: str) -> str:
    """The requirement for pip, in quotes, since a shell reads brackets.

    >>> requirement("pt", "hub")
    '"gptj-multibackend[pt,hub]"'
    """
    return f'"{DISTRIBUTION}[{",".join(extras)}]"'


def install_line(*extras: str) -> str:
    """The command that installs extras.

    >>> print(install_line("vocab"))
    pip install "gptj-multibackend[vocab]"
    """
    return f"pip install {requirement(*extras)}"


def install_one_of(extras: Iterable[str]) -> str:
    """The advice to one who needs any of several extras, and has none.

    >>> install_one_of(["pt", "tf"])
    'Install one: pip install "gptj-multibackend[pt]" or "gptj-multibackend[tf]"'
    """
    *most, last = map(requirement, extras)
    return f"Install one: pip install {', '.join(most)} or {last}"


def shown(value: object, *, longest: int = 200) -> str:
    """`value` as it may be printed: quoted where it is text, control characters escaped, cut at `longest`."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    text = ascii(value) if isinstance(value, str | bytes) else _text(value)
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


# The characters that reverse what follows them: a text could show another than it is (bidirectional overrides).
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def harmless(text: str) -> str:
    """`text` as a terminal may show it: characters that would steer it are escaped, line breaks and tabs stay.

    Those are C0 and C1 controls, ESC, the bell and the carriage return among them, line separators, and what turns
    the direction of writing. Joiners inside emoji and letters of every script stay as they are.

    >>> print(harmless("red: " + chr(27) + "[31m, naïve 🤗"))
    red: \\x1b[31m, naïve 🤗
    """
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if _steers(c) else c for c in text)


def _steers(c: str) -> bool:
    return (unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in "\n\t") or c in _REORDERING


def _text(value: object) -> str:
    """`str(value)`; integers of more digits than Python prints are described instead."""
    try:
        return str(value)
    except (ValueError, RecursionError):
        bits = f" of {value.bit_length():,} bits" if isinstance(value, int) else ""
        return f"{type(value).__name__}{bits}"


def _printable(text: str) -> str:
    """`text` with lone surrogates and control characters escaped, so that any terminal can print it, in one line."""
    escaped = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in escaped)


class GPTJError(Exception):
    """The root of the tree. `str(error)` is the whole message.

    Args:
        problem: what is wrong, a sentence without its full stop.
        file: the file or folder that it is about.
        where: the tensor, field, argument or line inside it.
        expected, found: the two values that disagree, already fit to print.
        hint: what the reader can do about it.
    """

    ag_pass_through = True  # TensorFlow's autograph leaves an error of this name alone, and else replaces it by its own

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else os.fspath(file)
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        place = ": ".join(str(p) for p in (self.file, self.where) if p is not None)
        text = f"{place}: {self.problem}" if place else self.problem
        facts = [
            f"{word} {_text(value)}"
            for word, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if facts:
            text += f" ({', '.join(facts)})"
        if self.hint:
            text += f". {self.hint}"
        return _printable(text)

    def __str__(self) -> str:
        return self._message()

    @property
    def code(self) -> str:
        """The class's name, which is how the command line and `--json` call the error."""
        return type(self).__name__

    def as_dict(self) -> dict[str, str | None]:
        """The error's facts as JSON-ready text: code, message, file, where, expected, found, hint."""
        facts = {key: None if value is None else _printable(_text(value)) for key, value in self.facts().items()}
        return {"code": self.code, "message": str(self), **facts}

    def facts(self, **others: Any) -> dict[str, Any]:
        """Its keyword arguments, with `others` in place of some: for an error or a warning of the same."""
        names = ("file", "where", "expected", "found", "hint")
        return {**{name: getattr(self, name) for name in names}, **others}


@contextlib.contextmanager
def naming_file(file: str | os.PathLike[str] | None) -> Iterator[None]:
    """Let an error that is raised inside, and names no file yet, name this one."""
    try:
        yield
    except GPTJError as error:
        if error.file is None and file is not None:
            error.file = os.fspath(file)
        raise


class FormatError(GPTJError, ValueError):
    """The bytes of a file are not what its format says."""


class MissingFileError(FormatError, FileNotFoundError):
    """A file or folder that must be there is not."""


class SchemaError(GPTJError, ValueError):
    """Tensors are missing, unexpected, misshapen or of a wrong dtype. All of them are listed at once."""


class ConfigError(GPTJError, ValueError):
    """A field of config.json or generation_config.json breaks its rule."""


class TokenizerError(GPTJError, ValueError):
    """Tokenizer files are incomplete or contradict themselves."""


class InputError(GPTJError, ValueError):
    """An argument of a call breaks its rule: token ids, masks, positions, lengths, options."""


class UnsafeFileError(GPTJError, ValueError):
    """A file would run code when it is read, or reach outside its folder."""


class LimitError(GPTJError, MemoryError):
    """More tensors, bytes, dimensions or nesting than is allowed, or more memory than there is."""


class WriteError(GPTJError, OSError):
    """An output could not be written; what stood at its place still stands there."""


class ParityError(GPTJError, AssertionError):
    """Two backends, or a backend and the oracle, disagree by more than the tolerance."""


class BackendError(GPTJError, ImportError):
    """The backend asked for is unknown, or its framework is not installed."""


class ProcessError(GPTJError, RuntimeError):
    """Another of the processes that compute one model together ended, or could not be reached."""


class BackendAttributeError(GPTJError, AttributeError):
    """A class of a backend, asked of `gptj` itself, where no backend can be had: `hasattr` says no.

    No class of Python's can be an AttributeError and an ImportError; `from gptj import ...` raises the BackendError.
    """


class CheckpointWarning(UserWarning):
    """Something in a checkpoint's files is odd, or was left out, and changes nothing of what the model computes."""


def warn_of(
    problem: str,
    *,
    file: str | os.PathLike[str] | None = None,
    where: str | None = None,
    expected: object = None,
    found: object = None,
    hint: str | None = None,
    category: type[Warning] = CheckpointWarning,
) -> None:
    """Warn of an oddity, in the words of an error (see `GPTJError`), at the caller's line outside of this package."""
    _warn(str(GPTJError(problem, file=file, where=where, expected=expected, found=found, hint=hint)), category)


def warn_again(caught: Iterable[warnings.WarningMessage]) -> None:
    """Warn of what `warnings.catch_warnings(record=True)` kept back, at the caller's line outside of this package."""
    for one in caught:
        _warn(str(one.message), one.category)


def _warn(message: str, category: type[Warning]) -> None:
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("gptj", "gptj_conversion"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: Python's, or a framework's own, which has no common class.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    (True, True)
    >>> is_out_of_memory(ValueError("of another kind"))
    False
    """
    if isinstance(error, MemoryError):
        return True
    named = type(error).__name__ in ("OutOfMemoryError", "ResourceExhaustedError")  # PyTorch's, TensorFlow's
    said = "RESOURCE_EXHAUSTED", "can't allocate memory"  # jax', PyTorch's on a host
    return named or (isinstance(error, RuntimeError) and any(words in str(error) for words in said))


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural but for one.

    >>> counted(1, "file"), counted(1_200, "file")
    ('1 file', '1,200 files')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The sentence that names the one of `known` which `name` is nearly spelt as, None where none is.

    >>> did_you_mean("paddin", ("padding", "max_length"))
    'Did you mean padding?'
    """
    close = difflib.get_close_matches(name, sorted({*known}), n=1, cutoff=0.7)
    return f"Did you mean {close[0]}?" if close else None
