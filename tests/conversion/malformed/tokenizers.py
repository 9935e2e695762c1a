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
SETTINGS, NAMES, TOKENIZER = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
ADDED = "added_tokens.json"
FILES = small().files()

read: Callable[[Path], object] = GPTJTokenizer.from_pretrained


def with_members(file: str, members: dict[str, Any], *, older: bool = False) -> Callable[[Path], None]:
    """Makes the good folder with members of `file` changed; `older` is the one without tokenizer.json."""

    def make(folder: Path) -> None:
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        path = folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | members))
        if older:
            (folder / TOKENIZER).unlink()

    return make


def case(file: str, field: str, value: Any, names: str | None = None, **outcome: Any) -> Malformed:
    """`file` with `value` in `field`."""
    what = f"{file}: {field} is {json.dumps(value)[:60]}"
    return Malformed(what, with_members(file, {field: value}), read, names or field, **outcome)


def contradiction(file: str, members: dict[str, Any], names: str) -> list[Malformed]:
    """`file` that contradicts the vocabulary in tokenizer.json, and the one in vocab.json."""
    what = f"{file}: {json.dumps(members)[:70]}"
    return [
        Malformed(f"{what}, {'the older pair' if older else TOKENIZER}", with_members(file, members, older=older), read,
                  names)
        for older in (False, True)
    ]  # fmt: skip


