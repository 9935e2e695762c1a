"""A few numbers of the reference's forward pass, kept with a checkpoint: what a shape cannot say, they do.

Another n_head or rotary_dim changes no shape, and a transposed square matrix keeps its own; but each changes what
the model answers. So `gptj convert` runs the float64 oracle once on a short prompt and notes some of its logits in
manifest.json, and whoever holds the directory can run it again and compare. The pass reads one tensor at a time
and multiplies some rows at a time, so it needs the memory of one stored tensor and a buffer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.checkpoint import Checkpoint, open_checkpoint, plan_load
from gptj.config import GPTJConfig
from gptj.errors import MissingFileError, ParityError
from gptj.manifest import MANIFEST_FILE, Fingerprint, Manifest
from gptj.parity.oracle import Oracle
from gptj.schema import Head
from gptj.weight_files import safe_path

__all__ = ["FINGERPRINT_TOLERANCE", "StreamedOracle", "check_fingerprint", "read_by_row", "take_fingerprint"]

FINGERPRINT_TOLERANCE = 1e-9
"""Of the root of the mean square: float64 sums in another order differ by 1e-14, the smallest mistake by 1e-4."""

_TOKENS = 4
_PLACES = 16
_BLOCK_BYTES = 2**21  # of float64: what a core keeps near between widening and multiplying

# OpenBLAS uses one thread up to so many multiplications. Beyond, its threads wait for each other in busy loops: on
# two loaded cores the same pass took 26 CPU seconds in place of 1.6.
_ONE_THREAD = 2**18

Read = Callable[[str], NDArray[Any]]


class StreamedOracle(Oracle):
    """The oracle, which multiplies with some rows of a matrix at a time, so no whole matrix is in float64."""

    def linear(self, name: str, x: NDArray[Any], *, bias: bool = False) -> NDArray[Any]:
        """x W' (+ bias)."""
        y = self._times(f"{name}.weight", x)
        return y + self.read(f"{name}.bias") if bias else y

    def lm_head(self, hidden: NDArray[Any]) -> NDArray[Any]:
        """Logits over the vocabulary."""
        tied = self.config.tie_word_embeddings
        logits = self._times(f"{self._prefix}wte.weight" if tied else "lm_head.weight", hidden)
        return logits + self.read("lm_head.bias")

    def _times(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        weight = np.asarray(self._read(name))
        flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
        out = np.empty((len(flat), len(weight)), self.dtype)
        rows = max(1, _BLOCK_BYTES // (weight.shape[1] * self.dtype.itemsize))
        few = max(1, _ONE_THREAD // flat.size)
        for at in range(0, len(weight), rows):
            block = _widened(weight[at : at + rows]).astype(self.dtype)
            for start in range(0, len(block), few):
                part = block[start : start + few]
                out[:, at + start : at + start + len(part)] = flat @ part.T
        return out.reshape(*x.shape[:-1], len(weight))


def take_fingerprint(config: GPTJConfig, head: Head, read: Read) -> Fingerprint:
    """The fingerprint of a model, whose tensors `read` gives by their canonical names."""
    oracle = StreamedOracle(config, read, bare=head == "base")
    ids = _prompt(config)
    has_logits = head == "causal_lm"
    with np.errstate(all="ignore"):  # a model whose weights are not finite answers NaN, and that is said elsewhere
        result = oracle.forward([ids], logits=has_logits)
    last = (result.logits if result.logits is not None else result.hidden_states[-1])[0, -1]
    places = np.unique(np.linspace(0, len(last) - 1, _PLACES).astype(int)).tolist()
    return Fingerprint(
        token_ids=tuple(ids),
        output="logits" if has_logits else "hidden_state",
        places=tuple(places),
        values=tuple(float(last[place]) for place in places),
        norm=float(np.sqrt((last * last).sum())),
    )


def check_fingerprint(
    directory: str | os.PathLike[str], *, config: GPTJConfig | None = None, follow_links: bool = False
) -> Fingerprint:
    """The directory's fingerprint, after the forward pass has been run again and found to give it.

    Args:
        directory: a checkpoint that `gptj convert` wrote.
        config: to use in place of the directory's own.
        follow_links: accept links that lead out of the directory.

    Raises:
        MissingFileError: there is no manifest, or no fingerprint in it.
        ParityError: the numbers are others: the config, a matrix or their order was changed.
        GPTJError: the directory cannot be opened; see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(directory, config=config, follow_links=follow_links)
    read = read_by_row(checkpoint)
    return compare_fingerprint(
        checkpoint.directory, checkpoint.config, checkpoint.head, read, follow_links=follow_links
    )


def compare_fingerprint(
    directory: Path, config: GPTJConfig, head: Head, read: Read, *, follow_links: bool = False
) -> Fingerprint:
    """`check_fingerprint` for tensors that `read` gives by their canonical names, whatever holds them."""
    path = safe_path(directory, MANIFEST_FILE, follow_links=follow_links)
    recorded = Manifest.from_file(path).fingerprint
    if recorded is None:
        raise MissingFileError("no fingerprint in it", file=path, hint="Convert again, without --no-fingerprint")
    _require_same(recorded, take_fingerprint(config, head, read), directory)
    return recorded


def read_by_row(checkpoint: Checkpoint) -> Read:
    """From the canonical name of a row to the tensor that the checkpoint stores for it."""
    tensors = plan_load(checkpoint, checkpoint.config, checkpoint.head).tensors
    return lambda name: checkpoint.read(tensors[name].name)


def _require_same(recorded: Fingerprint, found: Fingerprint, directory: Path) -> None:
    same_prompt = (recorded.token_ids, recorded.output, recorded.places) == (
        found.token_ids,
        found.output,
        found.places,
    )
    bound = FINGERPRINT_TOLERANCE * max(recorded.norm, 1e-30)
    pairs = [*zip(recorded.values, found.values, strict=False), (recorded.norm, found.norm)]
    if same_prompt and all(abs(a - b) <= bound for a, b in pairs):
        return
    worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    raise ParityError(
        "the forward pass is not the one that was recorded when this was written",
        file=directory,
        where=f"fingerprint.{recorded.output}",
        expected=f"{worst[0]:.9g}" if same_prompt else f"{recorded.output} {list(recorded.places)}",
        found=f"{worst[1]:.9g}" if same_prompt else f"{found.output} {list(found.places)}",
        hint="Restore config.json (n_head and rotary_dim change no shape) or the weights (gptj verify says which)",
    )


def _prompt(config: GPTJConfig) -> list[int]:
    """Some token ids all over the vocabulary, as many as positions allow."""
    count = min(_TOKENS, config.n_positions)
    return [(1 + 7919 * n) % config.vocab_size for n in range(count)]


def _widened(block: NDArray[Any]) -> NDArray[Any]:
    """A bfloat16 block in float32, by its bits: eight times as fast as ml_dtypes' own loop."""
    if block.dtype.name != "bfloat16":
        return block
    bits = block.view(np.uint16).astype(np.uint32)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)
