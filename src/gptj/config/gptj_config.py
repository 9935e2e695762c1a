"""GPTJConfig: what a GPT-J is, before any framework: validated, config.json in and out.

Field names, their order and defaults are transformers' (4.34, `GPTJConfig`), whose defaults describe GPT-J-6B. Three
things differ on purpose. A wrong field is refused here, with its name, its value and its rule, rather than at the
first forward pass. Keys of a config.json that we do not know are kept in `extra` and written back (see
`gptj.config.file` for what is read into a field, said, or refused). And a field that a model is built by
(`BUILT_IN`) cannot be assigned, since no model would follow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, Unpack

from gptj.config.dtypes import dtype_name
from gptj.config.file import ALIASES, is_alike, meant_field, misleads, read_members
from gptj.config.labels import derive_labels
from gptj.config.rules import is_number, is_whole, plain, spelt
from gptj.config.settings import DTYPE_KEYS, READ_AS, Settings, default_members, plain_extra
from gptj.errors import ConfigError, naming_file, shown
from gptj.errors.brief import brief, html_table

__all__ = ["ACTIVATIONS", "BUILT_IN", "GPTJConfig", "is_field"]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish", "tanh")
"""The values of `activation_function`; each wing has one function a name."""

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

CONFIG_FILE = "config.json"

BUILT_IN = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim", "n_inner", "activation_function"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "tie_word_embeddings", "num_labels"),
)
"""Fields that a model is built by: its shapes, or what its layers keep. They cannot be assigned."""

_INSTEAD = {
    "vocab_size": "Write model.resize_token_embeddings({value}), or config = config.replace(vocab_size={value}) "
    "before the model is made",
    "num_labels": "Write from_pretrained(folder, num_labels={value}), or config = config.replace(num_labels={value}) "
    "before the model is made",
}
_INSTEAD_OF_OTHERS = (
    "Write config = config.replace({field}={value}) before the model is made, or from_pretrained(folder, "
    "{field}={value})"
)

_LARGEST_SIZE = 2**31 - 1
_LARGEST_POSITIONS = 2**24
_LARGEST_ROTARY_TABLE = 2**24
"""The most numbers of a model's sine and cosine tables together: 64 MB in float32. GPT-J-6B has 2**17."""

_EPSILONS = (1e-20, 1.0)  # of a variance: below it vanishes in float32, above it is all that is left
_LARGEST_INITIALIZER = 1e3  # start values beyond overflow sooner or later in 16 bits, and train nothing


class OtherNames(TypedDict, total=False):
    """Names that `GPTJConfig` takes besides its fields, for a type checker; when run, others go to `extra`."""

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    max_position_embeddings: int
    model_type: str
    architectures: list[str]
    torch_dtype: Any


