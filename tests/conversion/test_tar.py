"""A checkpoint in a tar is read where it lies, a .tar.zst through a bounded spool, and nothing leads outside."""

from __future__ import annotations

import gc
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from gptj_conversion.convert import convert, describe
from gptj_conversion.mesh.tar import open_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_samples import MeshSample, same_bits, write_mesh_sample

from gptj.checkpoint import open_checkpoint
from gptj.errors import FormatError, GPTJError, LimitError, MissingFileError, UnsafeFileError


@pytest.fixture
def sample(tmp_path: Path) -> MeshSample:
    return write_mesh_sample(tmp_path / "model", meta=True)


def packed(folder: Path, target: Path, *, name: str = ".", **options: object) -> Path:
    with tarfile.open(target, "w", **options) as archive:  # type: ignore[call-overload]
        archive.add(folder, name)
    return target


def compressed(tar: Path) -> Path:
    target = tar.with_name(tar.name + ".zst")
    target.write_bytes(zstandard.ZstdCompressor().compress(tar.read_bytes()))
    return target


@pytest.mark.parametrize("kind", ["tar", "tar.zst"])
@pytest.mark.parametrize("name", [".", "", "step_7", "deep/er/model"])
@pytest.mark.parametrize("what", ["model", "step"])
def test_an_archive_gives_the_same_bytes_as_its_folder(sample, tmp_path, kind, name, what):
    folder = sample.path if what == "model" else sample.step_directory
    if what == "model" and name == "step_7":
        name = "somewhere"
    archive = packed(folder, tmp_path / "x.tar", name=name or "/")
    archive = compressed(archive) if kind == "tar.zst" else archive
    convert(archive, tmp_path / "out", config=sample.config_file)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(same_bits(checkpoint.read(n), values) for n, values in sample.tensors.items())
    facts = describe(archive)
    assert facts.layers == 2 and facts.format == "mesh-transformer-jax v1, slim" and "x.tar" in facts.path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_dialect_of_tar_is_read(sample, tmp_path, format):
    deep = "/".join(["a-rather-long-folder-name"] * 5) if format != tarfile.USTAR_FORMAT else "short"
    archive = packed(sample.path, tmp_path / "x.tar", name=deep, format=format)
    source = open_tar(archive, config=sample.config_file)
    assert same_bits(source.read("lm_head.weight"), sample.tensors["lm_head.weight"])


def test_the_spool_is_gone_when_the_checkpoint_is_let_go_of(sample, tmp_path):
    archive = compressed(packed(sample.path, tmp_path / "x.tar"))
    (tmp_path / "spool").mkdir()
    source = open_tar(archive, spool_directory=tmp_path / "spool")
    assert len(list((tmp_path / "spool").iterdir())) == 1
    source.read("lm_head.weight")
    del source
    gc.collect()
    assert list((tmp_path / "spool").iterdir()) == []


def test_the_spool_is_gone_after_an_error_too(tmp_path):
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as archive:
        archive.addfile(tarfile.TarInfo("readme.txt"))
    (tmp_path / "spool").mkdir()
    with pytest.raises(MissingFileError, match="no checkpoint in it"):
        open_tar(compressed(tar), spool_directory=tmp_path / "spool")
    assert list((tmp_path / "spool").iterdir()) == []


def test_W18_an_archive_that_unpacks_to_more_than_is_allowed_is_refused(tmp_path):
    bomb = tmp_path / "bomb.tar.zst"
    bomb.write_bytes(zstandard.ZstdCompressor(level=1).compress(bytes(200 * 2**20)))
    assert bomb.stat().st_size < 100_000
    (tmp_path / "spool").mkdir()
    with pytest.raises(LimitError, match=r"bomb\.tar\.zst: unpacks to more than is allowed"):
        open_tar(bomb, spool_directory=tmp_path / "spool")
    assert list((tmp_path / "spool").iterdir()) == []


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("step_7/shard_0/0.npz")
    member.type, member.linkname = kind, target
    return member


