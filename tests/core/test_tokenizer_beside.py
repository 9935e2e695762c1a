"""What stands beside a tokenizer's vocabulary is followed, compared with it, or said; the ids are transformers' own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import CORPUS, gpt2, small

from gptj import GPTJTokenizer
from gptj.errors import CheckpointWarning, TokenizerError

SETTINGS, NAMES, TOKENIZER, ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "added_tokens.json",
)
END = {"content": "<|endoftext|>", "special": True}
TEXT = "a!  <|endoftext|>  b <a> <|user|><sep>"
# What transformers 4.57 gives for TEXT where only <|endoftext|> is an added token, and what its parts give.
PLAIN = [64, 0, 220, 220, 299, 220, 220, 65, 220, 27, 64, 29, 220, 27, 91, 84, 82, 261, 91, 29, 27, 82, 68, 79, 29]
USER, SEP, A = [27, 91, 84, 82, 261, 91, 29], [27, 82, 68, 79, 29], [27, 64, 29]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the small tokenizer's five files."""
    small().save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, drop: tuple[str, ...] = (), **members: Any) -> None:
    """Change members of the JSON object in the file, which may be absent."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in before.items() if k not in drop} | members))


def opened(folder: Path, says: str | None = None) -> GPTJTokenizer:
    """The tokenizer, which must warn of what `says` names and of nothing else."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        tokenizer = GPTJTokenizer.from_pretrained(folder)
    assert [warning.category for warning in heard] == [CheckpointWarning] * (says is not None)
    assert says is None or says in str(heard[0].message)
    return tokenizer


# Special tokens


@pytest.mark.parametrize("file", [SETTINGS, NAMES])
@pytest.mark.parametrize(
    "members",
    [
        {"additional_special_tokens": ["!"]},
        {"additional_special_tokens": [{"content": "!", "lstrip": False, "__type": "AddedToken"}]},
        {"extra_special_tokens": ["!"]},
        {"extra_special_tokens": {"image_token": "!"}},
        {"model_specific_special_tokens": {"image_token": "!"}},
        {"sep_token": "!"},
        {"cls_token": {"content": "!"}},
        {"mask_token": "!", "additional_special_tokens": None},
    ],
)
def test_further_special_tokens_are_dropped_by_skip_special_tokens(
    folder: Path, file: str, members: dict[str, Any]
) -> None:
    edit(folder / file, **members)
    tokenizer = opened(folder)
    assert tokenizer.encode(TEXT, allow_special=True) == PLAIN
    assert tokenizer.decode(PLAIN, skip_special_tokens=True) == "a    b <a> <|user|><sep>"
    assert tokenizer.decode(PLAIN) == TEXT
    assert tokenizer.all_special_tokens == ["<|endoftext|>", "!"]
    tokenizer.save_pretrained(folder / "again")
    assert opened(folder / "again").decode(PLAIN, skip_special_tokens=True) == "a    b <a> <|user|><sep>"


def test_special_tokens_that_the_vocabulary_lacks_are_appended_in_transformers_order(folder: Path) -> None:
    edit(folder / SETTINGS, sep_token="<sep>", additional_special_tokens=["<|user|>"])
    with pytest.warns(CheckpointWarning) as heard:
        tokenizer = GPTJTokenizer.from_pretrained(folder)
    assert "sep_token: is appended with id 300: the vocabulary lacks it (found '<sep>')" in str(heard[0].message)
    assert "additional_special_tokens[0]: is appended with id 301" in str(heard[1].message)
    assert tokenizer.encode(TEXT, allow_special=True) == [*PLAIN[: -len(USER) - len(SEP)], 301, 300]
    assert tokenizer.encode("<|user|>") == USER, "no text becomes one by itself"
    assert len(tokenizer) == 302


