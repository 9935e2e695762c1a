"""Training data: text or JSON lines, as token ids with labels, cut into windows, in one order for every framework.

A JSON line is {"text": ...}, every token of which is learnt, or {"prompt": ..., "completion": ...}, of which the
completion is. A text file is one document. Each document ends with the tokenizer's end-of-text token, which is learnt
too. A prompt is encoded apart from its completion, as it will be when the model is asked.

Windows are a token longer than what they teach, since their first token is predicted by nothing: neighbours share
one, and each token is predicted once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config.labels import IGNORED_LABEL
from gptj.errors import FormatError, InputError, shown, warn_of
from gptj.paths.json_file import parse_json_object, read_small_file
from gptj.text.lines import decode_lines
from gptj.text.tokenizer import GPTJTokenizer

__all__ = ["Batch", "Batches", "Document", "Windows", "make_windows", "own_rows", "read_documents"]

_LARGEST_FILE_BYTES = 1_000_000_000

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_TEXT_SUFFIXES = (".txt", ".md")
_TABLE_SUFFIXES = (".csv", ".tsv")

_FORMS = '{"text": ...} or {"prompt": ..., "completion": ...}'

ROUNDED_TO = 32
"""Tokens to a multiple of which windows that are padded are lengthened, since each length is compiled once."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text to learn.

    Attributes:
        text: what is learnt.
        prompt: what stands before it and is not.
        line: where it stands in its file, from 1; None for a whole file.
    """

    text: str
    prompt: str = ""
    line: int | None = None


def read_documents(path: Path) -> list[Document]:
    """The documents of a file.

    .jsonl, .ndjson and .json are JSON lines, .txt and .md are text, .csv and .tsv are refused; any other is JSON lines
    where its first filled line begins as one does.

    Raises:
        InputError: there is nothing in it, or a line is not what it should be; it names the line.
        FormatError: it is no regular file, or not UTF-8.
    """
    data = read_small_file(path, limit_bytes=_LARGEST_FILE_BYTES)
    text, lines = decode_lines(data, file=path, error=FormatError)
    if not lines:
        raise InputError("nothing to learn", file=path, expected=f"text, or JSON lines: {_FORMS}", found="no text")
    suffix = path.suffix.lower()
    if suffix in _TABLE_SUFFIXES:
        hint = "Write a JSON object a line; as mere text, name it .txt"
        raise InputError("a table", file=path, expected=f"text, or JSON lines: {_FORMS}", found=suffix, hint=hint)
    if suffix in _JSON_SUFFIXES or (suffix not in _TEXT_SUFFIXES and _is_meant_as_json(text, lines[0][1])):
        return _from_json(lines, path)
    return [Document(text)]


def _is_meant_as_json(text: str, first: str) -> bool:
    """Whether the first filled line begins as an object with a name does, or all of it is an array of objects.

    What is wrong with it is then for the reader of JSON lines to say: text that is learnt in its place is a model
    that writes JSON.
    """
    if re.match(r"\s*\{\s*[\"}]", first):
        return True
    if not re.match(r"\s*\[\s*\{", text):
        return False
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _from_json(lines: list[tuple[int, str]], path: Path) -> list[Document]:
    """The documents of JSON lines; fields that are not used are said once."""
    if lines[0][1].lstrip().startswith("["):
        hint = "jq -c '.[]' makes lines of an array"
        raise InputError(
            "a JSON array in place of lines", file=path, where=f"line {lines[0][0]}", expected=_FORMS, hint=hint
        )
    if lines[0][1].strip() == "{":
        hint = "jq -c . makes a line of each"
        raise InputError(
            "a JSON object over several lines", file=path, where=f"line {lines[0][0]}", expected=_FORMS, hint=hint
        )
    unused: dict[str, int] = {}
    documents = [_document(line, path, number, unused) for number, line in lines]
    if unused:
        name, number = next(iter(unused.items()))
        others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        warn_of(f"fields that are not learnt: {shown(name)}{others}", file=path, where=f"line {number}")
    return documents


def _document(line: str, path: Path, number: int, unused: dict[str, int]) -> Document:
    where = f"line {number}"
    members = parse_json_object(line.encode(), file=path, where=where, error=InputError)
    names = ("text",) if "text" in members else ("prompt", "completion")
    both = "text" in members and not members.keys().isdisjoint(("prompt", "completion"))
    missing = [name for name in names if name not in members]
    if missing or both:
        hint = "Render each conversation into a prompt and a completion" if "messages" in members else None
        problem = "text beside a prompt or a completion" if both else f"no {' and no '.join(missing)}"
        found = ", ".join(sorted(map(shown, members))) or "no field"
        raise InputError(problem, file=path, where=where, expected=_FORMS, found=found, hint=hint)
    for name in names:
        value = members[name]
        if not isinstance(value, str):
            raise InputError("not text", file=path, where=f"{where}: {name}", expected="a string", found=shown(value))
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise InputError("half a character", file=path, where=f"{where}: {name}", found=shown(value))
        if not value and name != "prompt":
            raise InputError("nothing to learn", file=path, where=f"{where}: {name}", found="an empty string")
    for name in members.keys() - set(names):
        unused.setdefault(name, number)
    return Document(members[names[-1]], members["prompt"] if names[0] == "prompt" else "", number)


# ---- windows


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token ids and labels, a row a window.

    Attributes:
        ids: (n, t), 0 where a window is not full.
        labels: (n, t), the ids that are learnt, -100 elsewhere. The model compares those at 1 to t - 1 with the logits
            at 0 to t - 2.
        lengths: (n,) tokens of each.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learnt(self) -> int:
        """The number of tokens that the loss is taken of."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())

    @property
    def sha256(self) -> str:
        """A hash of all of it."""
        digest = hashlib.sha256(str(self.ids.shape).encode())
        for array in (self.ids, self.labels):
            digest.update(np.ascontiguousarray(array, "<i4").data)
        return digest.hexdigest()


