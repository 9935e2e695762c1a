"""The doors of the converters: recognise what is there, write what is asked, say what a path is.

A format is known by what lies on the disk, never by what a caller hopes (`recognise`), and is a row of one table
(`formats`); what is to be done is one object (`job`). Reading is lazy and writing streams, so a conversion holds one
tensor and some buffers, whatever the size of the model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gptj.errors import GPTJError, LimitError, warn_of
from gptj_conversion.common.plan import ConversionPlan, make_plan
from gptj_conversion.common.source import Facts, Source
from gptj_conversion.formats import FORMATS, find_target
from gptj_conversion.job import Choices, Job, make_job
from gptj_conversion.recognise import ConfigChoice, recognise

__all__ = [
    "Choices",
    "ConversionPlan",
    "Facts",
    "convert",
    "describe",
    "do_job",
    "open_job",
    "open_source",
    "plan",
    "plan_job",
    "source_formats",
    "target_formats",
]


def source_formats() -> tuple[str, ...]:
    """The names of the formats that can be read."""
    return tuple(known.name for known in FORMATS)


def target_formats() -> tuple[str, ...]:
    """The names of the formats that can be written."""
    return tuple(known.name for known in FORMATS if known.target is not None)


def open_source(
    path: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    config: ConfigChoice = None,
    weights: str | None = None,
    follow_links: bool = False,
) -> Source:
    """The checkpoint at `path`, of whatever format, its headers checked.

    Args:
        path: a folder, or a weights file in one.
        source_format: one of `source_formats()`, where several fit.
        config: the training config (or its file) of a TPU checkpoint; a GPTJConfig or config.json else.
        weights: the name of the weights file, where a folder holds several.
        follow_links: accept links that lead out of the folder.

    Raises:
        MissingFileError: there is nothing that any reader knows.
        FormatError: several formats fit, or a file is malformed.
        GPTJError: see the readers.
    """
    return recognise(
        path, source_format=source_format, config=config, weights=weights, follow_links=follow_links
    ).open()


def describe(
    path: str | os.PathLike[str],
    *,
    source_format: str | None = None,
    config: ConfigChoice = None,
    weights: str | None = None,
    follow_links: bool = False,
) -> Facts:
    """The facts of the checkpoint at `path`, from its headers; see `open_source` for the arguments.

    Raises:
        GPTJError: it cannot be opened at all; what would only keep it from being converted is in `problems`.
    """
    return recognise(
        path, source_format=source_format, config=config, weights=weights, follow_links=follow_links
    ).describe()


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    config: ConfigChoice = None,
    dtype: str | None = None,
    overwrite: bool = False,
    source_format: str | None = None,
    weights: str | None = None,
    to: str = "safetensors",
    max_shard_bytes: int = 5_000_000_000,
    shards: int | None = None,
    layout: Literal["slim", "full"] = "slim",
    follow_links: bool = False,
    allow_overflow: bool = False,
    allow_nonfinite: bool = False,
    fingerprint: bool = True,
    verify: bool = False,
    resume: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """The directory `dst`, the checkpoint at `src` in another format.

    Args:
        src, config, source_format, weights, follow_links: see `open_source`.
        dst: where; its parent must exist.
        dtype: of all tensors; None keeps what each is stored as.
        overwrite: whether a checkpoint at `dst` may be replaced.
        to: the format to write, one of `target_formats()`.
        max_shard_bytes: weights of more bytes than this are cut into several files and an index.
        shards, layout: of a TPU checkpoint (`to="mesh"`): the cores that will load it, and "slim" or "full".
        allow_overflow, allow_nonfinite: write values that became infinite in a narrowing cast; NaN and infinity.
        fingerprint: note some logits of the float64 oracle in the manifest; see `gptj.parity.fingerprint`.
        verify: run the oracle with the source's tensors and with what was written, and refuse a difference.
        resume: go on from what a killed conversion of the same input left; else it is cleared.
        tokenizer: to write beside the weights: "gpt2", which is GPT-J's and needs the extra `vocab`; one's folder; None
            for the one that lies beside the source, where one does; "none" for none. It also says which token ends a
            text; see `gptj_conversion.companions` for the rule, and `plan` for what it comes to.
        progress: told the name and bytes of each tensor when it has been written.

    Raises:
        GPTJError: see `open_source` and the writers; nothing is left behind at `dst`.
    """
    choices = Choices(
        to=to, dtype=dtype, max_shard_bytes=max_shard_bytes, shards=shards, layout=layout, tokenizer=tokenizer,
        overwrite=overwrite, allow_overflow=allow_overflow, allow_nonfinite=allow_nonfinite, fingerprint=fingerprint,
        verify=verify, resume=resume, progress=progress,
    )  # fmt: skip
    return do_job(
        open_job(
            src, dst, choices, config=config, source_format=source_format, weights=weights, follow_links=follow_links
        )
    )


def plan(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    config: ConfigChoice = None,
    dtype: str | None = None,
    source_format: str | None = None,
    weights: str | None = None,
    to: str = "safetensors",
    max_shard_bytes: int = 5_000_000_000,
    shards: int | None = None,
    layout: Literal["slim", "full"] = "slim",
    follow_links: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
) -> ConversionPlan:
    """The plan that `convert` with these arguments would carry out; only headers are read, and nothing is written.

    Raises:
        GPTJError: it would not begin; see `open_source`.
    """
    choices = Choices(
        to=to, dtype=dtype, max_shard_bytes=max_shard_bytes, shards=shards, layout=layout, tokenizer=tokenizer
    )
    return plan_job(
        open_job(
            src, dst, choices, config=config, source_format=source_format, weights=weights, follow_links=follow_links
        )
    )


# ---- the job, for whoever plans it first and does it then


def open_job(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    choices: Choices,
    *,
    config: ConfigChoice = None,
    source_format: str | None = None,
    weights: str | None = None,
    follow_links: bool = False,
) -> Job:
    """The conversion of `src` into `dst`, its source opened and everything checked that can be at once.

    Raises:
        GPTJError: it would not begin; see `open_source`.
    """
    find_target(choices.to)
    choices = choices.check()
    source = open_source(src, source_format=source_format, config=config, weights=weights, follow_links=follow_links)
    return make_job(src, Path(dst), source, choices, follow_links=follow_links)


def plan_job(job: Job) -> ConversionPlan:
    """The plan of a job; see `plan`."""
    files = find_target(job.choices.to).plan(job)
    return make_plan(
        job.source, job.rows, job.directory, to=job.choices.to, dtype=job.choices.dtype, files=files, notes=job.notes
    )


def do_job(job: Job) -> Path:
    """The job's directory, written whole; see `convert`."""
    to = job.choices.to
    for oddity in job.source.context.oddities:
        warn_of(oddity, file=job.path)
    try:
        return find_target(to).write(job, functools.partial(open_source, source_format=to))
    except GPTJError:
        raise
    except MemoryError:
        raise LimitError(
            f"needs about {job.estimate_memory() / 1e9:.2g} GB of memory over what Python takes, more than there is",
            file=job.source.path,
        ) from None
