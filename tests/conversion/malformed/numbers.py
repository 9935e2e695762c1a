"""Numbers beyond reason, in files and in calls: each is named before anything of that size is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_samples import write_sample
from gptj_conversion.convert import convert
from mesh_samples import write_mesh_sample
from tokenizer_samples import small
from toy_decoder import ToyDecoder, toy_config

from gptj.checkpoint import verify_checkpoint
from gptj.config import GPTJConfig
from gptj.generation import GenerationConfig, generate
from gptj.sharding.plan import Work, list_meshes, plan_memory
from gptj.text.tokenizer import GPTJTokenizer
from gptj.writing.shards import shard_bytes
from malformed import Malformed
from malformed.configs import converted, opened, read, setting

TITLE = "numbers beyond reason"
MODEL = toy_config()
DIGITS = "9" * 5000

IN_CONFIG: dict[str, tuple[Any, ...]] = {
    "n_positions": (2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**63, 10**18, 10**299, 1e300),
    "vocab_size": (2**31, 2**63, 10**18, 10**299),
    "n_layer": (2**31, 2**63, 10**299),
    "n_embd": (2**31, 10**299),
    "n_head": (2**31, 10**299),
    "n_inner": (2**31, 10**299, -(10**299)),
    "rotary_dim": (2**31, 10**299, -(10**299)),
    "layer_norm_epsilon": (1e-300, 5e-324, 1e-45, 1e-30, 2, 1e30, 1e300, 10**299),
    "initializer_range": (1e30, 1e300, 10**299),
    "attn_pdrop": (1e300, 10**299),
    "pad_token_id": (2**31, 10**299),
    "eos_token_id": (2**31, [10**299]),
    "bos_token_id": (10**299,),
    "num_labels": (2**40, 10**299),
}

IN_CALLS: dict[str, tuple[Any, ...]] = {
    "max_length": (10**12, 10**400, 10**5000),
    "max_new_tokens": (2**31, 10**400, 10**5000, 10**6),
    "min_length": (2**31, 10**5000),
    "max_time": (10**400, float("inf")),
    "num_beams": (5000, 10**6, 10**9, 10**5000),
    "num_beam_groups": (10**6, 10**9),
    "num_return_sequences": (10**6, 10**9, 10**5000),
    "num_assistant_tokens": (10**9, 10**5000),
    "prompt_lookup_num_tokens": (10**9, 10**5000),
    "max_matching_ngram_size": (10**9,),
    "no_repeat_ngram_size": (10**9, 10**5000),
    "encoder_no_repeat_ngram_size": (10**9,),
    "prefill_chunk_size": (10**9, 10**5000),
    "pad_token_id": (2**21, 10**9, 10**5000),
    "eos_token_id": (10**9, [10**5000]),
    "suppress_tokens": ([10**9], [10**5000]),
    "bad_words_ids": ([[10**9]], [[10**5000]]),
    "forced_eos_token_id": (10**9,),
    "repetition_penalty": (1e-310, 5e-324, 1e300, 10**400, float("nan")),
    "encoder_repetition_penalty": (1e-310, 1e300, 10**5000),
    "length_penalty": (1e3, -1e3, 1e300, 10**400),
    "diversity_penalty": (1e-310, 1e300, 10**400),
    "exponential_decay_length_penalty": ([1, 1e-310], [1, 1e300], [1, 10**400], [10**400, 1.1]),
    "sequence_bias": ([[[1], 1e300]], [[[1], 10**400]], [[[10**9], 1.0]]),
    "temperature": (1e-310, 1e300, 10**400, 10**5000),
    "top_k": (10**5000,),
    "top_p": (10**400,),
    "min_p": (10**400,),
    "epsilon_cutoff": (10**400,),
    "seed": (2**64, 10**5000, -(10**5000)),
}


def calling(field: str, value: Any) -> Callable[[Path], object]:
    """Asks for text with that setting."""

    def door(folder: Path) -> object:
        arguments: dict[str, Any] = {"seed": value} if field == "seed" else {}
        options: dict[str, Any] = {"do_sample": True} if field == "seed" else {field: value}
        return generate(
            lambda batch, capacity: ToyDecoder(MODEL, batch, capacity),
            [[4, 5, 6]],
            model_config=MODEL,
            generation_config=options,
            **arguments,
        )

    return door


def nothing(folder: Path) -> None:
    return None


# ---- an integer of 5,000 digits in every kind of JSON

Make = Callable[[Path], object]


def replaced(make: Make, name: str, pattern: str = r"\d+") -> Make:
    """Makes a folder in whose file `name` the first number that follows `pattern` has 5,000 digits."""

    def spoil(folder: Path) -> None:
        make(folder)
        text = (folder / name).read_text()
        spoilt, count = re.subn(pattern, lambda found: re.sub(r"\d+$", DIGITS, found[0]), text, count=1)
        assert count == 1, name
        (folder / name).write_text(spoilt)

    return spoil


def sharded(folder: Path) -> None:
    write_sample(folder / "in", max_shard_bytes=3000)


def tokens(folder: Path) -> None:
    small().save_pretrained(folder / "in")


def header(folder: Path) -> None:
    path = write_sample(folder / "in") / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = re.sub(rb'"data_offsets":\[\d+', b'"data_offsets":[' + DIGITS.encode(), data[8 : 8 + size], count=1)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def tpu(folder: Path) -> None:
    sample = write_mesh_sample(folder / "in")
    text = sample.config_file.read_text()
    (folder / "tpu.json").write_text(text)


def generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"top_k": 1}')


IN_JSON: list[tuple[str, Make, Callable[[Path], object], str]] = [
    ("config.json", replaced(sharded, "in/config.json", r'"n_layer": \d+'), opened, "config.json"),
    ("config.json, a key of others", replaced(sharded, "in/config.json", r'"n_embd": \d+'), converted, "config.json"),
    ("an index", replaced(sharded, "in/model.safetensors.index.json", r'"total_size": \d+'), opened, "index.json"),
    ("a safetensors header", header, opened, "model.safetensors"),
    ("manifest.json", replaced(sharded, "in/manifest.json", r'"nbytes": \d+'),
     lambda folder: verify_checkpoint(folder / "in"), "manifest.json"),
    ("tokenizer.json", replaced(tokens, "in/tokenizer.json", r'"id": \d+'),
     lambda folder: GPTJTokenizer.from_pretrained(folder / "in"), "tokenizer.json"),
    ("a training config", replaced(tpu, "tpu.json", r'"layers": \d+'),
     lambda folder: convert(folder / "in", folder / "out", config=folder / "tpu.json"), "tpu.json"),
    ("generation_config.json", replaced(generation, "generation_config.json", r'"top_k": \d+'),
     lambda folder: GenerationConfig.from_file(folder), "generation_config.json"),
]  # fmt: skip

_DOORS = (read, opened, converted)

IN_PLANS: dict[str, tuple[int, ...]] = {
    "devices": (0, -1, 2**20 + 1, 10**9, 10**18, int("9" * 4000)),
    "batch": (0, 2**31, 10**18, int("9" * 4000)),
    "length": (0, 17, 10**18, int("9" * 4000)),
}
SIZES = (
    "9" * 400 + "GB",
    DIGITS,
    "9" * 30 + "TB",
    "0.1",
    "0.0001KB",
    "1e9",
    "\u0661\u0666GB",
    "\u00b2GB",
    "nan",
    "inf",
)


def planned(name: str, value: int) -> Callable[[Path], object]:
    """A door: the memory of a model on so many devices."""

    def door(folder: Path) -> object:
        config = GPTJConfig(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
        sizes = {"devices": 2, "batch": 2, "length": 16, name: value}
        work = Work(True, sizes["batch"], sizes["length"])
        work.check(config)
        return [plan_memory(config, *cut, work) for cut in list_meshes(sizes["devices"], training=True)]

    return door


CASES = [
    *(
        Malformed(f"gptj plan with {name} = {str(value)[:20]}", lambda folder: None, planned(name, value), name)
        for name, values in IN_PLANS.items()
        for value in values
    ),
    *(
        Malformed(f"a size of {size[:20]!r}", lambda folder: None, lambda folder, size=size: shard_bytes(size), "size")
        for size in SIZES
    ),
    *(
        Malformed(f"{field} {str(value)[:20]} in config.json", setting(field, value), _DOORS[number % 3], field)
        for field, values in IN_CONFIG.items()
        for number, value in enumerate(values)
    ),
    *(
        Malformed(f"{field} number {number} of its kind in a call", nothing, calling(field, value), field)
        for field, values in IN_CALLS.items()
        for number, value in enumerate(values)
    ),
    *(Malformed(f"5,000 digits in {what}", make, door, names) for what, make, door, names in IN_JSON),
    Malformed(
        "a config of Python's with 5,000 digits",
        nothing,
        lambda folder: GPTJConfig(n_positions=10**5000),
        "n_positions",
    ),
]
