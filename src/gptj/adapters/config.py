"""An adapter's config: the fields of PEFT's adapter_config.json, each supported or refused by name.

A field that changes the computation and is not supported is an error where its value says so; one that says how
training began, or how another program loads, changes nothing here and is let be.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from gptj.adapters.patterns import MOST_PATTERNS, require_pattern
from gptj.errors import ConfigError, LimitError, did_you_mean, naming_file, shown, warn_of

__all__ = ["DEFAULT_TARGETS", "NAME", "NAME_RULE", "TARGETS", "AdapterConfig"]

NAME, NAME_RULE = re.compile(r"[A-Za-z0-9_-]{1,100}"), "letters, digits, - and _, at most 100"
"""The names under which a model holds adapters."""

TARGETS = ("attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")
"""The matrices of a block that an adapter may add to, in the schema's order."""

DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's own for a GPT-J."""

OTHER_MODULES = ("wte", "lm_head", "ln_1", "ln_f", "score", "qa_outputs", "transformer", "h", "attn", "mlp")
_NAMES = tuple(target.split(".")[1] for target in TARGETS)

MERGE_HINT = "Merge the adapter with PEFT: merge_and_unload(), then save_pretrained"

_REFUSED = {
    "use_dora": "it scales each output by a magnitude of its own",
    "use_qalora": "it pools the inputs in groups",
    "use_bdlora": "its matrices are of blocks",
    "lora_bias": "B has a bias",
    "trainable_token_indices": "rows of the embedding are part of it",
    "target_parameters": "it adapts parameters and not layers",
    "layer_replication": "the model gets further layers",
    "alora_invocation_tokens": "it acts from a token on",
    "arrow_config": "it is a mixture of adapters",
    "kasa_config": "it changes the base's weights",
    "monteclora_config": "it samples",
    "modules_to_save": "whole modules of another model are part of it",
}
"""Fields that change the computation and are not supported, with how; each is lawful where it says nothing."""

