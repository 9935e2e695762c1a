"""The tokenizer's calls under transformers' names: what data collators, trainers and recipes use."""

import numpy as np
import pytest

from gptj.errors import InputError, TokenizerError
from gptj.text.tokenizer import GPTJTokenizer

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture
def tokenizer():
    return GPTJTokenizer.train([TEXT], 280)


def rows(tokenizer):
    return [tokenizer(text) for text in ("The fox", "jumps over the dog", "x")]


# ---- pad


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_filled_to_the_longest(tokenizer, side):
    tokenizer.padding_side = side
    expected = tokenizer(["The fox", "jumps over the dog", "x"], padding=True)
    assert tokenizer.pad(rows(tokenizer)) == expected
    as_lists = {name: [row[name] for row in rows(tokenizer)] for name in ("input_ids", "attention_mask")}
    assert tokenizer.pad(as_lists) == expected


def test_padding_takes_what_a_call_takes(tokenizer):
    made = tokenizer.pad(rows(tokenizer), pad_to_multiple_of=8, padding_side="right", return_tensors="np")
    assert made.input_ids.shape[1] % 8 == 0 and made.attention_mask[2].sum() == len(tokenizer.encode("x"))
    made = tokenizer.pad(rows(tokenizer), padding="max_length", max_length=40, return_attention_mask=False)
    assert [len(row) for row in made["input_ids"]] == [40] * 3 and "attention_mask" not in made
    one = tokenizer.pad(tokenizer("x"), padding="max_length", max_length=5)
    assert len(one["input_ids"]) == len(one["attention_mask"]) == 5


def test_other_members_stay_as_they_are(tokenizer):
    given = [{**row, "labels": n, "score": 0.5} for n, row in enumerate(rows(tokenizer))]
    made = tokenizer.pad(given, return_tensors="np")
    assert made.labels.tolist() == [0, 1, 2] and made.score.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "options", "match"),
    [
        ([], {}, "encoded_inputs"),
        ("text", {}, "encoded_inputs"),
        ([{"labels": 1}], {}, "no input_ids"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": 2}], {}, r"encoded_inputs\[1\]"),
        ([{"input_ids": [1]}, {"input_ids": [1, 2]}], {"padding": False, "return_tensors": "np"}, "different lengths"),
        ([{"input_ids": [1, 2]}], {"padding": "max_length", "max_length": 1}, "longer than max_length"),
        ([{"input_ids": [1, 2], "labels": [1]}, {"input_ids": [1], "labels": []}], {"return_tensors": "np"}, "labels"),
        ([{"input_ids": [1]}], {"padding_side": "top"}, "padding_side"),
    ],
)
def test_what_cannot_be_padded_is_refused(tokenizer, given, options, match):
    with pytest.raises(InputError, match=match):
        tokenizer.pad(given, **options)


# ---- tokens by name