def named(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    return member


MEMBERS: dict[str, tuple[tarfile.TarInfo, type[GPTJError], str]] = {
    "symbolic link": (link(tarfile.SYMTYPE, "/etc/passwd"), UnsafeFileError, "is a symbolic link"),
    "hard link": (link(tarfile.LNKTYPE, "/etc/passwd"), UnsafeFileError, "is a hard link"),
    "character device": (named("step_7/zero", tarfile.CHRTYPE), UnsafeFileError, "is a device"),
    "block device": (named("step_7/disk", tarfile.BLKTYPE), UnsafeFileError, "is a device"),
    "fifo": (named("step_7/pipe", tarfile.FIFOTYPE), UnsafeFileError, "is a device or FIFO"),
    "upwards": (named("../../evil"), UnsafeFileError, "leads outside"),
    "upwards inside": (named("step_7/../../evil"), UnsafeFileError, "leads outside"),
    "absolute": (named("/etc/evil"), UnsafeFileError, "leads outside"),
    "backslashes": (named("step_7\\..\\evil"), UnsafeFileError, "leads outside"),
    "drive": (named("C:evil"), UnsafeFileError, "leads outside"),
    "control characters": (named("step_7/a\nb"), UnsafeFileError, "leads outside"),
    "twice": (named("step_7/shard_0/0.npz"), FormatError, "stands twice"),
    "a file in a file": (named("step_7/shard_0/0.npz/x"), FormatError, "lies in a file"),
}


@pytest.mark.parametrize("fault", MEMBERS)
@pytest.mark.parametrize("kind", ["tar", "tar.zst"])
def test_W18_a_hostile_member_is_refused_by_name(sample, tmp_path, fault, kind):
    member, error, words = MEMBERS[fault]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(sample.step_directory, "step_7")
        archive.addfile(member)
    path = compressed(tmp_path / "x.tar") if kind == "tar.zst" else tmp_path / "x.tar"
    with pytest.raises(error) as caught:
        convert(path, tmp_path / "out", config=sample.config_file)
    assert words in str(caught.value) and path.name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_W18_a_sparse_member_of_1_TB_is_refused(sample, tmp_path):
    member = tarfile.TarInfo("step_7/huge")
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "step_7/huge",
        "GNU.sparse.realsize": str(2**40),
    }
    member.size = 512
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(sample.step_directory, "step_7")
        archive.addfile(member, io.BytesIO(b"0\n".ljust(512, b"\0")))
    with pytest.raises(UnsafeFileError, match="is a sparse file"):
        open_tar(tmp_path / "x.tar")


def test_W18_a_member_larger_than_the_archive_is_refused(sample, tmp_path):
    member = tarfile.TarInfo("step_7/huge")
    member.size = 2**40
    good = packed(sample.step_directory, tmp_path / "x.tar", name="step_7")
    end = (len(good.read_bytes().rstrip(b"\0")) + 511) // 512 * 512
    good.write_bytes(good.read_bytes()[:end] + member.tobuf() + bytes(1024))
    with pytest.raises(FormatError, match=r"x\.tar"):
        open_tar(good)


def test_W18_a_header_that_says_it_is_gigabytes_long_is_not_read(tmp_path):
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, 2**33
    (tmp_path / "x.tar").write_bytes(member.tobuf() + bytes(2**20))
    with pytest.raises((LimitError, FormatError), match=r"x\.tar"):
        open_tar(tmp_path / "x.tar")


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["tar", "tar.zst"])
def test_W18_an_archive_that_is_cut_short_is_refused(sample, tmp_path, cut, kind):
    path = packed(sample.step_directory, tmp_path / "x.tar", name="step_7")
    data = path.read_bytes().rstrip(b"\0") if kind == "tar" else compressed(path).read_bytes()
    path = path if kind == "tar" else tmp_path / "x.tar.zst"
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(GPTJError, match=r"x\.tar"):
        convert(path, tmp_path / "out", config=sample.config_file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"\x28\xb5\x2f\xfd", b"hello" * 300, bytes(5000)])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(GPTJError, match=r"x\.tar"):
        open_tar(tmp_path / "x.tar")


