"""transformers opens the tokenizer files that we write, fast and slow, and gives the ids that we give; and back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from lawful import Oddity, good_folder
from lawful.tokenizers import ODDITIES
from tokenizer_samples import HARD_TEXTS, gpt2, random_texts, small

from gptj import GPTJTokenizer
from gptj.errors import CheckpointWarning

TEXTS = [*HARD_TEXTS.values(), *random_texts(2_000, seed=7)]
"""With `<|endoftext|>` and `<|extratoken_7|>` in hundreds of them."""


@pytest.fixture(scope="module", params=["gpt2", "small"])
def tokenizer(request: pytest.FixtureRequest) -> GPTJTokenizer:
    return {"gpt2": gpt2, "small": small}[request.param]()


@pytest.fixture(scope="module", params=["fast", "slow"])
def theirs(request: pytest.FixtureRequest, tokenizer: GPTJTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    opened = transformers.AutoTokenizer.from_pretrained(folder, use_fast=request.param == "fast")
    assert opened.is_fast == (request.param == "fast")
    return opened


def test_they_have_the_same_tokens(tokenizer: GPTJTokenizer, theirs: Any) -> None:
    assert len(theirs) == len(tokenizer)
    assert theirs.get_vocab() == {tokenizer.id_to_token(n): n for n in range(len(tokenizer))}
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert theirs.padding_side == "left"


def test_they_give_the_ids_that_we_give_where_added_tokens_are_allowed(tokenizer: GPTJTokenizer, theirs: Any) -> None:
    assert theirs(TEXTS)["input_ids"] == tokenizer(TEXTS, allow_special=True).input_ids


def test_they_decode_to_the_text_that_we_decode_to(tokenizer: GPTJTokenizer, theirs: Any) -> None:
    rows = tokenizer(TEXTS, allow_special=True).input_ids
    options = {} if theirs.is_fast else {"spaces_between_special_tokens": False}  # the slow one's own addition
    for skip in (False, True):
        ours = tokenizer.batch_decode(rows, skip_special_tokens=skip)
        assert theirs.batch_decode(rows, skip_special_tokens=skip, **options) == ours


def test_rows_are_padded_and_cut_alike(tokenizer: GPTJTokenizer, theirs: Any) -> None:
    theirs.pad_token = theirs.eos_token
    plain = [text for text in TEXTS if "<|" not in text and text]
    pairs = list(zip(plain[::2], plain[1::2], strict=False))
    for limit in (2, 5, 8, 13):
        arguments: Any = {"padding": True, "truncation": True, "max_length": limit}
        assert dict(theirs(plain, **arguments)) == dict(tokenizer(plain, **arguments))
        if theirs.is_fast:  # the slow one always gives an odd token to the first text
            assert dict(theirs(pairs, **arguments)) == dict(tokenizer(pairs, **arguments))


def test_offsets_are_theirs(tokenizer: GPTJTokenizer, theirs: Any) -> None:
    if theirs.is_fast:  # the slow one has none
        found = tokenizer(TEXTS, allow_special=True, return_offsets=True).offset_mapping
        assert theirs(TEXTS, return_offsets_mapping=True)["offset_mapping"] == found


def test_what_they_write_reads_back_the_same(tokenizer: GPTJTokenizer, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    again = GPTJTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(tokenizer)
    assert again(TEXTS, allow_special=True) == tokenizer(TEXTS, allow_special=True)
    assert again(TEXTS) == tokenizer(TEXTS)


def test_a_vocabulary_without_an_end_of_text_gets_none(tmp_path: Path) -> None:
    files = small().files()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.replace(b"<|endoftext|>", b"</s>"))
    ours = GPTJTokenizer.from_pretrained(tmp_path)
    assert (ours.eos_token, ours.eos_token_id, len(ours)) == ("</s>", 299, 300)
    ours.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (len(theirs), theirs.eos_token_id, theirs("a</s>")["input_ids"][-1]) == (300, 299, 299)


# What they open only by running code or from release 5 on, and the token that they append without a row for it.
NOT_OPENED = {"a class of one's own", "a class with its repository"}
NEWER = {"the class TokenizersBackend", "transformers 5's members"} if transformers.__version__ < "5" else set()
APPENDED = {"a further special token that the vocabulary lacks, and no row for it"}


@pytest.mark.parametrize(
    "oddity", [one for one in ODDITIES if one.what not in NOT_OPENED | NEWER], ids=lambda oddity: oddity.what
)
def test_odd_files_mean_to_us_what_they_mean_to_them(oddity: Oddity, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "model")
    oddity.make(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        ours = GPTJTokenizer.from_pretrained(folder)
    texts = [text for text in TEXTS[:300] if "<|user|>" not in text]
    rows = ours(texts, allow_special=True).input_ids
    assert theirs(texts)["input_ids"] == rows
    assert len(theirs) == len(ours) + (oddity.what in APPENDED)
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert theirs.batch_decode(rows, **options) == ours.batch_decode(rows, skip_special_tokens=True)
