"""`gptj convert`, `inspect` and `verify`: the commands that read and write checkpoints, without any framework."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptj.command.options import (
    Command,
    DtypeChoice,
    FileName,
    FiniteRange,
    Inside,
    Names,
    PathArgument,
    Sections,
    SourceArgument,
    apply_options,
    json_option,
    option,
    revision_option,
    weights_option,
)
from gptj.command.printing import (
    open_console,
    print_facts,
    print_json,
    print_note,
    spell,
    spell_size,
)
from gptj.command.waiting import waiting
from gptj.errors import counted, shown

if TYPE_CHECKING:
    from gptj_conversion.convert import ConversionPlan
    from rich.console import Console

__all__ = ["convert", "inspect", "verify"]

_WORTH_LINES_BYTES = 100_000_000
"""The bytes from which on a conversion without a terminal prints a line for each tenth."""

# What people call the formats, by their files or their frameworks.
_CALLED = {
    "hf": "safetensors", "huggingface": "safetensors", "tpu": "mesh", "npz": "mesh", "zst": "tar", "pytorch": "bin",
    "torch": "bin", "pt": "bin", "msgpack": "flax", "jax": "flax", "h5": "tf", "tensorflow": "tf", "keras": "tf",
}  # fmt: skip


def _source_formats() -> tuple[str, ...]:
    from gptj_conversion.convert import source_formats

    return source_formats()


def _target_formats() -> tuple[str, ...]:
    from gptj_conversion.convert import target_formats

    return target_formats()


_SOURCE_OPTIONS = (
    option("Source", "--config", type=PathArgument, help="The training config (JSON) of a TPU checkpoint."),
    option("Source", "--source-format", type=Names(_source_formats, called=_CALLED),
                 help="Where several fit. [default: what is found]"),
    option("Source", "--weights", type=Inside, metavar="FILE", help="Which weights file of SRC, where it holds "
                 "several sets."),
    revision_option(section="Source"),
    option("Source", "--follow-links", is_flag=True, help="Accept links that lead out of SRC."),
)  # fmt: skip

_OF_SOURCE = ("config", "source_format", "weights", "follow_links")

_CONVERT_OPTIONS = (
    option("Result", "--to", type=Names(_target_formats, called=_CALLED), default="safetensors", show_default=True,
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


@click.command(cls=Sections, short_help="Convert a TPU checkpoint or a foreign folder.")
@click.argument("src", type=SourceArgument)
@click.argument("dst", type=PathArgument)
@apply_options((*_SOURCE_OPTIONS, *_CONVERT_OPTIONS))
def convert(src: Path, dst: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Convert SRC, a TPU checkpoint or a foreign folder, into the folder DST.

    SRC is a step folder (step_383500), or the folder above it, whose newest step is taken. A tokenizer beside it is
    carried along; --tokenizer gpt2 writes GPT-J's own. The tokenizer says which token ends a text.
    """
    from gptj_conversion.convert import Choices, do_job, open_job, plan_job

    source = {name: options.pop(name) for name in _OF_SOURCE}
    size, fingerprint = int(options.pop("max_shard_gb") * 1e9), not options.pop("no_fingerprint")
    job = open_job(src, dst, Choices(**options, max_shard_bytes=size, fingerprint=fingerprint), **source)
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
        print_json(plan.as_dict())
        return
    _print_source(plan.source.as_dict())
    click.echo("")
    facts: dict[str, Any] = {
        "destination": plan.destination,
        "to": plan.to,
        "dtype": plan.dtype,
        "bytes": spell_size(plan.nbytes),
        "free": "-" if plan.free_bytes is None else spell_size(plan.free_bytes),
        "memory": f"about {plan.peak_memory_bytes / 1e6:,.0f} MB over what Python takes",
    }
    print_facts({key: spell(value) for key, value in facts.items()})
    for file in plan.files:
        click.echo(f"  {file.name}  {counted(file.tensors, 'tensor')}, {spell_size(file.nbytes)}")
    _print_notes(plan)
    click.echo("nothing was written: this is what would be done", err=True)
    if not plan.fits:
        click.echo("warning: there is not enough space", err=True)


def _print_notes(plan: ConversionPlan) -> None:
    for note in plan.notes:
        print_note(note)


@click.command(cls=Sections, short_help="Say what a checkpoint is, from its headers.")
@click.argument("path", type=SourceArgument, metavar="SRC")
@apply_options(_SOURCE_OPTIONS)
@json_option
def inspect(path: Path, as_json: bool, **source: Any) -> None:
    """Say what SRC is: format, sizes, dtype, tensors, parameters. Reads headers only.

    SRC may be a LoRA adapter's folder, too.
    """
    from gptj.adapters.files import is_adapter

    if is_adapter(path):
        from gptj.command.adapter import print_adapter

        print_adapter(path, as_json)
        return
    _inspect(path, as_json, **source)


def _inspect(path: Path, as_json: bool, **source: Any) -> None:
    from gptj_conversion.convert import describe

    facts = describe(path, **source).as_dict()
    if as_json:
        print_json(facts)
        return
    _print_source(facts)


def _print_source(facts: Mapping[str, Any]) -> None:
    """Print the facts of a checkpoint, but for those that its format does not know; sizes in a larger unit too."""
    told = {key.replace("_", " "): spell(value) for key, value in facts.items() if value is not None}
    told["bytes"] = spell_size(facts["bytes"])
    del told["problems"]
    print_facts(told)
    for problem in facts["problems"]:
        print_note(problem)


@click.command(cls=Command, short_help="Check a folder against the hashes noted of it.")
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
        print_json({**format_of, **facts, "fingerprint": fingerprint})
    else:
        same = ", and the reference computes the same" if fingerprint else ""
        counts = f"{counted(len(manifest.tensors), 'tensor')}, {counted(len(manifest.files), 'file')}"
        click.echo(f"{directory}: {counts}, all as they were written{same}")
        for name in manifest.unchecked:
            click.echo(f"not checked: {shown(name).strip(chr(39))}")
        click.echo(f"sha256 {manifest.sha256}")


@contextlib.contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[str, int], None]]:
    """Show progress, told by the function that this gives: a bar on a terminal, else lines."""
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = open_console(stderr=True)
    if not console.is_terminal:
        yield _lines(console, total_bytes) if total_bytes >= _WORTH_LINES_BYTES else lambda name, nbytes: None
        return
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("converting", total=total_bytes)
        yield lambda name, nbytes: bar.update(task, advance=nbytes)


def _lines(console: Console, total_bytes: int) -> Callable[[str, int], None]:
    """The function that prints a line for each tenth of the work."""
    done = 0

    def advance(name: str, nbytes: int) -> None:
        nonlocal done
        before, done = done, done + nbytes
        if 10 * before // total_bytes != 10 * done // total_bytes:
            console.print(f"converting: {100 * done // total_bytes} % of about {spell_size(total_bytes)}")

    return advance
