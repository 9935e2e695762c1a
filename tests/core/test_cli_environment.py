"""What the command line sets for a framework before it is imported, and what it leaves alone."""

from __future__ import annotations

import os

import pytest

from gptj.command.main import gptj_command

CACHE = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def settled(monkeypatch):
    """The variables after a command has begun among these."""

    def begin(**variables: str) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", dict(variables))
        gptj_command.callback(debug=False)
        return os.environ

    return begin


def test_what_xla_compiled_is_kept_in_the_home_folder(settled, tmp_path):
    assert settled(HOME=str(tmp_path))[CACHE] == f"{tmp_path}/.cache/gptj/xla"
    assert list(tmp_path.iterdir()) == []


def test_a_users_own_values_stay(settled, tmp_path):
    own = {CACHE: "/elsewhere", "TF_CPP_MIN_LOG_LEVEL": "0"}
    assert own.items() <= settled(HOME=str(tmp_path), **own).items()


def test_nothing_is_kept_where_there_is_no_home(settled, tmp_path):
    found = settled(HOME=str(tmp_path / "missing"))
    assert CACHE not in found
    assert found["KERAS_BACKEND"] == "tensorflow"