TOKEN = {"content": "<|endoftext|>", "special": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
OTHER_CLASSES = (
    *(
        "Llama",
        "T5",
        "Bert",
        "Roberta",
        "XLMRoberta",
        "Whisper",
        "Gemma",
        "CodeLlama",
        "Cohere",
        "DistilBert",
        "Albert",
    ),
    *("Electra", "MBart", "Nllb", "Deberta", "XLNet", "CLIP", "Bart", "MPNet", "Longformer", "Canine", "ByT5"),
)
LISTED_IN = {"pre_tokenizer": "pretokenizers", "decoder": "decoders", "post_processor": "processors"}
STEPS = {
    "normalizer": ("NFC", "NFKC", "Lowercase", "StripAccents", "Prepend", "BertNormalizer"),
    "pre_tokenizer": ("Whitespace", "Digits", "Split", "Punctuation", "Metaspace", "ByteLevel", None, 3, "Sequence"),
    "decoder": ("WordPiece", "Metaspace", "Strip", "Replace", "ByteFallback", "ByteLevel", None, 3, "Sequence"),
    "post_processor": ("TemplateProcessing", "BertProcessing", "RobertaProcessing", None, 3, "Sequence"),
}


def step(kind: Any) -> Any:
    """A step of that kind, or what is no step."""
    if kind == "ByteLevel":
        return BYTE_LEVEL
    return {"type": kind} if isinstance(kind, str) else kind


def sequence(part: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", LISTED_IN.get(part, "normalizers"): list(steps)}


def piece(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


END = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
TEMPLATES: tuple[tuple[Any, Any], ...] = (
    ([END, piece("A")], [piece("A"), piece("B")]),
    ([piece("A"), END], [piece("A"), piece("B")]),
    ([piece("A")], [piece("A"), END, piece("B")]),
    ([piece("A")], [piece("B"), piece("A")]),
    ([piece("A"), piece("A")], [piece("A"), piece("B")]),
    ([], [piece("A"), piece("B")]),
    (["A"], ["A", "B"]),
    ({"Sequence": {"id": "A"}}, [piece("A"), piece("B")]),
    ([{**piece("A"), **END}], [piece("A"), piece("B")]),
    (None, None),
)
NO_TOKENS = (
    [3],
    [None],
    [[]],
    [{}],
    [{"content": ""}],
    [{"content": 3}],
    [""],
    [True],
    ["!", 3],
    [{"content": "\ud800"}],
)
SAID: dict[str, tuple[Any, ...]] = {
    "chat_template": ("{{ messages }}", [{"name": "default", "template": "{{ x }}"}], 3),
    "clean_up_tokenization_spaces": (True, "yes", 1),
    "spaces_between_special_tokens": (True,),
    "errors": ("strict", "ignore", "backslashreplace", "surrogateescape", 3, True),
    "split_special_tokens": (True,),
    "do_lower_case": (True,),
    "return_token_type_ids": (True,),
    "model_input_names": (["input_ids"], ["input_ids", "token_type_ids", "attention_mask"], [], "input_ids", 3, [3]),
    "auto_map": ({"AutoTokenizer": ["tokenization.MyTokenizer", None]}, ["a.B", None]),
    "tokenizer_file": ("/elsewhere/tokenizer.json",),
    "vocab_file": ("other.json",),
    "merges_file": ("other.txt",),
    "fix_mistral_regex": (True,),
    "init_inputs": (["x"],),
    "additional_special_tokens": (["<|user|>"], [{"content": "<|user|>", "lstrip": True}], ["!", "<|user|>"]),
    "extra_special_tokens": (["<|user|>"], {"image_token": "<image>"}),
    "model_specific_special_tokens": ({"image_token": "<image>"},),
    "sep_token": ("<sep>", {"content": "<sep>"}),
    "cls_token": ("<cls>",),
    "mask_token": ("<mask>",),
    "tokenizer_class": ("MyTokenizer", "BloomTokenizerFast", "owner/name--tokenization.GPT2TokenizerFast"),
}

CASES = [
    *(
        case(SETTINGS, "tokenizer_class", f"{name}Tokenizer{fast}")
        for name in OTHER_CLASSES
        for fast in ("", "Fast")
    ),
    *(case(SETTINGS, "tokenizer_class", name) for name in (3, [], "", True, {}, "owner/name--", "a--LlamaTokenizer")),
    *(
        Malformed(f"the older pair of {name}", with_members(SETTINGS, {"tokenizer_class": name}, older=True), read,
                  "tokenizer_class")
        for name in ("MyTokenizer", "Qwen2Tokenizer", "BloomTokenizerFast", "LlamaTokenizer")
    ),
    *(case(SETTINGS, "added_tokens_decoder", value) for value in ([], [TOKEN], "", 0, False, "x")),
    *(
        case(SETTINGS, "added_tokens_decoder", {key: TOKEN}, "added_tokens_decoder")
        for key in ("-1", "²", "٣", "1.0", "0299", " 299", "+299", "", "1_0", "9" * 5000)
    ),
    *(case(SETTINGS, "added_tokens_decoder", {"299": value}) for value in (None, 3, "x", [], {}, {"content": 3})),
    *(
        case(SETTINGS, "added_tokens_decoder", {"299": TOKEN | {flag: value}}, f"added_tokens_decoder.299.{flag}")
        for flag in ("special", "single_word", "lstrip", "rstrip", "normalized")
        for value in (1, "true", None, [])
    ),
    *(
        case(SETTINGS, "added_tokens_decoder", {"299": TOKEN | {flag: value}}, f"added_tokens_decoder.299.{flag}",
             outcome="said")
        for flag, value in (("special", False), ("single_word", True), ("lstrip", True), ("rstrip", True))
    ),
    # An id that tokenizer.json gives another text, a text that it gives another id, and one id for two texts.
    *(
        one
        for key, value in (("298", TOKEN), ("0", TOKEN), ("299", {"content": "</s>"}), ("5", {"content": "<pad>"}),
                           ("300", TOKEN), ("299", {"content": "!"}), ("299", TOKEN | {"id": 298}))
        for one in contradiction(SETTINGS, {"added_tokens_decoder": {key: value}}, f"added_tokens_decoder.{key}")
    ),
    *(
        one
        for members, names in (
            ({"<|endoftext|>": 0}, "<|endoftext|>"), ({"<|endoftext|>": 300}, "<|endoftext|>"), ({"</s>": 299}, "</s>"),
            ({"<pad>": 5}, "<pad>"), ({"<a>": 300, "<b>": 300}, "<b>"), ({"!": 299}, "'!'"), ({"<a>": 302}, "<a>"),
            ({"<a>": -1}, "<a>"), ({"<a>": "300"}, "<a>"), ({"<a>": None}, "<a>"), ({"<a>": 300.0}, "<a>"),
            ({"": 300}, ADDED), ({"<a>": True}, "<a>"), ({"\ud800": 300}, "ud800"),
        )
        for one in contradiction(ADDED, members, names)
    ),
    *(case(SETTINGS, "eos_token", value) for value in (3, [], True, {}, {"content": None}, {"content": 3}, "absent")),
    *(case(NAMES, "pad_token", value) for value in (3, [], True, {}, {"content": None}, "")),
    *(case(NAMES, role, "!", outcome="said") for role in ("bos_token", "eos_token", "unk_token", "pad_token")),
    *(case(SETTINGS, "pad_token", {"content": "!", flag: 1}, f"pad_token.{flag}") for flag in ("lstrip", "rstrip")),
    *(
        case(file, field, value)
        for file in (SETTINGS, NAMES)
        for field in ("additional_special_tokens", "extra_special_tokens")
        for value in (*NO_TOKENS, 3, "<|user|>", True)
    ),
    case(SETTINGS, "additional_special_tokens", {"a": "!"}),
    *(case(SETTINGS, "extra_special_tokens", {"image_token": value}) for value in (3, [], {}, "", None)),
    *(case(SETTINGS, role, value) for role in ("sep_token", "cls_token", "mask_token") for value in (3, [], {}, "")),
    *(case(SETTINGS, field, value, outcome="said") for field, values in SAID.items() for value in values),
    *(case(SETTINGS, "model_max_length", value) for value in ("2048", 0, -1, 10.5, True, [])),
    *(case(SETTINGS, flag, value) for flag in ("add_prefix_space", "add_bos_token", "add_eos_token")
      for value in (True, "false", 1, [], {}, "")),
    *(case(TOKENIZER, "added_tokens", value) for value in ({}, "", 0, False, [3])),
    # Each step alone, in a Sequence, and in one within another.
    *(
        case(TOKENIZER, part, value)
        for part, kinds in STEPS.items()
        for kind in kinds
        if kind not in (None, "ByteLevel")
        for inner in (sequence(part, step(kind)),)
        for value in (step(kind), inner, sequence(part, sequence(part), inner))
    ),
    # Beside a ByteLevel, before it and after it.
    *(
        case(TOKENIZER, part, sequence(part, *steps))
        for part in LISTED_IN
        for kind in STEPS[part]
        for steps in ((step(kind), BYTE_LEVEL), (BYTE_LEVEL, step(kind)))
    ),
    *(case(TOKENIZER, part, sequence(part)) for part in ("pre_tokenizer", "decoder")),
    *(case(TOKENIZER, part, {"type": "Sequence", "steps": [BYTE_LEVEL]}) for part in LISTED_IN),
    *(case(TOKENIZER, part, {"type": "Sequence", name: BYTE_LEVEL}) for part, name in LISTED_IN.items()),
    *(
        case(TOKENIZER, "pre_tokenizer", sequence("pre_tokenizer", BYTE_LEVEL | {member: value}), f"[0].{member}")
        for member, values in (("add_prefix_space", (True, None, 0)), ("use_regex", (False, 1, "")))
        for value in values
    ),
    *(
        case(TOKENIZER, "post_processor", {"type": "TemplateProcessing", "single": single, "pair": pair})
        for single, pair in TEMPLATES
    ),
    case(TOKENIZER, "post_processor", BYTE_LEVEL | {"trim_offsets": True}, "trim_offsets", outcome="said"),
    case(TOKENIZER, "truncation", {"max_length": 2, "strategy": "LongestFirst"}, outcome="said"),
    case(TOKENIZER, "padding", {"strategy": {"Fixed": 9}, "pad_id": 0}, outcome="said"),
]  # fmt: skip
