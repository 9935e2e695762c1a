"""What surrounds the command line: a stdout that cannot be written, an interrupt, a folder that is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gptj import backends
from gptj.errors import BackendError


@pytest.mark.parametrize("way", [">/dev/full", ">&-"])
@pytest.mark.parametrize("command", ["--version", "convert --help", "doctor --json"])
def test_one_line_says_that_stdout_cannot_be_written(command, way):
    line = f'"{sys.executable}" -m gptj {command} {way}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("gptj: WriteError: stdout: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("way", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize(
    ("command", "status", "out"), [("inspect nowhere", 1, ""), ("inspect --nope", 2, ""), ("doctor", 0, "python ")]
)
def test_a_stderr_that_cannot_be_written_changes_neither_status_nor_stdout(command, status, out, way):
    line = f'"{sys.executable}" -m gptj {command} {way}'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.startswith(out) and bool(done.stdout) == bool(out)


def test_no_file_gets_the_number_of_a_standard_stream_that_is_closed(tmp_path):
    program = """
        import os, sys
        from gptj.command.standard_streams import prepare_streams
        prepare_streams()
        file = open(sys.argv[1], "w")
        os.write(2, b"what a library prints")
        file.write(str(file.fileno() > 2))
    """
    (tmp_path / "script.py").write_text("\n".join(line[8:] for line in program.splitlines()))
    line = f'"{sys.executable}" {tmp_path}/script.py {tmp_path}/file <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", line]).returncode == 0
    assert (tmp_path / "file").read_text() == "True"


def test_an_interrupt_that_a_callback_swallowed_comes_again():
    program = """
        import sys, weakref
        from gptj.command import main as cli

        class Thing: ...

        def forget(reference):
            raise KeyboardInterrupt

        def command(**options):
            thing = Thing()
            kept = weakref.ref(thing, forget)
            del thing
            for _ in range(10**8): pass
            print("went on")

        cli.gptj_command.main = command
        cli.main()
    """
    done = subprocess.run([sys.executable, "-c", "\n".join(line[8:] for line in program.splitlines())],
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a current folder from being removed")
def test_a_current_folder_that_is_gone_is_no_traceback(tmp_path):
    gone = tmp_path / "gone"
    line = f'mkdir "{gone}" && cd "{gone}" && rmdir "{gone}" && "{sys.executable}" -m gptj inspect x'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("gptj: MissingFileError: x: ")


@pytest.mark.parametrize("error", [ImportError("libx.so: failed to map segment"), OSError("no memory"), MemoryError()])
def test_a_framework_that_cannot_be_loaded_is_named(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(backends, "choose_backend", lambda name: "pt")
    monkeypatch.setattr(backends.importlib, "import_module", fail)
    with pytest.raises(BackendError, match=r"gptj\.pt: its framework is installed and cannot be loaded"):
        backends.backend("pt")


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["", "json"])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("MemoryError('cannot take it')", "cannot take it"),
        (
            'RuntimeError("alloc.cpp:1: can\'t allocate memory: 9 bytes\\nframe")',
            "alloc.cpp:1: can't allocate memory: 9 bytes",
        ),
        ("type('OutOfMemoryError', (RuntimeError,), {})('of a device\\nand where')", "of a device"),
        ("type('ResourceExhaustedError', (Exception,), {})('of a product\\n[Op:MatMul]')", "of a product"),
        ("type('JaxRuntimeError', (RuntimeError,), {})('RESOURCE_EXHAUSTED: 9 bytes')", "RESOURCE_EXHAUSTED: 9 bytes"),
    ],
    ids=["Python", "PyTorch", "a GPU", "TensorFlow", "jax"],
)
def test_a_framework_without_memory_is_one_line(error, said, words):
    program = f"""
        import sys
        from gptj.command import main
        def fail(**options):
            raise {error}
        main.gptj_command.main = fail
        main.main()
    """
    lines = "\n".join(line[8:] for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", lines, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"gptj: LimitError: out of memory (found {said}). ") and done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["error"]["found"] == said if words else not done.stdout


def test_an_error_whose_json_cannot_be_written_is_still_said():
    line = f'"{sys.executable}" -m gptj inspect --json nowhere >/dev/full'
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "gptj: MissingFileError: nowhere: no such file or folder\n")
