"""mesh-transformer-jax v1 checkpoints, read with NumPy alone, a tensor at a time.

A checkpoint is `step_N/shard_S/{0..15}.npz` without a single name: a leaf is known by its place in the order of
`jax.tree_flatten`. That is opt_state, params, step: whatever the optimizer kept, the parameters and the step are the
last leaves. So the shapes, from the end, tell layers, widths and shards, and every header of every file is compared
with what they imply before any data is read. How leaves become tensors stands
in `dialects`; the arithmetic is here:

* cut leaves are joined along the axis that the shards cut, and transposed where the table says so;
* a layer norm is shard 0's copy, since the other copies are never trained;
* the biases behind an all-reduce count once a shard, so the tensor is their sum, made after decoding 16-bit
  values, in float64, and rounded to float32 (a sum in bfloat16 moves an 8-shard model's logits by 4.4e-3);
* the embedding's bias, which GPT-J has no tensor for, is added to every row of the embedding in float32.

The original is https://github.com/kingoflolz/mesh-transformer-jax (checkpoint.py, transformer_shard.py).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gptj.config import GPTJConfig
from gptj.dtypes import numpy_dtype
from gptj.errors import (
    ConfigError,
    FormatError,
    LimitError,
    MissingFileError,
    SchemaError,
    shown,
)
from gptj.json_file import read_json_object
from gptj.reading.buffers import Room
from gptj.reading.npz import NpyArray, NpzFile
from gptj.reading.safetensors_file import WEIGHT_DTYPES, cast
from gptj.schema import Head, TensorSpec, schema
from gptj_conversion.common.dialects import MeshLeaf, mesh_leaves
from gptj_conversion.common.source import TOKENIZER_SIGNS, Facts
from gptj_conversion.common.transpose import copy_transposed
from gptj_conversion.mesh.folder import (
    TRAINING_FILE,
    DiskFolder,
    FoundStep,
    MeshFolder,
    find_step,
    looks_like_mesh_v2,
    open_shards,
)
from gptj_conversion.mesh.leaves import count_leaves, layout_of, settle_state
from gptj_conversion.mesh.training_config import TrainingConfig, config_of

__all__ = ["MeshCheckpoint", "open_mesh", "open_mesh_folder"]

# Reading, checking and turning let go of Python's lock, so two shards are read side by side.
_THREADS = 2
_WORTH_THREADS_BYTES = 2**22

_FORMATS = {
    "full": "full",
    "slim": "slim",
    "other": "with the state of another optimizer",
}

# ---- what it is


@dataclasses.dataclass(frozen=True)
class MeshCheckpoint:
    """One step of a v1 training run, every header checked; no data has been read but the step number.

    Attributes:
        path: the step directory.
        layout: "full" (with the state of the original's optimizer), "slim", or "other" (with another state).
        step: the training step that the folder is called after, or else the one that the shards hold.
        shards, layers, width, vocab: sizes, as the files show them.
        dtype: of the parameters: float32, bfloat16, float16 or float64.
        padding: how many of the last rows of `vocab` are no tokens, as the training config says.
        config: heads, rotary width and positions included; None where no training config was given.
        assumed: the token ids of `config` that the training config does not say.
        beside, unread: the folders in which its tokenizer may lie; the tokenizer's files that lie in an archive.
        oddities: what a caller of `convert` is warned of: another optimizer, or an older step than the newest.
        notes: these, what is left out of a conversion, and what was settled without having been asked for.
        archives: the .npz files, by shard and number.
        parameters: for each shard, the place of each leaf of `mesh_leaves(layers)`.
    """

    path: Path
    layout: Literal["full", "slim", "other"]
    step: int
    shards: int
    layers: int
    width: int
    vocab: int
    padding: int
    dtype: str
    config: GPTJConfig | None
    assumed: tuple[str, ...]
    beside: tuple[Path, ...]
    unread: tuple[Path, ...]
    oddities: tuple[str, ...]
    notes: tuple[str, ...]
    archives: tuple[tuple[NpzFile, ...], ...]
    parameters: tuple[tuple[tuple[NpzFile, NpyArray], ...], ...]

    @property
    def format(self) -> str:
        """The format's name in plans and manifests."""
        return f"mesh-transformer-jax v1, {_FORMATS[self.layout]}"

    @property
    def head(self) -> Head:
        """A v1 model always has a language-model head."""
        return "causal_lm"

    def dtype_of(self, name: str) -> str:
        """The dtype of every parameter."""
        return self.dtype

    def leaves(self, name: str) -> list[tuple[int, MeshLeaf]]:
        """The leaves that make a canonical tensor, with their numbers, matrices before biases."""
        found = [(n, leaf) for n, leaf in enumerate(mesh_leaves(self.layers)) if leaf.tensor == name]
        if not found:
            raise SchemaError("no such tensor", file=self.path, where=name)
        return sorted(found, key=lambda pair: -len(pair[1].axes))

    def origin(self, name: str) -> str:
        """How a tensor is made, in words: the leaves and the rule."""
        leaves = self.leaves(name)
        made = "; then ".join(f"{_rule(leaf, self.shards)} ({leaf.path})" for _, leaf in leaves)
        cut = self.padding and "vocab" in leaves[0][1].axes
        return f"{made}; the rows that pad the vocabulary ({self.padding}) left out" if cut else made

    def origin_files(self, name: str) -> tuple[str, ...]:
        """The archives, by their path below the step directory."""
        places = {
            f"shard_{shard}/{self.parameters[shard][number][0].path.name}": None
            for number, leaf in self.leaves(name)
            for shard in range(1 if leaf.cut is None and leaf.copies == "first" else self.shards)
        }
        return tuple(places)

    def read(
        self,
        row: TensorSpec | str,
        dtype: Any = None,
        *,
        allow_overflow: bool = False,
        room: Room | None = None,
    ) -> NDArray[Any]:
        """A canonical tensor in the checkpoint's dtype or in `dtype`, in the memory of `room` or in its own.

        Never more than the tensor, one copy of a summed bias and two buffers are in memory.

        Raises:
            FormatError: a file changed or is damaged.
            SchemaError: there is no such tensor, or a value overflows `dtype`.
        """
        name = row if isinstance(row, str) else row.name
        wanted = numpy_dtype(self.dtype if dtype is None else dtype)
        (number, leaf), *added = self.leaves(name)

        def fit(values: NDArray[Any]) -> NDArray[Any]:
            return cast(values, wanted, where=name, file=self.path, allow_overflow=allow_overflow)

        if leaf.copies == "sum":
            return fit(self._sum(number))
        whole = self._whole_shape(leaf)
        out = _allocate(whole[::-1] if leaf.transposed else whole, wanted, self.path, name, room)
        bias = self._sum(added[0][0]) if added else None
        if bias is not None and not bias.any():
            bias = None

        def fill(shard: int) -> None:
            archive, array = self.parameters[shard][number]
            place = out if leaf.cut is None else self._part(out, leaf, shard)
            for start, block in archive.rows(array):
                if bias is not None:
                    block = block.astype(bias.dtype) + bias
                rows = slice(start, start + len(block))
                if leaf.transposed:
                    copy_transposed(place[:, rows], fit(block))
                else:
                    place[rows] = fit(block)

        pieces_to_read = range(1 if leaf.cut is None else self.shards)
        if out.nbytes < _WORTH_THREADS_BYTES:
            for shard in pieces_to_read:
                fill(shard)
        else:
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="gptj-read") as threads:
                list(threads.map(fill, pieces_to_read))
        return out[: len(out) - self.padding] if "vocab" in leaf.axes else out

    def facts(self) -> Facts:
        """What it is, and what seems strange about it."""
        problems = [*self.notes]
        problems += [f"the copies of {path} differ between shards" for path in self.copies_differ()]
        if self.config is None:
            problems.append("heads, rotary width and positions are not in the files: convert needs the training config")
        config = self.config
        rows = schema(
            config or GPTJConfig(vocab_size=self.vocab, n_embd=self.width, n_layer=self.layers, n_head=1, rotary_dim=2)
        )
        return Facts(
            path=str(self.path),
            format=self.format,
            step=self.step,
            shards=self.shards,
            layers=self.layers,
            width=self.width,
            heads=None if config is None else config.n_head,
            rotary_width=None if config is None else config.rotary_width,
            positions=None if config is None else config.n_positions,
            vocab=self.vocab - self.padding,
            dtype=self.dtype,
            tensors=len(rows),
            parameters=sum(row.size for row in rows),
            bytes=sum(archive.archive.nbytes for files in self.archives for archive in files),
            problems=tuple(problems),
        )

    def copies_differ(self) -> list[str]:
        """The summed biases whose copies are not the same in every shard.

        Training gives each copy the same gradient, so a difference says that the shards may not belong together.
        """
        different = []
        for number, leaf in enumerate(mesh_leaves(self.layers)):
            if leaf.cut is None and leaf.copies != "first":
                copies = [archive.read(array).tobytes() for archive, array in (s[number] for s in self.parameters)]
                if len(set(copies)) > 1:
                    different.append(leaf.path)
        return different

    def _whole_shape(self, leaf: MeshLeaf) -> tuple[int, ...]:
        return leaf.shape(_axis_sizes(self.width, self.vocab), 1)

    def _part(self, out: NDArray[Any], leaf: MeshLeaf, shard: int) -> NDArray[Any]:
        """The view of `out` that a shard's piece of a cut leaf fills."""
        assert leaf.cut is not None
        axis = len(leaf.axes) - 1 - leaf.cut if leaf.transposed else leaf.cut
        size = out.shape[axis] // self.shards
        part = slice(shard * size, (shard + 1) * size)
        return out[part] if axis == 0 else out[:, part]

    def _sum(self, number: int) -> NDArray[Any]:
        """The sum of a leaf's copies: in float64, rounded once to float32 (float64 for a float64 checkpoint)."""
        copies = [archive.read(array).astype(np.float64) for archive, array in (s[number] for s in self.parameters)]
        total: NDArray[Any] = np.asarray(sum(copies[1:], start=copies[0]))
        return total if self.dtype == "float64" else total.astype(np.float32)


