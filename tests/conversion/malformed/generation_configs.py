"""generation_config.json whose settings cannot be honoured: it is read and said, and text is refused by the field."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from toy_decoder import ToyDecoder, toy_config

from gptj.errors import CheckpointWarning
from gptj.generation import GenerationConfig, generate
from malformed import Malformed

TITLE = "generation_config.json"
MODEL = toy_config()


def written(text: str) -> Any:
    """Makes a folder with that generation_config.json."""

    def make(folder: Path) -> None:
        (folder / "generation_config.json").write_text(text)

    return make


def read(folder: Path) -> GenerationConfig:
    return GenerationConfig.from_file(folder, vocab_size=MODEL.vocab_size)


def continued(folder: Path) -> object:
    """Reads the file, which must only be said, and asks for text by it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        config = read(folder)
    return generate(
        lambda batch, capacity: ToyDecoder(MODEL, batch, capacity),
        [[4, 5, 6]],
        model_config=MODEL,
        generation_config=config,
        decode=str,
        seed=0,
    )


BROKEN: dict[str, tuple[Any, ...]] = {
    "max_length": (0, -1, "20", [20], 10**12),
    "max_new_tokens": (0, -3, 2.5, "20", True),
    "min_length": (-1, "3", 2.5),
    "min_new_tokens": (-1, [3]),
    "max_time": (0, -1, "x"),
    "stop_strings": (5, [1], [""], {"a": 1}),
    "eos_token_id": ("<|endoftext|>", [[3]], {"a": 1}, 2.5, True),
    "do_sample": ("true", 2, []),
    "num_beams": (0, -1, "4", 2.5, 10**6, 10**9),
    "repetition_penalty": (0, -1, "1.2", 1e-310, 1e300, True),
    "encoder_repetition_penalty": (0, 1e-310),
    "no_repeat_ngram_size": (-1, "3", 2.5, 10**9),
    "bad_words_ids": (5, [5], [["a"]], [[1.5]], "x"),
    "sequence_bias": (5, [[1, 2]], [[[1], "x"]], [[[1], 1e300]], {"(1, 2)": 0.5}),
    "forced_eos_token_id": ("x", 2.5, [[1]]),
    "forced_bos_token_id": ("x", 2.5, [1, 2]),
    "remove_invalid_values": ("yes", 2),
    "exponential_decay_length_penalty": ([1], "x", [1, 0], [-1, 2.0], [1, 1e300]),
    "suppress_tokens": (5.5, "x", [[1]], [1.5]),
    "begin_suppress_tokens": ("x", {"a": 1}),
    "num_return_sequences": (0, 2, "2", 10**9),
    "renormalize_logits": ("x", 3),
    "return_dict_in_generate": ("x",),
}

SAMPLED: dict[str, tuple[Any, ...]] = {
    "temperature": (-1, "hot", 1e-300, 1e300, [1]),
    "top_k": (-1, "5", 2.5),
    "top_p": (0, 1.5, -1, "x"),
    "min_p": (-1, 2),
    "typical_p": (0, 2),
    "epsilon_cutoff": (-1, 1),
    "eta_cutoff": (-1, 1, "x"),
}

BEAMS: dict[str, tuple[Any, ...]] = {
    "length_penalty": ("x", 1e300),
    "early_stopping": ("always", 2),
    "num_beam_groups": (0, 3, 2),
    "num_return_sequences": (5, 10**6),
}

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1.5, 0, "x", 3),
    "force_words_ids": ([[3]], 5),
    "constraints": ([{"a": 1}], "x"),
    "token_healing": (True, 1),
    "watermarking_config": ({"bias": 2.0}, 3),
    "dola_layers": ("high", [1, 2]),
    "forced_decoder_ids": ([[1, 5]],),
}

NOT_READ = ("", "[]", "{", '{"top_k": 1,}', '{"top_k": 1, "top_k": 2}', '{"temperature": NaN}', "null", "\x00", '"x"')


def cases(settings: dict[str, tuple[Any, ...]], beside: dict[str, Any]) -> list[Malformed]:
    listed = []
    for field, values in settings.items():
        for value in values:
            text = json.dumps(beside | {field: value})
            listed.append(Malformed(f"{text[:60]}: text", written(text), continued, field))
            listed.append(Malformed(f"{text[:60]}: the file", written(text), read, field, "said"))
    return listed


CASES = [
    *cases(BROKEN, {}),
    *cases(SAMPLED, {"do_sample": True}),
    *cases(BEAMS, {"num_beams": 4}),
    *cases(NOT_SUPPORTED, {"max_new_tokens": 3}),
    *(Malformed(f"{text!r}", written(text), read, "generation_config.json") for text in NOT_READ),
]
