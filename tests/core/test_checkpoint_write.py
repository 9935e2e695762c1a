"""What is written is right, opens elsewhere, and says what it holds."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checkpoint_samples import CONFIG, array_of, arrays, write_sample
from safetensors import safe_open

from gptj.checkpoint import open_checkpoint, verify_checkpoint, write_checkpoint
from gptj.config.schema import schema
from gptj.errors import FormatError, InputError, MissingFileError, SchemaError, WriteError
from gptj.reading import safetensors_file
from gptj.writing import output_file, stored_tensor
from gptj.writing.output_directory import OutputDirectory

WTE = "transformer.wte.weight"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


@pytest.fixture(params=[64, 16 * 2**20], ids=["small blocks", "large blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module, name in ((stored_tensor, "BLOCK_BYTES"), (output_file, "BLOCK_BYTES")):
        monkeypatch.setattr(module, name, request.param)
    return int(request.param)


# ---- the bytes


@pytest.mark.parametrize("shards", [1, 3000], ids=["one tensor a shard", "3000 bytes a shard"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formats_own_library_reads_what_was_written(
    tmp_path: Path, dtype: str, shards: int, block_bytes: int
) -> None:
    directory = write_sample(tmp_path / "x", dtype=dtype, max_shard_bytes=shards)
    read: dict[str, Any] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert file.metadata()["format"] == "pt"
            read |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert {n: (a.dtype, a.tobytes()) for n, a in read.items()} == {
        n: (np.dtype(DTYPES[dtype]), a.astype(DTYPES[dtype]).tobytes()) for n, a in arrays().items()
    }


def test_the_index_names_the_shard_of_every_tensor_and_the_sum(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x", max_shard_bytes=3000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays().values())
    assert list(index["weight_map"]) == list(arrays())
    count = len(set(index["weight_map"].values()))
    assert {p.name for p in directory.glob("*.safetensors")} == {
        f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    }
    for path in directory.glob("*.safetensors"):
        held = sum(a.nbytes for a in safetensors.numpy.load_file(path).values())
        assert held <= 3000 or len(safetensors.numpy.load_file(path)) == 1


@pytest.mark.parametrize(
    "layout",
    [
        "fortran",
        "transposed view",
        "strided",
        "reversed",
        "broadcast",
        "big-endian",
        "read-only",
        "unaligned",
        "subclass",
    ],
)
def test_S9_any_memory_layout_is_written_right(tmp_path: Path, layout: str, block_bytes: int) -> None:
    def lay_out(values: np.ndarray) -> np.ndarray:
        if layout == "fortran":
            return np.asfortranarray(values)
        if layout == "transposed view":
            return values.T.copy().T
        if layout == "strided":
            return np.repeat(values, 2, axis=-1)[..., ::2]
        if layout == "reversed":
            return values[::-1].copy()[::-1]
        if layout == "broadcast":
            return np.broadcast_to(values[:1], values.shape)
        if layout == "big-endian":
            return values.astype(">f4")
        if layout == "unaligned":
            return np.frombuffer(b"x" + values.tobytes(), np.float32, offset=1).reshape(values.shape)
        if layout == "subclass":
            return values.view(np.memmap)
        values.setflags(write=False)
        return values

    given = {row.name: lay_out(array_of(row)) for row in schema(CONFIG)}
    directory = write_checkpoint(tmp_path / "x", CONFIG, lambda row: given[row.name])
    for name, read in safetensors.numpy.load_file(directory / "model.safetensors").items():
        np.testing.assert_array_equal(read, given[name].astype(np.float32), strict=True)


def test_S9_arrays_are_stored_as_they_come_when_no_dtype_is_said(tmp_path: Path) -> None:
    def read(row: Any) -> np.ndarray:
        return array_of(row).astype(np.float64 if "ln_" in row.name else ml_dtypes.bfloat16)

    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "x", CONFIG, read))
    assert {t.dtype for n, t in checkpoint.tensors.items() if "ln_" in n} == {"float64"}
    assert {t.dtype for n, t in checkpoint.tensors.items() if "ln_" not in n} == {"bfloat16"}
    assert checkpoint.config.extra["torch_dtype"] == "float64"


def test_each_row_may_have_its_own_dtype(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x", dtype=lambda row: "float32" if row.kind == "scale" else "float16")
    tensors = open_checkpoint(directory).tensors
    assert tensors["transformer.ln_f.weight"].dtype == "float32"
    assert tensors[WTE].dtype == "float16"


def test_every_tensor_lies_aligned_whatever_the_mixture(tmp_path: Path) -> None:
    """11 bfloat16 numbers are 22 bytes; what comes after them must not lie at an odd multiple of two."""
    config = CONFIG.replace(n_inner=11)

    def choose(row: Any) -> str:
        return "bfloat16" if row.name.endswith("fc_in.bias") else "float64"

    checkpoint = open_checkpoint(write_sample(tmp_path / "x", config, dtype=choose))
    for tensor in checkpoint.tensors.values():
        assert tensor.offset % DTYPES[tensor.dtype](0).nbytes == 0
    for name, array in arrays(config).items():
        np.testing.assert_allclose(checkpoint.map(name).astype(np.float64), array, rtol=2**-8)


def test_each_row_is_asked_for_once_in_schema_order_and_progress_is_told(tmp_path: Path) -> None:
    asked, told = [], []

    def read(row: Any) -> np.ndarray:
        asked.append(row.name)
        return array_of(row)

    write_checkpoint(tmp_path / "x", CONFIG, read, dtype="float16", progress=lambda *event: told.append(event))
    assert asked == list(arrays())
    assert told == [(name, 2 * array.size) for name, array in arrays().items()]


def test_the_same_model_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    one, two = write_sample(tmp_path / "a", max_shard_bytes=3000), write_sample(tmp_path / "b", max_shard_bytes=3000)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


def test_R1_writing_holds_one_tensor_and_a_few_blocks(tmp_path: Path, monkeypatch: Any) -> None:
    for module, name in ((stored_tensor, "BLOCK_BYTES"), (output_file, "BLOCK_BYTES")):
        monkeypatch.setattr(module, name, 2**16)
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 2**16)
    config = CONFIG.replace(vocab_size=40_000)  # two tensors of 1.92 MB, Fortran order, cast: three temptations to copy
    largest = 40_000 * 12 * 4
    tracemalloc.start()
    try:
        write_checkpoint(
            tmp_path / "x",
            config,
            lambda row: np.zeros(row.shape, np.float32, order="F"),
            dtype="float64",
            max_shard_bytes=10**6,
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < largest + 16 * 2**16


# ---- what is refused


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_W11_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float, dtype: str) -> None:
    given = {name: array.astype(DTYPES[dtype]) for name, array in arrays().items()}
    given[WTE][4, 2] = bad
    with pytest.raises(SchemaError, match=r"transformer\.wte\.weight: holds values that are not finite"):
        write_checkpoint(tmp_path / "x", CONFIG, lambda row: given[row.name])
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path / "x", CONFIG, lambda row: given[row.name], allow_nonfinite=True)


def test_W11_a_cast_that_overflows_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    given = arrays()
    given[WTE][4, 2] = 1e6
    with pytest.raises(SchemaError, match="does not fit float16"):
        write_checkpoint(tmp_path / "x", CONFIG, lambda row: given[row.name], dtype="float16")
    assert list(tmp_path.iterdir()) == []
    directory = write_checkpoint(
        tmp_path / "x", CONFIG, lambda row: given[row.name], dtype="float16", allow_overflow=True
    )
    assert open_checkpoint(directory).read(WTE)[4, 2] == np.inf


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((12, 11), np.float32), r"expected \(11, 12\), found \(12, 11\)"),
        (np.zeros((11, 12, 1), np.float32), "wrong shape"),
        (np.float32(1), "wrong shape"),
        (np.zeros((11, 12), np.int64), "int64"),
        (np.zeros((11, 12), object), "object"),
        (np.zeros((11, 12), "V2"), "V2"),
        (np.zeros((11, 12), np.complex64), "complex64"),
    ],
)
def test_an_array_that_is_not_the_row_is_refused_by_name(tmp_path: Path, wrong: Any, words: str) -> None:
    with pytest.raises(SchemaError, match=words) as caught:
        write_checkpoint(tmp_path / "x", CONFIG, lambda row: wrong if row.name == WTE else array_of(row))
    assert caught.value.where == WTE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"head": "lm"},
        {"dtype": "int8"},
        {"dtype": lambda row: "q4"},
        {"max_shard_bytes": 0},
        {"max_shard_bytes": 2.5},
        {"metadata": {"a": 1}},
        {"provenance": {"a": object()}},
        {"provenance": {"a": float("nan")}},
        {"extra_files": {"../x": b""}},
        {"extra_files": {"config.json": b""}},
        {"extra_files": {"model.safetensors": b""}},
        {"extra_files": {"manifest.json": b""}},
        {"extra_files": {"pytorch_model.bin": b""}},
        {"extra_files": {".hidden": b""}},
    ],
)
def test_an_argument_that_breaks_its_rule_is_refused_before_any_work(tmp_path: Path, options: Any) -> None:
    with pytest.raises(InputError):
        write_checkpoint(tmp_path / "x", CONFIG, lambda row: pytest.fail("asked for a tensor"), **options)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_reader_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    for error in (OSError(5, "from the reader"), KeyboardInterrupt(), FormatError("from the reader")):

        def read(row: Any, error: BaseException = error) -> np.ndarray:
            if row.name == "lm_head.bias":
                raise error
            return array_of(row)

        with pytest.raises(type(error)) as caught:
            write_checkpoint(tmp_path / "x", CONFIG, read)
        assert caught.value is error
        assert list(tmp_path.iterdir()) == []


# ---- the files beside the weights


def test_config_json_names_the_class_and_the_dtype(tmp_path: Path) -> None:
    config = CONFIG.replace(extra={"dtype": "float16", "torch_dtype": "float16", "mine": [1]})
    directory = write_sample(tmp_path / "x", config, head="question_answering", dtype="bfloat16")
    members = json.loads((directory / "config.json").read_text())
    assert members["architectures"] == ["GPTJForQuestionAnswering"]
    assert members["torch_dtype"] == "bfloat16"
    assert members["mine"] == [1]
    assert "dtype" not in members


def test_extra_files_and_metadata_are_written(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x", extra_files={"tokenizer.json": b"{}"}, metadata={"mine": "yes"})
    assert (directory / "tokenizer.json").read_bytes() == b"{}"
    assert open_checkpoint(directory).metadata["mine"] == "yes"


def test_the_manifest_records_files_tensors_and_provenance(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x", provenance={"source": "somewhere"}, extra_files={"a.txt": b"hello"})
    manifest = verify_checkpoint(directory)
    assert set(manifest.files) == {"model.safetensors", "config.json", "a.txt"}
    assert list(manifest.tensors) == list(arrays())
    assert manifest.provenance == {"source": "somewhere"}
    assert manifest.config_sha256 == CONFIG.architecture_sha256


@pytest.mark.parametrize("shards", [5_000_000_000, 3000])
def test_W12_a_flipped_bit_is_noticed_and_its_tensor_named(tmp_path: Path, shards: int) -> None:
    directory = write_sample(tmp_path / "x", max_shard_bytes=shards)
    tensor = open_checkpoint(directory).tensors[WTE]
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.offset + 5)
        byte = stream.read(1)[0]
        stream.seek(tensor.offset + 5)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(FormatError, match=rf"tensor {WTE} in {tensor.file.name} differs"):
        verify_checkpoint(directory)


def test_W9_two_layers_that_changed_places_are_noticed(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x")
    path = directory / "model.safetensors"
    path.write_bytes(
        path.read_bytes().replace(b".h.0.attn.q_proj", b".h.9.attn.q_proj").replace(b".h.1.attn.q_", b".h.0.attn.q_")
    )
    path.write_bytes(path.read_bytes().replace(b".h.9.attn.q_proj", b".h.1.attn.q_proj"))
    with pytest.raises(FormatError, match=r"tensor transformer\.h\.[01]\.attn\.q_proj\.weight .*differs"):
        verify_checkpoint(directory)


def test_a_changed_or_missing_file_is_noticed(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x", extra_files={"a.txt": b"hello", "b.txt": b"hello"})
    (directory / "a.txt").write_bytes(b"hallo")
    (directory / "b.txt").unlink()
    with pytest.raises(FormatError, match=r"'a\.txt' differs, 'b\.txt' is missing"):
        verify_checkpoint(directory)


def test_verifying_without_a_manifest_says_so(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x")
    (directory / "manifest.json").unlink()
    with pytest.raises(MissingFileError, match=r"manifest\.json"):
        verify_checkpoint(directory)


@pytest.mark.parametrize("text", ["{}", '{"format": 2}', '{"format": 2, "files": [], "tensors": {}}', "[]"])
def test_a_malformed_manifest_is_refused(tmp_path: Path, text: str) -> None:
    directory = write_sample(tmp_path / "x")
    (directory / "manifest.json").write_text(text)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        verify_checkpoint(directory)


# ---- where it may be written


def test_S5_a_directory_with_something_in_it_is_not_replaced_unasked(tmp_path: Path) -> None:
    write_sample(tmp_path / "x")
    before = (tmp_path / "x" / "model.safetensors").read_bytes()
    with pytest.raises(WriteError, match=r"is not empty: it holds .*Say overwrite"):
        write_sample(tmp_path / "x", seed=1)
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == before


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir(mode=0o700)
    directory = write_sample(tmp_path / "x")
    assert open_checkpoint(directory).head == "causal_lm"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_replacing_carries_other_files_over_and_leaves_old_weights_behind(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x", max_shard_bytes=3000, extra_files={"tokenizer.json": b"old"})
    (directory / "README.md").write_text("read me")
    (directory / "README.md").chmod(0o600)
    write_sample(directory, seed=1, overwrite=True, extra_files={"tokenizer.json": b"new"})
    assert {p.name for p in directory.iterdir()} == {
        "README.md",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (directory / "README.md").read_text() == "read me"
    assert stat.S_IMODE((directory / "README.md").stat().st_mode) == 0o600
    assert (directory / "tokenizer.json").read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [directory]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tf_model.h5", "flax_model-00001-of-00002.msgpack"])
def test_S5_weights_of_another_format_are_not_thrown_away(tmp_path: Path, name: str) -> None:
    directory = write_sample(tmp_path / "x")
    (directory / name).write_bytes(b"precious")
    with pytest.raises(WriteError, match="would be lost"):
        write_sample(directory, overwrite=True)
    assert (directory / name).read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_S5_a_directory_that_holds_more_than_files_is_not_replaced(tmp_path: Path, kind: str) -> None:
    directory = write_sample(tmp_path / "x")
    if kind == "folder":
        (directory / "inner").mkdir()
    elif kind == "link":
        (directory / "inner").symlink_to("config.json")
    else:
        os.mkfifo(directory / "inner")
    with pytest.raises(WriteError, match="'inner', which is not a plain file"):
        write_sample(directory, overwrite=True)


def test_S5_a_parent_that_is_missing_or_a_target_that_is_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target, words in (("a/b", "no such folder"), ("file", "is a file"), ("file/x", "not a folder")):
        with pytest.raises(WriteError, match=words):
            write_checkpoint(tmp_path / target, CONFIG, lambda row: pytest.fail("asked"), overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(WriteError):
        write_checkpoint("/", CONFIG, lambda row: pytest.fail("asked"), overwrite=True)


def test_a_link_to_a_directory_is_written_through(tmp_path: Path) -> None:
    write_sample(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write_sample(tmp_path / "link", seed=1, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    read = open_checkpoint(tmp_path / "real").read(WTE)
    np.testing.assert_array_equal(read, arrays(seed=1)[WTE])


def test_a_checkpoint_can_be_rewritten_in_place_from_itself(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x")
    source = open_checkpoint(directory)
    write_checkpoint(directory, source.config, lambda row: source.map(row.name), dtype="bfloat16", overwrite=True)
    read = open_checkpoint(directory).read(WTE)
    assert read.tobytes() == arrays()[WTE].astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "-rf",
        "new\nline",
        "emoji \U0001f600",
        "x" * 255,
        b"not utf-8 \xff\xfe".decode("utf-8", "surrogateescape"),
    ],
)
def test_S10_any_name_that_the_file_system_takes_is_written_and_read(tmp_path: Path, name: str) -> None:
    directory = write_sample(tmp_path / name)
    assert verify_checkpoint(directory).tensors
    np.testing.assert_array_equal(open_checkpoint(directory).read(WTE), arrays()[WTE])
    write_sample(directory, seed=1, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 1


def test_S6_modes_follow_the_umask_and_are_kept_where_a_file_is_replaced(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        directory = write_sample(tmp_path / "x")
        assert stat.S_IMODE(directory.stat().st_mode) == 0o750
        assert {stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()} == {0o640}
        (directory / "model.safetensors").chmod(0o604)
        directory.chmod(0o2755)
        write_sample(directory, seed=1, overwrite=True)
        assert stat.S_IMODE((directory / "model.safetensors").stat().st_mode) == 0o604
        assert stat.S_IMODE((directory / "config.json").stat().st_mode) == 0o640
        assert stat.S_IMODE(directory.stat().st_mode) == 0o2755
    finally:
        os.umask(old)


def test_S1_a_file_size_limit_is_a_write_error_and_the_old_directory_stands(tmp_path: Path) -> None:
    directory = write_sample(tmp_path / "x")
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    code = textwrap.dedent(
        f"""
        import resource
        import numpy as np
        from gptj.checkpoint import write_checkpoint, open_checkpoint
        from gptj.errors import WriteError
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        config = open_checkpoint({str(directory)!r}).config
        try:
            write_checkpoint({str(directory)!r}, config, lambda row: np.ones(row.shape, np.float32), overwrite=True)
        except WriteError as error:
            print(error)
        """
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ulimit -f" in answer.stdout
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == before
    assert list(tmp_path.iterdir()) == [directory]


# ---- two writers


def test_S4_a_second_writer_is_told_who_is_writing(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "x") as first:
        for overwrite in (False, True):
            with pytest.raises(WriteError, match=rf"is being written by (process {os.getpid()}|this process)"):
                write_sample(tmp_path / "x", overwrite=overwrite)
        first.write_file("a", b"1")
        first.commit()
    assert (tmp_path / "x" / "a").read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_S4_a_second_process_is_told_who_is_writing(tmp_path: Path) -> None:
    code = textwrap.dedent(
        f"""
        from gptj.errors import WriteError
        from gptj.writing.output_directory import OutputDirectory
        try:
            with OutputDirectory({str(tmp_path / "x")!r}):
                pass
        except WriteError as error:
            print(error)
        """
    )
    with OutputDirectory(tmp_path / "x"):
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"is being written by process {os.getpid()}" in answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_different_places_do_not_meet(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "x") as one, OutputDirectory(tmp_path / "y") as two:
        one.commit()
        two.commit()
    assert {p.name for p in tmp_path.iterdir()} == {"x", "y"}


def test_a_directory_that_appears_while_another_is_made_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="is not empty"), OutputDirectory(tmp_path / "x") as output:
        output.write_file("a", b"1")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "theirs").write_bytes(b"2")
        output.commit()
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "x") as output:
        output.write_file("a", b"1")
    assert list(tmp_path.iterdir()) == []
