"""The training config of mesh-transformer-jax: the JSON file that a checkpoint needs and does not contain.

The checkpoint's files show layers, widths, vocabulary and shards; heads, rotary width and sequence length stand
in this file alone. What both say must agree. Keys that concern only training (learning rates, buckets) are not
looked at. Our own writer adds the token ids that begin, end and pad a text, which the original has no key for.

The fork of the original that KoboldAI runs (github.com/VE-FORBRYDERNE/mesh-transformer-jax) has more keys. Those that
leave a GPT-J what it is, or that GPT-J has a field for, are understood; those that make another model are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from typing import Any

from gptj.config import GPTJConfig
from gptj.errors import ConfigError, shown
from gptj.paths.json_file import read_json_object

__all__ = ["TOKEN_ID_KEYS", "TrainingConfig", "parse_config"]

TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The keys that our writer adds, spelt as in config.json; the original looks at none of them."""

_SIZES = ("layers", "d_model", "n_heads", "n_vocab", "seq")
_OPTIONAL = ("pe_rotary_dims", "pe_rotary_pct", "n_vocab_padding", "activation", "d_embed", "attention_layers")
_LARGEST_SIZE = 2**31 - 1

_NOT_GPTJ = {
    "norm": {
        "layernorm-desync": "each shard would have its own, trained",
        "layernorm-nobias": "it drops the offset that is stored",
        "doublelayernorm": "it is GPT-NeoX's in KoboldAI's fork",
        "rmsnorm": "it subtracts no mean",
        "scalenorm": "it subtracts no mean",
    },
    "pe": {
        "fixed": "its positions are a trained table, one more leaf of the embedding",
        "t5": "its positions are a trained bias of the attention, one more leaf",
        "neox_rotary": "it turns the halves of a head, not its pairs",
        "alibi": "its positions are a bias of the attention",
        "sinusoidal": "its positions are added to the embedding",
        "fairseq_sinusoidal": "its positions are added to the embedding",
    },
}
"""Why other values than GPT-J's are another model."""

_FORK_KEYS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "compat": (("j",), "the fork's models neo, neox, opt, bloom and fairseq_lm have other layers than GPT-J"),
    "combined_qkv": ((False,), "it makes one leaf of query, key and value"),
    "do_layer_norm_before": ((True,), "it moves the layer norms behind the layers"),
}
"""Keys of KoboldAI's fork: the values with which it is a GPT-J, and why others are not."""

_FORK_ACTIVATIONS = {
    "gelu_python": "gelu_new",
    **{name: name for name in ("gelu_new", "gelu", "gelu_fast", "silu", "swish", "relu", "tanh")},
}
"""The fork's `activation`, as `activation_function` calls it."""