def make_windows(
    path: Path, documents: Iterable[Document], tokenizer: GPTJTokenizer, *, length: int, pack: bool
) -> Windows:
    """The windows of documents.

    Args:
        path: their file, for errors.
        tokenizer: its end-of-text token, where it has one, ends each.
        length: tokens of a window at most.
        pack: one after the other and cut anywhere; else each begins a window of its own. A text that is longer goes
            on in further windows; a prompt and completion that are longer are refused. Packed, the first is said.

    Raises:
        InputError: there is nothing to predict, or a prompt and completion are too long.
    """
    pieces, said = [], False
    for document in documents:
        piece = _encode(document, tokenizer)
        if document.prompt and len(piece[0]) > length and not said:
            facts: Any = {"file": path, "where": f"line {document.line}", "found": f"{len(piece[0])}"}
            facts |= {"expected": f"at most {length} tokens"}
            if not pack:
                hint = "Shorten it, give a larger --length, or --pack, which cuts it"
                raise InputError("longer than a window", **facts, hint=hint)
            said = True
            problem = "longer than a window: it is cut, and what is learnt does not see all of its prompt"
            warn_of(problem, **facts, hint="Shorten it, or give a larger --length; more such lines are not said")
        pieces.append(piece)
    if pack:
        ids, labels = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        pieces = [(ids, labels)]
    rows = [row for ids, labels in pieces for row in _cut(ids, labels, length)]
    if not rows:
        raise InputError("nothing to learn", file=path, expected="two tokens or more", found="a token with none after")
    width = max(len(ids) for ids, _ in rows)
    windows = Windows(
        ids=np.zeros((len(rows), width), np.int32),
        labels=np.full((len(rows), width), IGNORED_LABEL, np.int32),
        lengths=np.array([len(ids) for ids, _ in rows], np.int64),
    )
    for row, (ids, labels) in enumerate(rows):
        windows.ids[row, : len(ids)] = ids
        windows.labels[row, : len(ids)] = labels
    return windows


