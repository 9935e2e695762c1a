"""Tokenizers and texts for the tokenizer's tests: GPT-2's own, a small one of 300 tokens, and texts that are hard."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Iterator

from gptj import GPTJTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's the dog's day; they'll say we've won 1,234 times.",
    "Whether 'tis nobler in the mind to suffer the slings and arrows of outrageous fortune, or not.",
    "naïve café, Ελληνικά, русский язык, 漢字かな交じり文、そして句読点。 한국어 🤗🤗",
]

HARD_TEXTS = {
    "nothing": "",
    "NUL": "a\0b",
    "byte order mark": "\ufeffBOM \ufeff inside",
    "CRLF": "one\r\ntwo\rthree\n\n",
    "composed and not": "\u00e9 e\u0301 \ufb01 \u1e9b\u0323",
    "joined emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "right to left": "\u202eabc\u202c \u05e9\u05dc\u05d5\u05dd",
    "all kinds of space": "a \u00a0\u2003\u3000\u2028\u2029\x85\x0b\x0c\x1c\x1f b ",
    "contractions": "I'll I'LL don't'd 'sup 'tis they've'S '' 'r 're''re",
    "noncharacters": "\ufffe \uffff \U0010ffff \ue000",
    "replacement": "\ufffd",
    "the alphabet's own letters": "Ġ Ċ Ł ł",
    "a merge line": "#version: 0.2\nĠ t",
}


@functools.cache
def gpt2() -> GPTJTokenizer:
    """GPT-J's tokenizer. Shared: a test that sets a property of it makes its own."""
    return GPTJTokenizer.gpt2()


@functools.cache
def small() -> GPTJTokenizer:
    """A tokenizer of 300 tokens, `<|endoftext|>` being 299. Shared, like `gpt2`."""
    return GPTJTokenizer.train(CORPUS, 300)


def every_character() -> Iterator[str]:
    """The 1,112,064 code points that are not surrogates."""
    for point in range(sys.maxunicode + 1):
        if not 0xD800 <= point <= 0xDFFF:
            yield chr(point)


_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r",
    " \u00a0\u2003\u3000\u2028\x85\x0b\x1c\x1f\u200b\ufeff",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "'stmdrevl' ",
    "àéîõüßøåçñ",
    "αβγδЖЩЫЮאבגدרزกขฃ",
    "漢字仮名、。「」한글ひらカナ",
    "²³¼½Ⅷ㊿௧०߁𝟘",
    "\u0301\u0308\u200d\ufe0f\u202e",
    "🤗👍🏽🏳🌈",
)
_WORDS = ("<|endoftext|>", "<|extratoken_7|>", " the", "'ll", "'re", "  ", "\n\n", "SolidGoldMagikarp", "don't", "ĠĊ")


def random_texts(count: int, *, seed: int) -> Iterator[str]:
    """Texts of 0 to 60 parts: words, runs of one kind of character, and code points from anywhere."""
    dice = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(dice.randrange(dice.choice((2, 8, 60)))):
            kind = dice.random()
            if kind < 0.15:
                parts.append(dice.choice(_WORDS))
            elif kind < 0.25:
                point = dice.randrange(sys.maxunicode + 1 - 0x800)
                parts.append(chr(point if point < 0xD800 else point + 0x800))
            else:
                alphabet = dice.choice(_ALPHABETS)
                parts.extend(dice.choices(alphabet, k=dice.randrange(1, 7)))
        yield "".join(parts)
