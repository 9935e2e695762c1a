"""Tokenizer, generation_config.json, bos and eos go with the weights through every format, and never drift apart."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from gptj_conversion.convert import convert, plan, target_formats
from mesh_samples import write_mesh_sample

from gptj import GPTJConfig, GPTJTokenizer
from gptj.checkpoint import write_checkpoint
from gptj.errors import ConfigError, TokenizerError, WriteError
from gptj.generation.config import GenerationConfig
from gptj.parity.revealing import revealing_fill
from gptj.reading.manifest import Manifest

VOCAB = 264
CONFIG = GPTJConfig(vocab_size=VOCAB, n_positions=32, n_embd=16, n_layer=1, n_head=2, rotary_dim=8)
TOKENIZER = GPTJTokenizer.train(["to be or not to be"] * 9, VOCAB)
END = VOCAB - 1
"""The id of the tokenizer's end of text."""


def canonical(path: Path, *, eos: Any, generation: GenerationConfig | None = None, tokenizer: bool = True) -> Path:
    files = {} if generation is None else {"generation_config.json": generation.to_json().encode()}
    if tokenizer:
        files |= TOKENIZER.files()
    config = CONFIG.replace(eos_token_id=eos, bos_token_id=eos if isinstance(eos, int) else None)
    return write_checkpoint(path, config, revealing_fill(0), extra_files=files)


@pytest.fixture
def mesh(tmp_path: Path) -> tuple[Path, Path]:
    """A TPU checkpoint as the original writes it, a tokenizer beside its step folder, and its training config."""
    sample = write_mesh_sample(tmp_path / "tpu", vocab_per_shard=VOCAB // 2)
    TOKENIZER.save_pretrained(sample.path)
    return sample.path, sample.config_file


def notes_of(src: Path, **options: Any) -> str:
    return "\n".join(plan(src, src.parent / "planned", **options).notes)


@pytest.mark.parametrize("below", ["", "step_7"])
def test_a_tokenizer_beside_a_tpu_checkpoint_says_which_token_ends_a_text(mesh, tmp_path, below):
    src, config = mesh
    out = convert(src / below, tmp_path / "out", config=config)
    written = GPTJConfig.from_file(out)
    assert (written.bos_token_id, written.eos_token_id) == (END, END)
    assert {name: (out / name).read_bytes() for name in TOKENIZER.files()} == TOKENIZER.files()
    notes = notes_of(src / below, config=config)
    assert "is carried along (264 tokens)" in notes and f"eos_token_id is {END}, as the tokenizer says" in notes
    assert "\n".join(Manifest.from_file(out / "manifest.json").provenance["notes"]) == notes
    assert str(tmp_path) not in notes


def test_without_a_tokenizer_the_config_is_the_original_converters_and_that_is_said(tmp_path):
    sample = write_mesh_sample(tmp_path / "tpu")
    out = convert(sample.path, tmp_path / "out", config=sample.config_file)
    assert GPTJConfig.from_file(out).eos_token_id == 50256
    assert "eos_token_id 50256 is beyond the vocabulary of 10" in notes_of(sample.path, config=sample.config_file)


def test_a_training_config_may_name_the_end_of_a_text(mesh, tmp_path):
    src, config = mesh
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 5}))
    written = GPTJConfig.from_file(convert(src, tmp_path / "out", config=config))
    assert (written.eos_token_id, written.bos_token_id) == (5, END)
    assert f"eos_token_id 5 stays, but the tokenizer's is {END}" in notes_of(src, config=config)


def test_a_training_config_that_names_an_end_beyond_the_vocabulary_gives_way(mesh, tmp_path):
    src, config = mesh
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 50256}))
    assert GPTJConfig.from_file(convert(src, tmp_path / "out", config=config)).eos_token_id == END
    assert f"eos_token_id is {END}, as the tokenizer says, and no longer 50256" in notes_of(src, config=config)


def test_a_training_config_whose_end_of_a_text_is_no_id_is_refused_by_its_key(mesh, tmp_path):
    src, config = mesh
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": "end"}))
    with pytest.raises(ConfigError, match=r"tpu\.json.*eos_token_id.*a token id"):
        convert(src, tmp_path / "out", config=config)


