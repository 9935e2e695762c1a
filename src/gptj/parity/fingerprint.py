"""A few numbers of the reference's forward pass, kept with a checkpoint: what a shape cannot say, they do.

Another n_head or rotary_dim changes no shape, and a transposed square matrix keeps its own; but each changes what
the model answers. So `gptj convert` runs the float64 oracle once on a short prompt and notes some of its logits in
manifest.json, and whoever holds the directory can run it again and compare. The pass needs one tensor at a time, and
multiplies some rows of it at a time, so it takes the memory of one stored tensor and a buffer; and it needs them in
the schema's order, so a writer that gives each tensor to a `FingerprintObserver` on its way to the disk need not read
it again.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.config.schema import Head
from gptj.errors import MissingFileError, ParityError
from gptj.parity.oracle import Oracle
from gptj.reading.folder import Checkpoint, open_checkpoint
from gptj.reading.load_plan import plan_load
from gptj.reading.manifest import MANIFEST_FILE, Fingerprint, Manifest
from gptj.reading.weight_files import safe_path, set_among

__all__ = [
    "FINGERPRINT_TOLERANCE",
    "FingerprintObserver",
    "StreamedOracle",
    "check_fingerprint",
    "read_by_row",
    "take_fingerprint",
]

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

    def row_blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """The rows of a matrix, some at a time."""
        yield np.asarray(self._read(name))

    def _times(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        flat = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).T)
        rows = max(1, _BLOCK_BYTES // (len(flat) * self.dtype.itemsize))
        few = max(1, _ONE_THREAD // flat.size)
        wide = np.empty((rows, len(flat)), self.dtype)
        bits = np.empty(wide.shape, np.uint32)
        parts = []
        for block in self.row_blocks(name):
            for at in range(0, len(block), rows):
                near = _widen(block[at : at + rows], wide, bits)
                parts += [near[start : start + few] @ flat for start in range(0, len(near), few)]
        return np.ascontiguousarray(np.concatenate(parts).T).reshape(*x.shape[:-1], -1)


def take_fingerprint(config: GPTJConfig, head: Head, read: Read) -> Fingerprint:
    """The fingerprint of a model, whose tensors `read` gives by their canonical names."""
    return _fingerprint_of(StreamedOracle(config, read, bare=head == "base"), head)


def _fingerprint_of(oracle: StreamedOracle, head: Head) -> Fingerprint:
    ids = _prompt(oracle.config)
    has_logits = head == "causal_lm"
    with np.errstate(all="ignore"):  # a model whose weights are not finite answers NaN, and that is said elsewhere
        last = oracle.forward([ids], logits=False).hidden_states[-1][:, -1:]
        last = (oracle.lm_head(last) if has_logits else last)[0, 0]
    places = np.unique(np.linspace(0, len(last) - 1, _PLACES).astype(int)).tolist()
    return Fingerprint(
        token_ids=tuple(ids),
        output="logits" if has_logits else "hidden_state",
        places=tuple(places),
        values=tuple(float(last[place]) for place in places),
        norm=float(np.sqrt((last * last).sum())),
    )


class FingerprintObserver:
    """Takes the fingerprint of a model whose tensors pass by once, in the schema's order, in a thread of its own.

    `with FingerprintObserver(config, head) as observer:` show it each tensor's blocks with `see`, say with `wait_for`
    that the tensor is over, and ask for the `fingerprint` at the end.
    """

    def __init__(self, config: GPTJConfig, head: Head) -> None:
        self._config = config
        self._head = head
        self._seen: queue.Queue[tuple[str | None, NDArray[Any] | None]] = queue.Queue(maxsize=1)
        self._in_hand = False  # whether the thread has yet to say that it is done with what it got last
        self._over = False

    def __enter__(self) -> FingerprintObserver:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gptj-fingerprint")
        self._taken = self._thread.submit(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._taken.done():
            self._seen.put((None, None))
        self._thread.shutdown()

    def see(self, name: str, rows: NDArray[Any]) -> None:
        """Look at the next rows of a tensor, which must stay as they are until `wait_for` returns."""
        self._seen.put((name, rows))

    def wait_for(self, name: str) -> None:
        """Return when all rows of a tensor have been used."""
        self._seen.put((name, None))
        self._seen.join()

    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint; None where not every tensor passed by, or one would be needed again (a tied head)."""
        if not self._taken.done():
            self._seen.put((None, None))
        return self._taken.result()

    def blocks(self, name: str) -> Iterator[NDArray[Any]]:
        """The rows of the tensor that passes by, which must be this one."""
        while True:
            seen, rows = self._seen.get()
            self._in_hand, self._over = True, seen is None
            if seen != name:
                raise _OutOfOrder
            if rows is not None:
                yield rows
            self._let_go()
            if rows is None:
                return

    def _let_go(self) -> None:
        if self._in_hand:
            self._in_hand = False
            self._seen.task_done()

    def _take(self) -> Fingerprint | None:
        try:
            return _fingerprint_of(_PassingOracle(self), self._head)
        except _OutOfOrder:
            return None
        finally:
            self._let_go()
            while not self._over:  # whoever shows the rest is not to wait for ever
                self._over = self._seen.get()[0] is None
                self._seen.task_done()


