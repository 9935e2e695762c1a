"""The tokenizer as its users meet it: exact, reversible, and never silent about what it cannot do."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_samples import CORPUS, HARD_TEXTS, gpt2, random_texts, small

from gptj import GPTJConfig, GPTJTokenizer
from gptj.errors import BackendError, ConfigError, InputError, TokenizerError
from gptj.text.token_rows import BatchEncoding

MEMORY_BYTES = 200_000_000
"""For 10 MB of text, over what the process had. The library alone, given the text whole, takes 1.5 GB."""

CPU_SECONDS = 20.0
"""For 10 MB of text, of the processor, so that a busy machine may be slow; benchmarks/README.md says what it takes."""


# Text to ids


def test_gpt2_has_50400_tokens_of_which_the_last_143_are_extra() -> None:
    tokenizer = gpt2()
    assert (len(tokenizer), tokenizer.vocab_size) == (50400, 50257)
    assert [tokenizer.token_to_id(f"<|extratoken_{i}|>") for i in range(1, 144)] == [50256 + i for i in range(1, 144)]
    assert tokenizer.special_ids == {50256}


def test_extra_tokens_can_be_left_out() -> None:
    tokenizer = GPTJTokenizer.gpt2(extra_tokens=False)
    assert len(tokenizer) == 50257
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]


@pytest.mark.parametrize("make", [gpt2, small])
@pytest.mark.parametrize("name", HARD_TEXTS)
def test_T3_hard_texts_come_back_exactly(make: Any, name: str) -> None:
    text = HARD_TEXTS[name]
    assert make().decode(make().encode(text)) == text


@given(st.text())
def test_any_text_comes_back_exactly(text: str) -> None:
    assert small().decode(small().encode(text)) == text


def test_no_token_is_put_before_or_after_a_text() -> None:
    assert gpt2().encode("") == []
    assert gpt2()("", return_tensors="np").input_ids.shape == (1, 0)
    assert gpt2().encode("a") == [64]


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|extratoken_7|>", "a<|endoftext|><|extratoken_143|> b"])
def test_T4_a_users_text_never_becomes_special_or_added_tokens(text: str) -> None:
    ids = gpt2().encode(text)
    assert max(ids) < 50256
    assert gpt2()(text).input_ids == ids
    assert gpt2().decode(ids, skip_special_tokens=True) == text


def test_added_tokens_are_matched_where_that_is_allowed() -> None:
    assert gpt2().encode("a<|endoftext|><|extratoken_7|>", allow_special=True) == [64, 50256, 50263]
    assert gpt2()(["<|endoftext|>"], allow_special=True).input_ids == [[50256]]


@pytest.mark.parametrize("text", ["ab\ud800", "\udcff", "a" * 100_000 + "\udc00b"])
def test_T3_a_lone_surrogate_is_refused_with_its_offset(text: str) -> None:
    offset = next(n for n, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    with pytest.raises(InputError, match=rf"text: a lone surrogate.*U\+D[89CDEF]..? ?.*at offset {offset}\b"):
        gpt2().encode(text)
    with pytest.raises(InputError, match=rf"text\[1\]: a lone surrogate.*at offset {offset}\b"):
        gpt2()(["fine", text])


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["list"]])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(InputError, match=f"expected str, found {type(text).__name__}"):
        gpt2().encode(text)


# Ids to text


@pytest.mark.parametrize("wrong", [-1, 50400, 2**32, 2**64, np.int64(-1), np.uint64(2**63)])
def test_T5_an_unknown_id_is_refused_with_its_place_and_value(wrong: int) -> None:
    with pytest.raises(
        InputError, match=rf"token_ids\[2\]: unknown token id \(expected 0 to 50399, found {int(wrong)}\)"
    ):
        gpt2().decode([64, 65, wrong])
    with pytest.raises(InputError, match=f"token_ids: unknown token id .*found {int(wrong)}"):
        gpt2().decode(wrong)
    with pytest.raises(InputError, match=r"sequences\[1\]\[0\]: unknown token id"):
        gpt2().batch_decode([[64], [wrong]])


@pytest.mark.parametrize(
    "wrong", [[1.0], [True], ["a"], [None], [[1]], np.array([1.0]), np.array([True]), np.array([[1]]), 1.5, None]
)
def test_T5_what_is_no_whole_number_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match=r"token_ids(\[0\])?: not a token id"):
        gpt2().decode(wrong)


@pytest.mark.parametrize("wrong", ["15496", b"1", {"input_ids": [1]}])
def test_text_and_dicts_are_no_ids(wrong: Any) -> None:
    with pytest.raises(InputError, match="token_ids: not token ids"):
        gpt2().decode(wrong)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "uint64"])
def test_arrays_of_any_integers_are_decoded(dtype: str) -> None:
    ids = np.array([72, 0], dtype=dtype)
    assert gpt2().decode(ids) == "i!"
    assert gpt2().decode(list(ids)) == "i!"
    assert gpt2().batch_decode(np.array([ids, ids])) == ["i!", "i!"]
    assert gpt2().decode(ids[0]) == "i"
    assert gpt2().decode(ids[:0]) == ""


def test_special_tokens_are_skipped_only_where_that_is_asked() -> None:
    ids = [50256, 64, 50257, 50256]
    assert gpt2().decode(ids) == "<|endoftext|>a<|extratoken_1|><|endoftext|>"
    assert gpt2().decode(ids, skip_special_tokens=True) == "a<|extratoken_1|>"


def test_decoding_cleans_nothing_up() -> None:
    text = " a ,  b . do n't  I 'm"
    assert gpt2().decode(gpt2().encode(text)) == text


def test_tokens_ids_and_bytes_name_each_other() -> None:
    assert gpt2().token_to_id("Ġdog") == 3290
    assert gpt2().token_to_id("no such token") is None
    assert (gpt2().id_to_token(3290), gpt2().id_to_bytes(3290)) == ("Ġdog", b" dog")
    assert gpt2().id_to_bytes(50257) == b"<|extratoken_1|>"
    assert sorted(small().id_to_bytes(i) for i in range(300) if len(small().id_to_token(i)) == 1) == [
        bytes([byte]) for byte in range(256)
    ]


# Streaming


@given(st.lists(st.integers(0, 299)))
def test_streamed_text_joined_is_the_whole_text(ids: list[int]) -> None:
    stream = small().stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.finish() == small().decode(ids)


@given(st.text(), st.integers(1, 4))
def test_a_stream_never_splits_a_character(text: str, group: int) -> None:
    ids = small().encode(text)
    stream = small().stream()
    shown = ""
    for start in range(0, len(ids), group):
        shown += stream.push(ids[start : start + group])
        assert text.startswith(shown)
    assert (shown, stream.finish()) == (text, "")


def test_T6_a_stream_that_ends_inside_a_character_ends_with_the_replacement_character() -> None:
    ids = gpt2().encode("ok 🤗")[:-1]
    stream = gpt2().stream()
    assert [stream.push(token_id) for token_id in ids] == ["ok", " ", ""]
    assert stream.finish() == "\ufffd"
    assert gpt2().decode(ids) == "ok \ufffd"
    assert stream.push(ids[0]) + stream.finish() == "ok"  # a finished stream begins anew


def test_a_stream_takes_nothing_of_a_push_that_it_refuses() -> None:
    stream = gpt2().stream(skip_special_tokens=True)
    with pytest.raises(InputError, match=r"token_ids\[1\]: unknown token id"):
        stream.push([64, 50400])
    assert stream.push(np.array([65, 50256])) == "b"


# Offsets


@pytest.mark.parametrize("text", [*HARD_TEXTS.values(), *random_texts(200, seed=4)])
def test_offsets_bound_what_each_token_spells(text: str) -> None:
    ids, offsets = gpt2().encode_with_offsets(text)
    assert ids == gpt2().encode(text)
    for token_id, (start, end) in zip(ids, offsets, strict=True):
        spelt = gpt2().id_to_bytes(token_id)
        assert spelt in text[start:end].encode()
        assert spelt == text[start:end].encode() or len(text[start:end].encode()) > len(spelt)
    covered = {n for start, end in offsets for n in range(start, end)}
    assert covered == set(range(len(text)))


def test_offsets_of_a_text_of_many_pieces_go_on_counting() -> None:
    text = "naïve 🤗 words " * 10_000
    ids, offsets = gpt2().encode_with_offsets(text)
    once, bounds = gpt2().encode_with_offsets("naïve 🤗 words ")
    assert text[slice(*offsets[-2])] == " words"
    assert (ids[:5], offsets[:5]) == (once[:5], bounds[:5])
    assert [end for _, end in offsets] == sorted(end for _, end in offsets)


# Batches


def test_rows_are_padded_on_the_left_and_on_the_right_on_request() -> None:
    texts = ["Hello", "Hello, my dog"]
    left = gpt2()(texts, padding=True)
    assert left.input_ids == [[50256, 50256, 50256, 15496], [15496, 11, 616, 3290]]
    assert left.attention_mask == [[0, 0, 0, 1], [1, 1, 1, 1]]
    right = gpt2()(texts, padding="longest", padding_side="right")
    assert right.input_ids[0] == [15496, 50256, 50256, 50256]
    assert right.attention_mask[0] == [1, 0, 0, 0]


def test_rows_are_padded_to_a_length_or_a_multiple() -> None:
    assert gpt2()("a b c", padding="max_length", max_length=5).attention_mask == [0, 0, 1, 1, 1]
    assert gpt2()(["a b c", "a"], padding=True, pad_to_multiple_of=4, return_tensors="np").input_ids.shape == (2, 4)
    assert gpt2()(["", ""], padding=True, return_tensors="np").input_ids.shape == (2, 0)


def test_padding_falls_back_to_the_end_of_text_and_says_so() -> None:
    tokenizer = GPTJTokenizer.gpt2()
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 50256)
    assert "pad '<|endoftext|>' (50256), the eos token, padding left" in repr(tokenizer)
    tokenizer.pad_token = "<|extratoken_1|>"
    assert tokenizer(["a", "a b"], padding=True).input_ids[0] == [50257, 64]
    assert tokenizer.decode([50257, 64], skip_special_tokens=True) == "a"
    assert "pad '<|extratoken_1|>' (50257), padding left" in repr(tokenizer)
    with pytest.raises(TokenizerError, match=r"pad_token: names a token that the vocabulary lacks .*'<pad>'"):
        tokenizer.pad_token = "<pad>"


def test_sides_can_be_set_and_are_checked() -> None:
    tokenizer = GPTJTokenizer.gpt2()
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    assert tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2).input_ids == [[64, 50256], [275, 269]]
    with pytest.raises(InputError, match=r"padding_side: no such choice .*'left' or 'right', found 'middle'"):
        tokenizer.padding_side = "middle"  # type: ignore[assignment]


def test_truncation_cuts_the_side_that_is_asked_for() -> None:
    ids = gpt2().encode("Hello, my dog is cute")
    assert gpt2()("Hello, my dog is cute", truncation=True, max_length=4).input_ids == ids[:4]
    left = gpt2()("Hello, my dog is cute", truncation=True, max_length=4, truncation_side="left", return_offsets=True)
    assert left.input_ids == ids[-4:]
    assert left.offset_mapping[0] == (6, 9)
    assert gpt2()("a", truncation=True).input_ids == [64]  # up to the 2,048 of the tokenizer's own
    assert len(gpt2()("a b " * 2000, truncation=True).input_ids) == 2048


def test_a_pairs_tokens_follow_each_other_and_say_whose_they_are() -> None:
    pair = gpt2()("my dog", " is cute", return_offsets=True)
    assert pair.input_ids == gpt2().encode("my dog is cute")
    assert (pair.sequence_ids, pair.offset_mapping[2:]) == ([0, 0, 1, 1], [(0, 3), (3, 8)])
    one_by_one = gpt2()(["my dog", "a"], [" is cute", "b"], padding=True)
    together = gpt2()([("my dog", " is cute"), ("a", "b")], padding=True)
    assert one_by_one == together
    assert together.attention_mask == [[1, 1, 1, 1], [0, 0, 1, 1]]
    padded = gpt2()([("a b c", "d"), ("a", "b")], padding=True, return_offsets=True)
    assert padded.sequence_ids == [[0, 0, 0, 1], [-1, -1, 0, 1]]
    assert padded.offset_mapping[1] == [(0, 0), (0, 0), (0, 1), (0, 1)]


@pytest.mark.parametrize(
    ("first", "second", "limit", "how", "kept"),
    [
        (7, 3, 10, True, (7, 3)),
        (7, 3, 9, True, (6, 3)),
        (7, 3, 6, "longest_first", (3, 3)),
        (3, 7, 6, True, (3, 3)),
        (7, 3, 5, True, (3, 2)),
        (3, 7, 5, True, (2, 3)),
        (7, 3, 8, "only_first", (5, 3)),
        (3, 7, 4, "only_second", (3, 1)),
        (7, 3, 3, "only_first", (0, 3)),
    ],
)
def test_a_pair_is_cut_from_its_longer_text_first(
    first: int, second: int, limit: int, how: Any, kept: tuple[int, int]
) -> None:
    pair = gpt2()(" a" * first, " b" * second, truncation=how, max_length=limit).input_ids
    assert (pair.count(257), pair.count(275)) == kept


def test_a_text_that_alone_may_be_cut_must_be_long_enough() -> None:
    with pytest.raises(InputError, match="pair 1: the second text is too short to lose 2 tokens"):
        gpt2()([(" a", " b"), (" a a a", " b")], truncation="only_second", max_length=2)
    with pytest.raises(InputError, match="truncation: there is no second text to cut"):
        gpt2()("a", truncation="only_second", max_length=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 3}, "max_length: has no effect by itself.*truncation=True"),
        ({"padding_side": "left"}, "padding_side: has no effect without padding"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of: has no effect without padding"),
        ({"padding": True, "pad_to_multiple_of": 0}, "pad_to_multiple_of: .*at least 1, found 0"),
        ({"padding": "left"}, "padding: no such choice .*'longest' or 'max_length', found 'left'"),
        ({"truncation": "left"}, "truncation: no such choice .*found 'left'"),
        ({"truncation": True, "max_length": 0}, "max_length: .*at least 1, found 0"),
        ({"truncation": True, "max_length": 2.0}, "max_length: .*found 2.0"),
        ({"truncation": True, "max_length": True}, "max_length: .*found True"),
        ({"truncation": True, "truncation_side": "up"}, "truncation_side: no such choice"),
        ({"padding": "max_length", "max_length": 1}, "text 0: longer than max_length .*1 tokens, found 2.*truncation"),
        ({"return_tensors": "flax"}, "return_tensors: .*pt, tf, jax, np, found 'flax'"),
    ],
)
def test_an_argument_that_breaks_its_rule_or_would_do_nothing_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gpt2()("a b", **arguments)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((5,), "text: not text .*list of str or of pairs, found int"),
        ((["a", 5],), r"text\[1\]: not text .*found int"),
        ((["a"], ["b", "c"]), "text_pair: not one for each text .*1 texts, found 2"),
        ((["a"], "b"), "text_pair: not one for each text .*found str"),
        (("a", ["b"]), "text_pair: text is one text .*found list"),
        (([("a", "b"), "c"],), r"text\[1\]: not a pair of texts"),
        (([("a", "b", "c")],), r"text\[0\]: not a pair of texts"),
        (([("a", 1)],), r"text\[0\]\[1\]: not text"),
        ((["a"], [None]), r"text_pair\[0\]: not text"),
    ],
)
def test_what_is_neither_texts_nor_pairs_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gpt2()(*texts)


def test_a_small_tokenizer_without_a_length_or_padding_asks_for_them(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    (tmp_path / "special_tokens_map.json").unlink()
    tokenizer = GPTJTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == (None, None)
    with pytest.raises(InputError, match=r"padding: no token to pad with. Set tokenizer.pad_token"):
        tokenizer(["a", "b c"], padding=True)
    with pytest.raises(InputError, match="max_length: needed to truncate or pad"):
        tokenizer("a", truncation=True)


def test_numpy_tensors_are_whole_batches() -> None:
    batch = gpt2()([("a b", "c"), ("a", "b")], padding=True, return_offsets=True, return_tensors="np")
    assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
        "input_ids": ("int64", (2, 3)),
        "attention_mask": ("int64", (2, 3)),
        "offset_mapping": ("int64", (2, 3, 2)),
        "sequence_ids": ("int64", (2, 3)),
    }


def test_rows_of_different_lengths_make_no_tensor() -> None:
    with pytest.raises(InputError, match=r"return_tensors: rows of different lengths .*1 to 2 tokens.*padding=True"):
        gpt2()(["a", "a b"], return_tensors="np")
    with pytest.raises(InputError, match="no texts"):
        gpt2()([], return_tensors="np")
    assert gpt2()([]) == {"input_ids": [], "attention_mask": []}


@pytest.mark.parametrize(
    ("kind", "module", "extra"), [("pt", "torch", "pt"), ("tf", "tensorflow", "tf"), ("jax", "jax", "flax")]
)
def test_a_framework_that_is_missing_is_named_with_its_extra(
    kind: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [module, "jax.numpy"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        BackendError, match=rf'return_tensors="{kind}": {module} cannot.*pip install "gptj-multibackend\[{extra}\]"'
    ):
        gpt2()("a", return_tensors=kind)


def test_an_encoding_is_a_dict_whose_members_are_attributes() -> None:
    def model(input_ids: Any, attention_mask: Any) -> Any:
        return input_ids, attention_mask

    encoding = gpt2()("a b")
    assert model(**encoding) == (encoding.input_ids, encoding["attention_mask"])
    with pytest.raises(AttributeError, match="no 'labels', only input_ids, attention_mask"):
        _ = encoding.labels
    assert copy.copy(encoding) == pickle.loads(pickle.dumps(encoding)) == encoding
    assert type(copy.deepcopy(encoding)) is BatchEncoding


# Other vocabularies, and the model beside it


@pytest.mark.parametrize(("rows", "fits"), [(50400, True), (50401, True), (50399, False), (50257, False)])
def test_a_tokenizer_must_not_be_larger_than_the_embedding(rows: int, fits: bool) -> None:
    config = GPTJConfig(vocab_size=rows)
    if fits:
        gpt2().check_fits(config)
    else:
        with pytest.raises(
            ConfigError, match=f"vocab_size: the tokenizer has 50400 tokens and the embedding {rows} rows"
        ):
            gpt2().check_fits(config)


def test_training_gives_exactly_the_size_asked_for_and_the_same_each_time() -> None:
    first, second = GPTJTokenizer.train(CORPUS, 304), GPTJTokenizer.train(iter(CORPUS), 304)
    assert len(first) == first.vocab_size == 304
    assert (first.eos_token_id, first.pad_token_id, first.special_ids) == (303, 303, {303})
    assert first.files() == second.files()
    assert len(first.encode(CORPUS[0])) < len(CORPUS[0])
    assert len(GPTJTokenizer.train([], 257)) == 257


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (256, "at least 257, found 256"),
        (300.0, "at least 257"),
        (5000, r"more tokens than the texts have .*found 5000"),
    ],
)
def test_a_size_that_training_cannot_give_is_refused(size: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"vocab_size: .*{message}"):
        GPTJTokenizer.train(CORPUS, size)


def test_a_tokenizer_can_be_sent_to_another_process() -> None:
    tokenizer = GPTJTokenizer.train(CORPUS, 290)
    tokenizer.padding_side = "right"
    other = pickle.loads(pickle.dumps(tokenizer))
    assert other.padding_side == "right"
    assert (other.files(), other.encode("The dog")) == (tokenizer.files(), tokenizer.encode("The dog"))


def test_a_library_that_encodes_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTJTokenizer, "encode", lambda self, text: [0])
    with pytest.raises(TokenizerError, match=r"tokenizers .* wrongly .*expected \[15496, 11, .*found \[0\]"):
        GPTJTokenizer.gpt2()


# Size

LARGE = """
import re, resource, sys, time
from gptj import GPTJTokenizer
tokenizer = GPTJTokenizer.gpt2()
words = re.findall(r"\\S+\\s*", sys.argv[1])
text = (" ".join(a + b for a in words for b in words) * 1000)[:10_000_000]
tokenizer.encode(text[:1_000_000])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
ids = tokenizer.encode(text)
seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert tokenizer.decode(ids) == text and len(text) == 10_000_000
print(seconds, (after - before) * 1024, len(ids))
"""


def test_ten_megabytes_take_seconds_and_little_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE, " ".join(CORPUS[:2])], capture_output=True, text=True, check=True, timeout=300
    )
    cpu_seconds, extra_bytes, tokens = map(float, done.stdout.split())
    assert tokens > 2_000_000
    assert extra_bytes < MEMORY_BYTES
    assert cpu_seconds < CPU_SECONDS


@pytest.mark.parametrize(
    "text", [" " * 1_000_000, "a" * 1_000_000, "\n" * 300_000, "汉字很好，" * 60_000, "🤗" * 60_000]
)
def test_a_million_of_one_kind_come_back_exactly(text: str) -> None:
    assert gpt2().decode(gpt2().encode(text)) == text