def _rule(leaf: MeshLeaf, shards: int) -> str:
    if leaf.copies == "sum onto every row":
        return f"the sum of {shards} copies in float32, added to every row"
    if leaf.copies == "sum":
        return f"the sum of {shards} copies in float32"
    if leaf.cut is None:
        return "the copy of shard 0"
    return f"{shards} pieces joined on axis {leaf.cut}" + (", transposed" if leaf.transposed else "")


def _axis_sizes(width: int, vocab: int) -> dict[str, int]:
    return {"vocab": vocab, "embed": width, "heads": width, "mlp": 4 * width, "norm": width}


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any], path: Path, name: str, room: Room | None) -> NDArray[Any]:
    try:
        return (room or Room()).array(shape, dtype)
    except (MemoryError, ValueError):
        gigabytes = math.prod(shape) * dtype.itemsize / 1e9
        raise LimitError(f"needs {gigabytes:.3g} GB of memory, more than there is", file=path, where=name) from None


# ---- opening


def open_mesh(
    path: str | os.PathLike[str],
    *,
    config: TrainingConfig | GPTJConfig | str | os.PathLike[str] | None = None,
    follow_links: bool = False,
) -> MeshCheckpoint:
    """The checkpoint in a step directory, or the newest in a model directory. Only headers are read.

    Args:
        path: `step_N`, or the folder above it.
        config: the training config or its file (or a GPTJConfig); needed to convert, not to look. None takes the
            training_config.json beside the step directory, where our own writer left one.
        follow_links: accept links that lead out of `path`.

    Raises:
        MissingFileError: a shard or one of its files is missing.
        FormatError: a file is malformed or cut short, or the checkpoint is of the v2 model.
        SchemaError: shards disagree, or their leaves are not those of a GPT-J.
        ConfigError: the training config breaks its rules or contradicts the files.
        UnsafeFileError: a file holds pickled objects, or a link leads out of `path`.
    """
    return open_mesh_folder(DiskFolder(Path(path), follow_links), config)