class _OutOfOrder(Exception):
    """Another tensor passes by than the one that is needed next."""


class _PassingOracle(StreamedOracle):
    """The oracle of tensors that are there only while they pass by."""

    def __init__(self, observer: FingerprintObserver) -> None:
        super().__init__(observer._config, self._join_blocks, bare=observer._head == "base")
        self.row_blocks = observer.blocks  # type: ignore[method-assign]

    def embed(self, ids: Any) -> NDArray[Any]:
        """Rows of the token embedding."""
        out = np.empty((*ids.shape, self.config.n_embd), self.dtype)
        start = 0
        for block in self.row_blocks(f"{self._prefix}wte.weight"):
            here = (ids >= start) & (ids < start + len(block))
            out[here] = block[ids[here] - start]
            start += len(block)
        return out

    def _join_blocks(self, name: str) -> NDArray[Any]:
        return np.concatenate([block.copy() for block in self.row_blocks(name)])


def check_fingerprint(
    directory: str | os.PathLike[str],
    *,
    config: GPTJConfig | None = None,
    weights: str | None = None,
    follow_links: bool = False,
) -> Fingerprint:
    """The directory's fingerprint, after the forward pass has been run again and found to give it.

    Args:
        directory: a checkpoint that `gptj convert` wrote.
        config: to use in place of the directory's own.
        weights: the name of the file or the index in it; None is what the manifest lists.
        follow_links: accept links that lead out of the directory.

    Raises:
        MissingFileError: there is no manifest, or no fingerprint in it.
        ParityError: the numbers are others: the config, a matrix or their order was changed.
        GPTJError: the directory cannot be opened; see `open_checkpoint`.
    """
    if weights is None:
        path = safe_path(Path(directory), MANIFEST_FILE, follow_links=follow_links)
        weights = set_among(Manifest.from_file(path).files)
    checkpoint = open_checkpoint(directory, config=config, weights=weights, follow_links=follow_links)
    read = read_by_row(checkpoint)
    return compare_fingerprint(
        checkpoint.directory, checkpoint.config, checkpoint.head, read, follow_links=follow_links
    )


def compare_fingerprint(
    directory: Path, config: GPTJConfig, head: Head, read: Read, *, follow_links: bool
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
    plan = plan_load(checkpoint, checkpoint.config, checkpoint.head)
    return lambda name: (
        np.zeros(checkpoint.config.vocab_size, np.float32)
        if name in plan.zeros
        else checkpoint.read(plan.tensors[name].name)
    )


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


def _widen(block: NDArray[Any], wide: NDArray[Any], bits: NDArray[Any]) -> NDArray[Any]:
    """A block in the dtype of `wide`, in the memory of `wide`; `bits` is scratch of its shape.

    bfloat16 goes through its bits to float32, eight times as fast as ml_dtypes' own loop.
    """
    wide, bits = wide[: len(block)], bits[: len(block)]
    if block.dtype.name == "bfloat16":
        np.copyto(bits, block.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
        block = bits.view(np.float32)
    np.copyto(wide, block)
    return wide
