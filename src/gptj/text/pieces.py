"""Places where a long text may be cut so that its pieces' tokens, joined, are the whole text's tokens; its words.

The `tokenizers` library takes minutes and gigabytes for one string of many megabytes, and seconds for the same
text in pieces. GPT-2 first splits text into words with this pattern and merges bytes only inside a word:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

A cut before position p changes nothing if (1) a word starts at p and (2) the words before p do not look at what
follows p. Call the four kinds of characters L (letters), N (numbers), S (white space) and O (the rest).

* Not S, then S: no alternative has white space after another kind, so a word starts at p. Before p, the only
  alternative that looks ahead is `\\s+(?!\\S)`, and what it sees, the character before p at the latest, is kept.
* L then N, L then O, N then L, N then O, O then N: no alternative has such a pair, and none of the words that
  can end there looks ahead. (O then L is left out: `'s` has it.)

Both sides are taken from narrow sets, so that no difference of opinion between Unicode versions about what a
letter or a space is can matter; a test asks the library about every character in them. A text without any such
place, like a million spaces, stays whole.

In ASCII the pattern itself can be said with Python's `re`, which knows no \\p{L}: so a text's words can be told apart
here, and each different word encoded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["text_pieces", "text_words"]

_LETTERS = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_NUMBERS = "0-9"
_OTHERS = "!-/:-@\\[-`{-~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"

# Python's \S is the stricter one: it counts U+001C to U+001F as white space, the library does not.
_BEFORE_SPACE = re.compile(r"(?<=\S)(?=[ \t\n\r])")
_ANY_SAFE_PLACE = re.compile(
    rf"{_BEFORE_SPACE.pattern}"
    rf"|(?<=[{_LETTERS}])(?=[{_NUMBERS}{_OTHERS}])"
    rf"|(?<=[{_NUMBERS}])(?=[{_LETTERS}{_OTHERS}])"
    rf"|(?<=[{_OTHERS}])(?=[{_NUMBERS}])"
)

# The pattern's \s holds these of ASCII, and not U+001C to U+001F.
_SPACES = r" \t\n\x0b\x0c\r"
_ASCII_WORD = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+"
    rf"| ?[^{_SPACES}A-Za-z0-9]+|[{_SPACES}]+(?![^{_SPACES}])|[{_SPACES}]+"
)


def text_words(text: str) -> list[str]:
    """A text cut at every safe place that is quickly found: in ASCII the pattern's own words, else before white space.

    >>> text_words("they'll  say 2,048"), text_words("a naïve  man")
    (['they', "'ll", ' ', ' say', ' 2', ',', '048'], ['a', ' naïve', '  man'])
    """
    return _ASCII_WORD.findall(text) if text.isascii() else _BEFORE_SPACE.split(text)


def text_pieces(text: str, *, at_least: int, only_before_spaces: bool = False) -> Iterator[tuple[int, int]]:
    """The bounds (start, end) of consecutive pieces of `text`, each cut at the first safe place after `at_least`.

    Args:
        text: any text; the empty one has no pieces.
        at_least: characters of every piece but the last.
        only_before_spaces: cut nowhere else, so that no token that is matched as literal text, such as
            `<|extratoken_1|>`, is cut in two.

    >>> list(text_pieces("to be or not", at_least=4))
    [(0, 5), (5, 12)]
    """
    places = _BEFORE_SPACE if only_before_spaces else _ANY_SAFE_PLACE
    start = 0
    while len(text) - start > at_least:
        place = places.search(text, start + at_least)
        if place is None:
            break
        yield start, place.start()
        start = place.start()
    if start < len(text):
        yield start, len(text)
