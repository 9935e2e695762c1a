"""Opening a mesh-transformer-jax v1 checkpoint: a folder's headers, or an archive's, compared with what they imply.

A checkpoint is `step_N/shard_S/{0..15}.npz` without a single name: a leaf is known by its place in the order of
`jax.tree_flatten`. That is opt_state, params, step: whatever the optimizer kept, the parameters and the step are the
last leaves. So the shapes, from the end, tell layers, widths and shards, and every header of every file is compared
with what they imply before any data is read. How leaves become tensors stands in `checkpoint`.

The original is https://github.com/kingoflolz/mesh-transformer-jax (checkpoint.py, transformer_shard.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptj.config import GPTJConfig
from gptj.errors import (
    ConfigError,
    FormatError,
    MissingFileError,
    SchemaError,
    shown,
)
from gptj.paths.json_file import read_json_object
from gptj.reading.npz import NpyArray, NpzFile
from gptj.reading.safetensors_file import WEIGHT_DTYPES
from gptj_conversion.common.dialects import mesh_leaves
from gptj_conversion.common.source import TOKENIZER_SIGNS, Context
from gptj_conversion.mesh.checkpoint import MeshCheckpoint, axis_sizes
from gptj_conversion.mesh.folder import (
    TRAINING_FILE,
    DiskFolder,
    FoundStep,
    MeshFolder,
    find_step,
    looks_like_mesh_v2,
    open_shards,
)
from gptj_conversion.mesh.leaves import count_leaves, infer_layout, require_same_state
from gptj_conversion.mesh.training_config import TrainingConfig, parse_config

__all__ = ["open_mesh", "open_mesh_folder"]


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
    folder: MeshFolder, config: TrainingConfig | GPTJConfig | str | os.PathLike[str] | None
) -> MeshCheckpoint:
    """`open_mesh`, wherever the folder is: on the disk or in an archive."""
    found = find_step(folder, lambda step: looks_like_mesh_v2(step) or _read_headers(step))
    directory = found.folder.path
    _refuse_v2(found.folder)
    headers = _read_headers(found.folder)
    archives, parameters, layers = headers.archives, headers.parameters, headers.layers
    width, vocab, step = headers.width, headers.vocab, headers.step
    layout = infer_layout(headers.state, [array.shape for _, array in parameters[0]])
    config = _choose_config(found, config)
    derived = None if config is None else _derive_config(config, layers, width, vocab, len(archives))
    training = config if isinstance(config, TrainingConfig) else None
    padding = 0 if training is None else training.n_vocab_padding
    oddities = tuple(_list_oddities(found, layout, len(headers.state)))
    context = dataclasses.replace(
        _look_around(found),
        assumed=() if training is None else training.assumed,
        oddities=oddities,
        notes=(*oddities, *_list_notes(found, layout, step, padding)),
        step=step if found.number is None else found.number,
    )
    return MeshCheckpoint(
        directory,
        layout,
        len(archives),
        layers,
        width,
        vocab,
        padding,
        headers.dtype,
        derived,
        context,
        archives,
        parameters,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Headers:
    """The headers of a step directory's files, found to agree: a whole checkpoint's.

    Attributes:
        archives: the .npz files, by shard and number.
        state: the shapes of the leaves before the parameters.
        parameters: for each shard, the places of its parameters.
        layers, width, vocab, dtype, step: of the model.
    """

    archives: tuple[tuple[NpzFile, ...], ...]
    state: list[tuple[int, ...]]
    parameters: tuple[tuple[tuple[NpzFile, NpyArray], ...], ...]
    layers: int
    width: int
    vocab: int
    dtype: str
    step: int


def _read_headers(folder: MeshFolder) -> _Headers:
    """The headers in a step directory, or the error of what is missing, damaged or of another run."""
    archives = open_shards(folder)
    flat = [[(archive, array) for archive in files for array in archive.arrays] for files in archives]
    count, layers = count_leaves(archives, [array.shape for _, array in flat[0]], folder.path)
    state = require_same_state([[array.shape for _, array in leaves[: -count - 1]] for leaves in flat], folder.path)
    parameters = tuple(tuple(leaves[-count - 1 : -1]) for leaves in flat)
    dtype = _infer_dtype(parameters)
    width, vocab = _infer_sizes(parameters, layers, folder.path)
    step = _read_step([leaves[-1] for leaves in flat], folder.path)
    return _Headers(
        archives=archives, state=state, parameters=parameters, layers=layers, width=width, vocab=vocab, dtype=dtype,
        step=step,
    )  # fmt: skip


def _refuse_v2(step: MeshFolder) -> None:
    if looks_like_mesh_v2(step):
        raise FormatError(
            "a checkpoint of mesh-transformer-jax's v2 model, which is no GPT-J",
            file=step.path,
            found="params/ and param_order in place of shard_0/",
            hint="Its layers have a gated MLP and biases on query, value and key; only v1 (shard_0/0.npz) is GPT-J",
        )


def _choose_config(
    found: FoundStep, config: TrainingConfig | GPTJConfig | str | os.PathLike[str] | None
) -> TrainingConfig | GPTJConfig | None:
    """The config that was passed, read where it is a file; else the one that our own writer left beside the step."""
    if config is None and found.above is not None and TRAINING_FILE in found.above.names():
        return parse_config(found.above.read_json(TRAINING_FILE), file=found.above.path / TRAINING_FILE)
    if config is not None and not isinstance(config, TrainingConfig | GPTJConfig):
        return parse_config(read_json_object(config, error=ConfigError), file=config)
    return config


def _look_around(found: FoundStep) -> Context:
    """The places of a tokenizer: folders on the disk are read from, those in an archive are not."""
    folders = [one for one in (found.folder, found.above) if one is not None]
    on_disk = [one for one in folders if isinstance(one, DiskFolder)]
    packed = [one for one in folders if not isinstance(one, DiskFolder)]
    return Context(
        beside=tuple(one.path for one in on_disk),
        unread=tuple(one.path / name for one in packed for name in TOKENIZER_SIGNS if name in one.names()),
    )


def _list_oddities(found: FoundStep, layout: str, state: int) -> Iterator[str]:
    """Sentences on what the user may not expect, without paths: they also go into the manifest."""
    if found.note:
        yield found.note
    if layout == "other":
        yield (
            f"what stands before the parameters (leaves: {state}) is the state of an optimizer that is not the "
            "original's, and left out: the parameters and the step are the last leaves"
        )


def _list_notes(found: FoundStep, layout: str, step: int, padding: int) -> Iterator[str]:
    """Sentences on what is left out, and on which step counts."""
    if found.number not in (None, step):
        yield f"the folder is called {found.folder.path.name}, and the step inside is {step}: the folder's name counts"
    if layout == "full":
        yield "the optimizer's state (Adam's moments) is left out: the parameters alone are converted"
    if padding:
        yield f"the rows that pad the vocabulary (n_vocab_padding: {padding}) are left out"


def _infer_dtype(parameters: tuple[tuple[tuple[NpzFile, NpyArray], ...], ...]) -> str:
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


def _infer_sizes(
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
    sizes = axis_sizes(width, vocab)
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


def _read_step(places: list[tuple[NpzFile, NpyArray]], directory: Path) -> int:
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


def _derive_config(config: TrainingConfig | GPTJConfig, layers: int, width: int, vocab: int, shards: int) -> GPTJConfig:
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
