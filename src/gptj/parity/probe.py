"""The probe: what every backend is asked, the same arrays for all, made once and handed to each as a file.

The batch has a whole row, one padded left, one padded right and one with a hole within, so that a mask that leaks
shows; its positions exist near 0 and far out, so that a rotary table that is kept in 16 bits shows; and the prompts
to continue are padded left, as a server pads them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptj.calls.inputs import check_attention_mask, check_ids, check_labels, check_positions, integers
from gptj.config import GPTJConfig
from gptj.config.labels import IGNORED_LABEL
from gptj.errors import FormatError, InputError, LimitError, naming_file, shown
from gptj.parity.oracle import positions_of_mask
from gptj.reading.npz import NpyArray, NpzFile, open_named_npz
from gptj.writing.npz import write_npz

__all__ = ["Probe", "make_probe"]

Ids = NDArray[np.int64]

BATCH_TOKENS = 24
NEW_TOKENS = 12
PREFILL_SHARE = 2 / 3
FAR_POSITION = 1_900
LARGEST_SEED = 2**63 - 1
LARGEST_PROBE_BYTES = 2**28

_SCALARS = ("new_tokens", "prefill", "seed")
_LIKE_THE_BATCH = ("attention_mask", "position_ids", "far_position_ids", "labels")


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """The inputs that every backend is given.

    Attributes:
        input_ids, attention_mask, position_ids, labels: a batch, each int64 (b, t).
        far_position_ids: the batch's positions, all shifted by the same number: the answers must not change.
        prompt_ids, prompt_mask: int64 (rows, n), padded left: what is to be continued.
        new_tokens: by how many.
        prefill: how many of the batch's t tokens are computed at once before the rest are stepped, one at a time.
        seed: of the sampled continuation.
    """

    input_ids: Ids
    attention_mask: Ids
    position_ids: Ids
    far_position_ids: Ids
    labels: Ids
    prompt_ids: Ids
    prompt_mask: Ids
    new_tokens: int
    prefill: int
    seed: int

    def __post_init__(self) -> None:
        """Make sure that the arrays fit each other.

        Raises:
            InputError: naming the array and both shapes, or the number and its range.
        """
        for like, others in (("input_ids", _LIKE_THE_BATCH), ("prompt_ids", ("prompt_mask",))):
            shape = integers(getattr(self, like), where=like).shape
            for name in others:
                if (found := integers(getattr(self, name), where=name).shape) != shape:
                    raise InputError("of another shape", where=name, expected=shape, found=found)
        for name, lowest, highest in (
            ("new_tokens", 1, LARGEST_SEED),
            ("prefill", 1, LARGEST_SEED),
            ("seed", 0, LARGEST_SEED),
        ):
            value = getattr(self, name)
            if type(value) is not int or not lowest <= value <= highest:
                raise InputError("breaks its rule", where=name, expected=f"a whole number, {lowest} to {highest}",
                                 found=shown(value))  # fmt: skip

    def check(self, config: GPTJConfig) -> None:
        """Make sure that a model of this config can be asked.

        Raises:
            InputError: naming the array, the value and the rule.
        """
        shape = b, t = check_ids(config, self.input_ids).shape
        check_attention_mask(self.attention_mask, b, (t,))
        check_positions(config, self.position_ids, b, t)
        check_positions(config, self.far_position_ids, b, t)
        check_labels(self.labels, (shape[0], shape[1]), config.vocab_size)
        rows, n = check_ids(config, self.prompt_ids, where="prompt_ids").shape
        check_attention_mask(self.prompt_mask, rows, (n,))
        if not 1 <= self.prefill < t:
            raise InputError(
                "leaves no token for steps",
                where="prefill",
                expected=f"1 to {t - 1}",
                found=self.prefill,
            )
        if n + self.new_tokens > config.n_positions:
            raise InputError(
                "does not fit behind the prompt",
                where="new_tokens",
                expected=f"1 to {config.n_positions - n}",
                found=self.new_tokens,
            )

    def as_arrays(self) -> dict[str, NDArray[np.int64]]:
        """Every field as an int64 array by name."""
        return {
            field.name: np.asarray(getattr(self, field.name), np.int64).copy() for field in dataclasses.fields(self)
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz that `load` reads, whole or not at all.

        Raises:
            WriteError: it could not be written.
        """
        write_npz(Path(path), self.as_arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Probe:
        """The probe in the .npz at `path`.

        Raises:
            MissingFileError, FormatError: there is none, or it is something else.
            GPTJError: see `gptj.reading.npz.open_named_npz`.
        """
        file, arrays = open_named_npz(Path(path), [field.name for field in dataclasses.fields(cls)], noun="probe")
        with naming_file(path):
            return cls.read(file, arrays)

    @classmethod
    def read(cls, file: NpzFile, arrays: Mapping[str, NpyArray]) -> Probe:
        """The probe whose arrays, by the names of its fields, lie in a file whose headers were checked.

        Raises:
            FormatError: an array is no probe's.
        """
        for name, array in arrays.items():
            axes = 0 if name in _SCALARS else 2
            if array.dtype.name not in ("int64", "int32") or len(array.shape) != axes:
                raise FormatError(
                    "not a probe's array",
                    file=file.path,
                    where=name,
                    expected=f"whole numbers, {axes} axes",
                    found=f"{array.dtype.name} {array.shape}",
                )
        if sum(array.nbytes for array in arrays.values()) > LARGEST_PROBE_BYTES:
            raise LimitError("too large a probe", file=file.path, expected=f"at most {LARGEST_PROBE_BYTES} bytes")
        try:
            return cls.of({name: file.read(array).astype(np.int64) for name, array in arrays.items()})
        except InputError as error:
            raise FormatError(error.problem, **error.facts(file=file.path)) from None

    @classmethod
    def of(cls, arrays: dict[str, NDArray[np.int64]]) -> Probe:
        """The probe of `as_arrays`."""
        return cls(**{name: int(value) if name in _SCALARS else value for name, value in arrays.items()})  # type: ignore[arg-type]


def require_seed(seed: int) -> None:
    """Raise InputError unless a probe can be made of `seed`."""
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        expected = f"a whole number, 0 to {LARGEST_SEED}"
        raise InputError("breaks its rule", where="seed", expected=expected, found=shown(seed))


def require_no_seed(seed: int | None, given: object) -> None:
    """Raise InputError where a seed is given beside what would be drawn with it."""
    if seed is not None and given is not None:
        raise InputError("given, though nothing is drawn", where="seed", expected="prompts or a seed",
                         found=shown(seed))  # fmt: skip


def make_probe(config: GPTJConfig, *, seed: int = 0) -> Probe:
    """A probe for a model of this config: random tokens, four rows of 24 and two prompts, or shorter ones that fit.

    Raises:
        InputError: the model has fewer than 8 positions or 2 tokens, or the seed breaks its rule.
    """
    require_seed(seed)
    if config.n_positions < 8 or config.vocab_size < 2:
        raise InputError("too small a model for a probe", expected="8 positions and 2 tokens at least")
    t = min(BATCH_TOKENS, config.n_positions)
    random = np.random.Generator(np.random.Philox(seed))
    ids = random.integers(0, config.vocab_size, (4, t))
    mask = np.ones((4, t), np.int64)
    mask[1, : t // 5 + 1] = 0
    mask[2, -(t // 4) :] = 0
    mask[3, t // 3 : t // 3 + 2] = 0
    positions = positions_of_mask(mask)
    shift = min(FAR_POSITION, config.n_positions - 1 - int(positions.max()))

    n = min(t // 2, config.n_positions // 2)
    prompt_mask = np.ones((2, n), np.int64)
    prompt_mask[1, : n // 3] = 0
    return Probe(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        far_position_ids=positions + shift,
        labels=np.where(mask == 1, ids, IGNORED_LABEL),
        prompt_ids=random.integers(0, config.vocab_size, (2, n)),
        prompt_mask=prompt_mask,
        new_tokens=min(NEW_TOKENS, config.n_positions - n),
        prefill=max(1, int(t * PREFILL_SHARE)),
        seed=seed,
    )
