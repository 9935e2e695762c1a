"""The files beside the weights, the tokenizer's and generation_config.json, and which ids begin and end a text.

A model's config, its generation_config.json and its tokenizer each say which token ends a text, and a conversion
must not let them drift apart. A TPU checkpoint is where they would: its training config says nothing, and the
original's converter writes 50256 whatever the vocabulary. So, in this order:

* A tokenizer that was asked for counts: bos and eos become its own.
* One that lies beside the source is carried along. A config that says which tokens begin and end a text keeps its
  word, unless it names an id beyond its own vocabulary; where it is silent, the tokenizer's count.
* Without a tokenizer the config stays as it is.

generation_config.json is carried along under the same rule. Whatever was chosen without having been asked for, and
whatever still contradicts itself, is said in a note.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptj.config import GPTJConfig
from gptj.errors import ConfigError, GPTJError, shown
from gptj.generation.config import GENERATION_CONFIG_FILE, GenerationConfig
from gptj.generation.stored import drop_ids_beyond, read_members
from gptj.paths import safe_path
from gptj.paths.json_file import read_json_object, read_small_file
from gptj.text.tokenizer import GPTJTokenizer
from gptj_conversion.common.source import TOKENIZER_SIGNS, Source

__all__ = ["GPT2", "NO_TOKENIZER", "Companions", "choose_companions"]

GPT2, NO_TOKENIZER = "gpt2", "none"
"""Words in place of a tokenizer's folder: GPT-J's own vocabulary, and that none is to be written."""


@dataclasses.dataclass(frozen=True)
class Companions:
    """The files that are written besides the weights.

    Attributes:
        config: with the bos and eos that were chosen.
        files: the tokenizer's and generation_config.json, by name.
        notes: what a user should know, a sentence each, without paths: they also go into the manifest.
    """

    config: GPTJConfig
    files: dict[str, bytes]
    notes: tuple[str, ...]


def choose_companions(
    source: Source,
    config: GPTJConfig,
    destination: Path,
    *,
    tokenizer: str | os.PathLike[str] | None,
    follow_links: bool = False,
) -> Companions:
    """The config, files and notes that go with the weights of `source`.

    Args:
        source, config, destination: what is converted, and where to.
        tokenizer: "gpt2", a folder, "none", or None for the one beside the source, where there is one.
        follow_links: carry a generation_config.json along that is a link out of the folder.

    Raises:
        TokenizerError: the tokenizer that was asked for is damaged or no GPT-J's; one that only lies there is left.
        ConfigError: it is larger than the embedding.
    """
    asked = tokenizer is not None
    found, notes = _find_tokenizer(source, config, tokenizer)
    files: dict[str, bytes] = {}
    generation_file, generation = _read_generation_config(source, notes, follow_links)
    as_read = generation
    if found is not None:
        found.check_fits(config)
        files |= found.files()
        chosen = _choose_ids(config, config.vocab_size, found, asked=asked, silent=source.context.assumed)
        notes += _describe_changes(config, chosen, source.context.assumed)
        config = config.replace(**chosen)
        if generation is not None:
            generation = generation.replace(**_choose_ids(generation, config.vocab_size, found, asked=asked))
    if generation is not None:
        generation = drop_ids_beyond(generation, config.vocab_size, say=_note_in(notes))
    if generation is not None and generation != as_read:
        files[GENERATION_CONFIG_FILE] = generation.to_json().encode()
    elif generation_file is not None:
        files[GENERATION_CONFIG_FILE] = read_small_file(generation_file)
    notes += _list_contradictions(config, generation, found)
    stay = [
        name
        for name in (*TOKENIZER_SIGNS, GENERATION_CONFIG_FILE)
        if name not in files and (destination / name).exists()
    ]
    if stay:
        notes.append(f"the destination's old {', '.join(stay)} would stay: does it belong to this model?")
    return Companions(config, files, tuple(notes))


def _find_tokenizer(
    source: Source, config: GPTJConfig, tokenizer: str | os.PathLike[str] | None
) -> tuple[GPTJTokenizer | None, list[str]]:
    """The tokenizer to write, and where it came from if that was not said."""
    if tokenizer == NO_TOKENIZER:
        return None, []
    if tokenizer == GPT2:
        return GPTJTokenizer.gpt2(extra_tokens=config.vocab_size >= 50_400), []
    if tokenizer is not None:
        return GPTJTokenizer.from_pretrained(tokenizer), []
    for folder in source.context.beside:
        if any(os.path.lexists(folder / name) for name in TOKENIZER_SIGNS):
            try:
                found = GPTJTokenizer.from_pretrained(folder)
            except GPTJError as error:
                return None, [f"the tokenizer is left out, say --tokenizer gpt2 or --tokenizer DIR for one: {error}"]
            return found, [f"the tokenizer in {shown(folder.resolve().name)} is carried along ({len(found):,} tokens)"]
    unread = source.context.unread[:1]
    return None, [f"{file.name} in the archive is not read: unpack it and say --tokenizer DIR" for file in unread]


def _read_generation_config(
    source: Source, notes: list[str], follow_links: bool
) -> tuple[Path | None, GenerationConfig | None]:
    """The file, and what it says: None where it is not JSON, which is no reason not to convert weights."""
    for folder in source.context.beside:
        file = folder / GENERATION_CONFIG_FILE
        if os.path.lexists(file):
            try:
                safe_path(folder, GENERATION_CONFIG_FILE, follow_links=follow_links)
                members = read_json_object(file, error=ConfigError)
            except ConfigError as error:
                notes.append(f"{GENERATION_CONFIG_FILE} is carried along as it is: {error.problem}")
                return file, None
            except GPTJError as error:  # a FIFO, a folder, a link that is broken or leads out: nothing to carry
                notes.append(f"{GENERATION_CONFIG_FILE} is left out: {error.problem}")
                return None, None
            return file, read_members(GenerationConfig, members, say=_note_in(notes, "is carried along as it is: "))
    return None, None


def _note_in(notes: list[str], words: str = "") -> Callable[..., None]:
    """A function that takes the arguments of `warn_of` and makes a note of them."""

    def say(problem: str, *, file: object = None, **facts: Any) -> None:
        notes.append(f"{GENERATION_CONFIG_FILE} {words}{GPTJError(problem, **facts)}")

    return say


def _choose_ids(
    config: GPTJConfig | GenerationConfig,
    vocab_size: int,
    tokenizer: GPTJTokenizer,
    *,
    asked: bool,
    silent: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The fields of `config` that the tokenizer decides, where it has such a token and they say something else."""
    chosen: dict[str, Any] = {}
    for field, token in (("bos_token_id", tokenizer.bos_token_id), ("eos_token_id", tokenizer.eos_token_id)):
        ids = _list_ids(getattr(config, field))
        gives_way = asked or field in silent or any(one >= vocab_size for one in ids)
        fits = token in ids and all(one < vocab_size for one in ids)
        if token is not None and gives_way and not fits:
            chosen[field] = token
    return chosen


