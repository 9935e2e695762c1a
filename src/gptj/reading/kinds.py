"""Names for files that are not what their names say, and for folders that are no model's; for messages alone.

A file is told by its first bytes; a folder by the names in it, with where the weights are or how to get them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["HEAD_BYTES", "describe_file", "describe_folder", "describe_no_safetensors"]

HEAD_BYTES = 512
"""The number of a file's first bytes that `describe_file` looks at."""

_ARCHIVES = (
    (b"\x1f\x8b", "a gzip file (unpack it, as with `tar xzf FILE`, and give the folder)"),
    (b"BZh", "a bzip2 file (unpack it, as with `tar xjf FILE`, and give the folder)"),
    (b"\xfd7zXZ\0", "an xz file (unpack it, as with `tar xJf FILE`, and give the folder)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive (unpack it and give the folder)"),
    (b"Rar!", "a rar archive (unpack it and give the folder)"),
    (b"PK\x05\x06", "an empty zip archive"),
)
_OTHERS = (
    (b"version https://git-lfs", "a git-lfs pointer (fetch the file itself with `git lfs pull`)"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a single .npy array"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file"),
    (b"\x80\x02", "a pickle, as torch.save wrote it before 1.6"),
    (b"<?xml", "an XML page (a download that answered with an error?)"),
    (b"{", "a JSON file (a download that answered with an error?)"),
)

_MERGE = "Merge it into its base: gptj adapter merge BASE ADAPTER OUT; or with PEFT, merge_and_unload(), and save"
_ONE_WAY = "It is converted one way only: take the original model"

# A sign among the folder's names, what that makes of it, and what to do.
_FOLDERS: tuple[tuple[str, str, str], ...] = (
    (r"adapter_config\.json|adapter_model\.(safetensors|bin)", "a PEFT (LoRA) adapter without its base model", _MERGE),
    (
        r"zero_pp_rank_.*|.*_optim_states\.pt|.*_model_states\.pt|zero_to_fp32\.py|global_step\d+",
        "a DeepSpeed checkpoint, whose weights lie in parts in {}",
        "Gather them: python zero_to_fp32.py DIR OUT, then convert OUT/pytorch_model.bin",
    ),
    (
        r".*\.distcp|\.metadata|pytorch_model_fsdp_\d+",
        "an FSDP (torch.distributed) checkpoint, whose weights lie in parts in {}",
        "Gather them: accelerate merge-weights DIR OUT",
    ),
    (
        r"mp_rank_\d+(_\d+)?|iter_\d{5,}|latest_checkpointed_iteration\.txt",
        "a Megatron checkpoint, whose weights lie in parts in {}",
        "Gather and convert them with the tools of the trainer that wrote it",
    ),
    (r".*\.gguf|.*ggml.*\.bin", "a GGUF (llama.cpp) model: {}", _ONE_WAY),
    (r".*\.onnx", "an ONNX model: {}", _ONE_WAY),
    (r"model\.bin", "a CTranslate2 model: {}", _ONE_WAY),
    (r"saved_model\.pb|.*\.keras", "a Keras model: {}", "Save it with transformers' save_pretrained"),
    (
        r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt|checkpoint_\d+|.*\.orbax.*|ocdbt\..*",
        "an orbax or t5x checkpoint: {}",
        "Restore it there, and save the parameters with transformers' save_pretrained",
    ),
    (
        r".*\.data-\d{5}-of-\d{5}|.*\.ckpt-\d+\.(index|meta)",
        "a checkpoint of TensorFlow's, without names of a model's: {}",
        "Restore it there, and save it with transformers' save_pretrained",
    ),
    (
        r"step_\d+|shard_\d+",
        "a TPU checkpoint, as mesh-transformer-jax writes it: {}",
        "Convert it: gptj convert {dir} OUT",
    ),
    (
        r".*\.npz",
        "a folder of NumPy arrays: {}",
        "Save them as safetensors under transformers' names, or give the step folder of a TPU checkpoint",
    ),
    (
        r"random_states_\d+\.pkl|optimizer\.(bin|pt|safetensors)|scheduler\.(bin|pt)|trainer_state\.json|training_args\.bin",
        "a trainer's state without the model's weights: {}",
        "Give the folder that save_pretrained wrote, or save the model again",
    ),
    (
        r"checkpoints",
        "a run of training that has not ended, whose checkpoints lie in {}",
        "Give the last of them, a folder step-...; gptj finetune ... --resume goes on with the run",
    ),
    (r"step-\d{8,}", "the checkpoints of a run of training: {}", "Give the last of them"),
    (r"checkpoint-\d+", "a trainer's output folder, whose checkpoints lie in {}", "Give one of them"),
    (r"snapshots|models--.+", "a folder of the hub's cache; the models lie in {}", "Give .../snapshots/REVISION"),
    (r".*\.(ckpt|pth?|safetensors|bin|h5|msgpack)", "a folder whose weights have another name: {}",
     "Choose the file: gptj convert {dir} OUT --weights {name}"),
)  # fmt: skip


