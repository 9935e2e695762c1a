"""Attributes, arguments of transformers' tokenizers: what GPT2TokenizerFast (4.57.6) answers, or why it has none."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import gpt2

from gptj import GPTJTokenizer
from gptj.errors import GPTJError, InputError, TokenizerError

END = "<|endoftext|>"


@pytest.fixture
def tokenizer() -> GPTJTokenizer:
    return copy.copy(gpt2())


SAME: dict[str, Any] = {
    "t.vocab['hello'], len(t.vocab)": (31373, 50400),
    "t.chat_template, t.sep_token, t.cls_token_id, t.mask_token": (None, None, None, None),
    "t.additional_special_tokens, t.additional_special_tokens_ids": ([], []),
    "t.unk_token, t.unk_token_id, t.pad_token_type_id": (END, 50256, 0),
    "t.clean_up_tokenization_spaces, t.add_prefix_space, t.is_fast": (False, False, True),
    "t.max_len_single_sentence, t.max_len_sentences_pair": (2048, 2048),
    "t.added_tokens_encoder['<|extratoken_1|>'], str(t.added_tokens_decoder[50256])": (50257, END),
    "t.build_inputs_with_special_tokens([1, 2], [3])": [1, 2, 3],
    "t.get_special_tokens_mask([1, 50256], already_has_special_tokens=True)": [0, 1],
    "t('hello my dog', truncation='do_not_truncate', padding='do_not_pad').input_ids": [31373, 616, 3290],
    "t('hi<|endoftext|>', split_special_tokens=True).input_ids": [5303, 27, 91, 437, 1659, 5239, 91, 29],
    "t('hi<|endoftext|>', split_special_tokens=False).input_ids": [5303, 50256],
    "t('hello', return_length=True)['length'], t(['hello', 'a b'], return_length=True)['length']": ([1], [1, 2]),
    "t('hello', return_length=True, return_tensors='np')['length'].tolist()": [1],
    "t.decode([15496], spaces_between_special_tokens=True)": "Hello",
    "t.batch_decode([[15496]], spaces_between_special_tokens=False)": ["Hello"],
    "t('hello').data": {"input_ids": [31373], "attention_mask": [1]},
    "t(['hello']).convert_to_tensors('np').input_ids.tolist()": [[31373]],
    "t('hello').is_fast": True,
}


@pytest.mark.parametrize("expression", SAME)
def test_what_can_be_had_is_the_same(expression: str) -> None:
    assert eval(expression, {"t": gpt2()}) == SAME[expression]


@pytest.mark.parametrize("role", ["bos", "eos", "pad", "unk"])
def test_a_role_is_given_by_token_or_by_id(tokenizer: GPTJTokenizer, role: str) -> None:
    setattr(tokenizer, f"{role}_token_id", 5)
    assert (getattr(tokenizer, f"{role}_token"), getattr(tokenizer, f"{role}_token_id")) == ("&", 5)
    setattr(tokenizer, f"{role}_token", "$")
    assert getattr(tokenizer, f"{role}_token_id") == 3
    with pytest.raises(InputError, match=f"{role}_token_id"):
        setattr(tokenizer, f"{role}_token_id", 50_400)
    with pytest.raises(TokenizerError, match=rf"{role}_token: names a token that .*add_special_tokens"):
        setattr(tokenizer, f"{role}_token", "[NEW]")
    assert getattr(tokenizer, f"{role}_token_id") == 3


def test_a_word_that_pads_stays_in_the_texts(tokenizer: GPTJTokenizer) -> None:
    tokenizer.pad_token_id = 0
    assert tokenizer.pad_token == "!" and 0 in tokenizer.all_special_ids
    assert tokenizer(["hi", "hi you"], padding=True).input_ids[0] == [0, 5303]
    assert tokenizer.decode([15496, 0], skip_special_tokens=True) == "Hello!"


def test_further_special_tokens_are_listed_and_left_out(tokenizer: GPTJTokenizer) -> None:
    tokenizer.additional_special_tokens = ["<|extratoken_1|>"]
    assert tokenizer.additional_special_tokens_ids == [50257]
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<|extratoken_2|>", "<a>"]}) == 1
    listed = ["<|extratoken_1|>", "<|extratoken_2|>", "<a>"]
    assert tokenizer.special_tokens_map["additional_special_tokens"] == listed
    assert tokenizer.all_special_tokens == [END, *listed]
    assert tokenizer.decode([50257, 50258, 50400, 5], skip_special_tokens=True) == "&"
    with pytest.raises(InputError, match=r"additional_special_tokens\[0\]: .*add_special_tokens"):
        tokenizer.additional_special_tokens = ["<b>"]


def test_a_tokenizer_says_where_it_comes_from_and_what_it_wrote(tokenizer: GPTJTokenizer, tmp_path: Path) -> None:
    assert tokenizer.name_or_path == ""
    written = tokenizer.save_pretrained(tmp_path / "out")
    assert sorted(written) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    opened = GPTJTokenizer.from_pretrained(tmp_path / "out", additional_special_tokens=["<x>"])
    assert opened.name_or_path == str(tmp_path / "out") and opened.additional_special_tokens == ["<x>"]
    assert pickle.loads(pickle.dumps(opened)).name_or_path == opened.name_or_path


REASONS: dict[str, str] = {
    "t.apply_chat_template([])": "no chat template.*gptj serve",
    "t.backend_tokenizer": "Tokenizer.from_file",
    "t.train_new_from_iterator([], 300)": r"GPTJTokenizer.train\(texts, vocab_size\)",
    "t.push_to_hub('a/b')": "hf upload",
    "t.prepare_for_model([1])": r"tokenizer.pad\(",
    "t.save_vocabulary('x')": "save_pretrained",
    "t.paddin_side": "Did you mean padding_side",
    "setattr(t, 'chat_template', 'x')": "chat_template: cannot be assigned.*gptj serve",
    "setattr(t, 'sep_token', '<s>')": "sep_token: .*additional_special_tokens",
    "setattr(t, 'add_bos_token', True)": "add_bos_token: .*nothing is put before",
    "setattr(t, 'clean_up_tokenization_spaces', True)": r"decode\(ids, clean_up_tokenization_spaces=True\)",
    "setattr(t, 'paddin_side', 'left')": "paddin_side.*Did you mean padding_side",
    "setattr(t, 'modelmax_length', 5)": "Did you mean model_max_length",
    "t.add_special_tokens({'cls_token': '<c>'})": "cls_token.*additional_special_tokens",
    "t(text_target='x')": "text_target: not supported",
    "t()": "text: not text",
    "t.decode([5], skip_specal_tokens=True)": "Did you mean skip_special_tokens",
    "t.decode([5], use_source_tokenizer=True)": "use_source_tokenizer",
    "t('hello').word_ids()": "encode_with_offsets",
    "t('hello').to('cpu')": 'input_ids.to: is on no device .*return_tensors="pt"',
    "t(['hello'])[0]": r"\['input_ids'\]\[row\]",
}


@pytest.mark.parametrize("expression", REASONS)
def test_what_cannot_be_had_has_a_reason(expression: str) -> None:
    with pytest.raises((GPTJError, AttributeError, KeyError), match=REASONS[expression]):
        eval(expression, {"t": gpt2()})


def test_what_is_set_to_what_it_is_or_is_the_users_own_is_accepted(tokenizer: GPTJTokenizer) -> None:
    tokenizer.chat_template = None  # type: ignore[misc]
    tokenizer.add_prefix_space = False  # type: ignore[misc]
    tokenizer.notes = "mine"  # type: ignore[attr-defined]
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
    assert tokenizer.notes == "mine" and not hasattr(tokenizer, "apply_chat_template")  # type: ignore[attr-defined]