def _describe_changes(config: GPTJConfig, chosen: dict[str, Any], silent: tuple[str, ...]) -> list[str]:
    return [
        f"{field} is {token}, as the tokenizer says"
        + (": the training config does not say it" if field in silent else f", and no longer {getattr(config, field)}")
        for field, token in chosen.items()
    ]


def _list_contradictions(
    config: GPTJConfig, generation: GenerationConfig | None, tokenizer: GPTJTokenizer | None
) -> list[str]:
    """Sentences on values that are written as they were found although they cannot be right."""
    notes = []
    beyond = [one for one in _list_ids(config.eos_token_id) if one >= config.vocab_size]
    if beyond:
        notes.append(
            f"no token ends a text: eos_token_id {beyond[0]} is beyond the vocabulary of {config.vocab_size}; "
            "--tokenizer DIR would say which one does"
        )
    elif tokenizer is not None and tokenizer.eos_token_id not in (None, *_list_ids(config.eos_token_id)):
        notes.append(
            f"eos_token_id {config.eos_token_id} stays, but the tokenizer's is {tokenizer.eos_token_id}; "
            "--tokenizer DIR takes the tokenizer's"
        )
    ends = {one for one in _list_ids(config.eos_token_id) if one < config.vocab_size}
    if generation is not None and set(_list_ids(generation.eos_token_id)) != ends:
        notes.append(
            f"{GENERATION_CONFIG_FILE} has eos_token_id {generation.eos_token_id}, the config {config.eos_token_id}"
        )
    return notes


def _list_ids(value: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)