def open_mesh_folder(
    folder: MeshFolder, config: TrainingConfig | GPTJConfig | str | os.PathLike[str] | None = None
) -> MeshCheckpoint:
    """`open_mesh`, wherever the folder is: on the disk or in an archive."""
    found = find_step(folder)
    above, step_folder = found.above, found.folder
    step_directory = step_folder.path
    if looks_like_mesh_v2(step_folder):
        raise FormatError(
            "a checkpoint of mesh-transformer-jax's v2 model, which is no GPT-J",
            file=step_directory,
            found="params/ and param_order in place of shard_0/",
            hint="Its layers have a gated MLP and biases on query, value and key; only v1 (shard_0/0.npz) is GPT-J",
        )
    archives = open_shards(step_folder)
    shards = len(archives)
    flat = [[(archive, array) for archive in files for array in archive.arrays] for files in archives]
    count, layers = count_leaves(archives, [array.shape for _, array in flat[0]], step_directory)
    state = settle_state([[array.shape for _, array in leaves[: -count - 1]] for leaves in flat], step_directory)
    parameters = tuple(tuple(leaves[-count - 1 : -1]) for leaves in flat)
    layout = layout_of(state, [array.shape for _, array in parameters[0]])
    dtype = _settle_dtype(parameters)
    width, vocab = _settle_sizes(parameters, layers, step_directory)
    step_inside = _settle_step([leaves[-1] for leaves in flat], step_directory)
    step = step_inside if found.number is None else found.number
    if config is None and above is not None and TRAINING_FILE in above.names():
        config = config_of(above.read_json(TRAINING_FILE), file=above.path / TRAINING_FILE)
    if config is not None and not isinstance(config, TrainingConfig | GPTJConfig):
        config = config_of(read_json_object(config, error=ConfigError), file=config)
    settled = None if config is None else _settle_config(config, layers, width, vocab, shards)
    folders = [one for one in (step_folder, above) if one is not None]
    padding = config.n_vocab_padding if isinstance(config, TrainingConfig) else 0
    oddities = tuple(_oddities(found, layout, len(state)))
    return MeshCheckpoint(
        step_directory, layout, step, shards, layers, width, vocab, padding, dtype, settled,
        assumed=config.assumed if isinstance(config, TrainingConfig) else (),
        beside=tuple(one.path for one in folders if isinstance(one, DiskFolder)),
        unread=tuple(
            one.path / name
            for one in folders
            for name in TOKENIZER_SIGNS
            if not isinstance(one, DiskFolder) and name in one.names()
        ),
        oddities=oddities,
        notes=(*oddities, *_notes(found, layout, step_inside, padding)),
        archives=archives,
        parameters=parameters,
    )  # fmt: skip


