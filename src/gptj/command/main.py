"""The command line: convert, inspect, verify, parity, generate, init, doctor, demo.

The result goes to stdout, progress and errors to stderr. Exit status: 0 yes; 1 no (bad input, backends that
disagree, nothing could be written); 2 misuse of the command line; 130 Ctrl-C. An error is one message without a
traceback, unless `--debug` asks for it. Commands import what they need when they run, so `gptj --help` is quick
and convert, inspect and verify never load a framework.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

import gptj
from gptj.backends import BACKENDS, choose_backend, installed_backends
from gptj.command.options import (
    DEBUG_HELP,
    FileName,
    FiniteRange,
    Group,
    Names,
    Repository,
    Sections,
    backend_names,
    decorated,
    option,
    revision_option,
)
from gptj.command.standard_streams import StdoutError, abandon_stdout, settle_streams
from gptj.command.waiting import waiting
from gptj.dtypes import DTYPES_CALLED, PARAMETER_DTYPES
from gptj.errors import CheckpointWarning, GPTJError, harmless, shown
from gptj.hub import locate, locate_source
from gptj.prepared import DEVICES, DEVICES_CALLED, QUANTIZATIONS
from gptj.reading.weight_files import split_weights

if TYPE_CHECKING:
    from gptj_conversion.common.plan import ConversionPlan

__all__ = ["main"]

# What a framework must see before it is imported. The library sets none of these; a user's own value stays.
ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "KERAS_BACKEND": "tensorflow",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "JAX_COMPILATION_CACHE_DIR": "~/.cache/gptj/xla",
    "JAX_COMPILATION_CACHE_MAX_SIZE": "268435456",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}

EPILOG = """\b
To see it all at work:
  gptj demo
To complete with Tab:
  eval "$(_GPTJ_COMPLETE=bash_source gptj)"
"""

PathArgument = FileName(path_type=Path)
Inside = FileName(inside=True)


ModelArgument = Repository(locate)
SourceArgument = Repository(locate_source)
BackendChoice = backend_names(BACKENDS)
BackendsChoice = backend_names(BACKENDS, several=True)
DtypeChoice = Names(PARAMETER_DTYPES, called=DTYPES_CALLED)


# What people call the formats, by their files or their frameworks.
CALLED = {
    "hf": "safetensors", "huggingface": "safetensors", "tpu": "mesh", "npz": "mesh", "zst": "tar", "pytorch": "bin",
    "torch": "bin", "pt": "bin", "msgpack": "flax", "jax": "flax", "h5": "tf", "tensorflow": "tf", "keras": "tf",
}  # fmt: skip


def _source_formats() -> tuple[str, ...]:
    from gptj_conversion.convert import source_formats

    return source_formats()


def _target_formats() -> tuple[str, ...]:
    from gptj_conversion.convert import target_formats

    return target_formats()


def main() -> None:
    """Run the command line and exit."""
    settle_streams()
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
        sys.exit(1)
    except GPTJError as error:
        if debug:
            traceback.print_exc()
        elif "--json" in sys.argv[1:]:
            try:
                click.echo(json.dumps({"error": error.as_dict()}))
            except (StdoutError, BrokenPipeError):  # stderr still says it
                abandon_stdout()
        click.echo(f"gptj: {error.code}: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has left, as `| head` does: nobody is there to be told.
        abandon_stdout()
        sys.exit(1)
    except MemoryError as error:
        click.echo(f"gptj: LimitError: out of memory: {error}", err=True)
        sys.exit(1)
    except Exception:
        if heard:  # a library that was being imported made another error of it
            _leave(heard[0])
        raise
    sys.exit(status if isinstance(status, int) else 0)


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
        said = _said()
        if str(message) not in said:  # Python forgets what it showed wherever a filter is set
            said.append(str(message))
            click.echo(f"warning: {message}", err=True)
    else:
        _show_warning_of_python(message, category, *place, **options)


def _said() -> list[str]:
    """The warnings that this command has printed."""
    context = click.get_current_context(silent=True)
    return [] if context is None else context.meta.setdefault("gptj.said", [])


def _note(text: str) -> None:
    """Print a note, unless a warning has said it: each thing is said once."""
    if not any(text in warning for warning in _said()):
        click.echo(f"note: {text}", err=True)


def _console(*, stderr: bool = False) -> Console:
    """The terminal, or a file that is wide enough for every table."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and len(columns) < 5 else 0
    if console.is_terminal:
        return console
    return Console(stderr=stderr, highlight=False, soft_wrap=True, width=width if width >= 20 else 140)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=True))


