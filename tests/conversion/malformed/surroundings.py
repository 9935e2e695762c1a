"""What surrounds a command: odd paths, numbers out of range, signals, streams, a folder and memory that are not there.

Most cases run the command in this process. A case with `process` needs one of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
from checkpoint_samples import write_sample

from gptj.backends import BACKENDS
from gptj.backends.surroundings import check_surroundings
from gptj.command.main import gptj_command
from gptj.errors import GPTJError
from malformed import Malformed

TITLE = "surroundings of a command"


def command(*words: str) -> None:
    """A door: a command in this process, whose misuse is an error like others. It takes PyTorch for installed."""
    there = mock.patch.object(importlib.util, "find_spec", lambda name, *rest: name)
    try:
        with there:
            gptj_command.main([*words], standalone_mode=False)
    except click.ClickException as error:
        raise GPTJError(f"{error.format_message()}") from None


@contextlib.contextmanager
def inside(folder: Path, *, gone: bool = False) -> Iterator[None]:
    """While this is open, the folder is the current one; with `gone` it is removed as soon as it is."""
    before = Path.cwd()
    os.chdir(folder)
    if gone:
        folder.rmdir()
    try:
        yield
    finally:
        os.chdir(before)


def place(folder: Path) -> None:
    """A checkpoint and a FIFO."""
    write_sample(folder / "good")
    os.mkfifo(folder / "fifo")


def case(what: str, words: tuple[str, ...], names: str) -> Malformed:
    def door(folder: Path) -> None:
        with inside(folder):
            command(*words)

    return Malformed(what, place, door, names)


PATHS = {
    "empty": ("", "an empty path"),
    "a NUL": ("a\0b", "a NUL"),
    "a name of 5,000 characters": ("n" * 5000, "too long"),
    "a path of 6,000 characters": ("a/" * 3000, "too long"),
    "a ~user that the shell has left": ("~nobody/x", "~nobody"),
    "a ~ that the shell has left": ("~", "~"),
}
"""Refused as no path, whatever reads it."""

ABSENT = {
    "a line break": ("a\nb", "a\\nb"),
    "a byte that is not UTF-8": ("a\udcffb", "a\\udcffb"),
    "an escape sequence": ("a\x1b[31mb", "a\\x1b[31mb"),
    "a device": ("/dev/zero", "/dev/zero"),
    "the process's memory": ("/proc/self/mem", "/proc/"),
    "a FIFO": ("fifo", "fifo"),
    "below a device": ("/dev/null/x", "/dev/null"),
}
"""Names of nothing that can be read."""

READERS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "convert SRC": lambda path: ("convert", path, "out"),
    "convert --config": lambda path: ("convert", "good", "out", "--config", path),
    "convert --tokenizer": lambda path: ("convert", "good", "out", "--tokenizer", path),
    "inspect": lambda path: ("inspect", path),
    "inspect --config": lambda path: ("inspect", "good", "--config", path),
    "verify": lambda path: ("verify", path),
    "parity": lambda path: ("parity", path),
    "generate DIR": lambda path: ("generate", path, "x"),
    "generate --prompts": lambda path: ("generate", "good", "--prompts", path),
    "generate --assistant": lambda path: ("generate", path, "x", "--assistant", path),
    "init --config": lambda path: ("init", "out", "--config", path),
}
WRITERS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "convert DST": lambda path: ("convert", "good", path),
    "convert DST, to bin": lambda path: ("convert", "good", path, "--to", "bin"),
    "init": lambda path: ("init", path),
    "demo --keep": lambda path: ("demo", "--keep", path),
}


def _paths() -> Iterator[Malformed]:
    for option, words in (READERS | WRITERS).items():
        for what, (path, names) in PATHS.items():
            yield case(f"{option}: {what}", words(path), names)
    for option, words in READERS.items():
        for what, (path, names) in ABSENT.items():
            yield case(f"{option}: {what}", words(path), names)
    for option, words in WRITERS.items():
        for what in ("a device", "the process's memory", "a FIFO", "below a device"):
            path, names = ABSENT[what]
            yield case(f"{option}: {what}", words(path), names)
    for weights, names in (("", "an empty path"), ("a\0b", "a NUL"), ("n" * 5000, "too long"), ("..", "weights")):
        for words in (("convert", "good", "out"), ("inspect", "good"), ("verify", "good"), ("generate", "good", "x")):
            yield case(f"{words[0]} --weights {weights[:9]!r}", (*words, "--weights", weights), names)


NUMBERS = {
    "--seed": ("-1", str(2**64), "1" + "0" * 40, "9" * 5000, "1.5", "nan", "", "0x10"),
    "--max-new-tokens": ("-1", "0", str(2**63), "1" + "0" * 40, "9" * 5000),
    "--temperature": ("-1", "nan", "inf", "1e400"),
    "--top-k": ("-1", str(2**64)),
    "--top-p": ("-1", "0", "2", "nan", "inf"),
    "--min-p": ("-1", "2", "nan"),
    "--num-beams": ("0", "-1", str(2**31), "1" + "0" * 40),
    "--repetition-penalty": ("0", "-1", "nan", "inf"),
    "--batch-size": ("0", "-1"),
    "--token-ids": ("-1", "1.5", str(2**63), str(2**64), "1" + "0" * 40, "9" * 5000, "999999", "1 " + str(2**63)),
}
WHOLE = ("--seed", "--max-new-tokens", "--token-ids")


def _numbers() -> Iterator[Malformed]:
    for option, values in NUMBERS.items():
        prompt = () if option == "--token-ids" else ("--token-ids", "1 2")
        for value in values:
            words = ("generate", "good", *prompt, "--backend", "pt", option, value)
            field = option.lstrip("-").replace("-", "_")
            field = {"token_ids": "input_ids[0]", "batch_size": option}.get(field, field)
            # What is no whole number at all is refused while the line is read, under the option's name.
            names = option if option in WHOLE and not re.fullmatch(r"[-\d ]{1,4299}", value) else field
            yield case(f"generate {option} {value[:25]}", words, names)
    for value in ("nan", "inf", "-inf", "0", "-1", "1e-9", "1e10", "1e300", "1e400"):
        yield case(f"--max-shard-gb {value}", ("convert", "good", "out", "--max-shard-gb", value), "--max-shard-gb")
    for value in ("0", "-1", "1" + "0" * 40, "9" * 5000, "1.5"):
        words = ("convert", "good", "out", "--to", "mesh", "--shards", value)
        yield case(f"--shards {value[:25]}", words, "shards")
    for name in ("init", "parity"):
        for value in ("-1", "1.5", "nan", "9" * 5000):
            yield case(
                f"{name} --seed {value[:25]}", (name, "good" if name == "parity" else "out", "--seed", value), "--seed"
            )
    for value in (str(2**63), str(2**64), "1" + "0" * 40):
        yield case(f"parity --seed {value[:25]}", ("parity", "good", "--seed", value), "--seed")


SETTINGS = {
    "self=1": "self", "extra=1": "extra", "extra={}": "extra", "=1": "''", "top_k": "top_k", "cls=1": "cls",
    "fields=1": "fields", "__class__=1": "__class__", "_given=1": "_given", "seed=1": "seed", "replace=1": "replace",
    "top_k=NaN": "top_k", "top_k=1e400": "top_k", "top_k=" + "9" * 5000: "top_k", "top_k=" + "[" * 100_000: "top_k",
    'stop_strings="\\ud800"': "stop_strings", "stop_strings=\udcff": "stop_strings", 'stop_strings=["a", "\\udfff"]':
    "stop_strings", "do_sample=1": "do_sample", "max_new_tokens=true": "max_new_tokens", "\udcff=1": "\\udcff",
}  # fmt: skip


def _settings() -> Iterator[Malformed]:
    shared = ("generate", "good", "--token-ids", "1 2", "--backend", "pt")
    for setting, names in SETTINGS.items():
        yield case(f"--set {setting[:25]!a}", (*shared, "--set", setting), names)
    for stop in ("", "\udcff"):
        yield case(f"--stop {stop!a}", (*shared, "--stop", stop), "stop_strings")


# ---- a folder and memory that are not there


def _gone() -> Iterator[Malformed]:
    def removed(*words: str, names: str) -> Malformed:
        def door(folder: Path) -> None:
            (folder / "gone").mkdir()
            with inside(folder / "gone", gone=True):
                command(*(word.replace("GOOD", str(folder / "good")) for word in words))

        return Malformed(f"a current folder that is gone: {' '.join(words)}", place, door, names)

    yield removed("inspect", "x", names="x: no such")
    yield removed("inspect", ".", names="'.': ")
    yield removed("convert", "GOOD", "out", names="out")
    yield removed("convert", "x", "out", names="x: no such")
    yield removed("init", "out", names="out")
    yield removed("init", ".", names="'.'")
    yield removed("verify", "x", names="x: no such")
    yield removed("demo", "--keep", "out", names="out")
    for backend in BACKENDS:
        words = ("generate", "GOOD", "--token-ids", "1 2", "--max-new-tokens", "2", "--backend", backend)
        yield removed(*words, names=f"gptj.{backend}: cannot be loaded from a current folder that is gone")
    yield removed("parity", "GOOD", "--backends", "pt", names="current folder that is gone")
    for option in (("--html", "x.html"), ("--json", "x.json"), ("--junit", "x.xml"), ("--markdown", "x.md")):
        yield removed("parity", "GOOD", "--backends", "pt", *option, names="current folder")


def starved(backend: str) -> Malformed:
    """A framework that cannot be loaded in a limit of 300 MB of address space: its trial dies, and not this process."""

    def door(folder: Path) -> None:
        with mock.patch("gptj.backends.surroundings.address_limit", lambda: 300_000_000):
            check_surroundings(backend)

    return Malformed(f"an address space of 300 MB, {backend}", lambda folder: None, door, "address space")


# ---- what needs a process


AT_IMPORT = """
import os, signal, sys
name, number, *words = sys.argv[1:]
class Finder:
    def find_spec(self, module, path=None, target=None):
        if module == name:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Finder())