def describe_file(head: bytes, size: int) -> str | None:
    """A name for a file of `size` bytes that begins with `head`, as "this is ..." goes on; None where it has none.

    >>> describe_file(b"<!DOCTYPE html><html>", 4000)
    'an HTML page (a download that answered with an error?)'
    """
    if size == 0:
        return "an empty file"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a download that answered with an error?)"
    if _is_safetensors(head, size):
        return "a safetensors file (call it model.safetensors, beside its config.json)"
    if head.startswith(b"PK\x03\x04"):
        return _zip(head)
    if head[257:262] == b"ustar":
        return "a tar archive"
    if not head.strip(b"\0"):
        return "nothing but zeros (a download that was never filled?)"
    return next((what for magic, what in (*_ARCHIVES, *_OTHERS) if head.startswith(magic)), None)


def _zip(head: bytes) -> str:
    """A name for a zip archive, by the name of its first member."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b".npy"):
        return "an .npz archive of arrays"
    if name.endswith((b"/data.pkl", b"/.format_version", b"/byteorder")):
        return "a PyTorch file (call it pytorch_model.bin, beside its config.json)"
    return "a zip archive (unpack it and give the folder)"


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= size - 8


def describe_folder(directory: Path, *, by_weights: bool = True) -> tuple[str, str] | None:
    """A name for a folder that holds no model's weights, and a hint; None where no sign of any kind is in it.

    Args:
        directory: the folder.
        by_weights: whether a file of weights by any name is a sign.
    """
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError:
        return None
    for sign, kind, hint in _FOLDERS if by_weights else _FOLDERS[:-1]:
        matches: Callable[[str], re.Match[str] | None] = re.compile(sign).fullmatch
        found = next((name for name in names if matches(name)), None)
        if found is not None and not (sign == r"model\.bin" and "config.json" not in names):
            hint = hint.replace("DIR", str(directory)).replace("{dir}", str(directory)).replace("{name}", found)
            return kind.format(found), hint
    return None


def describe_no_safetensors(head: bytes, file_bytes: int) -> str | None:
    """A name for a file that should be safetensors and is not, by its first bytes and its size, or None."""
    if file_bytes == 0:
        return "an empty file"
    beginnings = {
        b"version https://git-lfs": "a git-lfs pointer (fetch the file itself with `git lfs pull`)",
        b"\x1f\x8b": "a gzip file",
        b"PK\x03\x04": "a zip archive (a PyTorch .bin, a Keras model or an .npz?)",
        b"\x89HDF\r\n": "an HDF5 file",
        b"\x28\xb5\x2f\xfd": "a zstandard file",
        b"\x80\x02": "a pickle",
        b"\x80\x03": "a pickle",
        b"\x80\x04": "a pickle",
        b"\x80\x05": "a pickle",
    }
    for beginning, kind in beginnings.items():
        if head.startswith(beginning):
            return kind
    text = head[:512].lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a download that answered with an error?)"
    return "an XML page (a download that answered with an error?)" if text.startswith(b"<?xml") else None
