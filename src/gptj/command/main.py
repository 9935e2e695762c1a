"""The command line: adapter, batch, convert, inspect, verify, parity, generate, serve, finetune, init, doctor, demo.

The result goes to stdout, progress and errors to stderr. Exit status: 0 yes; 1 no (bad input, backends that disagree,
nothing could be written); 2 misuse of the command line; 130 Ctrl-C. Of `gptj parity` and its commands 1 is that
something differs, and nothing else: where that could not be judged, the status is 2. An error is one message without a
traceback, unless `--debug` asks for it. Each command lies in a module that is imported when it is asked for, and
imports what it needs when it runs, so `gptj --help` is quick and convert, inspect and verify never load a framework.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click

import gptj
from gptj.command.called import CALLED
from gptj.command.options import DEBUG_HELP, LazyGroup
from gptj.command.printing import printed_warnings
from gptj.command.standard_streams import StdoutError, abandon_stdout, prepare_streams
from gptj.errors import CheckpointWarning, GPTJError, LimitError, is_out_of_memory

__all__ = ["main"]

# What a framework must see before it is imported. The library sets none of these; a user's own value stays.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "KERAS_BACKEND": "tensorflow",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "JAX_COMPILATION_CACHE_DIR": "~/.cache/gptj/xla",
    "JAX_COMPILATION_CACHE_MAX_SIZE": "268435456",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}

COMMANDS = {
    **dict.fromkeys(("convert", "inspect", "verify"), "gptj.command.convert"),
    "adapter": "gptj.command.adapter",
    "batch": "gptj.command.batch",
    "generate": "gptj.command.generate",
    "serve": "gptj.command.serve",
    "score": "gptj.command.score",
    "eval": "gptj.command.evaluate",
    "export": "gptj.command.export",
    "finetune": "gptj.command.finetune",
    **dict.fromkeys(("parity", "init", "doctor", "demo"), "gptj.command.checks"),
    "plan": "gptj.command.plan",
}
"""Each command's module."""

EPILOG = """\b
To see it all at work:
  gptj demo
To complete with Tab:
  eval "$(_GPTJ_COMPLETE=bash_source gptj)"
"""


def main() -> None:
    """Run the command line and exit."""
    prepare_streams()
    if sys.stdout is None:
        click.echo("gptj: WriteError: stdout: is closed", err=True)
        sys.exit(1)
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: _terminate(heard))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: _interrupt(heard))
    sys.unraisablehook = _interrupt_again
    warnings.simplefilter("default", CheckpointWarning)
    warnings.showwarning = _show_warning
    debug = "--debug" in sys.argv[1:]
    try:
        status = gptj_command.main(standalone_mode=False)
        sys.stdout.flush()
    except (click.exceptions.Abort, KeyboardInterrupt):
        _leave(signal.SIGINT)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except StdoutError as error:
        abandon_stdout()
        click.echo(f"gptj: WriteError: stdout: cannot be written: {error}", err=True)
        sys.exit(_status_of(error))
    except GPTJError as error:
        _say(error, debug)
        sys.exit(_status_of(error))
    except BrokenPipeError as error:
        # The reader of our output has left, as `| head` does: nobody is there to be told.
        abandon_stdout()
        sys.exit(_status_of(error))
    except Exception as error:
        if heard:  # a library that was being imported made another error of it
            _leave(heard[0])
        if is_out_of_memory(error):
            said = next(iter(str(error).splitlines()), None)  # the rest is where in a framework
            hint = "A smaller batch, a narrower --dtype or shorter texts take less"
            _say(LimitError("out of memory", found=said, hint=hint), debug)
            sys.exit(_status_of(error))
        if _status_of(error) == 1:  # as Python ends with
            raise
        traceback.print_exc()
        sys.exit(_status_of(error))
    sys.exit(status if isinstance(status, int) else 0)


def _say(error: GPTJError, debug: bool) -> None:
    """Print an error that is being handled: a line, its facts for `--json`, the way to it for `--debug`."""
    if debug:
        traceback.print_exc()
    elif "--json" in sys.argv[1:]:
        try:
            click.echo(json.dumps({"error": error.as_dict()}))
        except (StdoutError, BrokenPipeError):  # stderr still says it
            abandon_stdout()
    click.echo(f"gptj: {error.code}: {error}", err=True)


def _status_of(error: Exception) -> int:
    """The status that an error ends with: 1, or what its command says (`gptj.command.options.Judging`)."""
    return getattr(error, "exit_status", 1)


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Signal once more where the signal fell into a callback, whose exceptions Python drops."""
    if lost.exc_type is not None and issubclass(lost.exc_type, KeyboardInterrupt | SystemExit):
        number = signal.SIGINT if issubclass(lost.exc_type, KeyboardInterrupt) else signal.SIGTERM
        again = threading.Timer(0.01, _thread.interrupt_main, (number,))  # at once would fall into this very hook
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(lost)


def _leave(number: int) -> NoReturn:
    """End with the status of a signal. Python would end itself by it where it fell into code that Python made."""
    signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(128 + number)


def _interrupt(heard: list[int]) -> None:
    heard.append(signal.SIGINT)
    raise KeyboardInterrupt


def _terminate(heard: list[int]) -> None:
    heard.append(signal.SIGTERM)
    sys.exit(128 + signal.SIGTERM)


_show_warning_of_python = warnings.showwarning


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
    """Print a warning of ours as a line, without the place in the code; others as Python does."""
    if issubclass(category, CheckpointWarning):
        said = printed_warnings()
        if str(message) not in said:  # Python forgets what it showed wherever a filter is set
            said.append(str(message))
            click.echo(f"warning: {message}", err=True)
    else:
        _show_warning_of_python(message, category, *place, **options)


@click.group(
    name="gptj",
    cls=LazyGroup,
    modules=COMMANDS,
    called=CALLED,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.version_option(gptj.__version__, "-V", "--version", prog_name="gptj")
@click.option("--debug", is_flag=True, help=DEBUG_HELP)
def gptj_command(debug: bool) -> None:
    """GPT-J in PyTorch, TensorFlow and Flax: convert, check, run.

    A DIR is a folder with config.json and safetensors weights, as `gptj convert` writes it and transformers too; or
    a repository of the Hugging Face hub: OWNER/NAME, with --revision or as OWNER/NAME@REVISION where it is not the
    main branch that is meant. SRC may be one as well.
    """
    home = Path("~").expanduser()
    for name, value in ENVIRONMENT.items():
        if not value.startswith("~"):
            os.environ.setdefault(name, value)
        elif os.access(home, os.W_OK):  # jax warns of every program that it cannot keep
            os.environ.setdefault(name, value.replace("~", str(home), 1))