@pytest.mark.parametrize("eos", [END, 5, [5, END], None])
def test_a_round_trip_over_a_tpu_checkpoint_keeps_them_all(tmp_path, eos):
    generation = GenerationConfig(do_sample=True, top_k=7, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)
    src = canonical(tmp_path / "src", eos=eos, generation=generation)
    tpu = convert(src, tmp_path / "tpu", to="mesh", shards=2)
    out = convert(tpu, tmp_path / "out")
    names = [*TOKENIZER.files(), "generation_config.json"]
    assert {name: (out / name).read_bytes() for name in names} == {name: (src / name).read_bytes() for name in names}
    before, after = GPTJConfig.from_file(src), GPTJConfig.from_file(out)
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(after, field) == getattr(before, field), field


@pytest.mark.parametrize("to", [name for name in target_formats() if name != "mesh"])
def test_every_format_carries_them_along(tmp_path, to):
    src = canonical(tmp_path / "src", eos=END, generation=GenerationConfig(eos_token_id=END))
    out = convert(src, tmp_path / "out", to=to)
    again = convert(out, tmp_path / "again")
    for folder in (out, again):
        assert GPTJTokenizer.from_pretrained(folder).eos_token_id == GPTJConfig.from_file(folder).eos_token_id == END
        assert GenerationConfig.from_file(folder).eos_token_id == END