def _oddities(found: FoundStep, layout: str, state: int) -> Iterator[str]:
    """What may not be what the user thinks it is, without paths: it also goes into the manifest."""
    if found.note:
        yield found.note
    if layout == "other":
        yield (
            f"what stands before the parameters (leaves: {state}) is the state of an optimizer that is not the "
            "original's, and left out: the parameters and the step are the last leaves"
        )


def _notes(found: FoundStep, layout: str, step: int, padding: int) -> Iterator[str]:
    """What a user should know besides."""
    if found.number not in (None, step):
        yield f"the folder is called {found.folder.path.name}, and the step inside is {step}: the folder's name counts"
    if layout == "full":
        yield "the optimizer's state (Adam's moments) is left out: the parameters alone are converted"
    if padding:
        yield f"the rows that pad the vocabulary (n_vocab_padding: {padding}) are left out"


def _settle_dtype(parameters: tuple[tuple[tuple[NpzFile, NpyArray], ...], ...]) -> str:
    """The one dtype of all parameters."""
    wanted = parameters[0][0][1].dtype
    for leaves in parameters:
        for archive, array in leaves:
            if array.dtype != wanted or array.dtype.name not in WEIGHT_DTYPES:
                raise SchemaError(
                    "not the dtype of the other parameters" if array.dtype != wanted else "not a dtype of weights",
                    file=archive.path,
                    where=array.member.name,
                    expected=wanted.name if array.dtype != wanted else " or ".join(WEIGHT_DTYPES),
                    found=array.dtype.name,
                )
    return wanted.name


