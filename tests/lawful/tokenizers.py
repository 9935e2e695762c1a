"""Tokenizer files of other classes, releases and trainers, around the same byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawful import Oddity

SETTINGS, NAMES, TOKENIZER = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
END = {"content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
END_ROLE = END | {"__type": "AddedToken"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
EMPTY = {
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": []},
    "decoder": {"type": "Sequence", "decoders": []},
    "post_processor": {"type": "Sequence", "processors": []},
}
SEQUENCES = {
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]},
    "decoder": {"type": "Sequence", "decoders": [BYTE_LEVEL]},
    "post_processor": {"type": "Sequence", "processors": [BYTE_LEVEL]},
}
BARE_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def edited(file: str, **members: Any) -> Callable[[Path], None]:
    """Changes members of `file`, which may be absent."""

    def make(folder: Path) -> None:
        path = folder / file
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | members))

    return make


def both(*makes: Callable[[Path], object]) -> Callable[[Path], None]:
    """All of the changes, in order."""

    def make(folder: Path) -> None:
        for change in makes:
            change(folder)

    return make


def without(file: str, *names: str) -> Callable[[Path], None]:
    """Takes members out of `file`."""

    def make(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))

    return make


def dropped(*files: str) -> Callable[[Path], None]:
    """Takes files away."""
    return lambda folder: [(folder / file).unlink() for file in files] and None


def settings(**members: Any) -> Callable[[Path], None]:
    """Changes members of tokenizer_config.json."""
    return edited(SETTINGS, **members)


def stepped(**steps: Any) -> Callable[[Path], None]:
    """Changes the pipeline of tokenizer.json."""
    return edited(TOKENIZER, **steps)


def companions(part: str, member: str) -> dict[str, Any]:
    """A part's ByteLevel in a Sequence, beside and within empty ones."""
    return {"type": "Sequence", member: [EMPTY[part], {"type": "Sequence", member: [BYTE_LEVEL]}, EMPTY[part]]}


def template_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


QUIET_CLASSES = ("GPT2TokenizerFast", "PreTrainedTokenizerFast", "CodeGenTokenizerFast", "GPTNeoXTokenizerFast",
                 "TokenizersBackend")  # fmt: skip

ODDITIES = [
    *(Oddity(f"the class {name}", settings(tokenizer_class=name)) for name in QUIET_CLASSES),
    Oddity("a class of another byte-level model", settings(tokenizer_class="Qwen2TokenizerFast"), "Qwen2"),
    Oddity("a class of one's own",
           settings(tokenizer_class="MyTokenizer", auto_map={"AutoTokenizer": ["t.MyTokenizer", None]}), "MyTokenizer"),
    Oddity("a class with its repository", settings(tokenizer_class="owner/name--GPT2TokenizerFast"), "tokenizer_class"),
    Oddity("a Sequence around every step", stepped(**SEQUENCES, normalizer={"type": "Sequence", "normalizers": []})),
    Oddity("Sequences with empty companions",
           stepped(pre_tokenizer=companions("pre_tokenizer", "pretokenizers"),
                   post_processor=companions("post_processor", "processors"),
                   decoder=companions("decoder", "decoders"))),
    Oddity("an empty Sequence that follows", stepped(post_processor=EMPTY["post_processor"])),
    Oddity("a template that adds nothing", stepped(post_processor=BARE_TEMPLATE)),
    Oddity("offsets that leave the space out", stepped(post_processor=BYTE_LEVEL | {"trim_offsets": True}),
           "trim_offsets"),
    Oddity("a chat template", settings(chat_template="{% for m in messages %}{{ m }}{% endfor %}"), "chat_template"),
    Oddity("a chat template in a file", template_file, "chat_template.jinja"),
    Oddity("spaces that are cleaned up", settings(clean_up_tokenization_spaces=True), "clean_up_tokenization_spaces"),
    Oddity("errors that are dropped", settings(errors="ignore"), "errors"),
    Oddity("token types", settings(model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
           "model_input_names"),
    Oddity("further special tokens of the vocabulary", settings(additional_special_tokens=["!", END_ROLE])),
    Oddity("a further special token that the vocabulary lacks, and no row for it",
           settings(additional_special_tokens=["<|user|>"]), "additional_special_tokens[0]"),
    Oddity("roles that no GPT-J has", settings(sep_token="!", cls_token=None, mask_token=END_ROLE)),
    Oddity("transformers 5's members", settings(backend="tokenizers", is_local=True, extra_special_tokens=["!"],
                                                model_specific_special_tokens={})),
    Oddity("a trainer's members", settings(max_length=512, stride=0, truncation_strategy="longest_first", legacy=True,
                                           processor_class="X", name_or_path="gpt2", special_tokens_map_file=None)),
    Oddity("model_max_length by its old name", both(without(SETTINGS, "model_max_length"), settings(max_len=1024))),
    Oddity("the same added tokens thrice",
           both(settings(added_tokens_decoder={"299": END}), edited("added_tokens.json", **{"<|endoftext|>": 299}))),
    Oddity("an added token told of only beside tokenizer.json",
           both(stepped(added_tokens=[]), settings(added_tokens_decoder={"299": END}))),
    Oddity("an added token without a flag of tokenizer.json's",
           settings(added_tokens_decoder={"299": END | {"lstrip": True}}), "added_tokens_decoder.299.lstrip"),
    Oddity("two files that name another token", edited(NAMES, eos_token="!"), "eos_token"),
    Oddity("the older pair and its settings",
           both(dropped(TOKENIZER), settings(eos_token=END_ROLE | {"normalized": True}))),
    Oddity("nothing but tokenizer.json", dropped(SETTINGS, NAMES, "vocab.json", "merges.txt")),
]  # fmt: skip