@settings(deadline=None, max_examples=60)
@given(at=st.integers(0, 2**20), flip=st.integers(1, 255))
def test_a_mutated_archive_gives_a_checkpoint_or_one_of_our_errors(tmp_path_factory, at, flip):
    base = tmp_path_factory.getbasetemp() / "mutants"
    if not base.exists():
        base.mkdir()
        sample = write_mesh_sample(base / "model", layers=1, heads=2, head_dim=2, vocab_per_shard=2)
        packed(sample.step_directory, base / "good.tar", name="step_7")
    data = bytearray((base / "good.tar").read_bytes().rstrip(b"\0"))
    data[at % len(data)] ^= flip
    (base / "bad.tar").write_bytes(data + bytes(1024))
    try:
        source = open_tar(base / "bad.tar")
        source.read("lm_head.weight")
    except GPTJError as error:
        assert "bad.tar" in str(error)


def test_errors_name_the_archive_and_the_place_in_it(sample, tmp_path):
    (sample.step_directory / "shard_1" / "3.npz").write_bytes(b"PK\x03\x04" + struct.pack("<I", 0) * 20)
    path = packed(sample.step_directory, tmp_path / "x.tar", name="step_7")
    with pytest.raises(FormatError, match=r"x\.tar/step_7/shard_1/3\.npz: this is a zip archive that is cut short"):
        open_tar(path)


# ---- lawful oddities of archives


def header_named(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = 4
    return member


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read_with_names_longer_than_a_header_holds(sample, tmp_path, kind):
    name = "x/" + "a" * 120 + "/step_7" if kind != tarfile.USTAR_FORMAT else "a" * 80 + "/" + "b" * 60 + "/step_7"

    def stamped(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = 1.5  # which only a pax record holds
        member.uname = "Jürgen"
        return member

    with tarfile.open(tmp_path / "x.tar", "w", format=kind, pax_headers={"comment": "a commit"}) as archive:
        archive.add(sample.step_directory, name, filter=stamped if kind == tarfile.PAX_FORMAT else None)
    source = open_tar(tmp_path / "x.tar", config=sample.config_file)
    assert all(same_bits(source.read(name), tensor) for name, tensor in sample.tensors.items())


def raw_members(
    sample: MeshSample, *, kind: bytes = b"0", magic: bytes = b"ustar\x0000", base_256: bool = False
) -> bytes:
    """A tar of the sample by another hand: no folders, and headers as old or large programs write them."""
    out = b""
    for path in sorted(sample.step_directory.glob("shard_*/*.npz")):
        data = path.read_bytes()
        size = b"\x80" + len(data).to_bytes(11, "big") if base_256 else b"%011o " % len(data)
        fields = f"step_7/{path.parent.name}/{path.name}".encode().ljust(100, b"\0") + b"0000644\0" * 3
        fields += size + b"00000000000\0" + b" " * 8 + kind + bytes(100) + magic
        fields = fields.ljust(512, b"\0")
        out += fields[:148] + b"%06o\0 " % sum(fields) + fields[156:] + data + bytes(-len(data) % 512)
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"magic": b"ustar  \0"}, {"magic": bytes(8)}, {"kind": b"\0"}, {"kind": b"7"}, {"base_256": True}],
    ids=["POSIX", "GNU", "V7", "the old kind of file", "contiguous", "base 256"],
)
@pytest.mark.parametrize("end", [512, 1024, 10240, 2**20])
def test_headers_of_old_and_large_programs_are_read(sample, tmp_path, options, end):
    (tmp_path / "x.tar").write_bytes(raw_members(sample, **options) + bytes(end))
    source = open_tar(tmp_path / "x.tar", config=sample.config_file)
    assert same_bits(source.read("lm_head.weight"), sample.tensors["lm_head.weight"])


