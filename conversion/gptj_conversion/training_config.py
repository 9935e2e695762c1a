"""The training config of mesh-transformer-jax: the JSON file that a checkpoint needs and does not contain.

The checkpoint's files show layers, widths, vocabulary and shards; heads, rotary width and sequence length stand
in this file alone. What both say must agree. Keys that concern only training (learning rates, buckets) are not
looked at. Our own writer adds the token ids that begin, end and pad a text, which the original has no key for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from gptj.config import GPTJConfig
from gptj.errors import ConfigError, shown
from gptj.json_file import read_json_object

__all__ = ["TOKEN_ID_KEYS", "TrainingConfig"]

TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What our writer adds, spelt as in config.json; the original looks at none of them."""

_LARGEST_SIZE = 2**31 - 1

# transformers' values for GPT-J-6B, which the original converter writes whatever the vocabulary
_ASSUMED_TOKEN_IDS = {"bos_token_id": 50256, "eos_token_id": 50256}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What a training config says about the model.

    Attributes:
        layers, d_model, n_heads, n_vocab: sizes.
        seq: the length of a training sequence, and so the most positions.
        pe_rotary_dims: how much of each head is rotated; None means the whole head, as in the original.
        cores_per_replica: the number of shards; None where the file does not say.
        token_ids: which of bos_token_id, eos_token_id and pad_token_id the file says, and what.
        file: where it was read, which errors name.
    """

    layers: int
    d_model: int
    n_heads: int
    n_vocab: int
    seq: int
    pe_rotary_dims: int | None = None
    cores_per_replica: int | None = None
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    file: str | os.PathLike[str] | None = None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TrainingConfig:
        """The training config in a JSON file.

        Raises:
            ConfigError: not JSON, a key is missing or breaks its rule, or the model is no GPT-J.
        """
        return cls.from_dict(read_json_object(path, error=ConfigError), file=path)

    @classmethod
    def from_dict(cls, members: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> TrainingConfig:
        """The training config that the members of the JSON file describe."""
        for key, wanted in (("norm", "layernorm"), ("pe", "rotary")):
            if members.get(key) != wanted:
                raise ConfigError(
                    "not a GPT-J" if key in members else "is missing",
                    file=file,
                    where=key,
                    expected=json.dumps(wanted),
                    found=shown(json.dumps(members[key])) if key in members else None,
                )
        sizes = {key: _size(members, key, file) for key in ("layers", "d_model", "n_heads", "n_vocab", "seq")}
        rotary, shards = (
            None if members.get(key) is None else _size(members, key, file)
            for key in ("pe_rotary_dims", "cores_per_replica")
        )
        token_ids = {key: members[key] for key in TOKEN_ID_KEYS if key in members}
        config = cls(**sizes, pe_rotary_dims=rotary, cores_per_replica=shards, token_ids=token_ids, file=file)
        if config.d_model % config.n_heads:
            raise ConfigError(
                "breaks its rule", file=file, where="n_heads", expected=f"a divisor of d_model = {config.d_model}",
                found=config.n_heads,
            )  # fmt: skip
        config.model_config()
        return config

    @property
    def assumed(self) -> tuple[str, ...]:
        """The fields of `model_config` that the file does not say."""
        return tuple(key for key in _ASSUMED_TOKEN_IDS if key not in self.token_ids)

    def model_config(self) -> GPTJConfig:
        """The same model's GPTJConfig, as the original's converter writes it."""
        try:
            return GPTJConfig(
                vocab_size=self.n_vocab,
                n_positions=self.seq,
                n_embd=self.d_model,
                n_layer=self.layers,
                n_head=self.n_heads,
                rotary_dim=self.pe_rotary_dims,
                activation_function="gelu_new",
                layer_norm_epsilon=1e-5,
                **{**_ASSUMED_TOKEN_IDS, **self.token_ids},
                extra={"architectures": ["GPTJForCausalLM"], "tokenizer_class": "GPT2Tokenizer"},
            )
        except ConfigError as error:
            key = {"rotary_dim": "pe_rotary_dims", "n_positions": "seq"}.get(str(error.where), error.where)
            raise ConfigError(
                error.problem, file=self.file, where=key, expected=error.expected, found=error.found, hint=error.hint
            ) from None


def _size(members: Mapping[str, Any], key: str, file: str | os.PathLike[str] | None) -> int:
    value = members.get(key)
    if type(value) is not int or not 1 <= value <= _LARGEST_SIZE:
        raise ConfigError(
            "breaks its rule" if key in members else "is missing",
            file=file,
            where=key,
            expected="a whole number, 1 or above",
            found=shown(json.dumps(value)) if key in members else None,
        )
    return value