@click.group(
    name="gptj",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.version_option(gptj.__version__, prog_name="gptj")
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


def _once(context: click.Context, option: click.Parameter, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names of --backends, each of them there once."""
    if names is not None and len(set(names)) != len(names):
        raise click.BadParameter(f"{shown(','.join(names))} names one twice")
    return names


backends_option = click.option(
    "--backends", type=BackendsChoice, callback=_once,
    help="Which, with commas between. [default: all that are installed]",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is at the destination.")


source_options = (
    option("Source", "--config", type=PathArgument, help="The training config (JSON) of a TPU checkpoint."),
    option("Source", "--source-format", type=Names(_source_formats, called=CALLED),
                 help="Where several fit. [default: what is found]"),
    option("Source", "--weights", type=Inside, metavar="FILE", help="Which weights file of SRC, where it holds "
                 "several sets."),
    revision_option(section="Source"),
    option("Source", "--follow-links", is_flag=True, help="Accept links that lead out of SRC."),
)  # fmt: skip
convert_options = (
    option("Result", "--to", type=Names(_target_formats, called=CALLED), default="safetensors", show_default=True,
                 help="What to write."),
    option("Result", "--shards", type=int, help="How many cores will load it: for --to mesh."),
    option("Result", "--layout", type=Names(("slim", "full")), default="slim", show_default=True,
                 help="For --to mesh."),
    option("Result", "--tokenizer", type=FileName(), metavar="gpt2|DIR|none", help="To write beside the weights. "
                 "[default: the one beside SRC, if any]"),
    option("Result", "--dtype", type=DtypeChoice, help="Of the written tensors. [default: as "
                 "in SRC]"),
    option("Result", "--max-shard-gb", type=FiniteRange(min=0.001, max=1e9), default=5.0, show_default=True,
                 help="Size of a weights file."),
    option("Result", "--overwrite", is_flag=True, help="Replace what is at the destination."),
    option("Checks", "--allow-overflow", is_flag=True, help="Let a narrowing cast turn large values into "
                 "infinity."),
    option("Checks", "--allow-nonfinite", is_flag=True, help="Write NaN and infinity."),
    option("Checks", "--verify", is_flag=True, help="Run the float64 reference on SRC and on the result, and "
                 "compare."),
    option("Checks", "--no-fingerprint", is_flag=True, help="Note no logits of the reference in manifest.json."),
    option("Running", "--resume", is_flag=True, help="Go on from what a killed run left."),
    option("Running", "--dry-run", is_flag=True, help="Print what would be done, and touch nothing."),
    option("Running", "--json", "as_json", is_flag=True, help="Print the result as JSON."),
)  # fmt: skip
weights_option = click.option(
    "--weights", type=Inside, metavar="FILE", help="Which weights file of DIR, where it holds several sets."
)


@gptj_command.command(cls=Sections, short_help="Convert a TPU checkpoint or a foreign folder.")
@click.argument("src", type=SourceArgument)
@click.argument("dst", type=PathArgument)
@decorated((*source_options, *convert_options))
def convert(
    src: Path, dst: Path, to: str, shards: int | None, layout: Literal["slim", "full"], tokenizer: str | None,
    dtype: str | None, overwrite: bool, max_shard_gb: float,
    allow_overflow: bool, allow_nonfinite: bool, verify: bool, no_fingerprint: bool, resume: bool, dry_run: bool,
    as_json: bool, **source: Any,
) -> None:  # fmt: skip
    """Convert SRC, a TPU checkpoint or a foreign folder, into the folder DST.

    SRC is a step folder (step_383500), or the folder above it, whose newest step is taken. A tokenizer beside it is
    carried along; --tokenizer gpt2 writes GPT-J's own. The tokenizer says which token ends a text.
    """
    from gptj_conversion.convert import Choices, do_job, open_job, plan_job

    choices = Choices(
        to=to, dtype=dtype, max_shard_bytes=int(max_shard_gb * 1e9), shards=shards, layout=layout, tokenizer=tokenizer,
        overwrite=overwrite, allow_overflow=allow_overflow, allow_nonfinite=allow_nonfinite,
        fingerprint=not no_fingerprint, verify=verify, resume=resume,
    )  # fmt: skip
    job = open_job(src, dst, choices, **source)
    planned = plan_job(job)
    if dry_run:
        _print_plan(planned, as_json)
        return
    with _progress(planned.nbytes) as advance:
        do_job(job.with_progress(advance))
    _print_notes(planned)
    _inspect(dst, as_json)


def _print_plan(plan: ConversionPlan, as_json: bool) -> None:
    if as_json:
        _print_json(plan.as_dict())
        return
    _print_source(plan.source.as_dict())
    click.echo("")
    facts: dict[str, Any] = {
        "destination": plan.destination,
        "to": plan.to,
        "dtype": plan.dtype,
        "bytes": _size(plan.nbytes),
        "free": "-" if plan.free_bytes is None else _size(plan.free_bytes),
        "memory": f"about {plan.peak_memory_bytes / 1e6:,.0f} MB over what Python takes",
    }
    _print_facts({key: _spelt(value) for key, value in facts.items()})
    for file in plan.files:
        click.echo(f"  {file.name}  {file.tensors} tensors, {_size(file.nbytes)}")
    _print_notes(plan)
    click.echo("nothing was written: this is what would be done", err=True)
    if not plan.fits:
        click.echo("warning: there is not enough space", err=True)


def _print_notes(plan: ConversionPlan) -> None:
    for note in plan.notes:
        _note(note)


@gptj_command.command(cls=Sections, short_help="Say what a checkpoint is, from its headers.")
@click.argument("path", type=SourceArgument, metavar="SRC")
@decorated(source_options)
@json_option
def inspect(path: Path, as_json: bool, **source: Any) -> None:
    """Say what SRC is: format, sizes, dtype, tensors, parameters. Reads headers only."""
    _inspect(path, as_json, **source)


def _inspect(path: Path, as_json: bool, **source: Any) -> None:
    from gptj_conversion.convert import describe

    facts = describe(path, **source).as_dict()
    if as_json:
        _print_json(facts)
        return
    _print_source(facts)


def _print_source(facts: Mapping[str, Any]) -> None:
    """What a checkpoint is; what its format does not know is left out, and sizes are spelt for people too."""
    told = {key.replace("_", " "): _spelt(value) for key, value in facts.items() if value is not None}
    told["bytes"] = _size(facts["bytes"])
    del told["problems"]
    _print_facts(told)
    for problem in facts["problems"]:
        _note(problem)


def _print_facts(facts: Mapping[str, str]) -> None:
    """A line a fact, the same on a terminal of any width and in a file."""
    width = max(map(len, facts))
    for key, value in facts.items():
        click.echo(f"{key:<{width}}  {value}")


def _size(nbytes: int) -> str:
    """So many bytes: exactly, and from 10 kB on in a larger unit too.

    >>> _size(9_999), _size(12_992), _size(24_241_003_136)
    ('9,999 bytes', '13.0 kB (12,992 bytes)', '24.2 GB (24,241,003,136 bytes)')
    """
    unit = next((unit for unit in (1e9, 1e6, 1e3) if nbytes >= unit), 1)
    short = f"{nbytes / unit:.1f} {({1e9: 'GB', 1e6: 'MB', 1e3: 'kB'}).get(unit)}"
    return f"{nbytes:,} bytes" if nbytes < 10_000 else f"{short} ({nbytes:,} bytes)"


def _spelt(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return shown(value).strip("'")


@gptj_command.command(short_help="Check a folder against the hashes noted of it.")
@click.argument("directory", type=SourceArgument, metavar="DIR")
@click.option("--fingerprint", is_flag=True, help="Also run the float64 reference, and compare its logits.")
@weights_option
@revision_option()
@json_option
def verify(directory: Path, fingerprint: bool, weights: str | None, as_json: bool) -> None:
    """Check what `gptj convert` wrote into DIR, in any format, against its manifest.json.

    Every file and every tensor is read and hashed again; the source is not needed. The sha256 is of all tensors in
    their canonical layout: two folders of the same sha256 hold the same model, whatever their formats. What else lies
    in DIR has no hash, and is named as not checked.
    """
    from gptj_conversion.verify import verify as run

    with waiting(f"verifying {directory}"):
        manifest = run(directory, fingerprint=fingerprint, weights=weights)
    if as_json:
        facts: dict[str, Any] = {"files": len(manifest.files), "tensors": len(manifest.tensors)}
        facts |= {"checked": {"files": [*manifest.files], "tensors": [*manifest.tensors]}}
        facts |= {"unchecked": [*manifest.unchecked], "sha256": manifest.sha256}
        format_of = {"verified": str(directory), "format": manifest.weights_format}
        _print_json({**format_of, **facts, "fingerprint": fingerprint})
    else:
        same = ", and the reference computes the same" if fingerprint else ""
        counts = f"{len(manifest.tensors)} tensors, {len(manifest.files)} files"
        click.echo(f"{directory}: {counts}, all as they were written{same}")
        for name in manifest.unchecked:
            click.echo(f"not checked: {shown(name).strip(chr(39))}")
        click.echo(f"sha256 {manifest.sha256}")


generate_options = (
    option("Prompts", "--prompts", type=FileName(), metavar="FILE", help="A prompt a line, or JSON lines as above; - "
            "is stdin."),
    option("Prompts", "--token-ids", metavar="IDS", help='The prompt as token ids: "1 2 3".'),
    option("Prompts", "--allow-special", is_flag=True, help="Read <|endoftext|> in a prompt as that token."),
    option("Prompts", "--truncate", type=click.Choice(("left",)), help="Cut the beginning of a prompt that is too "
            "long for the model. [default: refuse it]"),
    option("Output", "--stream", is_flag=True, help="Print the text as it is made."),
    option("Output", "-i", "--interactive", is_flag=True, help="Continue what you type, turn by turn."),
    option("Output", "--json", "as_json", is_flag=True, help="Print token ids and text as JSON; for several prompts, "
            "an object a line."),
    option("Model", "--backend", type=BackendChoice, help="Which framework. [default: GPTJ_BACKEND, or the only one]"),
    option("Model", "--weights", type=Inside, metavar="FILE", help="Which weights file of DIR, where it holds "
            "several sets."),
    revision_option(section="Model"),
    option("Model", "--dtype", type=DtypeChoice, help="Of the parameters. [default: as stored]"),
    option("Model", "--no-mmap", is_flag=True, help="Read the weights files and do not map them: slower to start, and "
           "they may change meanwhile."),
    option("Model", "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
            help="How many prompts to read at once."),
    option("Model", "--assistant", type=ModelArgument, metavar="DIR", help="A smaller model that guesses ahead; the "
            "text is the same."),
    option("Model", "--quantize", type=Names(QUANTIZATIONS), help="Decode with weights of 8 or 4 bits, where "
            "the framework can."),
    option("Model", "--device", type=Names(DEVICES, called=DEVICES_CALLED), default="auto", show_default=True,
            help="Where it runs; auto is a GPU where the framework sees one."),
    option("Decoding", "--max-new-tokens", type=int, metavar="N", help="Tokens to add at most. [default: 40]"),
    option("Decoding", "--temperature", type=float, metavar="T", help="Sample; below 1 is bolder, above 1 more even, "
            "0 is greedy."),
    option("Decoding", "--top-k", type=int, metavar="K", help="Sample among the K likeliest tokens."),
    option("Decoding", "--top-p", type=float, metavar="P", help="Sample among the likeliest tokens that make up this "
            "probability."),
    option("Decoding", "--min-p", type=float, metavar="P", help="Sample among the tokens of at least P times the "
            "best one's probability."),
    option("Decoding", "--seed", type=int, metavar="N", help="Sample with this seed: in float32, the same text "
            "in every framework."),
    option("Decoding", "--num-beams", type=int, metavar="N", help="Search with N beams."),
    option("Decoding", "--repetition-penalty", type=float, metavar="X", help="Above 1, make said tokens unlikelier."),
    option("Decoding", "--stop", multiple=True, metavar="TEXT", help="End after this text. May be given several "
            "times."),
    option("Decoding", "--any-token", is_flag=True, help="Let it choose ids that the tokenizer does not know, too; "
            "they are shown as <|50300|>."),
    option("Decoding", "--set", "fields", multiple=True, metavar="NAME=VALUE", help="Any other field of "
            "GenerationConfig, as in --set no_repeat_ngram_size=3."),
)  # fmt: skip


@gptj_command.command(cls=Sections, short_help="Continue a prompt, or many, or turn by turn.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.argument("prompt", required=False)
@decorated(generate_options)
def generate(
    directory: Path, prompt: str | None, prompts: str | None, token_ids: str | None, allow_special: bool,
    truncate: str | None, stream: bool, interactive: bool, as_json: bool, backend: str | None, dtype: str | None,
    weights: str | None, batch_size: int, assistant: Path | None, quantize: str | None, seed: int | None,
    stop: tuple[str, ...], fields: tuple[str, ...], any_token: bool, device: str, no_mmap: bool, **named: Any,
) -> None:  # fmt: skip
    """Continue PROMPT with the model in DIR; a PROMPT of - is all of stdin.

    Greedy, unless the folder's generation_config.json or one of --temperature, --top-k, --top-p, --min-p and --seed
    asks for sampling. Several prompts draw with the seed, the seed + 1, and so on.

    JSON lines have "prompt" or "token_ids", and may have "seed" and any field of GenerationConfig for this prompt
    alone: {"prompt": "Once", "max_new_tokens": 9}.
    """
    from gptj.command.generate import Request, continue_prompts, converse, stream_prompts
    from gptj.command.prompts import STDIN, Prompt, read_lines, read_prompt

    ways = (prompt, prompts, token_ids)
    if sum(way is not None for way in ways) != 1 and not (interactive and ways == (None, None, None)):
        raise click.UsageError('Give the prompt as text, or as --token-ids "1 2 3", or several with --prompts FILE.')
    if interactive and (token_ids is not None or STDIN in (prompt, prompts) or assistant is not None):
        raise click.UsageError("--interactive reads text from stdin: leave out --token-ids, -, and --assistant.")
    if sum((stream, interactive, as_json)) > 1:
        raise click.UsageError("Choose one of --stream, --interactive and --json.")
    if batch_size > 1 and (stream or interactive):
        raise click.UsageError("--batch-size is for whole texts: leave out --stream and --interactive.")

    settings = {name: value for name, value in named.items() if value is not None}
    directory, weights = split_weights(directory, weights)
    request = Request(
        directory=directory,
        weights=weights,
        mmap=not no_mmap,
        backend=backend,
        dtype=dtype,
        assistant=assistant,
        quantize=quantize,
        device=device,
        settings=_fields(fields) | settings | ({"stop_strings": stop} if stop else {}),
        seed=seed,
        truncate=truncate is not None,
        allow_special=allow_special,
        any_token=any_token,
    )
    if prompts is not None:
        given = read_lines(prompts)
    elif token_ids is not None:
        given = [Prompt(token_ids=_token_ids(token_ids))]
    elif prompt is not None:
        given = [read_prompt(STDIN) if prompt == STDIN else Prompt(prompt)]
    else:
        given = []
    if interactive:
        converse(request, given, write=_write, note=lambda line: click.echo(line, err=True))
    elif stream:
        stream_prompts(request, given, write=_write)
    else:
        continue_prompts(request, given, batch_size=batch_size, as_json=as_json, write=_write)


def _write(text: str) -> None:
    """Text at once: as it is in a pipe or a file, on a terminal without what would steer it (see `harmless`).

    click would take what looks like a colour out of it.
    """
    if sys.stdout is not None:
        sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def _fields(assignments: Iterable[str]) -> dict[str, Any]:
    """What the NAME=VALUE of --set say: JSON where a value is some, else text."""
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise click.BadParameter(f"NAME=VALUE, not {shown(assignment)}", param_hint="--set")
        if name in fields:
            raise click.BadParameter(f"{shown(name)} stands there twice", param_hint="--set")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
        except RecursionError:
            raise click.BadParameter(f"{shown(name)}: nested too deeply for JSON", param_hint="--set") from None
    return fields


def _token_ids(text: str) -> tuple[int, ...]:
    words = text.replace(",", " ").split()
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise click.BadParameter("whole numbers with spaces between them", param_hint="--token-ids") from None


@gptj_command.command(short_help="Compare the frameworks on a model, and with an oracle.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@backends_option
@click.option("--dtype", type=DtypeChoice, default="float32", show_default=True, help="To compute in.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    metavar="N",
    help="Of the prompts and sampled text.",
)
@weights_option
@revision_option()
@click.option("--skip-manifest", is_flag=True, help="Do not first check the weights against manifest.json.")
@click.option("--verbose", is_flag=True, help="Also print every measure.")
@json_option
def parity(
    directory: Path, backends: tuple[str, ...] | None, dtype: str, seed: int, weights: str | None,
    skip_manifest: bool, verbose: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run the model in DIR in each framework and compare: with the float64 oracle and with each other.

    The weights are first checked against the manifest.json in DIR, if there is one. Each framework runs in a process
    of its own. The exit status is 1 where any two are too far apart, or the weights are not those of the manifest.
    """
    from gptj.parity import run_parity

    names = installed_backends() if backends is None else tuple(choose_backend(name) for name in backends)
    with waiting(f"comparing {', '.join(names)}"):
        report = run_parity(directory, names, dtype=dtype, seed=seed, weights=weights, check_manifest=not skip_manifest)
    if as_json:
        _print_json(report.as_dict())
    else:
        console = _console()
        console.print(report.summary(), soft_wrap=False)
        if verbose:
            console.print("", report.table(), sep="\n", soft_wrap=False)
    if not report.passed:
        sys.exit(1)


@gptj_command.command(short_help="Write a folder of random weights that reveal mistakes.")
@click.argument("directory", type=PathArgument, metavar="DIR")
@click.option("--config", type=PathArgument, help="A config.json. [default: a tiny model with every size different]")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N", help="Of the random values."
)
@click.option("--dtype", type=DtypeChoice, default="float32", show_default=True, help="Of the tensors.")
@overwrite_option
def init(directory: Path, config: Path | None, seed: int, dtype: str, overwrite: bool) -> None:
    """Write DIR with random weights that reveal mistakes: no bias is zero, no scale is one."""
    from gptj.checkpoint import write_checkpoint
    from gptj.config import GPTJConfig
    from gptj.parity.revealing import revealing_config, revealing_fill

    settled = revealing_config() if config is None else GPTJConfig.from_file(config)
    with waiting(f"writing {directory}"):
        write_checkpoint(directory, settled, revealing_fill(seed), dtype=dtype, overwrite=overwrite)
    click.echo(f"{directory}: written")


@gptj_command.command(short_help="Say what is installed, and what changes results.")
@json_option
def doctor(as_json: bool) -> None:
    """Say which frameworks are installed, in which versions, and what in the environment changes results."""
    from gptj.command.doctor import examine

    report = examine()
    if as_json:
        _print_json(report.as_dict())
    else:
        _print_facts(report.lines())
        for warning in report.warnings:
            click.echo(f"warning: {warning}", err=True)


@gptj_command.command(short_help="Show the whole journey on a model that is shipped.")
@backends_option
@click.option("--keep", type=PathArgument, metavar="DIR", help="Leave the converted model of verse here.")
def demo(backends: tuple[str, ...] | None, keep: Path | None) -> None:
    """Show the whole journey on a TPU checkpoint that the package ships: convert, verify, write verse, compare."""
    from gptj.demo import run_demo

    names = None if backends is None else tuple(choose_backend(name) for name in backends)
    if not run_demo(names, _console(), keep=keep):
        sys.exit(1)


_WORTH_LINES_BYTES = 100_000_000


@contextlib.contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[str, int], None]]:
    """While this is open, the function that it gives shows how far the work is: a bar on a terminal, else lines."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield _lines(console, total_bytes) if total_bytes >= _WORTH_LINES_BYTES else lambda name, nbytes: None
        return
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("converting", total=total_bytes)
        yield lambda name, nbytes: bar.update(task, advance=nbytes)


def _lines(console: Console, total_bytes: int) -> Callable[[str, int], None]:
    """A line for each tenth of the work."""
    done = 0

    def advance(name: str, nbytes: int) -> None:
        nonlocal done
        before, done = done, done + nbytes
        if 10 * before // total_bytes != 10 * done // total_bytes:
            console.print(f"converting: {100 * done // total_bytes} % of about {_size(total_bytes)}")

    return advance
