"""config.json as others write it: what is read, what is said, what is refused.

The rule: refuse what cannot be understood or would compute something else; accept, with a warning that names the
field, what transformers opens and what changes nothing here. So a value that does not shape the model may be odd
(a null, an id of -1, a token's text in place of its id), keys of trackers and wrappers are kept, and a key that
looks like a misspelling is fatal only where the field that it seems to mean is missing and shapes the model. What
is refused in a file and in a call alike stands in `GPTJConfig`.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from gptj.config.rules import spelt
from gptj.errors import ConfigError, shown, warn_of

__all__ = ["ALIASES", "is_alike", "meant_field", "misleads", "read_members"]

ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}

_SHAPING = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "rotary_dim",
    "n_inner",
    "activation_function",
    "layer_norm_epsilon",
)
"""Fields without which another model is computed."""

_FLAGS = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
_NULL_IS_DEFAULT = (*_FLAGS, "tie_word_embeddings", "initializer_range")
"""Fields in which transformers takes null, and means what it means by the default."""

_OF_OTHERS: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None, {}),
    "rope_scaling": (None, {}),
    "rope_theta": (None, 10000),
    "rope_parameters": (None, {}),
    "sliding_window": (None,),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "reorder_and_upcast_attn": (None, False),
    "use_parallel_residual": (None, True),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "qk_norm": (None, False),
}
"""Keys by which other models, or a loader, would compute something else, and the values that ask for nothing."""

Say = Callable[..., None]
"""`warn_of` with the file named."""

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Keys that transformers itself writes into config.json, in any release, without meaning for the forward pass of a
# GPT-J, and that look like a field of ours. They are kept like any unknown key, and are nothing to speak of.
_TRANSFORMERS_KEYS = frozenset(
    [
        "sep_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "use_return_dict",
        "tie_encoder_decoder",
        "output_scores",
        "return_dict_in_generate",
        "rotary_pct",
        "rotary",
        "n_ctx",
        "layer_types",
        "vocab_size_padded",
    ]
)


def read_members(
    members: Mapping[str, Any], fields: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that the members of a config.json set, and the other members, which are kept.

    Args:
        members: of the file.
        fields: the fields of `GPTJConfig` with their defaults.
        file: what warnings name.

    Raises:
        ConfigError: another kind of model, an alias that contradicts its field, or the misspelling of a field that is
            missing and shapes the model.
    """
    if {"layers", "d_model", "n_heads"} <= members.keys() and "model_type" not in members:
        raise ConfigError(
            "the training config of a TPU checkpoint, not a config.json",
            hint="Say it as --config to gptj convert, which writes a folder with a config.json",
        )
    rest = dict(members)
    say = functools.partial(warn_of, file=file)
    _check_kind(rest, say)
    for alias, field in ALIASES.items():
        if alias in rest:
            value = rest.pop(alias)
            if rest.setdefault(field, value) != value:
                raise ConfigError(
                    f"contradicts its alias {alias}", where=field, expected=spelt(value), found=spelt(rest[field])
                )
    known = {key: rest.pop(key) for key in list(rest) if key in fields}
    if rest and not known and not {"model_type", "architectures"} & members.keys():
        found = ", ".join(shown(key, longest=30) for key in [*rest][:3])
        raise ConfigError("no config of a model: no field of a GPT-J is in it", found=found)
    for key in rest:
        _judge_unknown(key, known, fields, say)
    for key in rest:
        if not _asks_nothing(key, rest[key]):
            say("of other models: not read, nor written into another folder", where=key, found=spelt(rest[key]))
    for field, value in list(known.items()):
        if value is None and field in _NULL_IS_DEFAULT:
            known[field] = fields[field]
        elif field in _FLAGS and type(value) in (int, float) and value in (0, 1):
            known[field] = bool(value)
            say("a number in place of true or false", where=field, found=value)
        elif field in _TOKEN_IDS:
            known[field] = _convert_token_ids(field, value, say)
    _choose_labels(known, say)
    return known, rest


def is_alike(key: str, fields: Mapping[str, Any]) -> bool:
    """Whether an unknown key is spelt so much like a field that it may be meant for it."""
    return key not in _TRANSFORMERS_KEYS and meant_field(key, fields) is not None


def misleads(key: str, value: Any, fields: Mapping[str, Any]) -> bool:
    """Whether another program may take an unknown key for more than it is: a field, or an order to compute."""
    return key == "auto_map" or is_alike(key, fields) or not _asks_nothing(key, value)


def meant_field(key: str, fields: Mapping[str, Any], *, cutoff: float = 0.8) -> str | None:
    """The field, or alias of one, that is spelt most like `key`; None where none is alike."""
    close = difflib.get_close_matches(key, (*fields, *ALIASES), n=1, cutoff=cutoff)
    return close[0] if close else None


