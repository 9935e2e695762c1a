"""Evidence that a conversion is right: its fingerprint, a forward pass against the source, the state of the input."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import Head, TensorSpec, schema_by_name
from gptj.errors import FormatError, ParityError
from gptj.parity.fingerprint import FINGERPRINT_TOLERANCE, FingerprintObserver, StreamedOracle, take_fingerprint
from gptj.parity.oracle import OracleOutput
from gptj.reading.manifest import Fingerprint, Origin
from gptj_conversion.common.source import Source

__all__ = ["describe_origin", "identify_input", "make_examiner"]

_log = logging.getLogger("gptj")
_PROMPTS, _TOKENS = 3, 8
_SAMPLED_BYTES = 2**16


def describe_origin(source: Source, row: TensorSpec) -> Origin:
    """The source's files that a tensor comes from, and by which rule."""
    return Origin(source.origin_files(row.name), source.origin(row.name))


def identify_input(path: Path) -> list[list[Any]]:
    """Each file's name, size, time of change, and the hash of its first and last 64 kB.

    The ends are where headers, and the checksums of a zip's members, stand; so another checkpoint of the same size
    is told apart even where times were carried over, and nobody waits for 12 GB to be hashed.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    facts = []
    for file in files:
        try:
            with file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                ends = hashlib.sha256(stream.read(_SAMPLED_BYTES))
                stream.seek(max(0, status.st_size - _SAMPLED_BYTES))
                ends.update(stream.read(_SAMPLED_BYTES))
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", file=file) from None
        name = os.fsencode(file.relative_to(path)).decode("utf-8", "backslashreplace")
        facts.append([name, status.st_size, status.st_mtime_ns, ends.hexdigest()])
    return facts


def make_examiner(
    config: GPTJConfig,
    head: Head,
    read: Callable[[TensorSpec], NDArray[Any]],
    reopen: Callable[[Path], Source],
    *,
    fingerprint: bool,
    verify: bool,
    witness: FingerprintObserver | None,
) -> Callable[[Path], Fingerprint | None]:
    """A function that checks the finished directory before it takes its place: see `write_checkpoint`'s `examine`.

    Args:
        config, head: the model.
        read: the source's tensors, as they were to be written.
        reopen: opens what was written, in its format.
        fingerprint: whether to take one.
        verify: whether to compare the forward passes of the source and of the directory, in float64.
        witness: who saw the tensors on their way to the disk, and has the fingerprint if all of them passed by.
    """

    def examine(stage: Path) -> Fingerprint | None:
        rows = schema_by_name(config, head)
        written = reopen(stage)

        def stored(name: str) -> NDArray[Any]:
            return written.read(rows[name])

        if verify:
            _require_same_forward(config, head, lambda name: read(rows[name]), stored, stage)
        taken = witness.fingerprint() if fingerprint and witness is not None else None
        if fingerprint and taken is None:
            taken = take_fingerprint(config, head, stored)
        if taken is not None and not math.isfinite(taken.norm):
            _log.warning("%s: no fingerprint, since the model answers with values that are not finite", stage.name)
            return None
        return taken

    return examine


def _require_same_forward(
    config: GPTJConfig,
    head: Head,
    source: Callable[[str], NDArray[Any]],
    stored: Callable[[str], NDArray[Any]],
    stage: Path,
) -> None:
    """Raise ParityError unless both give the same logits, or hidden states, for a few prompts."""
    tokens = min(_TOKENS, config.n_positions)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (_PROMPTS, tokens))
    with np.errstate(all="ignore"):
        expected, found = (
            StreamedOracle(config, read, bare=head == "base").forward(prompts, logits=head == "causal_lm")
            for read in (source, stored)
        )
    for where, one, other in _pair_outputs(expected, found):
        bound = FINGERPRINT_TOLERANCE * max(float(np.abs(one).max()), 1e-30)
        difference = float(np.abs(one - other).max())
        if not difference <= bound and not np.array_equal(one, other, equal_nan=True):
            raise ParityError(
                "the converted weights compute something else than the source's",
                file=stage,
                where=where,
                expected=f"a difference of at most {bound:.3g}",
                found=f"{difference:.3g}",
                hint="The source changed meanwhile, or this is a bug: please report it",
            )


def _pair_outputs(expected: OracleOutput, found: OracleOutput) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """The arrays to compare, in the order in which it is computed, so that the first difference is named."""
    states = zip(expected.hidden_states, found.hidden_states, strict=True)
    pairs = [(f"hidden state {layer}", one, other) for layer, (one, other) in enumerate(states)]
    if expected.logits is not None and found.logits is not None:
        pairs.append(("logits", expected.logits, found.logits))
    return pairs