_INERT = frozenset(
    {"auto_mapping", "peft_version", "inference_mode", "megatron_config", "megatron_core", "loftq_config"}
    | {"eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "ensure_weight_tying"}
    | {"runtime_config", "init_lora_weights", "fan_in_fan_out", "bias", "peft_type"}
)
"""Fields that are looked at on their own, or that change nothing of what a stored adapter computes."""

_LEAST_ALPHA, _MOST_ALPHA = 1e-6, 1e6
_ALPHA = f"a number other than 0, {_LEAST_ALPHA:g} to {_MOST_ALPHA:g} or minus that"
"""Beyond, the addition is lost in the base's own rounding, or the base in the addition."""

_STARTS = ("gaussian", "eva", "orthogonal")
"""`init_lora_weights` that start A and B otherwise, and leave the base's weights as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The rank, the scale and the places of an adapter.

    Attributes:
        r: the rank, rows of A and columns of B.
        lora_alpha: what scales the addition: by lora_alpha / r.
        target_modules: names or ends of names of the matrices, a regular expression of whole names, or "all-linear".
            None means q_proj and v_proj, as PEFT does.
        lora_dropout: of the input of A in training.
        use_rslora: scale by lora_alpha / sqrt(r).
        rank_pattern, alpha_pattern: other r and lora_alpha, by ends of names or regular expressions of them.
        exclude_modules: names, ends or a regular expression of those that `target_modules` shall not mean.
        layers_to_transform: the blocks that are meant, a number or several; None means all.
        layers_pattern: a regular expression that ends in the name of the list of blocks, which is "h", or several, of
            which the first that fits counts; only beside `layers_to_transform`.
        task_type, base_model_name_or_path, revision: notes for people and for PEFT.

    Raises:
        ConfigError: a field breaks its rule.
        LimitError: a regular expression may take ages, or there are too many.
    """

    r: int = 8
    lora_alpha: float = 16
    target_modules: str | Sequence[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Settle the fields' types, and refuse what breaks a rule."""
        settled = {
            "target_modules": _names("target_modules", self.target_modules, empty=False),
            "exclude_modules": _names("exclude_modules", self.exclude_modules),
            "layers_to_transform": _layers(self.layers_to_transform),
        }
        if settled["target_modules"] is None:
            settled["target_modules"] = DEFAULT_TARGETS
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        _require("r", self.r, _is_rank(self.r), "a whole number, 1 or above")
        _require("lora_alpha", self.lora_alpha, _is_alpha(self.lora_alpha), _ALPHA)
        chance = _is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1
        _require("lora_dropout", self.lora_dropout, chance, "a number from 0 to below 1")
        _require("use_rslora", self.use_rslora, isinstance(self.use_rslora, bool), "true or false")
        for field, fits, expected in (
            ("rank_pattern", _is_rank, "a rank of 1 or above for each name"),
            ("alpha_pattern", _is_alpha, f"{_ALPHA}, for each name"),
        ):
            pattern = getattr(self, field)
            _require(field, pattern, isinstance(pattern, Mapping), expected)
            if len(pattern) > MOST_PATTERNS:
                raise LimitError("too many names", where=field, expected=f"at most {MOST_PATTERNS}", found=len(pattern))
            for name, value in pattern.items():
                _require(f"{field}[{shown(name)}]", value, isinstance(name, str) and fits(value), expected)
                require_pattern(name, field)
        for pattern in self._lists_of_blocks():
            require_pattern(_within(pattern), "layers_pattern")
        if self._lists_of_blocks() and self.layers_to_transform in (None, ()):
            raise ConfigError("says which blocks without layers_to_transform", where="layers_pattern")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            hint = "Name the blocks in the regular expression, or the matrices in a list"
            raise ConfigError("not beside target_modules of text, as in PEFT", where="layers_to_transform", hint=hint)
        for field in ("task_type", "base_model_name_or_path", "revision"):
            value = getattr(self, field)
            _require(field, value, value is None or isinstance(value, str), "text or null")

    # ---- from and to PEFT's fields

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """The config of fields by PEFT's names, as a call gives them: a field that there is none of is refused.

        Raises:
            ConfigError: naming the field.
        """
        own = {field.name for field in dataclasses.fields(cls)}
        for name, value in fields.items():
            if name in own:
                continue
            if name not in _INERT and name not in _REFUSED:
                hint = did_you_mean(name, own) or f"The fields are {', '.join(sorted(own))}"
                raise ConfigError("no such field", where=shown(name), hint=hint)
            _refuse_unsupported(name, value)
        require_new(fields)
        _warn_of_fan_in(fields)
        return cls(**{name: value for name, value in fields.items() if name in own})

    @classmethod
    def from_dict(cls, members: Mapping[str, Any], *, file: str | os.PathLike[str] | None = None) -> Self:
        """The config that an adapter_config.json says.

        Args:
            members: the JSON object.
            file: what errors and warnings name.

        Raises:
            ConfigError: a field breaks its rule, is missing, or changes the computation and is not supported.
        """
        own = {field.name for field in dataclasses.fields(cls)}
        with naming_file(file):
            _require_lora(members)
            for name in ("r", "lora_alpha"):
                if members.get(name) is None:
                    hint = "Write what it was trained with: the addition is scaled by lora_alpha / r"
                    raise ConfigError("is missing", where=name, expected="a number", hint=hint)
            for name, value in members.items():
                if name in own:
                    continue
                _refuse_unsupported(name, value)
                if name not in _INERT and name not in _REFUSED:
                    if value not in (None, False, "", [], {}):
                        hint = "It may change what the adapter computes: if it does not, take it out"
                        raise ConfigError("no such field here", where=shown(name), found=shown(value), hint=hint)
                    warn_of("no such field here; it says nothing", file=file, where=shown(name), found=shown(value))
            _warn_of_fan_in(members, file)
            given = {name: value for name, value in members.items() if name in own}
            empty = {field.name: field.default_factory for field in dataclasses.fields(cls)}
            for name in ("rank_pattern", "alpha_pattern"):
                if given.get(name, 0) is None:
                    given[name] = empty[name]()  # type: ignore[operator]
            return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """PEFT's adapter_config.json, with the fields that each release of it knows."""
        named = {
            name: value if value is None or isinstance(value, str | int) else list(value)
            for name, value in (
                ("target_modules", self.target_modules),
                ("layers_to_transform", self.layers_to_transform),
                ("layers_pattern", self.layers_pattern),
                ("exclude_modules", self.exclude_modules),
            )
        }
        excluded = named.pop("exclude_modules")
        return {
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "revision": self.revision,
            "task_type": self.task_type,
            "use_dora": False,
            "use_rslora": self.use_rslora,
            **named,
            **({} if excluded is None else {"exclude_modules": excluded}),
        }

    # ---- which matrices, and how

    def places(self, blocks: int) -> list[tuple[int, str]]:
        """The matrices that are adapted of so many blocks, by PEFT's rules: the block, and one of `TARGETS`.

        Names are those of a model with a head, or of GPTJModel's where the fields mean nothing of the first.
        """
        every = [(n, target) for n in range(blocks) for target in TARGETS]
        for bare in (False, True):
            if found := [place for place in every if self._means(*place, bare)]:
                return found
        return []

    def _means(self, block: int, target: str, bare: bool) -> bool:
        name = _spellings(block, target)[bare]
        if self.exclude_modules is not None and _is_meant(self.exclude_modules, name):
            return False
        modules = self.target_modules
        if isinstance(modules, str):
            return modules.lower() == "all-linear" or re.fullmatch(modules, name) is not None
        assert modules is not None  # settled when it was made
        if name in modules:
            return True
        chosen = self.layers_to_transform
        if chosen is not None and chosen != ():
            lists = self._lists_of_blocks()
            found = _block_of(lists, name) if lists else block
            if found not in ((chosen,) if isinstance(chosen, int) else chosen):
                return False
        return _is_meant(modules, name)

    def _lists_of_blocks(self) -> tuple[str, ...]:
        """The names that `layers_pattern` gives the list of blocks."""
        given = self.layers_pattern
        names = (given,) if isinstance(given, str) and given else given or ()
        fits = isinstance(names, list | tuple) and all(isinstance(name, str) and name for name in names)
        _require("layers_pattern", given, fits, '"h", the blocks of a GPT-J, a regular expression, or several')
        return tuple(names)

    def rank(self, block: int, target: str) -> int:
        """The r of a matrix."""
        return int(_of_pattern(self.rank_pattern, block, target, self.r))

    def scale(self, block: int, target: str) -> float:
        """The factor of B A."""
        alpha, r = _of_pattern(self.alpha_pattern, block, target, self.lora_alpha), self.rank(block, target)
        return float(alpha / math.sqrt(r) if self.use_rslora else alpha / r)

    def strangers(self, blocks: int) -> list[tuple[str, str]]:
        """Fields, and names in them, that mean no matrix of so many blocks; of a pattern, none that is adapted."""
        every = [name for n in range(blocks) for target in TARGETS for name in _spellings(n, target)]
        found = []
        for field in ("target_modules", "exclude_modules"):
            names = getattr(self, field)
            others = () if field == "target_modules" else OTHER_MODULES  # a habit beside "all-linear"
            for name in () if names is None or isinstance(names, str) else names:
                if name.split(".")[-1] not in others and not any(_is_meant((name,), one) for one in every):
                    found.append((field, name))
        adapted = [_spellings(*place)[0] for place in self.places(blocks)]
        for field in ("rank_pattern", "alpha_pattern"):
            keys = getattr(self, field)
            found += [(field, key) for key in keys if not any(_is_of(key, name) for name in adapted)]
        return found


def stranger_hint(name: str) -> str:
    """The sentence that says what a target that is none may have meant."""
    if name.split(".")[-1] in _NAMES:
        return "Targets and blocks that are chosen leave it out"
    if name.split(".")[-1] in OTHER_MODULES:
        return f"{shown(name)} is no matrix of a block; those are {', '.join(_NAMES)}"
    return did_you_mean(name.split(".")[-1], _NAMES) or f"The matrices of a block are {', '.join(_NAMES)}"


def nothing_hint(adapter: AdapterConfig, blocks: int) -> str:
    """The sentence that says why an adapter means no matrix of a model with so many blocks."""
    modules = adapter.target_modules
    if isinstance(modules, str) and any(_is_meant((modules,), f".{target}") for target in TARGETS):
        return f"Text is a regular expression of whole names: say [{shown(modules)}]"
    if strangers := [name for field, name in adapter.strangers(blocks) if field == "target_modules"]:
        return stranger_hint(strangers[0])
    fields = ("exclude_modules", "layers_pattern", "layers_to_transform")
    leaving = [name for name in fields if getattr(adapter, name) not in (None, (), "", [])]
    return f"{leaving[0]} leaves none of them" if leaving else stranger_hint("")


def _spellings(block: int, target: str) -> tuple[str, str]:
    return f"transformer.h.{block}.{target}", f"h.{block}.{target}"


def _is_meant(modules: str | Sequence[str], name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _within(pattern: str) -> str:
    """The regular expression of the names inside a list of blocks, by PEFT's rule."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _block_of(lists: Sequence[str], name: str) -> int | None:
    """The block that a matrix lies in, by the first of the lists' names that fits; None where none says it."""
    for pattern in lists:
        if (match := re.match(_within(pattern), name)) is not None:
            return None if match["idx"] is None else int(match["idx"])
    return None


def _of_pattern(pattern: Mapping[str, Any], block: int, target: str, default: Any) -> Any:
    name = _spellings(block, target)[0]
    return next((value for key, value in pattern.items() if _is_of(key, name)), default)


def _is_of(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


# ---- the rules of fields


def _require(field: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise ConfigError("breaks its rule", where=field, expected=expected, found=shown(value))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and value >= 1


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and _LEAST_ALPHA <= abs(value) <= _MOST_ALPHA


def _names(field: str, value: Any, *, empty: bool = True) -> str | tuple[str, ...] | None:
    """A field of names as a tuple, in order; a regular expression as it is."""
    expected = "names of matrices, or a regular expression of them"
    if value is None:
        return None
    if isinstance(value, str):
        _require(field, value, bool(value), expected)
        if value.lower() != "all-linear":
            require_pattern(value, field)
        return value
    _require(field, value, isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes), expected)
    names = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    _require(field, value, all(isinstance(name, str) and name for name in names), expected)
    _require(field, value, bool(names) or empty, expected)
    return names or None


def _layers(value: Any) -> int | tuple[int, ...] | None:
    expected = "numbers of blocks"
    if value is None:
        return None
    listed = [value] if isinstance(value, int) else value
    _require("layers_to_transform", value, isinstance(listed, Sequence) and not isinstance(listed, str), expected)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in listed)
    _require("layers_to_transform", value, whole, expected)
    return value if isinstance(value, int) else tuple(listed)


def _require_lora(members: Mapping[str, Any]) -> None:
    """Refuse an adapter of another kind, or another program's."""
    if "peft_type" not in members and {"lora_parameters", "fine_tune_type"} & members.keys():
        raise ConfigError(
            "an adapter of mlx_lm's, whose matrices lie the other way round under other names",
            where="fine_tune_type",
            expected='PEFT\'s, with "peft_type": "LORA"',
            hint="Fuse it with mlx_lm.fuse, or write it in PEFT's format: lora_A = lora_a.T, lora_B = lora_b.T",
        )
    kind = members.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        hint = "Merge it with PEFT where PEFT can: merge_and_unload(), then save_pretrained"
        raise ConfigError("no LoRA adapter", where="peft_type", expected="LORA", found=shown(kind), hint=hint)


def require_new(members: Mapping[str, Any]) -> None:
    """Refuse fields of PEFT's that would make a new adapter start, or train, in another way than one does here.

    Raises:
        ConfigError: naming the field.
    """
    for name, fits, value, way in (
        ("init_lora_weights", members.get("init_lora_weights") in (True, None), True, "A is even, B zero"),
        ("inference_mode", not members.get("inference_mode"), False, "what is not trained is opened by load_adapter"),
        ("peft_type", str(members.get("peft_type", "LORA")).upper() == "LORA", "LORA", "an adapter is a LoRA here"),
    ):
        if not fits:
            found = shown(members[name])
            raise ConfigError(f"not how a new adapter begins here: {way}", where=name, expected=value, found=found)


def _warn_of_fan_in(members: Mapping[str, Any], file: str | os.PathLike[str] | None = None) -> None:
    if members.get("fan_in_fan_out"):
        problem = "GPT-J's matrices are stored output axis first, and read so, as PEFT does"
        warn_of(problem, file=file, where="fan_in_fan_out", expected=False, found=True)


def _refuse_unsupported(name: str, value: Any) -> None:
    """Refuse a field of PEFT's whose value changes the computation in a way that is not supported."""
    hint = MERGE_HINT
    if name == "bias" and value != "none":
        raise ConfigError(
            "biases of the base are part of it", where=name, expected="none", found=shown(value), hint=hint
        )
    if name in _REFUSED and value not in (None, False, [], {}, ""):
        raise ConfigError(f"not supported: {_REFUSED[name]}", where=name, found=shown(value), hint=hint)
    if name == "init_lora_weights" and not isinstance(value, bool | None) and value not in _STARTS:
        raise ConfigError(
            "not supported: it changes the base's weights, which the adapter then belongs to",
            where=name,
            expected="true, false, " + ", ".join(_STARTS),
            found=shown(value),
            hint=hint,
        )