def test_a_tokenizer_that_was_asked_for_counts(tmp_path):
    src = canonical(
        tmp_path / "src", eos=5, generation=GenerationConfig(max_new_tokens=7, eos_token_id=5), tokenizer=False
    )
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    out = convert(src, tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    assert GPTJConfig.from_file(out).eos_token_id == END
    settled = GenerationConfig.from_file(out)
    assert (settled.eos_token_id, settled.max_new_tokens) == (END, 7)
    assert f"eos_token_id is {END}, as the tokenizer says, and no longer 5" in notes_of(
        src, tokenizer=tmp_path / "tokenizer"
    )


def test_a_tokenizer_that_was_asked_for_lets_a_list_stand_that_holds_its_end(tmp_path):
    src = canonical(tmp_path / "src", eos=[5, END])
    assert GPTJConfig.from_file(convert(src, tmp_path / "out", tokenizer=src)).eos_token_id == [5, END]


def test_a_config_that_names_another_end_than_the_tokenizer_beside_it_keeps_its_word_and_it_is_said(tmp_path):
    src = canonical(tmp_path / "src", eos=5, generation=GenerationConfig(eos_token_id=6))
    out = convert(src, tmp_path / "out")
    assert GPTJConfig.from_file(out).eos_token_id == 5
    notes = notes_of(src)
    assert f"eos_token_id 5 stays, but the tokenizer's is {END}" in notes
    assert "generation_config.json has eos_token_id 6, the config 5" in notes


def test_none_is_written_where_none_is_wanted(tmp_path):
    src = canonical(tmp_path / "src", eos=END)
    out = convert(src, tmp_path / "out", tokenizer="none")
    assert not TOKENIZER.files().keys() & {path.name for path in out.iterdir()}
    assert GPTJConfig.from_file(out).eos_token_id == END and notes_of(src, tokenizer="none") == ""


def test_a_generation_config_that_breaks_a_rule_is_carried_as_it_is_and_that_is_said(tmp_path):
    src = canonical(tmp_path / "src", eos=END)
    (src / "generation_config.json").write_text('{"top_k": -1}')
    assert (convert(src, tmp_path / "out") / "generation_config.json").read_text() == '{"top_k": -1}'
    notes = notes_of(src)
    assert "is carried along as it is" in notes and "top_k" in notes


@pytest.mark.parametrize("secret", ['{"token": "s3cret"}', "s3cret"])
def test_X2_nothing_is_carried_along_through_a_link_out_of_the_source_unless_that_is_said(tmp_path, secret):
    source = canonical(tmp_path / "in", eos=END)
    (tmp_path / "elsewhere").write_text(secret)
    (source / "generation_config.json").symlink_to(tmp_path / "elsewhere")
    assert "generation_config.json is left out: is a link out of its folder" in notes_of(source)
    out = convert(source, tmp_path / "out")
    assert not [file.name for file in out.iterdir() if b"s3cret" in file.read_bytes()]
    out = convert(source, tmp_path / "followed", follow_links=True)
    assert (out / "generation_config.json").read_text() == secret


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_in_a_tokenizer_files_place_does_not_keep_the_weights_from_being_converted(tmp_path, name):
    source = canonical(tmp_path / "in", eos=END)
    (source / name).unlink()
    (source / name).mkdir()
    assert "the tokenizer is left out" in notes_of(source)


def test_a_tokenizer_that_stays_in_a_folder_that_is_replaced_is_pointed_out(tmp_path):
    src = canonical(tmp_path / "src", eos=END, tokenizer=False)
    old = canonical(tmp_path / "old", eos=END, generation=GenerationConfig(eos_token_id=END))
    assert "old tokenizer.json, vocab.json, generation_config.json would stay" in "\n".join(plan(src, old).notes)
    assert not plan(src, tmp_path / "new").notes
    convert(src, old, overwrite=True)
    assert GPTJTokenizer.from_pretrained(old).eos_token_id == END


@pytest.mark.parametrize("text", ["{", '{"model": {"type": "Unigram", "vocab": []}}', ""])
def test_a_tokenizer_beside_the_weights_that_cannot_be_read_is_left_and_said(tmp_path, text):
    src = canonical(tmp_path / "src", eos=END)
    (src / "tokenizer.json").write_text(text)
    notes = "\n".join(plan(src, tmp_path / "out").notes)
    assert "the tokenizer is left out" in notes and "tokenizer.json" in notes and "--tokenizer gpt2" in notes
    out = convert(src, tmp_path / "out")
    assert not (out / "tokenizer.json").exists()
    with pytest.raises(TokenizerError):
        convert(src, tmp_path / "asked", tokenizer=src)


def test_a_tokenizer_beside_the_weights_that_is_larger_than_the_embedding_is_refused(mesh, tmp_path):
    src, _ = mesh
    GPTJTokenizer.train(["to be or not to be, that is the question"] * 9, VOCAB + 6).save_pretrained(src)
    with pytest.raises(ConfigError, match=r"270 tokens .* 264 rows"):
        convert(src, tmp_path / "out", config=mesh[1])


def test_a_tpu_folder_is_replaced_only_if_its_tokenizer_is_too(tmp_path):
    src = canonical(tmp_path / "src", eos=END)
    tpu = convert(src, tmp_path / "tpu", to="mesh", shards=2)
    convert(src, tpu, to="mesh", shards=2, overwrite=True)
    assert GPTJTokenizer.from_pretrained(tpu).eos_token_id == END
    with pytest.raises(WriteError, match="which would be lost"):
        convert(src, tpu, to="mesh", shards=2, overwrite=True, tokenizer="none")


def test_a_tokenizer_in_an_archive_is_not_read_and_that_is_said(mesh, tmp_path):
    src, config = mesh
    with tarfile.open(tmp_path / "tpu.tar", "w") as archive:
        archive.add(src, "tpu")
    out = convert(tmp_path / "tpu.tar", tmp_path / "out", config=config)
    assert not (out / "tokenizer.json").exists()
    assert "tokenizer.json in the archive is not read: unpack it" in notes_of(tmp_path / "tpu.tar", config=config)


def test_the_command_says_what_was_settled_on_stderr_and_before_it_in_a_dry_run(mesh, tmp_path):
    src, config = mesh
    command = [sys.executable, "-m", "gptj", "convert", src, tmp_path / "out", "--config", config]
    for options in (["--dry-run"], []):
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 0 and "note: the tokenizer in" in done.stderr, done.stderr
        assert f"note: eos_token_id is {END}, as the tokenizer says" in done.stderr and "note" not in done.stdout
