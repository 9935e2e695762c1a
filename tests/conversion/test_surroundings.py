"""Links, permissions, places and the environment: what surrounds a conversion does it no harm, and it does none."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checkpoint_samples import write_sample
from gptj_conversion.convert import convert

from gptj import backends
from gptj.checkpoint import open_checkpoint, verify_checkpoint
from gptj.errors import BackendError, FormatError, WriteError

SOURCES = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_sample(tmp_path / "source")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- X3, X6


def test_X3_a_source_that_is_a_hard_link_into_the_output_stays_what_it_was(source, tmp_path):
    target = write_sample(tmp_path / "target", seed=1)
    (source / "model.safetensors").unlink()
    os.link(target / "model.safetensors", source / "model.safetensors")
    (source / "manifest.json").unlink()
    before = contents(source)
    convert(source, target, dtype="float16", overwrite=True)
    assert contents(source) == before
    assert open_checkpoint(target).tensors["lm_head.bias"].dtype == "float16"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_X3_links_that_lead_in_a_circle_are_named(source, tmp_path, name):
    (source / name).unlink()
    (source / name).symlink_to("other")
    (source / "other").symlink_to(name)
    with pytest.raises((FormatError, OSError), match=name):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_X6_a_file_that_may_not_be_read_is_named(source, tmp_path):
    """Root may read everything, so the process becomes somebody else after its imports."""
    program = """
        import os, sys
        from gptj_conversion.convert import convert
        convert("source", "first")  # which imports what is imported late
        os.chmod("source/{name}", 0)
        if os.geteuid() == 0:
            os.chmod(".", 0o777)
            os.seteuid(65534)
        try:
            convert("source", "out")
        except Exception as error:
            print(type(error).__name__, error)
    """
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(source, folder / "source")
        command = [sys.executable, "-c", textwrap.dedent(program).replace("{name}", name)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.stdout.startswith("FormatError") and name in done.stdout, done.stdout + done.stderr
        assert not (folder / "out").exists()


# ---- S5: places


@pytest.mark.parametrize("place", ["source", "source/inside", "."])
def test_S5_an_output_that_is_holds_or_lies_in_its_source_is_refused(source, tmp_path, place):
    with pytest.raises(WriteError, match="is, holds or lies in what is being converted"):
        convert(source, tmp_path / place, overwrite=True)
    assert verify_checkpoint(source)


@pytest.mark.parametrize("place", ["missing/out", "file/out", "file"])
def test_S5_an_output_without_a_place_is_refused_before_any_work(source, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match=r"missing|file"):
        convert(source, tmp_path / place, overwrite=True, progress=lambda *event: pytest.fail("work was begun"))
    assert (tmp_path / "file").read_text() == "mine"


# ---- R3 to R6


@pytest.mark.parametrize("name", ["pt", "tf", "flax"])
def test_R3_a_framework_that_is_not_installed_is_named_with_how_to_get_it(monkeypatch, name):
    honest = importlib.util.find_spec
    hidden = {"torch", "tensorflow", "keras", "jax", "flax"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module in hidden else honest(module, *rest)
    )
    with pytest.raises(
        BackendError, match=rf'gptj\.{name}: .* is not installed .*pip install "gptj-multibackend\[{name}\]"'
    ):
        backends.backend(name)
    with pytest.raises(BackendError, match=r'no framework is installed.*pip install "gptj-multibackend\[pt\]"'):
        backends.backend()


@pytest.mark.parametrize("home", [None, "/dev/null", "/nowhere"])
def test_R4_a_conversion_needs_no_home(source, tmp_path, home):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HOME", "XDG", "HF_"))}
    environment |= {} if home is None else {"HOME": home}
    command = [sys.executable, "-m", "gptj", "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out").keys() == {"config.json", "model.safetensors", "manifest.json"}


def test_R6_nothing_here_forks():
    """A fork after any of the frameworks has computed hangs; other processes are started anew."""
    forks = {"fork", "forkpty", "Process", "Pool", "ProcessPoolExecutor"}
    for path in [*(SOURCES / "src").rglob("*.py"), *(SOURCES / "conversion").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            named = getattr(node, "attr", None) or getattr(node, "id", None)
            imported = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            assert named not in forks and imported.isdisjoint(forks), f"{path.name}: {named or imported}"
