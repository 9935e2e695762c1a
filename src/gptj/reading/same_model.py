"""Whether processes on several hosts, each with a folder of its own, are about to compute with one model."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Mapping

from gptj.errors import GPTJError, InputError
from gptj.reading.folder import Checkpoint

__all__ = ["require_same_model"]


def require_same_model(
    checkpoint: Checkpoint, rank: int, gather: Callable[[str], list[str]], *, facts: Mapping[str, str]
) -> None:
    """Refuse weights, a config or facts that are others than the first process'; every process calls it.

    Files that all processes see as one are not read. Where they are copies, every byte of each copy is read once and
    hashed, a share by each of the processes that see that copy.

    Args:
        rank: this process' number.
        gather: gives every process' text, in their order; all wait for each other.
        facts: what else must be the same, by the name that a refusal has.

    Raises:
        InputError: in each process whose copy, or facts, are others; naming the first of them.
        FormatError: a file cannot be read.
    """
    status = [path.stat() for path in checkpoint.weight_files]
    # Of a file that hosts share these are the same everywhere; the last is nobody's to set, so that a copy has another.
    mine = json.dumps([(one.st_size, one.st_ino, one.st_mtime_ns, one.st_ctime_ns) for one in status])
    copies = gather(mine)
    fields = {"config.json": checkpoint.config.architecture_sha256, **facts}
    failed: GPTJError | None = None
    hashes: dict[str, str] = {}
    if len({*copies}) > 1:
        peers = [other for other, copy in enumerate(copies) if copy == mine]
        try:
            hashes = _hash_tensors(checkpoint, peers.index(rank), len(peers))
        except GPTJError as error:
            failed = error
    found = [json.loads(text) for text in gather(json.dumps([fields, hashes]))]
    if failed is not None:
        raise failed
    expected, own = dict(found[0][0]), dict(fields)
    for (_, part), copy in zip(found, copies, strict=True):
        expected |= part if copy == copies[0] else {}
        own |= part if copy == mine else {}
    for name in sorted({*expected, *own}):
        if expected.get(name) != own.get(name):
            raise InputError(
                f"the model on {socket.gethostname()} is another than the first process'", file=checkpoint.directory,
                where=name, expected="the same in every process",
                hint="Give every host the same folder, or one that all of them share, and the same command",
            )  # fmt: skip


def _hash_tensors(checkpoint: Checkpoint, part: int, parts: int) -> dict[str, str]:
    """The hash of every `parts`-th tensor from the `part`-th on, and of what it is, by its name."""
    hashes = {}
    of_file = {name: file for file in checkpoint.files for name in file.tensors}
    for name in sorted(checkpoint.tensors)[part::parts]:
        tensor = checkpoint.tensors[name]
        digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
        for block in of_file[name].blocks(tensor):
            digest.update(block)
        hashes[name] = digest.hexdigest()
    return hashes
