"""What a file is that is not what its name says, told by its first bytes; for messages alone."""

from __future__ import annotations

__all__ = ["HEAD_BYTES", "kind_of"]

HEAD_BYTES = 512
"""How many of a file's first bytes `kind_of` looks at."""

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


def kind_of(head: bytes, size: int) -> str | None:
    """What a file of `size` bytes that begins with `head` is, as "this is ..." goes on; None where it is not known.

    >>> kind_of(b"<!DOCTYPE html><html>", 4000)
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
    """Which zip it is, by the name of its first member."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b".npy"):
        return "an .npz archive of arrays"
    if name.endswith((b"/data.pkl", b"/.format_version", b"/byteorder")):
        return "a PyTorch file (call it pytorch_model.bin, beside its config.json)"
    return "a zip archive (unpack it and give the folder)"


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= size - 8