from gptj.__main__ import run
sys.argv = ["gptj", *words]
run()
"""


def interrupted(module: str, number: int, *words: str) -> Malformed:
    """A signal that comes while a module is imported: it ends the process, which says nothing."""

    def door(folder: Path) -> None:
        program = [sys.executable, "-c", AT_IMPORT, module, str(int(number)), *words]
        done = subprocess.run(program, capture_output=True, text=True, cwd=folder)
        assert done.returncode in (-number, 128 + number), f"status {done.returncode}: {done.stderr}"
        assert (done.stdout + done.stderr).strip() == ""
        raise GPTJError(f"ended by {signal.Signals(number).name}")

    return Malformed(f"signal {number} at the import of {module}", place, door, "ended by SIG")


def shell(what: str, line: str, names: str) -> Malformed:
    """A line that a shell runs, and of which one line is said on stderr."""

    def door(folder: Path) -> None:
        words = line.replace("gptj ", f"{shlex.quote(sys.executable)} -m gptj ")
        done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, cwd=folder, input="")
        assert done.returncode == 1 and done.stderr.count("\n") == 1, f"status {done.returncode}: {done.stderr[-300:]}"
        raise GPTJError(done.stderr)

    return Malformed(what, place, door, names)


def _processes() -> Iterator[Malformed]:
    for number in (signal.SIGINT, signal.SIGTERM):
        for module in ("gptj.command.main", "gptj.command.convert", "gptj_conversion.convert"):
            yield interrupted(module, number, "inspect", "good")
        yield interrupted("gptj.command.opened_model", number, "generate", "good", "x")
    yield shell("stdout full", "gptj inspect good >/dev/full", "stdout")
    yield shell("stdout closed", "gptj init out2 >&-", "stdout")
    yield shell("stdin that cannot be read", "gptj generate good --prompts - 0>written", "stdin")
    for kilobytes in (50_000, 100_000, 165_000):
        yield shell(f"{kilobytes} kB of address space", f"ulimit -v {kilobytes}; gptj inspect good", "memory")


CASES = [*_paths(), *_numbers(), *_settings(), *_gone(), *map(starved, BACKENDS), *_processes()]