def _settle_sizes(
    parameters: tuple[tuple[tuple[NpzFile, NpyArray], ...], ...], layers: int, directory: Path
) -> tuple[int, int]:
    """Width and vocabulary, after every leaf of every shard has been found to have the shape that they imply."""
    shards = len(parameters)
    leaves = mesh_leaves(layers)
    by_axes = {leaf.axes: n for n, leaf in reversed(list(enumerate(leaves)))}

    def array(axes: tuple[str, ...], ndim: int) -> NpyArray:
        archive, found = parameters[0][by_axes[axes]]
        if len(found.shape) != ndim:
            raise SchemaError(
                f"wrong shape for {leaves[by_axes[axes]].path}",
                file=archive.path,
                where=found.member.name,
                expected=f"{ndim} axes",
                found=found.shape,
            )
        return found

    width = array(("embed",), 1).shape[0]
    query = array(("embed", "heads"), 2).shape
    vocab = array(("vocab", "embed"), 2).shape[0] * shards
    implied = width // query[1] if query[0] == width and query[1] and width % query[1] == 0 else shards
    if implied != shards:
        problem = f"shard {shards} of {implied} is missing" if implied > shards else "too many shards"
        raise (MissingFileError if implied > shards else SchemaError)(
            problem,
            file=directory / f"shard_{min(shards, implied)}",
            expected=f"{implied} shards, since a shard has {query[1]} of {width} columns of a query matrix",
            found=shards,
        )
    sizes = _axis_sizes(width, vocab)
    for shard in parameters:
        for leaf, (archive, found) in zip(leaves, shard, strict=True):
            wanted = leaf.shape(sizes, shards)
            if found.shape != wanted:
                raise SchemaError(
                    f"wrong shape for {leaf.path}",
                    file=archive.path,
                    where=found.member.name,
                    expected=f"{wanted} in each of {shards} shards of width {width} and vocabulary {vocab}",
                    found=found.shape,
                )
    if min(width, vocab) == 0:
        raise SchemaError(
            "an empty model", file=directory, expected="width and vocabulary above 0", found=(width, vocab)
        )
    return width, vocab


def _settle_step(places: list[tuple[NpzFile, NpyArray]], directory: Path) -> int:
    """The training step, the last leaf, which must be the same in every shard."""
    steps = []
    for archive, array in places:
        if array.shape != () or array.dtype.kind not in "iu":
            raise SchemaError(
                "the last leaf is not the step",
                file=archive.path,
                where=array.member.name,
                expected="one whole number",
                found=f"{array.dtype.name} {array.shape}",
            )
        steps.append(int(archive.read(array)))
    for shard, step in enumerate(steps):
        if step != steps[0]:
            raise SchemaError(
                "the shards are of different training steps",
                file=directory / f"shard_{shard}",
                expected=f"step {steps[0]}, as in shard_0",
                found=f"step {step}",
            )
    return steps[0]


def _settle_config(config: TrainingConfig | GPTJConfig, layers: int, width: int, vocab: int, shards: int) -> GPTJConfig:
    """The model's config, after what the files show has been found to agree."""
    if isinstance(config, TrainingConfig):
        facts = {"layers": layers, "d_model": width, "stored_vocab": vocab, "cores_per_replica": shards}
        heads, heads_key, file = config.n_heads, "n_heads", config.file
        spelt = {"stored_vocab": "n_vocab + n_vocab_padding" if config.n_vocab_padding else "n_vocab"}
    else:
        facts = {"n_layer": layers, "n_embd": width, "vocab_size": vocab, "inner_width": 4 * width}
        heads, heads_key, file, spelt = config.n_head, "n_head", None, {}
        _require_computable(config)
    problems = [
        f"{spelt.get(key, key)} is {getattr(config, key)}, the files show {found}"
        for key, found in facts.items()
        if getattr(config, key) not in (None, found)
    ]
    if problems:
        raise ConfigError("contradicts the checkpoint: " + "; ".join(problems), file=file)
    if heads % shards:
        raise ConfigError(
            "breaks its rule", file=file, where=heads_key, expected=f"a multiple of the {shards} shards", found=heads
        )
    return config.model_config() if isinstance(config, TrainingConfig) else config


def _require_computable(config: GPTJConfig) -> None:
    """Refuse a config.json with fields that the original has no choice of: its model would compute something else."""
    fixed: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")),
        ("layer_norm_epsilon", (1e-5,)),
        ("tie_word_embeddings", (False,)),
    )
    for field, values in fixed:
        if getattr(config, field) not in values:
            raise ConfigError(
                "not what a TPU checkpoint computes", where=field, expected=shown(values[0]),
                found=shown(getattr(config, field)), hint="Give the training config, which says it if a fork could",
            )  # fmt: skip
