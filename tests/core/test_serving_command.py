"""What `gptj serve` refuses before it opens anything."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gptj import backends
from gptj.command.serve import named_folders, serve
from gptj.errors import BackendError, InputError
from gptj.serving.server import Server, listen


def test_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "missing_from", lambda extra: ("starlette",) if extra == "serve" else ())
    result = CliRunner().invoke(serve, [str(tmp_path)])
    assert isinstance(result.exception, BackendError)
    assert "starlette" in str(result.exception)
    assert backends.install_line("serve") in str(result.exception)


@pytest.mark.parametrize("key", ["", "  ", "a\nb", "sésame"])
def test_a_key_that_nobody_can_send_is_refused(tmp_path, key):
    result = CliRunner().invoke(serve, [str(tmp_path), "--api-key", key])
    assert result.exit_code == 2 and "--api-key" in result.output


@pytest.mark.parametrize("key", ["", "  ", "sésame"])
def test_so_is_one_in_the_variable_which_would_let_everybody_ask(tmp_path, key):
    result = CliRunner().invoke(serve, [str(tmp_path)], env={"GPTJ_API_KEY": key})
    assert result.exit_code == 2 and "GPTJ_API_KEY" in result.output


@pytest.mark.parametrize(
    "given",
    [("--host", " "), ("--name", ""), ("--name", "a\nb"), ("--cors", ""), ("--cors", "example.com"),
     ("--cors", "http://example.com/"), ("--cors", "http://Example.com")],
)  # fmt: skip
def test_what_would_reach_nobody_or_everybody_is_refused(tmp_path, given):
    result = CliRunner().invoke(serve, [str(tmp_path), *given])
    assert result.exit_code == 2 and f"{given[0]}" in result.output


@pytest.mark.parametrize(
    "said", [["one"], ["=a"], ["one="], ["one=a", "one=b"], ["a/b=c"], [" one=a"], ["x" * 101 + "=a"]]
)
def test_an_adapter_has_a_name_and_a_folder(said):
    with pytest.raises(click.UsageError, match=r"--adapter: (expected NAME=DIR|a name is of letters)"):
        named_folders(said)
    assert named_folders(["one=a=b", "two=c"]) == {"one": Path("a=b"), "two": Path("c")}


@pytest.mark.parametrize("option", ["--timeout", "--drain"])
@pytest.mark.parametrize("seconds", ["nan", "inf", "0"])
def test_seconds_are_finite(tmp_path, option, seconds):
    result = CliRunner().invoke(serve, [str(tmp_path), option, seconds])
    assert result.exit_code == 2 and option in result.output


def test_a_signal_that_follows_the_line_at_once_ends_it_in_order():
    ends = []
    server = Server(None, close=ends.append)
    server.serve_on(listen("127.0.0.1", 0), ready=lambda: signal.raise_signal(signal.SIGTERM))
    assert ends == [None] and not server.was_forced


def test_the_drain_is_rounded_up():
    assert Server(None, close=print, drain_s=1.5).config.timeout_graceful_shutdown == 2


def test_the_key_may_come_by_a_variable_which_the_help_names():
    assert re.search(r"env\s+var:\s+GPTJ_API_KEY", CliRunner().invoke(serve, ["--help"]).output)


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=f"127.0.0.1:{taken.getsockname()[1]} .*--port 0"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match=r"192\.0\.2\.1:0 .*an address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(InputError, match="nowhere"):
        listen("nowhere.invalid", 0)