@dataclasses.dataclass(init=False, eq=True, repr=False)
class GPTJConfig(Settings):
    """The sizes and options of one GPT-J.

    Attributes:
        vocab_size: rows of the token embedding and of lm_head.
        n_positions: the longest sequence; a position is 0 to n_positions - 1.
        n_embd: model width m.
        n_layer: blocks.
        n_head: attention heads h; n_embd must be a multiple of it.
        rotary_dim: how much of each head is rotated. None, or more than a head is wide, means the whole head.
        n_inner: feed-forward width f; None means 4 * n_embd.
        activation_function: one of `ACTIVATIONS`.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probabilities, 0 to below 1.
        layer_norm_epsilon: added to the variance.
        initializer_range: standard deviation of freshly made kernels and embeddings.
        use_cache, output_attentions, output_hidden_states, return_dict: defaults of a call's arguments.
        bos_token_id, eos_token_id, pad_token_id: token ids or None (eos may be several). They may lie outside
            a small vocabulary, as they do in real checkpoints; generation checks them when it needs them.
        tie_word_embeddings: lm_head.weight is wte.weight; lm_head.bias stays its own.
        num_labels, id2label, label2id, problem_type: the classification head's.
        extra: unknown keys of config.json, kept and written back; each can be read as an attribute.

    Arguments are the fields, in transformers' order, and the aliases hidden_size, num_attention_heads,
    num_hidden_layers and max_position_embeddings; others go to `extra`. Every field but those in `BUILT_IN` can be
    assigned.

    Raises:
        ConfigError: a field breaks its rule. The message names the field, the rule and the value.
    """

    FILE: ClassVar[str] = CONFIG_FILE

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    rotary_dim: int | None
    n_inner: int | None
    activation_function: str
    resid_pdrop: float
    embd_pdrop: float
    attn_pdrop: float
    layer_norm_epsilon: float
    initializer_range: float
    use_cache: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    tie_word_embeddings: bool
    num_labels: int | None
    id2label: dict[int, str] | None
    label2id: dict[str, int] | None
    problem_type: str | None
    output_attentions: bool
    output_hidden_states: bool
    return_dict: bool
    extra: Mapping[str, Any]

    def __init__(
        self,
        vocab_size: int = 50400,
        n_positions: int = 2048,
        n_embd: int = 4096,
        n_layer: int = 28,
        n_head: int = 16,
        rotary_dim: int | None = 64,
        n_inner: int | None = None,
        activation_function: str = "gelu_new",
        resid_pdrop: float = 0.0,
        embd_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 50256,
        eos_token_id: int | list[int] | None = 50256,
        tie_word_embeddings: bool = False,
        *,
        pad_token_id: int | None = None,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        label2id: dict[str, int] | None = None,
        problem_type: str | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        extra: Mapping[str, Any] | None = None,
        **others: Unpack[OtherNames],
    ) -> None:
        given = dict(locals())
        unknown = dict(extra or {})
        for name, value in dict[str, Any](others).items():
            field = ALIASES.get(name)
            if field is not None:
                given[field] = _require_agreement(field, name, given[field], value)
            elif name == "model_type":
                self._require(value == "gptj", name, '"gptj"', value)
            elif is_alike(name, _DEFAULTS):
                raise ConfigError("no such field", where=shown(name), hint=_did_you_mean(name))
            else:
                unknown[name] = value
        for one in dataclasses.fields(self):
            object.__setattr__(self, one.name, unknown if one.name == "extra" else given[one.name])
        self.__post_init__()

    def __post_init__(self) -> None:
        for field in _FIELDS - {"extra"}:
            object.__setattr__(self, field, plain(getattr(self, field)))
        count, names, ids = derive_labels(self.num_labels, self.id2label, self.label2id)
        for field, value in (("num_labels", count), ("id2label", names), ("label2id", ids)):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "extra", plain_extra(self.extra))
        for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "num_labels"):
            self._require_size(field)
        for field in ("rotary_dim", "n_inner"):
            if getattr(self, field) is not None:
                self._require_size(field)
        self._require(
            self.n_positions <= _LARGEST_POSITIONS, "n_positions", f"at most {_LARGEST_POSITIONS}", self.n_positions
        )
        self._require(self.n_embd % self.n_head == 0, "n_embd", f"a multiple of n_head = {self.n_head}", self.n_embd)
        self._require(
            self.rotary_width % 2 == 0,
            "rotary_dim",
            f"an even width of at most the head's {self.head_dim} (rotary turns pairs)",
            self.rotary_width,
        )
        self._require(
            self.n_positions * self.rotary_width <= _LARGEST_ROTARY_TABLE,
            "n_positions",
            f"at most {_LARGEST_ROTARY_TABLE // max(self.rotary_width, 1)} at a rotary width of {self.rotary_width}",
            self.n_positions,
        )
        self._require(
            isinstance(self.activation_function, str) and self.activation_function in ACTIVATIONS,
            "activation_function",
            "one of " + ", ".join(ACTIVATIONS),
            self.activation_function,
        )
        for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            value = getattr(self, field)
            self._require(is_number(value) and 0 <= value < 1, field, "a probability, 0 to below 1", value)
        for field, lowest, highest in (
            ("layer_norm_epsilon", *_EPSILONS),
            ("initializer_range", 0, _LARGEST_INITIALIZER),
        ):
            value = getattr(self, field)
            fits = is_number(value) and lowest <= value <= highest
            self._require(fits, field, f"a number, {lowest:g} to {highest:g}", value)
        for field in ("use_cache", "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict"):
            value = getattr(self, field)
            self._require(isinstance(value, bool), field, "true or false", value)
        self._require_token_ids()
        self._require(
            self.problem_type is None or self.problem_type in PROBLEM_TYPES,
            "problem_type",
            "null or one of " + ", ".join(PROBLEM_TYPES),
            self.problem_type,
        )

    def __repr__(self) -> str:
        default = type(self)()
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim")
        shown = (
            f"{name}={brief(value) if name == 'extra' else repr(value)}"
            for name, value in self._repr_fields().items()
            if name in sizes or value != getattr(default, name)
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """Every field, for a notebook."""
        rows = [(name, brief(value)) for name, value in self._repr_fields().items()]
        return html_table(type(self).__name__, rows, ("field", "value"))

    def _repr_fields(self) -> dict[str, Any]:
        """The fields, but for labels that are only numbered, and for what turns others around."""
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del told["label2id"]
        if self.id2label is None or all(name == f"LABEL_{number}" for number, name in self.id2label.items()):
            del told["id2label"]
        return told

    def _require(self, holds: bool, field: str, rule: str, value: object) -> None:
        if not holds:
            raise ConfigError("breaks its rule", where=field, expected=rule, found=spelt(value))

    def _require_size(self, field: str) -> None:
        value = getattr(self, field)
        self._require(is_whole(value, 1, _LARGEST_SIZE), field, "a whole number, 1 or above", value)

    def _require_token_ids(self) -> None:
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, field)
            several = field == "eos_token_id" and isinstance(value, list | tuple)
            ids = value if several else [value]
            fits = all(is_whole(i, 0, _LARGEST_SIZE) for i in ids if several or i is not None)
            self._require(fits, field, "null or a token id, 0 or above", value)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, field) for field in BUILT_IN))

    # ---- attributes

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "torch_dtype") and name not in self.extra:
            return next((self.extra[key] for key in DTYPE_KEYS if key in self.extra), None)
        is_opened = name.endswith("name_or_path") and "_opened_from" in self.__dict__
        ours = name in READ_AS and name not in self.extra and not is_opened
        return READ_AS[name] if ours else super().__getattr__(name)

    def _with(self, name: str, value: Any) -> GPTJConfig:
        field = ALIASES.get(name, name)
        if field in BUILT_IN:
            if getattr(self, field) == value:
                return self
            hint = _INSTEAD.get(field, _INSTEAD_OF_OTHERS).format(field=field, value=repr(value)[:40])
            raise ConfigError(
                "cannot be assigned: models are built by it",
                where=name,
                expected=repr(getattr(self, field)),
                found=shown(value),
                hint=hint,
            )
        if field in ("id2label", "label2id"):
            return self._with_labels(field, value)
        if field in _FIELDS:
            return self.replace(**{field: value})
        if name == "model_type":
            self._require(value == "gptj", name, '"gptj"', value)
            return self
        if is_alike(name, _DEFAULTS):
            raise ConfigError("no such field", where=shown(name), hint=_did_you_mean(name))
        return self._with_extra(name, dtype_name(value) if name in DTYPE_KEYS and value is not None else value)

    def _is_plain(self, name: str) -> bool:
        return name in _FIELDS - {*BUILT_IN, "id2label", "label2id"}

    def _with_labels(self, field: str, value: Any) -> GPTJConfig:
        """A copy with other names of as many labels; the other of id2label and label2id follows."""
        changed = self.replace(**{field: value})
        if changed.num_labels != self.num_labels:
            hint = f"Write from_pretrained(folder, num_labels={changed.num_labels})"
            raise ConfigError(
                "of another number of labels",
                where=field,
                expected=f"{self.num_labels} names",
                found=changed.num_labels,
                hint=hint,
            )
        return changed

    # ---- what follows from the fields

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def rotary_width(self) -> int:
        """The number of each head's first dimensions that rotate: min(rotary_dim or head_dim, head_dim)."""
        return self.head_dim if self.rotary_dim is None else min(self.rotary_dim, self.head_dim)

    @property
    def inner_width(self) -> int:
        """Width f of the feed-forward layer."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """eos_token_id as a tuple: empty for None."""
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)

    @property
    def use_return_dict(self) -> bool:
        """Alias of return_dict."""
        return self.return_dict

    @property
    def hidden_size(self) -> int:
        """Alias of n_embd."""
        return self.n_embd

    @property
    def num_attention_heads(self) -> int:
        """Alias of n_head."""
        return self.n_head

    @property
    def num_hidden_layers(self) -> int:
        """Alias of n_layer."""
        return self.n_layer

    @property
    def max_position_embeddings(self) -> int:
        """Alias of n_positions."""
        return self.n_positions

    @property
    def architecture_sha256(self) -> str:
        """A hash of the fields that change logits without changing any tensor's shape, and of those that do.

        A weights file carries it, so that a config.json whose n_head or rotary_dim was edited afterwards is
        noticed although every shape still fits.
        """
        facts = {
            "vocab_size": self.vocab_size,
            "n_embd": self.n_embd,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "rotary_width": self.rotary_width,
            "inner_width": self.inner_width,
            "activation_function": self.activation_function,
            "layer_norm_epsilon": self.layer_norm_epsilon,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def replace(self, /, **changes: Any) -> GPTJConfig:
        """A copy with some fields changed, validated anew. A new num_labels renames the labels."""
        changes = {ALIASES.get(name, name): value for name, value in changes.items()}
        if "num_labels" in changes or "id2label" in changes or "label2id" in changes:
            changes = {"num_labels": None, "id2label": None, "label2id": None} | changes
        unknown = sorted(set(changes) - _FIELDS)
        if unknown:
            raise ConfigError("no such field", where=shown(unknown[0]), hint=_did_you_mean(unknown[0]))
        return dataclasses.replace(self, **changes)

    # ---- config.json

    @classmethod
    def from_dict(cls, members: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> GPTJConfig:
        """The config that the members of a config.json describe; `file` is what errors name.

        Raises:
            ConfigError: another model_type, the misspelling of a missing field that shapes the model, or a field that
                breaks its rule. Odd members that change nothing are warned of (`CheckpointWarning`).
        """
        with naming_file(file):
            fields, extra = read_members(members, _DEFAULTS, file=file)
            return cls(**fields, extra=extra)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> GPTJConfig:
        """The config in `path`: a config.json, or the folder that holds one."""
        path, members = cls.read_members(path)
        return cls.from_dict(members, file=path)

    def for_other_programs(self) -> GPTJConfig:
        """A copy for a new folder, without what would mislead there: code, keys of other models or like a field's."""
        kept = {k: v for k, v in self.extra.items() if not misleads(k, v, _DEFAULTS)}
        return self.replace(extra=kept)

    def to_dict(self) -> dict[str, Any]:
        """The members of config.json: every field, model_type, and `extra` as it came.

        rotary_dim is the effective width, since transformers, vLLM and CTranslate2 read null, or more than a head is
        wide, in other ways and then fail.
        """
        members = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "extra"}
        members["rotary_dim"] = self.rotary_width
        if self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            del members["num_labels"], members["id2label"], members["label2id"]
        else:
            del members["num_labels"]  # transformers derives it from id2label and warns where both stand
            members["id2label"] = {str(i): name for i, name in (self.id2label or {}).items()}
        if self.problem_type is None:
            del members["problem_type"]
        return {**self.extra, **members, "model_type": "gptj"}

    def to_diff_dict(self) -> dict[str, Any]:
        """The members of config.json that are not the defaults, and model_type."""
        differing = default_members(self).keys() | self.extra.keys() | {"model_type"}
        return {key: value for key, value in self.to_dict().items() if key in differing}

    def to_json(self) -> str:
        """The text of config.json: sorted keys, two spaces, a newline at the end."""
        return self.to_json_string(use_diff=False)

    def get_text_config(self, decoder: bool = False) -> GPTJConfig:
        """The config itself: transformers' models of several kinds of input have one of each."""
        return self


def _require_agreement(field: str, alias: str, value: Any, given: Any) -> Any:
    """The value of a field that was given by its alias, and perhaps by its own name too."""
    if value not in (_DEFAULTS[field], given):
        raise ConfigError(f"contradicts its alias {alias}", where=field, expected=repr(given), found=repr(value))
    return given


_FIELDS = frozenset(field.name for field in dataclasses.fields(GPTJConfig))
_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(GPTJConfig).parameters.items()
    if name in _FIELDS and name != "extra"
}


def is_field(name: str) -> bool:
    """Whether it is a field, an alias of one, or spelt so much like one that it may be meant for it."""
    return name in _FIELDS or name in ALIASES or is_alike(name, _DEFAULTS)


def _did_you_mean(name: str) -> str | None:
    meant = meant_field(name, _DEFAULTS)
    return None if meant is None else f"Did you mean {meant}?"
