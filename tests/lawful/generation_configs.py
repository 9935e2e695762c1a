"""generation_config.json with settings that have no effect, and of other releases and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lawful import Oddity


def settings(**members: Any) -> Callable[[Path], None]:
    """Writes that generation_config.json."""

    def make(folder: Path) -> None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256} | members))

    return make


NULLS = ("max_length", "max_new_tokens", "min_length", "temperature", "top_k", "top_p", "num_beams", "do_sample",
         "repetition_penalty", "pad_token_id", "bos_token_id", "use_cache", "early_stopping", "cache_implementation",
         "guidance_scale", "low_memory", "suppress_tokens", "num_return_sequences", "output_scores")  # fmt: skip

ODDITIES = [
    Oddity("no generation_config.json", lambda folder: (folder / "generation_config.json").unlink()),
    Oddity("an empty object", lambda folder: (folder / "generation_config.json").write_text("{}")),
    Oddity("GPT-J-6B's own file", settings(_from_model_config=True, bos_token_id=256, transformers_version="4.27.0")),
    Oddity("every setting null", settings(**dict.fromkeys(NULLS))),
    Oddity("neutral settings that are not supported here",
           settings(guidance_scale=1.0, token_healing=False, constraints=[], force_words_ids=None, low_memory=False)),
    Oddity("unknown keys", settings(chat_format="chatml", user_token_id=195, max_window_size=6144, is_assistant=False)),
    Oddity("sampling settings without do_sample", settings(temperature=0.7, top_p=0.9, typical_p=0.8), "temperature"),
    Oddity("top_k without do_sample", settings(top_k=40), "top_k"),
    Oddity("early_stopping without beams", settings(early_stopping=True), "early_stopping"),
    Oddity("length_penalty without beams", settings(length_penalty=2.0), "length_penalty"),
    Oddity("diversity_penalty without groups", settings(diversity_penalty=0.5), "diversity_penalty"),
    Oddity("max_length beside max_new_tokens", settings(max_length=20, max_new_tokens=5), "max_length"),
    Oddity("an empty suppress_tokens", settings(suppress_tokens=[], begin_suppress_tokens=[]), "suppress_tokens"),
    Oddity("empty lists of words", settings(bad_words_ids=[], sequence_bias=[], stop_strings=[]), "bad_words_ids"),
    Oddity("a cache's name", settings(cache_implementation="hybrid", cache_config={"a": 4}), "cache_implementation"),
    Oddity("a compiler's setting", settings(disable_compile=True, compile_config={"mode": "x"}), "compile_config"),
    Oddity("an encoder's first token", settings(decoder_start_token_id=256), "decoder_start_token_id"),
    Oddity("pad_token_id -1", settings(pad_token_id=-1), "pad_token_id"),
    Oddity("eos_token_id -1 among others", settings(eos_token_id=[256, -1]), "eos_token_id"),
    Oddity("eos 50256 on a small vocabulary", settings(eos_token_id=50256, bos_token_id=50256), "eos_token_id"),
    Oddity("eos within and beyond the vocabulary", settings(eos_token_id=[256, 50256]), "eos_token_id"),
    Oddity("a pad_token_id beyond the vocabulary", settings(pad_token_id=50257), "pad_token_id"),
    Oddity("words beyond the vocabulary", settings(suppress_tokens=[50256], bad_words_ids=[[50256, 1]]), "bad_words"),
    Oddity("a forced token beyond the vocabulary", settings(forced_eos_token_id=50256), "forced_eos_token_id"),
    Oddity("whole numbers with a point", settings(max_new_tokens=5.0, num_beams=1.0), "max_new_tokens"),
    Oddity("0 in place of false", settings(do_sample=0), "do_sample"),
    Oddity("an assistant's settings", settings(num_assistant_tokens=5), "num_assistant_tokens"),
    Oddity("outputs that nobody sees", settings(output_scores=True, output_attentions=True), "output_scores"),
    Oddity("a misspelt setting", settings(temprature=0.5), "temprature"),
    Oddity("a sampling setting that breaks its rule, without do_sample", settings(top_p=7), "top_p"),
    Oddity("ngrams looked up without lookup", settings(max_matching_ngram_size=3), "max_matching_ngram_size"),
    Oddity("a decay of the eos that the vocabulary lacks",
           settings(eos_token_id=50256, exponential_decay_length_penalty=[5, 1.1]), "eos_token_id"),
]  # fmt: skip
