"""A repository id is looked up in the Hugging Face cache, offline; a path that exists never is."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gptj.checkpoint import write_checkpoint
from gptj.errors import MissingFileError
from gptj.hub import locate
from gptj.parity.revealing import revealing_config, revealing_fill

REVISION = "0123456789abcdef0123456789abcdef01234567"

LOAD = """
from gptj.pretrained import prepare
print(prepare("causal_lm", "someone/gptj-tiny").checkpoint.directory)
"""


@pytest.fixture
def cache(tmp_path):
    """A cache as the hub's client lays it out: blobs, and a snapshot of links to them."""
    repository = tmp_path / "hub" / "models--someone--gptj-tiny"
    written = write_checkpoint(tmp_path / "written", revealing_config(n_layer=1), revealing_fill(0))
    snapshot, blobs = repository / "snapshots" / REVISION, repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(written.iterdir()):
        (blobs / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub"


def run(code, cache, cwd):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PATH": "", "HOME": str(cwd)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd)


def test_a_repository_is_opened_from_the_cache_offline(cache, tmp_path):
    done = run(LOAD, cache, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"models--someone--gptj-tiny/snapshots/{REVISION}")


def test_a_repository_that_the_cache_lacks_is_named(tmp_path):
    done = run(LOAD, tmp_path / "empty", tmp_path)
    assert done.returncode == 1 and "MissingFileError: someone/gptj-tiny: no such folder" in done.stderr


def test_without_the_client_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingFileError, match=r'pip install "gptj-multibackend\[hub\]"'):
        locate("someone/gptj-tiny")


@pytest.mark.parametrize("name", ["here", "a/b/c", "/a/b", "../a", "./a", "a b/c"])
def test_what_is_no_repository_id_is_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(name) == Path(name)


def test_a_folder_that_exists_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "gptj-tiny").mkdir(parents=True)
    assert locate("someone/gptj-tiny") == Path("someone/gptj-tiny")