def test_one_that_the_model_has_no_row_for_is_left_out(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": 301}')
    edit(folder / SETTINGS, additional_special_tokens=["<|user|>"])
    assert len(opened(folder, "appended with id 300")) == 301
    (folder / "config.json").write_text('{"vocab_size": 300}')
    tokenizer = opened(folder, "additional_special_tokens[0]: is left out")
    assert tokenizer.encode(TEXT, allow_special=True) == PLAIN
    assert len(tokenizer) == 300


def test_one_beside_gpt2s_bare_vocabulary_takes_the_first_id_after_it(tmp_path: Path) -> None:
    GPTJTokenizer.gpt2(extra_tokens=False).save_pretrained(tmp_path)
    edit(tmp_path / SETTINGS, additional_special_tokens=["<|user|>"])
    assert opened(tmp_path, "appended with id 50257").token_to_id("<|user|>") == 50257


def test_a_roles_object_gives_the_flags_of_a_token_that_has_none(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    edit(folder / SETTINGS, drop=("added_tokens_decoder",), pad_token={"content": "!", "rstrip": True})
    assert opened(folder).encode("a!  b", allow_special=True) == [64, 0, 65]
    edit(folder / SETTINGS, pad_token={"content": "!"})
    assert opened(folder).encode("a!  b", allow_special=True) == small().encode("a!  b")


# Added tokens


@pytest.mark.parametrize("older", [False, True])
def test_agreement_of_the_files_is_silent(folder: Path, older: bool) -> None:
    edit(folder / ADDED, **{"<|endoftext|>": 299, "<a>": 300})
    edit(folder / SETTINGS, added_tokens_decoder={"299": END, "300": {"content": "<a>", "special": False}})
    if older:
        (folder / TOKENIZER).unlink()
    tokenizer = opened(folder)
    assert tokenizer.encode("<a>", allow_special=True) == [300]
    assert tokenizer.encode(CORPUS[0]) == small().encode(CORPUS[0])


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("file", "members", "message"),
    [
        (SETTINGS, {"5": {"content": "<pad>"}}, r"added_tokens_decoder.5: contradicts {} .expected '&', found '<pad>'"),
        (SETTINGS, {"299": {"content": "</s>"}}, r"added_tokens_decoder.299: contradicts {} .*'<\|endoftext\|>'"),
        (SETTINGS, {"300": END}, r"added_tokens_decoder.300: contradicts {} .expected id 299, found id 300"),
        (ADDED, {"<pad>": 5}, r"'<pad>': contradicts {} .expected '&', found '<pad>'"),
        (ADDED, {"<|endoftext|>": 300}, r"'<\|endoftext\|>': contradicts {} .expected id 299, found id 300"),
        (ADDED, {"<a>": 300, "<b>": 300}, r"'<b>': contradicts added_tokens.json .expected '<a>', found '<b>'"),
    ],
)
def test_a_contradiction_of_two_files_is_refused_by_both_names(
    folder: Path, file: str, members: dict[str, Any], message: str, older: bool
) -> None:
    if older:
        (folder / TOKENIZER).unlink()
    edit(folder / file, **({"added_tokens_decoder": members} if file == SETTINGS else members))
    with pytest.raises(TokenizerError, match=f"{file}: {message.format('vocab.json' if older else TOKENIZER)}"):
        GPTJTokenizer.from_pretrained(folder)


def test_added_tokens_that_tokenizer_json_lacks_are_added(folder: Path) -> None:
    described = {"299": END, "300": {"content": "<a>", "special": False, "lstrip": True}}
    edit(folder / SETTINGS, added_tokens_decoder=described)
    expected = [*PLAIN[:8], 300, *PLAIN[12:]]
    assert opened(folder).encode(TEXT, allow_special=True) == expected
    edit(folder / SETTINGS, drop=("added_tokens_decoder",))
    edit(folder / ADDED, **{"<a>": 300})
    assert opened(folder).encode(TEXT, allow_special=True) == [*PLAIN[:9], 300, *PLAIN[12:]]


def test_flags_are_those_of_added_tokens_decoder(folder: Path) -> None:
    edit(folder / SETTINGS, added_tokens_decoder={"299": END | {"rstrip": True}})
    tokenizer = opened(folder, "added_tokens_decoder.299.rstrip: counts, and tokenizer.json says otherwise")
    assert tokenizer.encode(TEXT, allow_special=True) == [*PLAIN[:5], *PLAIN[7:]]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("vocab.json", lambda text: text.replace('"!": 0', '"!": 1').replace('"\\"": 1', '"\\"": 0'), "differs"),
        ("vocab.json", lambda text: text.replace('"!": 0, ', ""), "differs from tokenizer.json"),
        ("vocab.json", lambda text: text[:-1] + ', "new": 300}', "differs from tokenizer.json"),
        ("vocab.json", lambda text: text[:-5], "vocab.json: is not read, since tokenizer.json counts: not JSON"),
        ("merges.txt", lambda text: text.rpartition("\n")[0].rpartition("\n")[0] + "\n", "differs from tokenizer.json"),
        ("merges.txt", lambda text: text + "a b c\n", "merges.txt: line 45: is not read"),
    ],
)
def test_an_older_pair_that_says_otherwise_is_said(
    folder: Path, name: str, change: Callable[[str], str], says: str
) -> None:
    before = (folder / name).read_text()
    (folder / name).write_text(change(before))
    assert (folder / name).read_text() != before
    assert opened(folder, says).files() == small().files()