def test_tokens_and_ids_are_turned_into_each_other(tokenizer):
    ids, tokens = tokenizer.encode("The fox"), tokenizer.tokenize("The fox")
    assert tokenizer.convert_ids_to_tokens(ids) == tokens and tokenizer.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_ids_to_tokens(ids[0]) == tokens[0] and tokenizer.convert_tokens_to_ids(tokens[0]) == ids[0]
    assert tokenizer.convert_tokens_to_string(tokens) == "The fox"
    assert tokenizer.convert_ids_to_tokens([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == tokens
    with pytest.raises(InputError, match=r"tokens\[0\]: no such token"):
        tokenizer.convert_tokens_to_ids(["no such"])


def test_special_tokens_are_listed(tokenizer):
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert tokenizer.all_special_ids == [tokenizer.eos_token_id]
    assert tokenizer.special_tokens_map == dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    assert list(tokenizer.model_input_names) == ["input_ids", "attention_mask"]


def test_tokens_are_added_and_saved(tokenizer, tmp_path):
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<a>", "<b>", "<a>"]) == 2 and tokenizer.add_tokens("<a>") == 0
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<s>"]}) == 2
    assert len(tokenizer) == size + 4 and tokenizer.pad_token_id == size + 2
    assert tokenizer.encode("x<a>", allow_special=True)[-1] == size != tokenizer.encode("x<a>")[-1]
    assert tokenizer.decode([size, size + 3]) == "<a><s>"
    assert tokenizer.decode([size, size + 3], skip_special_tokens=True) == "<a>"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = GPTJTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab() and again.pad_token == "[PAD]"
    assert again.encode("x<a>", allow_special=True) == tokenizer.encode("x<a>", allow_special=True)
    with pytest.raises(InputError, match="no such role"):
        tokenizer.add_special_tokens({"mask": "<m>"})


# ---- settings and arguments of a call


def test_settings_are_assigned(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 3
    assert len(tokenizer(TEXT, truncation=True)["input_ids"]) == 3
    with pytest.raises(InputError, match="model_max_length"):
        tokenizer.model_max_length = 0
    with pytest.raises(TokenizerError, match="no such"):
        tokenizer.eos_token = "no such"


def test_settings_are_arguments_of_from_pretrained(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    made = GPTJTokenizer.from_pretrained(
        tmp_path / "saved", padding_side="right", model_max_length=9, use_fast=True, revision="main"
    )
    assert (made.padding_side, made.model_max_length) == ("right", 9)
    with pytest.raises(InputError, match="pading_side"):
        GPTJTokenizer.from_pretrained(tmp_path / "saved", pading_side="right")


def test_a_call_takes_transformers_arguments(tokenizer):
    plain = tokenizer("The fox")
    assert tokenizer("The fox", add_special_tokens=True, return_token_type_ids=False) == plain
    assert tokenizer.encode_plus("The fox") == plain
    assert tokenizer.encode_plus("The", " fox")["input_ids"] == tokenizer.encode("The", " fox")
    assert set(tokenizer("The fox", return_attention_mask=False)) == {"input_ids"}
    assert "offset_mapping" in tokenizer("The fox", return_offsets_mapping=True)
    assert tokenizer.encode("The fox", return_tensors="np").shape == (1, len(plain["input_ids"]))
    with pytest.raises(InputError, match="return_token_type_ids: not supported"):
        tokenizer("The fox", return_token_type_ids=True)
    with pytest.raises(InputError, match="no such argument"):
        tokenizer("The fox", paddin=True)


# ---- what pipelines ask for


@pytest.mark.parametrize("asked", [None, False, True])
def test_a_text_is_cleaned_up_only_where_that_is_asked_for(tokenizer, asked):
    text = "It is n't so , he 's here . Is n't he ? I 've it ! They 're ' so ' ."
    ids = tokenizer.encode(text)
    clean = "It isn't so, he's here. Isn't he? I've it! They're'so '."
    expected = clean if asked else text
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=asked) == expected
    assert tokenizer.batch_decode([ids, ids], clean_up_tokenization_spaces=asked) == [expected] * 2
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("asked", [1, "yes", []])
def test_a_clean_up_that_is_neither_yes_nor_no_is_refused(tokenizer, asked):
    with pytest.raises(InputError, match="clean_up_tokenization_spaces: breaks its rule"):
        tokenizer.decode([1], clean_up_tokenization_spaces=asked)


def test_saving_takes_what_pipelines_hand_on(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t", safe_serialization=True, push_to_hub=False, legacy_format=None)
    assert GPTJTokenizer.from_pretrained(tmp_path / "t").encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize(
    ("option", "words"),
    [({"push_to_hub": True}, "push_to_hub: not supported"), ({"filename_prefix": "a"}, "filename_prefix"),
     ({"legacy_format": False}, "legacy_format"), ({"safe": True}, "'safe': no such argument")],
)  # fmt: skip
def test_saving_refuses_what_it_would_not_do(tokenizer, tmp_path, option, words):
    with pytest.raises(InputError, match=words):
        tokenizer.save_pretrained(tmp_path / "t", **option)
    assert not (tmp_path / "t").exists()