# transformers' values for GPT-J-6B, which the original converter writes whatever the vocabulary
_ASSUMED_TOKEN_IDS = {"bos_token_id": 50256, "eos_token_id": 50256}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The model that a training config describes.

    Attributes:
        layers, d_model, n_heads, n_vocab: sizes.
        n_vocab_padding: rows of the embedding and of lm_head after those of the vocabulary, which the fork's loss and
            logits leave out.
        seq: the length of a training sequence, and so the most positions.
        pe_rotary_dims: how much of each head is rotated; None, or more than a head is wide, means the whole head.
        activation: of the feed-forward layer, as `activation_function` calls it.
        cores_per_replica: the number of shards; None where the file does not say.
        token_ids: which of bos_token_id, eos_token_id and pad_token_id the file says, and what.
        file: where it was read, which errors name.
    """

    layers: int
    d_model: int
    n_heads: int
    n_vocab: int
    seq: int
    n_vocab_padding: int = 0
    pe_rotary_dims: int | None = None
    activation: str = "gelu_new"
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
        if members and members.keys().isdisjoint(_SIZES):
            raise ConfigError(
                "neither a training config nor a config.json",
                file=file,
                expected=", ".join(_SIZES),
                found=shown(", ".join(members)),
                hint="Give the JSON file that the model was trained with, as configs/6B_roto_256.json of the original",
            )
        _refuse_other_models(members, file)
        _refuse_misspellings(members, file)
        sizes = {key: _size(members, key, file) for key in _SIZES}
        if sizes["d_model"] % sizes["n_heads"]:
            raise ConfigError(
                "breaks its rule", file=file, where="n_heads", expected=f"a divisor of d_model = {sizes['d_model']}",
                found=sizes["n_heads"],
            )  # fmt: skip
        shards = None if members.get("cores_per_replica") is None else _size(members, "cores_per_replica", file)
        config = cls(
            **sizes,
            n_vocab_padding=_size(members, "n_vocab_padding", file, lowest=0) if "n_vocab_padding" in members else 0,
            pe_rotary_dims=_read_rotary_dims(members, sizes["d_model"] // sizes["n_heads"], file),
            activation=_read_activation(members, file),
            cores_per_replica=shards,
            token_ids={key: members[key] for key in TOKEN_ID_KEYS if key in members},
            file=file,
        )
        config.model_config()
        return config

    @property
    def stored_vocab(self) -> int:
        """Rows of the embedding in the checkpoint, padding included."""
        return self.n_vocab + self.n_vocab_padding

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
                activation_function=self.activation,
                layer_norm_epsilon=1e-5,
                **{**_ASSUMED_TOKEN_IDS, **self.token_ids},
                extra={"architectures": ["GPTJForCausalLM"], "tokenizer_class": "GPT2Tokenizer"},
            )
        except ConfigError as error:
            key = {"rotary_dim": "pe_rotary_dims", "n_positions": "seq"}.get(str(error.where), error.where)
            raise ConfigError(error.problem, **error.facts(file=self.file, where=key)) from None


def parse_config(members: Mapping[str, Any], *, file: str | os.PathLike[str] | None) -> TrainingConfig | GPTJConfig:
    """The config of a JSON file's members: a training config, or a config.json, which its fields' names tell."""
    if {"model_type", "n_embd", "n_layer", "hidden_size"}.isdisjoint(members):
        return TrainingConfig.from_dict(members, file=file)
    return GPTJConfig.from_dict(members, file=file)


def _refuse_misspellings(members: Mapping[str, Any], file: str | os.PathLike[str] | None) -> None:
    """Raise ConfigError where an unknown key seems to mean one that is missing and shapes the model."""
    shaping = (*_SIZES, *_OPTIONAL, *_FORK_KEYS)
    missing = [key for key in shaping if key not in members]
    for key in members:
        close = [] if key in shaping else difflib.get_close_matches(key, missing, 1, 0.8)
        if close:
            raise ConfigError("unknown key", file=file, where=shown(key), hint=f"Did you mean {close[0]}?")


def _refuse_other_models(members: Mapping[str, Any], file: str | os.PathLike[str] | None) -> None:
    """Raise ConfigError where a key makes another model of it than a GPT-J."""
    for key, wanted in (("norm", "layernorm"), ("pe", "rotary")):
        if members.get(key) != wanted:
            value = members.get(key)
            raise ConfigError(
                "not a GPT-J" if key in members else "is missing",
                file=file,
                where=key,
                expected=json.dumps(wanted),
                found=_show_found(members, key),
                hint=_because(_NOT_GPTJ[key].get(value.removesuffix("-bias")) if isinstance(value, str) else None),
            )
    for key, (fitting, reason) in _FORK_KEYS.items():
        if key in members and members[key] not in fitting:
            raise ConfigError(
                "not a GPT-J", file=file, where=key, expected=json.dumps(fitting[0]), found=_show_found(members, key),
                hint=_because(reason),
            )  # fmt: skip
    if members.get("d_embed", members.get("d_model")) != members.get("d_model"):
        raise ConfigError(
            "not a GPT-J", file=file, where="d_embed", expected=f"d_model = {shown(members.get('d_model'))}",
            found=_show_found(members, "d_embed"), hint=_because("an embedding of another width needs two more leaves"),
        )  # fmt: skip
    layers = members.get("attention_layers", [])
    if not isinstance(layers, list) or any(kind != "global" for kind in layers):
        raise ConfigError(
            "not a GPT-J", file=file, where="attention_layers", expected='"global" for each layer',
            found=_show_found(members, "attention_layers"), hint=_because("local attention sees only the last tokens"),
        )  # fmt: skip


def _read_rotary_dims(members: Mapping[str, Any], head: int, file: str | os.PathLike[str] | None) -> int | None:
    """The rotated width of each head, None where the file does not say; `head` is how wide a head is."""
    key = "pe_rotary_dims"
    said = None
    if key in members:
        if members[key] is None:
            raise ConfigError(
                "is null, with which the original computes no GPT-J",
                file=file,
                where=key,
                expected="a number, or no such key for the whole head",
                found="null",
                hint="Sliced with None, each head is its rotated and its unrotated self, and both scores are added",
            )
        if members[key] == 0 and type(members[key]) is int:
            raise ConfigError(
                "is 0, which means no rotation: a model that knows no positions",
                file=file,
                where=key,
                expected="2 or above",
                found="0",
                hint="GPT-J has no such thing, neither here nor in transformers, vLLM and CTranslate2",
            )
        said = _size(members, key, file)
    share = members.get("pe_rotary_pct")
    if share is None:
        return said
    fits = isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share <= 1
    of_share = int(share * head) if fits else 0
    if of_share == 0 or (said is not None and min(said, head) != of_share):
        raise ConfigError(
            "breaks its rule" if of_share == 0 else f"contradicts {key}, which only KoboldAI's fork lets it override",
            file=file,
            where="pe_rotary_pct",
            expected=f"a share of a head's {head} dimensions, above 0 to 1" if of_share == 0 else f"{said} of {head}",
            found=_show_found(members, "pe_rotary_pct"),
        )
    return of_share


def _read_activation(members: Mapping[str, Any], file: str | os.PathLike[str] | None) -> str:
    """The activation, which only the fork lets a file choose."""
    name = members.get("activation", "gelu_new")
    if not isinstance(name, str) or name not in _FORK_ACTIVATIONS:
        raise ConfigError(
            "an activation that GPT-J has no name for", file=file, where="activation",
            expected="one of " + ", ".join(_FORK_ACTIVATIONS), found=_show_found(members, "activation"),
        )  # fmt: skip
    return _FORK_ACTIVATIONS[name]


def _show_found(members: Mapping[str, Any], key: str) -> str | None:
    return shown(json.dumps(members[key])) if key in members else None


def _because(reason: str | None) -> str | None:
    return None if reason is None else reason[0].upper() + reason[1:]


def _size(members: Mapping[str, Any], key: str, file: str | os.PathLike[str] | None, *, lowest: int = 1) -> int:
    value = members.get(key)
    if type(value) is not int or not lowest <= value <= _LARGEST_SIZE:
        raise ConfigError(
            "breaks its rule" if key in members else "is missing",
            file=file,
            where=key,
            expected=f"a whole number, {lowest} or above",
            found=_show_found(members, key),
        )
    return value