def test_an_older_pair_need_not_have_the_added_tokens(folder: Path) -> None:
    path = folder / "vocab.json"
    path.write_text(path.read_text().replace(', "<|endoftext|>": 299', ""))
    assert opened(folder).files() == small().files()


# The pipeline


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
LISTED_IN = {"pre_tokenizer": "pretokenizers", "decoder": "decoders", "post_processor": "processors"}


@pytest.mark.parametrize("part", LISTED_IN)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda one, listed: listed(one),
        lambda one, listed: listed(listed(listed(one))),
        lambda one, listed: listed(listed(), one, listed(listed())),
    ],
    ids=["alone", "nested", "with empty ones"],
)
def test_a_sequence_around_the_only_step_is_that_step(folder: Path, part: str, wrap: Callable[..., Any]) -> None:
    def listed(*steps: Any) -> dict[str, Any]:
        return {"type": "Sequence", LISTED_IN[part]: list(steps)}

    edit(folder / TOKENIZER, **{part: wrap(BYTE_LEVEL, listed)})
    assert opened(folder).files() == small().files()


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL, BYTE_LEVEL]}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, BYTE_LEVEL, {"type": "Fuse"}]}},
    ],
)
def test_steps_that_change_nothing_are_none(folder: Path, steps: dict[str, Any]) -> None:
    edit(folder / TOKENIZER, **steps)
    assert opened(folder).files() == small().files()


@pytest.mark.parametrize(("depth", "message"), [(50, None), (100_000, "tokenizer.json: nested too deeply")])
def test_sequences_may_be_nested_as_deeply_as_json(folder: Path, depth: int, message: str | None) -> None:
    nested = '{"type": "Sequence", "pretokenizers": [' * depth + json.dumps(BYTE_LEVEL) + "]}" * depth
    text = (folder / TOKENIZER).read_text()
    (folder / TOKENIZER).write_text(text.replace('"pre_tokenizer": {', f'"pre_tokenizer": {nested}, "old": {{'))
    if message is None:
        assert opened(folder).files() == small().files()
    else:
        with pytest.raises(TokenizerError, match=message):
            GPTJTokenizer.from_pretrained(folder)


# Classes


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer", "PreTrainedTokenizer"])
@pytest.mark.parametrize("fast", ["", "Fast"])
def test_a_class_of_the_same_bpe_is_silent(folder: Path, name: str, fast: str) -> None:
    edit(folder / SETTINGS, tokenizer_class=name + fast)
    assert opened(folder).files() == small().files()


@pytest.mark.parametrize(
    "name", ["Qwen2TokenizerFast", "BloomTokenizerFast", "MyTokenizer", "owner/name--tok.GPT2TokenizerFast", "a.B"]
)
def test_another_class_around_the_same_pipeline_is_said(folder: Path, name: str) -> None:
    edit(folder / SETTINGS, tokenizer_class=name)
    assert opened(folder, "tokenizer_class").files() == small().files()


def test_config_json_names_the_class_where_tokenizer_config_does_not(folder: Path) -> None:
    edit(folder / "config.json", tokenizer_class="LlamaTokenizer")
    assert opened(folder).files() == small().files()
    edit(folder / SETTINGS, tokenizer_class=None)
    with pytest.raises(TokenizerError, match=r"config.json: tokenizer_class: another kind of tokenizer .*'LlamaTok"):
        GPTJTokenizer.from_pretrained(folder)


def test_the_length_has_an_old_name(folder: Path) -> None:
    edit(folder / SETTINGS, max_len=77)
    assert opened(folder).model_max_length == 77
    edit(folder / SETTINGS, model_max_length=88)
    assert opened(folder).model_max_length == 88


def test_gpt_j_6bs_own_files_are_silent(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    end = {"content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    roles = ("bos_token", "eos_token", "unk_token")
    beside = {"special_tokens_map_file": None, "name_or_path": "gpt2", "from_slow": True, "model_max_length": 1024}
    settings = {role: end | {"__type": "AddedToken"} for role in roles} | beside
    (tmp_path / SETTINGS).write_text(
        json.dumps(settings | {"add_prefix_space": False, "errors": "replace", "tokenizer_class": "GPT2Tokenizer"})
    )
    (tmp_path / NAMES).write_text(json.dumps(dict.fromkeys(roles, "<|endoftext|>")))
    extra = {f"<|extratoken_{n}|>": 50256 + n for n in range(1, 144)}
    (tmp_path / ADDED).write_text(json.dumps(extra))
    tokenizer = opened(tmp_path)
    assert (len(tokenizer), tokenizer.model_max_length) == (50400, 1024)
    (tmp_path / TOKENIZER).unlink()
    assert len(opened(tmp_path)) == 50400
