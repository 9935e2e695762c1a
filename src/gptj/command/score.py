"""`gptj score`: its options, and the tables that it prints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from gptj.command.model_options import MODEL_OPTIONS, adapter_option, batch_size_option, no_mmap_option
from gptj.command.options import (
    FileName,
    ModelArgument,
    Sections,
    apply_options,
    option,
)
from gptj.command.printing import print_json, write_text
from gptj.command.together import Copies, check_strategy_options, strategy_options, together
from gptj.reading.weight_files import split_weights
from gptj.sharding import Strategy

if TYPE_CHECKING:
    from gptj.command.documents import Document
    from gptj.command.opened_model import OpenedModel
    from gptj.generation.scoring import Measure, Score, Sequenced

__all__ = ["check_documents", "score"]

_OPTIONS = (
    option("Texts", "--whole", is_flag=True, help="All of FILE is one text. [default: a text a line]"),
    option("Texts", "--allow-special", is_flag=True, help="Read <|endoftext|> in a text as that token."),
    option("Texts", "--no-prefix", is_flag=True, help="Put no token before a text: its first one is not scored. "
            "[default: the config's bos, else eos]"),
    option("Windows", "--max-length", type=int, metavar="N", help="Tokens that are read together. [default: the "
            "model's positions]"),
    option("Windows", "--stride", type=int, metavar="N", help="Tokens that each further window of a long text scores; "
            "fewer give each more context. [default: all]"),
    option("Output", "--json", "as_json", is_flag=True, help="Print the result as JSON."),
    option("Output", "--tokens", is_flag=True, help="With --json, also each token and its log-likelihood."),
    *MODEL_OPTIONS,
    adapter_option,
    no_mmap_option,
    batch_size_option,
    *strategy_options("Model", ("tp", "dp")),
)  # fmt: skip


@click.command(cls=Sections, short_help="Say how likely a model finds texts: perplexity, bits per byte.")
@click.argument("directory", type=ModelArgument, metavar="DIR")
@click.argument("file", type=FileName(), metavar="FILE")
@apply_options(_OPTIONS)
def score(directory: Path, file: str, **options: Any) -> None:
    """Say how likely the model in DIR finds each text in FILE, and all of them; - is stdin.

    A line that is not blank is a text. Where the first line begins with {, every line is a JSON object:
    {"text": "..."}, {"token_ids": [1, 2]}, or {"prompt": "...", "completion": "..."}, of which the completion is
    scored.

    A text that is longer than the model's positions is read in windows. Bits per byte, unlike perplexity, can be
    compared between models with different tokenizers.
    """
    from gptj.command.documents import read_documents
    from gptj.command.opened_model import OpenedModel, Request
    from gptj.generation.scoring import limits_of, prefix_of, score_sequences

    said = ScoreOptions(**options)
    if said.tokens and not said.as_json:
        raise click.UsageError("--tokens is for --json.")
    check_strategy_options(said)
    directory, weights = split_weights(directory, said.weights)
    request = Request(
        directory=directory, weights=weights, mmap=not said.no_mmap, backend=said.backend, dtype=said.dtype,
        quantize=said.quantize, device=said.device, allow_special=said.allow_special, adapter=said.adapter,
        strategy=said.strategy, dp=said.dp, tp=said.tp,
    )  # fmt: skip
    with together(request) as agreed:
        documents = read_documents(file, whole=said.whole)
        opened = OpenedModel(agreed, needs_tokenizer=any(document.text is not None for document in documents))
        limits = limits_of(opened.model_config, said.max_length, said.stride)
        prefix = prefix_of(opened.model_config, None if said.no_prefix else "bos")
        sequences = [*check_documents(opened, documents, prefix)]
        with opened.at_work():
            model = opened.load(0)
            copies = Copies.of(model, opened.backend, [(*map(int, one.token_ids),) for one in sequences])
            copies.check(len(sequences), "texts")
            mine = [number for number in range(len(sequences)) if copies.is_mine(number)]
            with _progress() if agreed.rank == 0 else contextlib.nullcontext() as progress:
                made = score_sequences(
                    model, [sequences[number] for number in mine], limits, batch_size=said.batch_size, progress=progress
                )
        if copies.count > 1:
            facts = copies.gather(dict(zip(mine, map(_to_json, made), strict=True)))
            made = [_from_json(fact) for fact in facts]
        _print(opened, documents, made, said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The options of `gptj score`, as they are called there."""

    whole: bool
    allow_special: bool
    no_prefix: bool
    max_length: int | None
    stride: int | None
    as_json: bool
    tokens: bool
    backend: str | None
    weights: str | None
    adapter: Path | None
    dtype: str | None
    no_mmap: bool
    batch_size: int | None
    quantize: str | None
    device: str
    strategy: Strategy | None
    dp: int | None
    tp: int | None


def _to_json(one: Score) -> dict[str, Any]:
    """A score as JSON can hold it, for another process."""
    return {name: x.tolist() if hasattr(x, "tolist") else x for name, x in vars(one).items()}


def _from_json(facts: Mapping[str, Any]) -> Score:
    from gptj.generation.scoring import Score

    token_ids, numbers = np.array(facts["token_ids"], np.int64), np.array(facts["log_likelihoods"], np.float64)
    return Score(token_ids, numbers, np.array(facts["greedy"], np.bool_), facts["n_bytes"])


class _Encoding:
    """The folder's tokenizer, which reads special tokens in a text where it was asked to."""

    def __init__(self, opened: OpenedModel) -> None:
        self.encode = opened.encode
        self._tokenizer = opened.tokenizer

    def __len__(self) -> int:
        return 0 if self._tokenizer is None else len(self._tokenizer)

    def id_to_bytes(self, token_id: int) -> bytes:
        assert self._tokenizer is not None  # there are no ids that it could be asked for
        return self._tokenizer.id_to_bytes(token_id)


def check_documents(opened: OpenedModel, documents: Sequence[Document], prefix: int | None) -> Iterator[Sequenced]:
    """The checked token ids of each document.

    Raises:
        InputError: they are none of the model's, or none of all is scored; with the line.
    """
    from gptj.errors import GPTJError, InputError
    from gptj.generation.scoring import sequence_of

    some = False
    for document in documents:
        alone = "token_ids" if document.text is None else "text"
        try:
            one = sequence_of(
                opened.model_config, document.content, document.completion, tokenizer=_Encoding(opened), prefix=prefix,
                where=alone if document.completion is None else "completion", before="prompt",
            )  # fmt: skip
        except GPTJError as error:
            raise document.add_place(error) from None
        some = some or len(one.token_ids) > one.first
        yield one
    if not some:
        raise InputError("no token to score", file=documents[0].file, expected="one in any of the texts")


class _progress:
    """A bar on a terminal; elsewhere a line on stderr every ten seconds."""

    EVERY_S = 10.0

    def __enter__(self) -> Any:
        from rich.progress import Progress

        from gptj.command.printing import open_console

        console = open_console(stderr=True)
        self._bar = Progress(console=console, transient=True) if console.is_terminal else None
        self._task: Any = None
        if self._bar is not None:
            self._bar.start()
        import time

        self._clock, self._last = time.monotonic, time.monotonic()
        return self._tell

    def _tell(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._task = self._bar.add_task("tokens", total=total) if self._task is None else self._task
            self._bar.update(self._task, completed=done)
        elif done == total or self._clock() - self._last >= self.EVERY_S:
            self._last = self._clock()
            click.echo(f"scored {done:,} of {total:,} tokens", err=True)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _print(opened: OpenedModel, documents: Sequence[Document], scores: Sequence[Score], said: ScoreOptions) -> None:
    from gptj.generation.scoring import Measure

    total = Measure.of(scores)
    if said.as_json:
        records = [_record(document, one, said.tokens) for document, one in zip(documents, scores, strict=True)]
        print_json({"backend": opened.backend, "documents": records, "total": _facts(total)})
        return
    rows = [("line", "tokens", "log-likelihood", "perplexity", "bits per byte")]
    for document, one in zip(documents, scores, strict=True):
        if document.line is not None:
            rows.append((str(document.line), *_cells(one.measure)))
    rows.append(("all", *_cells(total)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        write_text("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) + "\n")


def _record(document: Document, one: Score, tokens: bool) -> dict[str, Any]:
    """A document's result for JSON."""
    record = {"line": document.line} | _facts(one.measure) | {"is_greedy": one.is_greedy}
    if tokens:
        record["token_ids"] = one.token_ids.tolist()
        record["log_likelihoods"] = one.log_likelihoods.tolist()
    return record


def _facts(measure: Measure) -> dict[str, Any]:
    """A measure for JSON, which has neither NaN nor infinity."""
    perplexity = measure.perplexity
    return {
        "tokens": measure.tokens,
        "bytes": measure.n_bytes,
        "log_likelihood": measure.log_likelihood,
        "perplexity": perplexity if math.isfinite(perplexity) else None,
        "bits_per_byte": measure.bits_per_byte,
    }


def _cells(measure: Measure) -> tuple[str, str, str, str]:
    """A measure in words; - for what is not known."""
    bits = measure.bits_per_byte
    perplexity = "-" if math.isnan(measure.perplexity) else f"{measure.perplexity:,.4f}"
    return f"{measure.tokens:,}", f"{measure.log_likelihood:,.4f}", perplexity, "-" if bits is None else f"{bits:.5f}"
