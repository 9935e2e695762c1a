"""The settings of a fine-tuning run: one frozen object, checked when it is made, that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gptj.adapters import AdapterConfig
from gptj.errors import ConfigError, InputError, did_you_mean, shown

__all__ = ["BETA_1", "BETA_2", "DTYPES", "EPSILON", "MOST_TIMES", "SCHEDULES", "Settings", "option_of"]

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16", "float16")

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
"""AdamW's constants, torch.optim.AdamW's own defaults."""

MOST_TIMES = 2**31 - 1
"""The most updates, windows or tokens."""

_LEAST, _MOST = 1e-15, 1e15
"""Beyond, a number or its product with another is 0 or infinite in float32, in one framework before the others."""

LR, LORA_LR = 2e-5, 2e-4
"""Peak learning rates where none is said: of all parameters, and of an adapter, which bears ten times as much."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The hyperparameters: all that decides the result beside model, data and framework.

    Attributes:
        steps: updates of the parameters; None for as many as `epochs` take.
        epochs: how often each window is seen; not beside `steps`. None without them is 1.
        batch: windows at once.
        accumulate: batches whose gradients make one update, each token weighing the same.
        length: tokens of a window; None for the model's n_positions.
        pack: documents one after the other, cut into full windows; False gives each its own padded window.
        lr: the peak learning rate; None is 2e-5, and 2e-4 for an adapter.
        schedule: "cosine" or "linear", down to zero, or "constant".
        warmup: the first updates, in which the learning rate climbs; below 1, their share of all.
        weight_decay: decoupled, of matrices; biases and layer norms have none.
        clip: the largest norm of the whole gradient; 0 for none.
        seed: of the order of the windows and of an adapter's start values.
        dtype: what is computed in. All that is trained, moments and sums of gradients stay float32; what is not, beside
            an adapter, is kept in `dtype`.
        checkpoint_gradients: compute each block again for its gradient, in place of keeping what is inside it.
        lora: the rank of an adapter that is trained in place of the parameters.
        lora_alpha: an adapter's scale is alpha / rank; None for twice the rank.
        lora_targets: the matrices it adds to; None for q_proj and v_proj.
        eval_every: updates between evaluations; None for a tenth of all.
        save_every: updates between checkpoints; None for a tenth of all. It alone may change on `--resume`.
    """

    steps: int | None = None
    epochs: int | None = None
    batch: int = 4
    accumulate: int = 1
    length: int | None = None
    pack: bool = True
    lr: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    checkpoint_gradients: bool = False
    lora: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] | None = None
    eval_every: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch", "accumulate", "eval_every", "save_every"):
            self._check_whole(name, least=1, most=MOST_TIMES)
        self._check_whole("lora", least=1, most=2**16)
        self._check_whole("length", least=2, most=MOST_TIMES)
        self._check_whole("seed", least=0, most=2**64 - 1)
        for name in ("lr", "warmup", "weight_decay", "clip", "lora_alpha"):
            self._check_number(name)
        for name in ("pack", "checkpoint_gradients"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                hint = did_you_mean(value, known) if isinstance(value, str) else None
                raise InputError(
                    "no such value", where=option_of(name), expected=" or ".join(known), found=shown(value), hint=hint
                )
        if self.steps is not None and self.epochs is not None:
            raise InputError("given beside --steps", where="--epochs", hint="Give one of the two")
        for name in ("lora_alpha", "lora_targets"):
            if self.lora is None and getattr(self, name) is not None:
                raise InputError("is of an adapter", where=option_of(name), hint="Give --lora too")
        if self.lora is not None:
            try:
                self.adapter_config()  # which checks what an adapter has
            except ConfigError as error:
                name = "lora_alpha" if error.where == "lora_alpha" else "lora_targets"
                raise InputError(error.problem, **error.facts(where=option_of(name))) from None

    def _refuse(self, name: str, expected: str) -> None:
        raise InputError("breaks its rule", where=option_of(name), expected=expected, found=shown(getattr(self, name)))

    def _check_whole(self, name: str, *, least: int, most: int) -> None:
        value = getattr(self, name)
        optional = _DEFAULTS[name] is None
        if value is None and optional:
            return
        if type(value) is not int or not least <= value <= most:
            self._refuse(name, f"a whole number from {least} to {most}")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and _DEFAULTS[name] is None:
            return
        above = name in ("lr", "lora_alpha")
        fits = type(value) in (int, float) and math.isfinite(value) and (value > 0 if above else value >= 0)
        if not fits:
            self._refuse(name, "a number above 0" if above else "a number, 0 or above")
        if value and name not in ("warmup", "lora_alpha") and not _LEAST <= value <= _MOST:
            self._refuse(name, f"a number, {_LEAST:g} to {_MOST:g}" + ("" if above else ", or 0"))
        if name == "warmup" and value >= 1 and value != int(value):
            self._refuse(name, "a whole number of updates, or a share below 1")

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        return LR if self.lora is None else LORA_LR

    @property
    def micro_batches(self) -> int:
        """Windows of one update."""
        return self.batch * self.accumulate

    @property
    def kept_dtype(self) -> str:
        """The dtype of the model's own parameters: float32 where they are trained, `dtype` beside an adapter."""
        return "float32" if self.lora is None else self.dtype

    def adapter_config(self, base: str | None = None) -> AdapterConfig:
        """The config of the adapter that is trained; `base` is the name of the model that it is for.

        Raises:
            ConfigError: `lora_targets` are no matrices.
        """
        assert self.lora is not None
        alpha = 2 * self.lora if self.lora_alpha is None else self.lora_alpha
        return AdapterConfig(
            r=self.lora, lora_alpha=alpha, target_modules=self.lora_targets, base_model_name_or_path=base
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as JSON can hold them."""
        members = dataclasses.asdict(self)
        return members | {"lora_targets": None if self.lora_targets is None else [*self.lora_targets]}

    def changes(self, stored: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Settings that differ from those of a checkpoint: the option, the stored value, and this one."""
        mine = self.to_dict()
        names = [name for name in mine if name != "save_every"]
        return [(option_of(name), stored.get(name), mine[name]) for name in names if stored.get(name) != mine[name]]


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}


def option_of(name: str) -> str:
    """The option of the command line that sets a field.

    >>> option_of("weight_decay")
    '--weight-decay'
    """
    return "--" + name.replace("_", "-")
