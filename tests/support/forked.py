"""`python -m gptj`, many times: each in a process of its own, forked from one in which its modules are imported.

A start of Python with the imports of a command takes half a second, and of one with a framework five; a fork takes
milliseconds. The process that forks has run no command, so that each begins as a new one would: with its arguments, its
streams, its current folder, and the environment of now. What Python reads of the environment when it starts is that of
the first call.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTED = ("gptj_conversion.convert", "gptj_conversion.companions", "gptj.parity.fingerprint")
"""What commands import when they run, besides their own modules."""


def gptj(*arguments: object, cwd: Path | None = None, input: str = "") -> subprocess.CompletedProcess[str]:
    """What `python -m gptj ARGUMENTS` ends with and says; `input` is its stdin."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(input.encode())
        given.seek(0)
        words = [*map(str, arguments)]
        status = _server().run(words, str(cwd or Path.cwd()), [stream.fileno() for stream in (given, out, err)])
        for stream in (out, err):
            stream.seek(0)
        return subprocess.CompletedProcess(words, status, out.read().decode(), err.read().decode())


class _Server:
    """The process that forks, which ends with this one."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import forked; forked.serve()"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        atexit.register(self.close)

    def run(self, words: list[str], cwd: str, streams: list[int]) -> int:
        """The status of a command, negative where a signal ended it."""
        asked = json.dumps([words, cwd, dict(os.environ)]).encode()
        socket.send_fds(self.ours, [len(asked).to_bytes(8)], streams)
        self.ours.sendall(asked)
        answer = self.ours.recv(8, socket.MSG_WAITALL)
        if len(answer) < 8:
            raise RuntimeError("the process that forks has ended")
        return int.from_bytes(answer, signed=True)

    def close(self) -> None:
        self.ours.close()
        self.process.wait()


@functools.cache
def _server() -> _Server:
    return _Server()


def serve() -> None:
    """Fork a process for each command that is asked for. It returns in that process alone, once it has run."""
    from gptj.command import main

    for module in {*main.COMMANDS.values()} | {*IMPORTED}:
        importlib.import_module(module)
    gc.freeze()  # else a child that ends would look through, and so copy, all that it shares
    connection = socket.socket(fileno=int(sys.argv[1]))
    while True:
        head, streams, _, _ = socket.recv_fds(connection, 8, 3)
        if not head:
            return
        asked = connection.recv(int.from_bytes(head), socket.MSG_WAITALL)
        child = os.fork()
        if child == 0:
            connection.close()
            _become(*json.loads(asked), streams)
            return
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(child, 0)
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, signed=True))


def _become(words: list[str], cwd: str, environment: dict[str, str], streams: list[int]) -> None:
    """Run the command."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = cwd
    sys.argv = ["gptj", *words]
    runpy.run_module("gptj", run_name="__main__", alter_sys=True)