def _check_kind(rest: dict[str, Any], say: Say) -> None:
    """Take model_type out of the members; refuse another kind of model, say what only seems to be one."""
    model_type = rest.pop("model_type", None)
    if model_type not in (None, "gptj"):
        raise ConfigError("another kind of model", where="model_type", expected='"gptj"', found=spelt(model_type))
    if rest.get("auto_map"):
        if model_type is None:
            raise ConfigError(
                "asks for code from the model's folder, and no model_type says what it is",
                where="auto_map",
                hint="gptj never runs such code; a GPT-J's config.json has model_type gptj",
            )
        say(
            "asks for code from the model's folder, which is never run: the model is taken for what model_type says",
            where="auto_map",
            found=spelt(rest["auto_map"]),
        )
    architectures = rest.get("architectures")
    if architectures is None or _are_ours(architectures):
        return
    if model_type is None and not _wrap_any(architectures):
        raise ConfigError(
            "another architecture", where="architectures", expected="GPTJ classes", found=spelt(architectures)
        )
    say(
        "not GPT-J's own: kept, and the model is taken for a GPT-J",
        where="architectures",
        expected="GPTJ classes",
        found=spelt(architectures),
    )


def _are_ours(architectures: object) -> bool:
    return isinstance(architectures, list) and all(
        isinstance(name, str) and name.removeprefix("TF").removeprefix("Flax").startswith("GPTJ")
        for name in architectures
    )


def _wrap_any(architectures: object) -> bool:
    """Whether the classes are wrappers that any model may be in, as trl's and transformers' Auto classes are."""
    return isinstance(architectures, list) and all(
        isinstance(name, str) and ("GPTJ" in name or name.startswith("Auto")) for name in architectures
    )


def _judge_unknown(key: str, known: Mapping[str, Any], fields: Mapping[str, Any], say: Say) -> None:
    """Refuse the misspelling of a field that is missing and shapes the model; say what else is alike a field."""
    if not is_alike(key, fields):
        return
    missing = [field for field in _SHAPING if field not in known]
    missing += [alias for alias, field in ALIASES.items() if field in missing]
    close = difflib.get_close_matches(key, missing, n=1, cutoff=0.8)
    if close:
        raise ConfigError("unknown key", where=shown(key), hint=f"Did you mean {close[0]}?")
    meant = meant_field(key, fields, cutoff=0.9)
    hint = None if meant is None else f"Did you mean {meant}?"
    say("no field of a GPT-J's config: not read, nor written into another folder", where=shown(key), hint=hint)


def _asks_nothing(key: str, value: Any) -> bool:
    """Whether a key is none of other models, or has the value with which they compute what a GPT-J does."""
    if key == "rope_parameters" and isinstance(value, Mapping):
        turned = (value.get("rope_type", "default"), value.get("rope_theta", 10000))
        return turned == ("default", 10000) and value.keys() <= {"rope_type", "rope_theta", "partial_rotary_factor"}
    neutral = _OF_OTHERS.get(key, (value,))
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _convert_token_ids(field: str, value: object, say: Say) -> Any:
    """Ids as whole numbers; what is no id is left out and said: no token of the model can be meant by it."""
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if field != "eos_token_id" and isinstance(value, list | tuple) and len(listed) > 1:
        return value  # several where one is meant: for the rule to refuse
    ids: list[Any] = []
    for one in listed:
        if isinstance(one, float) and one.is_integer() and one >= 0:
            say("not written as a whole number", where=field, expected=int(one), found=spelt(one))
            ids.append(int(one))
        elif isinstance(one, str) or (isinstance(one, int | float) and not isinstance(one, bool) and one < 0):
            say("no token id: left out", where=field, expected="null or an id, 0 or above", found=spelt(one))
        elif one is not None:
            ids.append(one)
    if isinstance(value, list | tuple) and field == "eos_token_id":
        return ids or None
    return ids[0] if ids else None


def _choose_labels(known: dict[str, Any], say: Say) -> None:
    """Drop empty labels, and a number of labels that contradicts their names: the names count, as in transformers.

    Names of ids with gaps between are left out, and their number is kept: it is how many rows a classifier has.
    """
    for field in ("id2label", "label2id"):
        if known.get(field) == {}:
            say("empty: left out", where=field)
            del known[field]
    names = known.get("id2label")
    if isinstance(names, Mapping) and _have_gaps(names):
        say("ids with gaps between: their number counts, the names are left out", where="id2label", found=spelt(names))
        known.update(num_labels=len(names), id2label=None, label2id=None)
    names, count = known.get("id2label"), known.get("num_labels")
    if isinstance(names, Mapping) and isinstance(count, int) and count != len(names):
        say("contradicts id2label, which counts", where="num_labels", expected=len(names), found=count)
        known["num_labels"] = None


def _have_gaps(names: Mapping[Any, Any]) -> bool:
    """Whether every key is an id, written once, and they are not 0 to n - 1."""
    ids = {int(key) for key in names if isinstance(key, str) and re.fullmatch(r"[0-9]{1,9}", key)}
    return len(ids) == len(names) and ids != set(range(len(names)))