Tokens = NDArray[np.int32]


def _encode(document: Document, tokenizer: GPTJTokenizer) -> tuple[Tokens, Tokens]:
    """The token ids of a document and their labels."""
    prompt = tokenizer.encode(document.prompt) if document.prompt else []
    text = [*tokenizer.encode(document.text)]
    if tokenizer.eos_token_id is not None:
        text.append(tokenizer.eos_token_id)
    labels = [IGNORED_LABEL] * len(prompt) + text
    return np.array([*prompt, *text], np.int32), np.array(labels, np.int32)


def _cut(ids: Tokens, labels: Tokens, length: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Windows of at most `length` tokens, neighbours sharing one, but for those that teach nothing."""
    for start in range(0, max(len(ids) - 1, 0), length - 1):
        some = slice(start, start + length)
        if (labels[some][1:] != IGNORED_LABEL).any():
            yield ids[some], labels[some]


# ---- batches


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are computed at once.

    Attributes:
        ids, labels: (b, t); a row that no window is left for has no label.
        learnt: tokens that are predicted.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    learnt: int


@dataclasses.dataclass(frozen=True)
class Batches:
    """The windows in their order: an epoch's is a permutation by Philox, a function of the seed and the epoch alone.

    So the place in the data is a function of the number of the update, and no state of a generator has to be kept.

    Attributes:
        windows: of them.
        batch: windows at once.
        accumulate: batches an update.
        seed: of the order; None leaves it as it is.
    """

    windows: Windows
    batch: int
    accumulate: int = 1
    seed: int | None = None
    _orders: dict[int, NDArray[np.int64]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def per_epoch(self) -> int:
        """Updates of an epoch; the last takes what is left."""
        return -(-len(self.windows) // (self.batch * self.accumulate))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The places of an epoch's windows, (n,).

        The numbers are Philox's own 64 bits, sorted; how NumPy makes a permutation of them may change.
        """
        count = len(self.windows)
        if self.seed is None:
            return np.arange(count)
        stream = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
        return np.argsort(stream.random_raw(count), kind="stable").astype(np.int64)

    def of_update(self, step: int) -> list[Batch]:
        """The batches of update 0, 1 ..."""
        epoch, place = divmod(step, self.per_epoch)
        size = self.batch * self.accumulate
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self.order(epoch)
        chosen = self._orders[epoch][place * size : (place + 1) * size]
        return [self._batch(chosen[start : start + self.batch]) for start in range(0, len(chosen), self.batch)]

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.per_epoch):
            yield from self.of_update(step)

    def _batch(self, chosen: NDArray[np.int64]) -> Batch:
        windows = self.windows
        longest = int(windows.lengths[chosen].max())
        width = min(windows.ids.shape[1], -(-longest // ROUNDED_TO) * ROUNDED_TO)
        ids = np.zeros((self.batch, width), np.int32)
        labels = np.full((self.batch, width), IGNORED_LABEL, np.int32)
        ids[: len(chosen)] = windows.ids[chosen, :width]
        labels[: len(chosen)] = windows.labels[chosen, :width]
        return Batch(ids, labels, int((labels[:, 1:] != IGNORED_LABEL).sum()))


def own_rows(
    ids: NDArray[Any], labels: NDArray[Any], mine: int, parts: int
) -> tuple[NDArray[Any], NDArray[Any], float]:
    """A part of a batch's rows, ids and labels, of so many that are equal; and its share of what is learnt."""
    own = np.split(labels, parts)[mine]
    learnt, of_all = (int((some[:, 1:] != IGNORED_LABEL).sum()) for some in (own, labels))
    return np.split(ids, parts)[mine], own, learnt / of_all


def describe(windows: Windows) -> dict[str, Any]:
    """Facts of the data, as JSON can hold them."""
    return {"windows": len(windows), "tokens": windows.learnt, "sha256": windows.sha256}
