"""A model's LoRA adapters: several held, one at most at work, in the same words in every wing.

The names and the order of arguments are near those of transformers' PreTrainedModel (`add_adapter`, `load_adapter`,
`set_adapter`, `disable_adapters`) and of PEFT (`merge_adapter`, `delete_adapter`). A model with adapters trains the one
at work alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gptj.adapters import (
    AdapterConfig,
    AdapterRow,
    adapter_rows,
    initial_arrays,
    merge_kernel,
    read_adapter,
    write_adapter,
)
from gptj.adapters.config import NAME, NAME_RULE, require_new, stranger_hint
from gptj.config.dtypes import dtype_name
from gptj.config.schema import BASE_PREFIX, TensorSpec, schema
from gptj.errors import ConfigError, InputError, LimitError, did_you_mean, shown, warn_of

__all__ = ["Adapted", "HeldAdapter", "HeldAdapters"]

HeldRow = tuple[AdapterRow, NDArray[Any], NDArray[Any]]
"""A row of an adapter with its A and B."""


@dataclasses.dataclass(frozen=True)
class HeldAdapter:
    """One adapter of a model.

    Attributes:
        config: what it adds, and where.
        rows: its pairs of matrices, in the schema's order.
        trains: whether it is trained when it is at work.
    """

    config: AdapterConfig
    rows: tuple[AdapterRow, ...]
    trains: bool


@dataclasses.dataclass
class HeldAdapters:
    """The adapters of a model and of the GPTJModel inside it.

    Attributes:
        by_name: all of them, in the order in which they came.
        active: the name of the one at work.
        before: the one that was at work when `disable_adapters` was called.
        base: what the wing remembers of the base's own trainability.
        arrays: what the wing keeps of each, where it does not keep it in its layers.
    """

    by_name: dict[str, HeldAdapter] = dataclasses.field(default_factory=dict)
    active: str | None = None
    before: str | None = None
    base: Any = None
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)


class Adapted:
    """A model that holds adapters."""

    _held_adapters: HeldAdapters | None = None
    _adapted_strategies: ClassVar[frozenset[str]] = frozenset()
    """How a model may be cut that is given an adapter."""

    # ---- which are there

    @property
    def adapters(self) -> dict[str, AdapterConfig]:
        """The configs of the adapters held, by name."""
        return {name: held.config for name, held in self._adapters.by_name.items()}

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter at work, None where it is the base alone."""
        return self._adapters.active

    def active_adapters(self) -> list[str]:
        """The adapter at work in a list, as transformers gives it."""
        active = self._adapters.active
        return [] if active is None else [active]

    def set_adapter(self, adapter_name: str | None) -> None:
        """Put one of the adapters to work, or with None leave the base alone. The one at work is trained, if any is.

        Raises:
            InputError: there is none of that name.
        """
        held = self._adapters
        if adapter_name == held.active:
            return
        if adapter_name is not None:
            self._find_adapter(adapter_name)
        held.active = adapter_name
        self._activate_adapter(adapter_name)
        for name, adapter in held.by_name.items():
            self._let_adapter_train(name, adapter.trains and name == adapter_name)

    def disable_adapters(self) -> None:
        """Leave the base alone, until `enable_adapters`."""
        held = self._adapters
        held.before = held.active or held.before
        self.set_adapter(None)

    def enable_adapters(self) -> None:
        """Put the adapter to work that was when `disable_adapters` was called, or else the last that came.

        Raises:
            InputError: the model holds none.
        """
        held = self._adapters
        if held.active is None:
            name = held.before if held.before in held.by_name else next(reversed(held.by_name), None)
            self.set_adapter(self._find_adapter(name))

    # ---- in and out

    def add_adapter(
        self,
        adapter_config: Any = None,
        adapter_name: str | None = None,
        *,
        name: str | None = None,
        seed: int = 0,
        **fields: Any,
    ) -> None:
        """Give the model a new adapter, which adds nothing yet, put it to work, and train it alone from now on.

        >>> model.add_adapter(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])  # doctest: +SKIP

        Args:
            adapter_config: an `AdapterConfig`, or PEFT's LoraConfig; or the name, and the fields follow.
            adapter_name, name: what the adapter is called, "default" where nobody says.
            seed: of A's start values, which are the same in all three backends; B starts at zero.
            fields: r, lora_alpha, target_modules, lora_dropout, use_rslora and the other fields of `AdapterConfig`.

        Raises:
            InputError: the name is taken or odd, or the model is prepared for inference.
            ConfigError: a field breaks its rule, is not supported, or means no matrix of this model.
            LimitError: its matrices have more bytes than the memory.
        """
        model: Any = self
        model._refuse_prepared("add_adapter")
        model._refuse_cut("add_adapter")
        if not model.parameters_apart:
            model._require_values("add_adapter")
        if isinstance(adapter_config, str):
            adapter_config, adapter_name = None, _one_name(adapter_config, adapter_name)
        settled = self._new_name(_one_name(adapter_name, name))
        config = _convert_config(adapter_config, fields)
        if odd := config.strangers(model.config.n_layer):
            (field, module), problem = odd[0], "means no matrix of this model that is adapted"
            raise ConfigError(problem, where=f"{field}: {shown(module)}", hint=stranger_hint(module))
        rows = adapter_rows(config, model.config)
        _require_room(rows, config)
        self._take(settled, config, ((row, *initial_arrays(row, seed)) for row in rows), trains=True)

    def load_adapter(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        name: str | None = None,
        is_trainable: bool = False,
    ) -> None:
        """Give the model the adapter in a folder, as PEFT or `save_adapter` writes it, and put it to work.

        In PyTorch and Flax a model that is cut for inference takes one: A and B are cut as the matrix beside them is.

        Args:
            directory: with adapter_config.json and adapter_model.safetensors.
            adapter_name, name: what the adapter is called, "default" where nobody says.
            is_trainable: whether it is trained further; else nothing of the model is.

        Raises:
            InputError: the name is taken or odd; or it is to train and the model is prepared for inference, or cut; or
                the model is cut in a way that takes none.
            GPTJError: see `gptj.adapters.read_adapter` and `Adapter.rows`.
        """
        model: Any = self
        if is_trainable or getattr(model.placement, "strategy", None) not in self._adapted_strategies:
            model._refuse_cut("load_adapter")
        if not model.parameters_apart:
            model._require_values("load_adapter")
        if is_trainable:
            model._refuse_prepared("is_trainable")
        settled = self._new_name(_one_name(adapter_name, name))
        adapter = read_adapter(directory)
        self._take(settled, adapter.config, adapter.arrays(model.config), trains=is_trainable)

    def save_adapter(
        self,
        directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        *,
        name: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write an adapter's folder, which PEFT and every backend here opens. Returns the folder.

        Args:
            directory: the folder, which is made; other files there stay.
            adapter_name, name: which, the one at work where nobody says.
            overwrite: replace the adapter that the folder holds.

        Raises:
            InputError: there is none of that name, or none at work.
            WriteError: the folder holds an adapter already and `overwrite` is False, or it cannot be written.
            SchemaError: a value is not finite.
        """
        model: Any = self
        model._refuse_cut("save_adapter")
        settled = self._find_adapter(_one_name(adapter_name, name) or self._adapters.active)
        held = self._adapters.by_name[settled]
        config = held.config
        if config.task_type is None and model.head == "causal_lm":
            config = dataclasses.replace(config, task_type="CAUSAL_LM")  # PEFT chooses its model's class by it
        return write_adapter(
            directory,
            config,
            held.rows,
            lambda row: self._read_adapter(settled, row),
            bare=model.head == "base",
            overwrite=overwrite,
        )

    def merge_adapter(self, adapter_name: str | None = None) -> None:
        """Add an adapter, the one at work where nobody says, to the base's matrices, and hold it no more.

        Each sum is rounded once to the parameters' dtype, so it cannot be undone to the bit: load the folder again.

        Raises:
            InputError: there is none of that name, or the model is prepared for inference.
            SchemaError: a sum does not fit the parameters' dtype; nothing was merged.
        """
        model: Any = self
        model._refuse_prepared("merge_adapter")
        model._refuse_cut("merge_adapter")
        name = self._find_adapter(adapter_name if adapter_name is not None else self._adapters.active)
        if dtype_name(model._parameter_dtype()) == "float16":  # the one dtype that a sum may not fit
            for _ in self._merged(name):
                pass
        model._assign(self._merged(name))
        self.delete_adapter(name)

    def delete_adapter(self, adapter_names: str | Iterable[str]) -> None:
        """Hold an adapter, or several, no more. With the last one goes the rule that nothing else is trained.

        Raises:
            InputError: there is none of that name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else [*adapter_names]
        for name in names:
            self._find_adapter(name)
        held = self._adapters
        for name in dict.fromkeys(names):
            if held.active == name:
                self.set_adapter(None)
            self._drop_adapter(name)
            del held.by_name[name]
            held.arrays.pop(name, None)
        if not held.by_name:
            self._let_base_train(held.base)
            held.base = None

    # ---- how

    @property
    def _adapters(self) -> HeldAdapters:
        """Those of the model, kept with the GPTJModel inside it."""
        base: Any = self.base_model  # type: ignore[attr-defined]
        if base._held_adapters is None:
            base._held_adapters = HeldAdapters()
        found: HeldAdapters = base._held_adapters
        return found

    def _take(self, name: str, config: AdapterConfig, arrays: Iterable[HeldRow], *, trains: bool) -> None:
        """Hold an adapter under a name, and put it to work."""
        model: Any = self
        wide = np.float64 if dtype_name(model._parameter_dtype()) == "float64" else np.float32
        # Settled before anything changes: a value that is not finite leaves the model as it was.
        settled = [(row, np.ascontiguousarray(a, wide), np.ascontiguousarray(b, wide)) for row, a, b in arrays]
        held = self._adapters
        if not held.by_name:
            held.base = self._freeze_base()
        self._hold_adapter(name, config, settled)
        held.by_name[name] = HeldAdapter(config, tuple(row for row, _, _ in settled), trains)
        self.set_adapter(name)

    def _merged(self, name: str) -> Iterator[tuple[TensorSpec, NDArray[Any]]]:
        """The rows of the schema that an adapter adds to, with their sums, one at a time."""
        model: Any = self
        rows = {row.kernel: row for row in self._adapters.by_name[name].rows}
        for spec in schema(model.config, model.head):
            row = rows.get(spec.name.removeprefix(BASE_PREFIX))
            if row is not None:
                yield spec, merge_kernel(model._read(spec.name), row, *self._read_adapter(name, row))

    def _find_adapter(self, name: Any) -> str:
        """The name, which is one of the adapters'.

        Raises:
            InputError: there is none of it.
        """
        names = self._adapters.by_name
        if not isinstance(name, str) or name not in names:
            expected = ", ".join(names) or "an adapter: see add_adapter and load_adapter"
            hint = did_you_mean(name, names) if isinstance(name, str) else None
            raise InputError("no such adapter", where="adapter_name", expected=expected, found=shown(name), hint=hint)
        return name

    def _new_name(self, name: str | None) -> str:
        """The name of a new adapter.

        Raises:
            InputError: it is taken, or not a name.
        """
        name = "default" if name is None else name
        if not isinstance(name, str) or not NAME.fullmatch(name):
            expected, found = NAME_RULE, shown(name)
            raise InputError("no name for an adapter", where="adapter_name", expected=expected, found=found)
        if name in self._adapters.by_name:
            hint = f"delete_adapter({shown(name)}) first, or give another name"
            raise InputError(
                "the model has an adapter of that name", where="adapter_name", found=shown(name), hint=hint
            )
        return name

    def _say_left(self, directory: str | os.PathLike[str]) -> None:
        """Warn that a folder of the base's weights lacks the adapters."""
        for name in self._adapters.by_name:
            hint = "save_adapter(DIR) writes it, merge_adapter() makes it part of the model"
            warn_of(
                "an adapter, which is not written here: these are the base's weights",
                file=directory,
                where=name,
                hint=hint,
            )

    # ---- hooks: how a framework does it

    def _hold_adapter(self, name: str, config: AdapterConfig, arrays: list[HeldRow]) -> None:
        """Make the arrays parameters of the framework's, not at work yet."""
        raise NotImplementedError

    def _read_adapter(self, name: str, row: AdapterRow) -> tuple[NDArray[Any], NDArray[Any]]:
        """A and B of a row in NumPy, to be read only."""
        raise NotImplementedError

    def _activate_adapter(self, name: str | None) -> None:
        """Compute with that adapter alone from now on, or with none."""
        raise NotImplementedError

    def _drop_adapter(self, name: str) -> None:
        """Let the parameters of an adapter go that is not at work."""
        raise NotImplementedError

    def _let_adapter_train(self, name: str, trains: bool) -> None:
        """Say whether an optimizer changes an adapter."""
        raise NotImplementedError

    def _freeze_base(self) -> Any:
        """Keep optimizers off the base's parameters, and return what `_let_base_train` needs."""
        raise NotImplementedError

    def _let_base_train(self, before: Any) -> None:
        """Undo `_freeze_base`."""
        raise NotImplementedError


def _one_name(first: str | None, second: str | None) -> str | None:
    if first is not None and second is not None and first != second:
        raise InputError("given twice", where="name", expected=shown(first), found=shown(second))
    return second if first is None else first


def _require_room(rows: Sequence[AdapterRow], config: AdapterConfig) -> None:
    """Refuse a rank whose matrices no memory holds.

    Raises:
        LimitError: with the bytes that there are.
    """
    need = 2 * 4 * sum(row.size for row in rows)  # in NumPy, and then the framework's
    try:
        np.empty(need, np.uint8)  # which takes no page of it
    except (MemoryError, ValueError):  # the second of a number beyond 64 bits
        largest = max(row.rank for row in rows)
        where = "r" if largest == config.r else "rank_pattern"
        found = f"rank {shown(largest)}: {need:,} bytes"
        raise LimitError("matrices larger than the memory that there is", where=where, found=found) from None


def _convert_config(config: Any, fields: Mapping[str, Any]) -> AdapterConfig:
    """The config given, ours or PEFT's or a mapping of its fields, or that of the fields."""
    if config is None:
        return AdapterConfig.from_fields(fields)
    if fields:
        raise InputError("given beside a config", where=next(iter(fields)), hint="Say it in the config")
    if isinstance(config, AdapterConfig):
        return config
    members = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    if not members:
        expected = "an AdapterConfig, or PEFT's LoraConfig"
        raise InputError("no adapter's config", where="adapter_config", expected=expected, found=type(config).__name__)
    plain = {name: _plain(value) for name, value in members.items()}
    converted = AdapterConfig.from_dict(plain)
    require_new(plain)
    return converted


def _plain(value: Any) -> Any:
    """PEFT's enumerations and sets as JSON would have them."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", value)
