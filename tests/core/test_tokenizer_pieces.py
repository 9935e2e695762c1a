"""A text is cut only where the cut changes no token, and the sets that decide it mean what the library means."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_samples import every_character, gpt2, random_texts
from tokenizers import pre_tokenizers

from gptj.text import pieces as module
from gptj.text.pieces import text_pieces, text_words

WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def words(text: str) -> list[str]:
    """What the library's pattern makes of `text`."""
    return [text[start:end] for _, (start, end) in WORDS.pre_tokenize_str(text)]


def is_letter(character: str) -> bool:
    return words("a" + character) == ["a" + character]


def is_number(character: str) -> bool:
    return words("1" + character) == ["1" + character]


def is_other(character: str) -> bool:
    return words("!" + character) == ["!" + character]


def members(characters: str) -> list[str]:
    """The characters that a set of the module stands for."""
    one = re.compile(f"[{characters}]")
    return [character for character in every_character() if one.match(character)]


@pytest.mark.parametrize(
    ("characters", "least", "belongs"),
    [(module._LETTERS, 30_000, is_letter), (module._NUMBERS, 10, is_number), (module._OTHERS, 35, is_other)],
)
def test_the_library_puts_each_character_of_a_set_into_the_same_kind(
    characters: str, least: int, belongs: object
) -> None:
    found = members(characters)
    assert len(found) >= least
    assert callable(belongs) and [character for character in found if not belongs(character)] == []


def test_what_the_library_takes_for_space_python_takes_for_space() -> None:
    spaces = [c for c in every_character() if not (c.isalnum() or is_letter(c) or is_number(c) or is_other(c))]
    assert len(spaces) >= 25
    assert [c for c in spaces if not re.match(r"\s", c)] == []
    assert all(c in spaces for c in " \t\n\r")


def test_the_pieces_are_the_text() -> None:
    for text in random_texts(300, seed=5):
        for only_before_spaces in (False, True):
            bounds = list(text_pieces(text, at_least=3, only_before_spaces=only_before_spaces))
            assert "".join(text[start:end] for start, end in bounds) == text
            assert all(end - start >= 3 for start, end in bounds[:-1])


@pytest.mark.parametrize(("only_before_spaces", "least_cuts"), [(False, 9_000), (True, 3_000)])
def test_the_pieces_have_the_words_of_the_text(only_before_spaces: bool, least_cuts: int) -> None:
    cuts = 0
    for text in random_texts(3_000, seed=6):
        pieces = [
            text[slice(*bounds)] for bounds in text_pieces(text, at_least=1, only_before_spaces=only_before_spaces)
        ]
        assert [word for piece in pieces for word in words(piece)] == words(text)
        cuts += len(pieces) - 1
    assert cuts > least_cuts


@given(st.text(alphabet="ab 'stlm1!\n\t\u00a0\u0301é漢。", max_size=40))
def test_the_pieces_have_the_words_of_any_text(text: str) -> None:
    pieces = [text[slice(*bounds)] for bounds in text_pieces(text, at_least=1)]
    assert [word for piece in pieces for word in words(piece)] == words(text)


def test_a_cut_inside_a_word_would_be_seen() -> None:
    assert words("ab") != words("a") + words("b")
    assert words("x's") != words("x'") + words("s")
    assert words("a   b") != words("a   ") + words("b")


def test_added_tokens_are_never_cut() -> None:
    part = "x<|extratoken_12|>y <|endoftext|>."
    assert gpt2().encode(part * 5_000, allow_special=True) == gpt2().encode(part, allow_special=True) * 5_000


def test_a_text_without_a_safe_place_stays_whole() -> None:
    assert list(text_pieces(" " * 100, at_least=10)) == [(0, 100)]
    assert list(text_pieces("a" * 100, at_least=10)) == [(0, 100)]
    assert list(text_pieces("", at_least=10)) == []


def test_a_text_cut_into_words_has_the_words_of_the_text() -> None:
    for text in random_texts(3_000, seed=8):
        parts = text_words(text)
        assert "".join(parts) == text
        assert [word for part in parts for word in words(part)] == words(text)


@given(st.text(alphabet=[chr(point) for point in range(128)], max_size=40))
def test_an_ascii_text_is_cut_into_the_librarys_own_words(text: str) -> None:
    assert text_words(text) == words(text)


def test_each_ascii_character_is_cut_from_its_neighbours_as_the_library_does() -> None:
    kinds = "a 's\t\n1!\x0b\x1c\0"
    for text in (a + chr(point) + b + c for point in range(128) for a in kinds for b in kinds for c in ("", "a")):
        assert text_words(text) == words(text), ascii(text)
