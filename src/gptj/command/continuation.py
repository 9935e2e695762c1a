"""Prompts in, text out: whole, one by one or in batches, or piece by piece as the tokens are made."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

import gptj
from gptj.command.opened_model import Job, OpenedModel, Request, TextDecoder
from gptj.command.prompts import Prompt
from gptj.command.together import TOO_FEW_HINT, Copies
from gptj.errors import InputError
from gptj.generation import GenerationConfig, TokenStep

__all__ = ["batches", "continue_prompts", "pieces", "stream_prompts"]

_OF_COLUMNS = ("max_length", "min_length")  # these count a row's padding, so only rows without any keep their meaning


def continue_prompts(
    request: Request, prompts: Sequence[Prompt], *, batch_size: int, as_json: bool, write: Callable[[str], None]
) -> None:
    """Write each prompt's continuation as soon as its batch is done, in the order of the prompts.

    Where processes have copies of the model, each takes its share of the batches, and all is written at the end.

    Args:
        request: how.
        prompts: what.
        batch_size: how many prompts the model reads at once. The tokens are those of one by one.
        as_json: an object a line (one prompt's is indented), else the texts, with an empty line between.
        write: takes what is to be printed, a line break at its end.
    """
    opened = OpenedModel(request, needs_tokenizer=any(prompt.text is not None for prompt in prompts))
    jobs = opened.jobs(prompts)
    steps = opened.tokens(jobs, batch_size)
    with opened.at_work():
        _continue(opened, jobs, opened.load(steps), opened.load_assistant(steps), batch_size, as_json, write)


def _continue(
    opened: OpenedModel, jobs: Sequence[Job], model: Any, assistant: Any, batch_size: int, as_json: bool,
    write: Callable[[str], None],
) -> None:  # fmt: skip
    alone = len(jobs) == 1 and jobs[0].config.num_return_sequences == 1
    copies = Copies.of(model, opened.backend, [job.ids for job in jobs])
    rows = 1  # of one program, which all devices run together, each its own; else a copy's
    if copies.count == 1 and model.placement is not None:
        rows = model.placement.mesh.dp
        if len(jobs) < rows:
            expected = f"{rows} or more"
            raise InputError("fewer than dp", where="prompts", expected=expected, found=len(jobs), hint=TOO_FEW_HINT)
    work = [*batches(jobs, batch_size * rows)]
    copies.check(len(work), "batches of prompts")
    first = True

    def write_records(records: Iterable[dict[str, Any]]) -> None:
        nonlocal first
        for record in records:
            if as_json:
                write(json.dumps(record, indent=2 if alone else None) + "\n")
            else:
                ids = record["token_ids"]
                text = " ".join(map(str, ids)) if record["text"] is None else record["text"]
                write(f"{'' if first else chr(10)}{text}\n")
            first = False

    if copies.count == 1:
        for batch in work:
            write_records(continue_batch(opened, model, assistant, batch, rows))
        return
    mine = {n: [*continue_batch(opened, model, assistant, work[n])] for n in range(len(work)) if copies.is_mine(n)}
    for records in copies.gather(mine):
        write_records(records)


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """The jobs in order, at most `size` that follow each other and may share a call of the model."""
    for _, alike in itertools.groupby(jobs, key=_batch_key):
        waiting = list(alike)
        for start in range(0, len(waiting), size):
            yield waiting[start : start + size]


def _batch_key(job: Job) -> tuple[GenerationConfig, int]:
    """The settings that the jobs of a batch share and, where these count columns, the length of the prompt."""
    counts_columns = any(getattr(job.config, field) for field in _OF_COLUMNS)
    return job.config, len(job.ids) if counts_columns else 0


def continue_batch(
    opened: OpenedModel, model: Any, assistant: Any, batch: Sequence[Job], multiple: int = 1
) -> Iterator[dict[str, Any]]:
    """A record for every returned sequence of every prompt of the batch.

    The model gets a multiple of so many rows: the last prompt again and again, where there are fewer.
    """
    config, asked = batch[0].config, len(batch)
    batch = [*batch, *[batch[-1]] * (-asked % multiple)]
    width = max(len(job.ids) for job in batch)
    ids = np.array([[0] * (width - len(job.ids)) + job.ids for job in batch])
    mask = np.array([[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in batch])
    output = model.generate(
        ids,
        config.replace(return_dict_in_generate=True),
        attention_mask=mask,
        seed=[job.seed for job in batch],
        logits_processor=opened.processors(config),
        tokenizer=opened.tokenizer,
        assistant_model=assistant,
    )
    sequences = gptj.backend(opened.backend).to_numpy(output.sequences)
    for row, (sequence, length) in enumerate(zip(sequences, output.lengths, strict=True)):
        prompt, copy = divmod(row, config.num_return_sequences)
        if prompt == asked:
            return
        job = batch[prompt]
        made = [int(i) for i in sequence[width - len(job.ids) : length]]
        yield {
            **({} if job.prompt.line is None else {"line": job.prompt.line}),
            **({} if config.num_return_sequences == 1 else {"sequence": copy}),
            "backend": opened.backend,
            "prompt_tokens": len(job.ids),
            **({"seed": job.seed} if config.strategy in ("sample", "beam_sample") else {}),
            **({} if output.sequences_scores is None else {"score": float(output.sequences_scores[row])}),
            "token_ids": made,
            "text": opened.text(_without_eos(made, len(job.ids), config)),
        }


def _without_eos(ids: list[int], prompt: int, config: GenerationConfig) -> list[int]:
    """`ids` without the eos that ends them: it is no part of the text."""
    return ids[:-1] if len(ids) > prompt and ids[-1] in config.eos_token_ids else ids


def stream_prompts(request: Request, prompts: Sequence[Prompt], *, write: Callable[[str], None]) -> None:
    """Write each prompt, and then its continuation piece by piece, as the tokens are made.

    Raises:
        InputError: a strategy that knows its tokens only at the end, or has several rows.
    """
    opened = OpenedModel(request, needs_tokenizer=any(prompt.text is not None for prompt in prompts))
    jobs = opened.jobs(prompts)
    for job in jobs:
        if job.config.num_beams > 1 or job.config.num_return_sequences > 1:
            field = "num_beams" if job.config.num_beams > 1 else "num_return_sequences"
            found = getattr(job.config, field)
            raise job.prompt.add_place(InputError("cannot be streamed", where=field, expected="1", found=found))
    new = opened.tokens(jobs)
    with opened.at_work():
        _stream(opened, jobs, opened.load(new), opened.load_assistant(new), write)


def _stream(opened: OpenedModel, jobs: Sequence[Job], model: Any, assistant: Any, write: Callable[[str], None]) -> None:
    Copies.of(model, opened.backend, [job.ids for job in jobs])
    for number, job in enumerate(jobs):
        decoder = opened.decoder()
        write(("\n" if number else "") + decoder.push(job.ids))
        steps = model.stream(
            [job.ids],
            job.config,
            seed=job.seed,
            logits_processor=opened.processors(job.config),
            tokenizer=opened.tokenizer,
            assistant_model=assistant,
        )
        try:
            for piece in pieces(steps, decoder, job.config):
                write(piece)
        finally:
            write("\n")


def pieces(
    steps: Iterable[TokenStep],
    decoder: TextDecoder,
    config: GenerationConfig,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[str]:
    """The text that each step completes, until `stopped` says so, and at the end the decoder's rest."""
    for step in steps:
        token = int(step.tokens[0])
        if token not in config.eos_token_ids and (piece := decoder.push([token])):
            yield piece
        if stopped():
            break
    if rest := decoder.finish():
        yield rest
