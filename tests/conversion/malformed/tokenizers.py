"""Tokenizer files that would give other ids, or that nobody can understand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizer_samples import small

from gptj import GPTJTokenizer
from malformed import Malformed

TITLE = "tokenizer files"
SETTINGS, TOKENIZER = "tokenizer_config.json", "tokenizer.json"


def case(file: str, field: str, value: Any, names: str | None = None, **outcome: Any) -> Malformed:
    """`file` with `value` in `field`."""

    def make(folder: Path) -> None:
        small().save_pretrained(folder)
        members = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**members, field: value}))

    door: Callable[[Path], object] = GPTJTokenizer.from_pretrained
    return Malformed(f"{file}: {field} is {json.dumps(value)[:60]}", make, door, names or field, **outcome)


TOKEN = {"content": "<|endoftext|>", "special": True}

CASES = [
    *(
        case(SETTINGS, "tokenizer_class", name)
        for name in ("LlamaTokenizer", "LlamaTokenizerFast", "T5Tokenizer", "BertTokenizer", "RobertaTokenizer", 3, [])
    ),
    *(case(SETTINGS, "added_tokens_decoder", value) for value in ([], [TOKEN], "", 0, False, "x")),
    *(
        case(SETTINGS, "added_tokens_decoder", {key: TOKEN}, "added_tokens_decoder")
        for key in ("-1", "²", "٣", "1.0", "0299", " 299", "+299", "", "1_0", "9" * 5000)
    ),
    *(case(SETTINGS, "added_tokens_decoder", {"299": value}) for value in (None, 3, "x", [], {}, {"content": 3})),
    *(case(SETTINGS, "eos_token", value) for value in (3, [], True, {}, {"content": None}, {"content": 3}, "absent")),
    *(case(SETTINGS, "model_max_length", value) for value in ("2048", 0, -1, 10.5, True, [])),
    *(case(SETTINGS, "add_prefix_space", value) for value in (True, "false", 1, [], {}, "")),
    *(case(TOKENIZER, "added_tokens", value) for value in ({}, "", 0, False, [3])),
    *(case(TOKENIZER, "normalizer", {"type": name}) for name in ("NFC", "Lowercase", "Strip")),
    case(TOKENIZER, "post_processor", {"type": "TemplateProcessing"}),
    case(TOKENIZER, "truncation", {"max_length": 2, "strategy": "LongestFirst"}, outcome="said"),
    case(TOKENIZER, "padding", {"strategy": {"Fixed": 9}, "pad_id": 0}, outcome="said"),
]