def test_what_macos_puts_beside_each_file_is_no_file_of_the_checkpoint(sample, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(header_named("._step_7"), io.BytesIO(b"Mac "))
        archive.add(sample.step_directory, "step_7")
        archive.addfile(header_named("step_7/shard_0/._0.npz"), io.BytesIO(b"Mac "))
    source = open_tar(tmp_path / "x.tar", config=sample.config_file)
    assert same_bits(source.read("lm_head.weight"), sample.tensors["lm_head.weight"])


def in_pieces(data: bytes) -> bytes:
    return b"".join(zstandard.compress(data[at : at + 10_000]) for at in range(0, len(data), 10_000))


FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "many frames": in_pieces,
    "frames to be skipped, as pzstd writes them": lambda data: (
        b"\x50\x2a\x4d\x18\4\0\0\0size" + in_pieces(data) + b"\x5f\x2a\x4d\x18\0\0\0\0"
    ),
    "no content size": lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data),
    "no checksum": lambda data: zstandard.ZstdCompressor(write_checksum=False).compress(data),
    "a checksum": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    "a stream, a block at a time": lambda data: streamed(data),
    "long matches": lambda data: zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    ).compress(data),
    "an empty frame last": lambda data: zstandard.compress(data) + zstandard.compress(b""),
}


def streamed(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    parts = []
    for at in range(0, len(data), 3000):
        parts += [compressor.compress(data[at : at + 3000]), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*parts, compressor.flush()])


@pytest.mark.parametrize("kind", FRAMES)
def test_every_kind_of_zstandard_file_is_read(sample, tmp_path, kind):
    tar = packed(sample.step_directory, tmp_path / "x.tar", name="step_7")
    (tmp_path / "x.tar.zst").write_bytes(FRAMES[kind](tar.read_bytes()))
    source = open_tar(tmp_path / "x.tar.zst", config=sample.config_file)
    assert all(same_bits(source.read(name), tensor) for name, tensor in sample.tensors.items())


@settings(deadline=None, max_examples=60)
@given(at=st.integers(0, 2**20), flip=st.integers(1, 255), checksum=st.booleans())
def test_a_mutated_zstandard_file_gives_the_checkpoint_or_one_of_our_errors(tmp_path_factory, at, flip, checksum):
    base = tmp_path_factory.getbasetemp() / "zstandard-mutants"
    if not base.exists():
        base.mkdir()
        sample = write_mesh_sample(base / "model", layers=1, heads=2, head_dim=2, vocab_per_shard=2)
        packed(sample.step_directory, base / "good.tar", name="step_7")
    compressor = zstandard.ZstdCompressor(write_checksum=checksum)
    data = bytearray(compressor.compress((base / "good.tar").read_bytes()))
    data[at % len(data)] ^= flip
    (base / "bad.tar.zst").write_bytes(data)
    try:
        source = open_tar(base / "bad.tar.zst")
        source.read("lm_head.weight")
    except GPTJError as error:
        assert "bad.tar" in str(error)


@settings(deadline=None, max_examples=30)
@given(cut=st.integers(1, 2**20))
def test_a_zstandard_file_cut_anywhere_is_refused(tmp_path_factory, cut):
    base = tmp_path_factory.getbasetemp() / "zstandard-cuts"
    if not base.exists():
        base.mkdir()
        sample = write_mesh_sample(base / "model", layers=1, heads=2, head_dim=2, vocab_per_shard=2)
        packed(sample.step_directory, base / "good.tar", name="step_7")
    data = zstandard.ZstdCompressor(write_checksum=True).compress((base / "good.tar").read_bytes())
    (base / "cut.tar.zst").write_bytes(data[: -(cut % len(data)) or -1])
    with pytest.raises(FormatError, match=r"cut\.tar\.zst"):
        open_tar(base / "cut.tar.zst")
