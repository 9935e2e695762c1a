"""Archives of a TPU checkpoint, .tar and .tar.zst, whose headers or frames lie, repeat, or end too early."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import zstandard
from gptj_conversion.convert import convert
from mesh_samples import write_mesh_sample

from malformed import Malformed

TITLE = "archives"

BLOCK = 512
END = bytes(2 * BLOCK)
Change = Callable[[bytes], bytes]


def archive(folder: Path) -> bytes:
    """A small checkpoint's tar, without the zeros at its end."""
    sample = write_mesh_sample(folder / "model", layers=1, heads=2, head_dim=2, vocab_per_shard=2, shards=1)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as out:
        out.add(sample.step_directory, "step_7")
        end = out.offset
    return buffer.getvalue()[:end]


def packed(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(data)


def header(
    name: str = "step_7/x", kind: bytes = b"0", size: bytes = b"00000000000\0", prefix: bytes = b"", link: bytes = b""
) -> bytes:
    """A header with a right checksum, whatever its fields say."""
    fields = bytearray(BLOCK)
    fields[:100] = name.encode()[:100].ljust(100, b"\0")
    fields[100:124] = b"0000644\0" * 3
    fields[124:136] = size.ljust(12, b"\0")[:12]
    fields[136:148] = b"00000000000\0"
    fields[156:157], fields[157:257] = kind, link.ljust(100, b"\0")
    fields[257:265] = b"ustar\x0000"
    fields[345:500] = prefix.ljust(155, b"\0")
    fields[148:156] = b"%06o\0 " % (sum(fields) + 8 * 32)
    return bytes(fields)


def octal(nbytes: int) -> bytes:
    return b"%011o\0" % nbytes


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def extension(kind: bytes, data: bytes) -> bytes:
    return header("././@LongLink", kind, octal(len(data))) + padded(data)


def record(key: str, value: str) -> bytes:
    """A pax record, its length counted."""
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


def named(name: str) -> bytes:
    return extension(b"L", name.encode() + b"\0")


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return extension(kind, b"".join(records))


def tar(change: Change) -> Callable[[Path], None]:
    """Makes x.tar of a good archive without its end."""
    return lambda folder: (folder / "x.tar").write_bytes(change(archive(folder))) and None


def zst(change: Change) -> Callable[[Path], None]:
    """Makes x.tar of a good archive that was compressed in one frame with a checksum."""
    return lambda folder: (folder / "x.tar").write_bytes(change(packed(archive(folder) + END))) and None


def skippable(nbytes: int, data: bytes = b"") -> bytes:
    return b"\x50\x2a\x4d\x18" + nbytes.to_bytes(4, "little") + data


def sparse_tail(folder: Path) -> None:
    """An archive with 100 GB of zeros after its end, which take no room on the disk."""
    (folder / "x.tar").write_bytes(archive(folder) + END)
    with (folder / "x.tar").open("r+b") as file:
        file.truncate(100 * 10**9)


def sparse_frame(folder: Path) -> None:
    """A file of 4 GB that is one frame to be skipped, and nothing else."""
    with (folder / "x.tar").open("wb") as file:
        file.write(skippable(2**32 - 1))
        file.truncate(8 + 2**32 - 1)


def door(folder: Path) -> object:
    return convert(folder / "x.tar", folder / "out", config=folder / "model.json")


def opened(folder: Path) -> object:
    return convert(folder / "x.tar", folder / "out")


BASE_256_NEGATIVE = b"\xff" * 12
SIZES = {
    "a negative size in base 256": BASE_256_NEGATIVE,
    "a size of -512 in base 256": b"\xff" * 10 + b"\xfe\0",
    "the most negative size": b"\xc0" + bytes(11),
    "a base-256 size beyond any disk": b"\x80" + b"\xff" * 11,
    "a base-256 size of the archive and a bit": b"\x80" + bytes(7) + (2**20).to_bytes(4, "big"),
    "a size with a minus": b"-0000000512\0",
    "a size that is no number": b"twelve\0",
    "a size in hexadecimal": b"0x200\0",
    "a size with an 8": b"00000000800\0",
    "a size of eight terabytes": b"77777777777\0",
    "a size whose first byte is 0x81": b"\x81" + bytes(11),
    "a size of superscript digits": "²²²\0".encode("latin-1"),
}

MEMBERS: dict[str, Change] = {
    "5,000 long names in a row": lambda good: good + named("step_7/x") * 5000 + header() + END,
    "5,000 long links in a row": lambda good: good + extension(b"K", b"x\0") * 5000 + header() + END,
    "5,000 pax headers in a row": lambda good: good + pax(record("mtime", "0")) * 5000 + header() + END,
    "5,000 global pax headers in a row": lambda good: (
        good + pax(record("comment", "x"), kind=b"g") * 5000 + header() + END
    ),
    "long names and pax headers by turns": lambda good: (
        good + (named("step_7/x") + pax(record("mtime", "0"))) * 3000 + header() + END
    ),
    "a long name and no member": lambda good: good + named("step_7/x") + END,
    "a long name and the end of the file": lambda good: good + named("step_7/x"),
    "a long name of 2 MiB": lambda good: good + named("a" * 2**21) + header() + END,
    "a long name that says it has 8 GB": lambda good: good + header("x", b"L", octal(2**33 - 1)) + END,
    "a pax header that says it has 8 GB": lambda good: good + header("x", b"x", octal(2**33 - 1)) + END,
    "a long name of a negative size": lambda good: good + header("x", b"L", BASE_256_NEGATIVE) + END,
    "a pax header of a negative size": lambda good: good + header("x", b"x", BASE_256_NEGATIVE) + END,
    "a long name that is not UTF-8": lambda good: good + extension(b"L", b"\xff\xfe\0") + header() + END,
    "a pax record of no length": lambda good: good + pax(b"0 a=b\n") + header() + END,
    "a pax record of a negative length": lambda good: good + pax(b"-9 a=b\n") + header() + END,
    "a pax record longer than its header": lambda good: good + pax(b"9999 path=x\n") + header() + END,
    "a pax record whose length has 5,000 digits": lambda good: good + pax(b"9" * 5000 + b" a=b\n") + header() + END,
    "a pax record shorter than its key": lambda good: good + pax(b"4 path=x\n") + header() + END,
    "a pax record without its newline": lambda good: good + pax(b"9 path=xx") + header() + END,
    "a pax record without an equals sign": lambda good: good + pax(b"8 path.\n") + header() + END,
    "a pax header of nothing but nines": lambda good: good + pax(b"9" * 2**16) + header() + END,
    "a pax path that is not UTF-8": lambda good: good + pax(b"10 path=\xff\n") + header() + END,
    "a pax size that is negative": lambda good: good + pax(record("size", "-512")) + header() + END,
    "a pax size of 5,000 digits": lambda good: good + pax(record("size", "9" * 5000)) + header() + END,
    "a pax size of Arabic digits": lambda good: good + pax(record("size", "٥١٢")) + header() + END,
    "a pax size of a thousand terabytes": lambda good: good + pax(record("size", str(10**15))) + header() + END,
    "a pax path that leads outside": lambda good: good + pax(record("path", "../../evil")) + header() + END,
    "a global pax path": lambda good: good + pax(record("path", "step_7/y"), kind=b"g") + header() + END,
    "a global pax size": lambda good: good + pax(record("size", "0"), kind=b"g") + header() + END,
    "a sparse member of the old kind": lambda good: good + header(kind=b"S", size=octal(2**33 - 1)) + END,
    "a sparse member of pax 0.1": lambda good: (
        good + pax(record("GNU.sparse.size", str(2**50)), record("GNU.sparse.map", "0,1")) + header() + END
    ),
    "a sparse member of pax 1.0": lambda good: (
        good
        + pax(record("GNU.sparse.major", "1"), record("GNU.sparse.realsize", "9" * 4000))
        + header(size=octal(512))
        + padded(b"9" * 500)
        + END
    ),
    "a member of another volume": lambda good: good + header(kind=b"M") + END,
    "a member of a kind of one's own": lambda good: good + header(kind=b"Z") + END,
    "a folder with data": lambda good: good + header("step_7/y", b"5", octal(512)) + bytes(512) + END,
    "a file without a name": lambda good: good + header("") + END,
    "a file called as the folder it is in": lambda good: good + header("step_7") + END,
    "a name behind a prefix that leads outside": lambda good: good + header("evil", prefix=b"../..") + END,
    "a name of 17 folders": lambda good: good + header("/".join("abcdefghijklmnopq")) + END,
    "a checksum that is off by one": lambda good: good + header().replace(b"\0 0", b"\1 0", 1) + END,
    "a header of another archive's noise": lambda good: good + bytes(range(256)) * 2 + END,
    "no end at all": lambda good: good,
    "a cut in the middle of the last header": lambda good: good + header()[:300],
    "a byte after its end": lambda good: good + END + b"x",
    "another archive after its end": lambda good: good + END + good + END,
    "a page after its end": lambda good: good + END + b"<html>" * 100,
    "100,001 members": lambda good: good + b"".join([header(f"step_7/{n}") for n in range(100_001)]) + END,
}

FRAMES: dict[str, Change] = {
    "a stream cut by one byte": lambda good: good[:-1],
    "a stream cut before its checksum": lambda good: good[:-4],
    "a stream cut by half": lambda good: good[: len(good) // 2],
    "a stream cut after its magic": lambda good: good[:4],
    "a stream cut in its header": lambda good: good[:5],
    "a checksum that is wrong": lambda good: good[:-1] + bytes([good[-1] ^ 1]),
    "a changed byte in the last block": lambda good: good[:-9] + bytes([good[-9] ^ 4]) + good[-8:],
    "a byte after the last frame": lambda good: good + b"x",
    "a page after the last frame": lambda good: good + b"<html>",
    "zeros after the last frame": lambda good: good + bytes(4096),
    "half a frame after the last": lambda good: good + good[: len(good) // 2],
    "a magic after the last frame": lambda good: good + good[:4],
    "a skippable frame of 4 GB that is not there": lambda good: good + skippable(2**32 - 1),
    "a skippable frame of 4 GB first": lambda good: skippable(2**32 - 1) + good,
    "a skippable frame cut in its size": lambda good: good + skippable(0)[:6],
    "nothing but a skippable frame": lambda good: skippable(8, b"GPT-J..."),
    "150,000 empty frames": lambda good: good + packed(b"") * 150_000,
    "150,000 empty skippable frames": lambda good: good + skippable(0) * 150_000,
    "200,000 blocks of nothing": lambda good: b"\x28\xb5\x2f\xfd\0\x58" + bytes(3) * 200_000 + good[-7:],
    "a block of the reserved kind": lambda good: b"\x28\xb5\x2f\xfd\0\x58" + b"\x07\0\0",
    "a block that says it has 2 MiB": lambda good: b"\x28\xb5\x2f\xfd\0\x58" + b"\xff" * 3,
    "a frame with a dictionary": lambda good: b"\x28\xb5\x2f\xfd\x03\x58" + b"\1\2\3\4" + b"\1\0\0",
    "a reserved bit in the frame's descriptor": lambda good: good[:4] + bytes([good[4] | 8]) + good[5:],
    "a window of 3.75 TB": lambda good: b"\x28\xb5\x2f\xfd\0\xff" + b"\1\0\0",
    "a content size that is a lie": lambda good: b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 7 + b"\x7f" + b"\1\0\0",
    "another archive in a frame of its own": lambda good: good + good,
    "a zstandard file in a zstandard file": lambda good: packed(good),
    "a bomb of 64 MB": lambda good: packed(bytes(2**26)),
}

CASES = [
    *(
        Malformed(what, tar(lambda good, size=size: good + header(size=size) + END), door, "x.tar")
        for what, size in SIZES.items()
    ),
    *(Malformed(what, tar(change), door, "x.tar") for what, change in MEMBERS.items()),
    *(Malformed(what, zst(change), door, "x.tar") for what, change in FRAMES.items()),
    *(
        Malformed(
            f"{what}, compressed", zst(lambda good, change=change: packed(change(zstandard.decompress(good)[:-1024]))),
            door, "x.tar",
        )
        for what, change in list(MEMBERS.items())[:4]
    ),
    Malformed("100 GB of zeros after its end", sparse_tail, door, "x.tar"),
    Malformed("a skippable frame of 4 GB that is there", sparse_frame, opened, "x.tar"),
]  # fmt: skip
