"""The label that no loss counts, and a classifier's labels: their number, names by id and ids by name, each derived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptj.config.rules import is_whole, spelt
from gptj.errors import ConfigError

__all__ = ["IGNORED_LABEL", "derive_labels"]

IGNORED_LABEL = -100
"""The label that no loss counts."""

_MOST = 2**31 - 1


def derive_labels(
    num_labels: Any, id2label: Mapping[Any, Any] | None, label2id: Mapping[Any, Any] | None
) -> tuple[Any, dict[int, str] | None, Mapping[Any, Any] | None]:
    """num_labels, id2label and label2id from whichever of them was given; two labels where none was.

    A num_labels that is no number comes back as it is, with no names; its own rule refuses it.

    Raises:
        ConfigError: they break their rules, or contradict each other.
    """
    for field, value in (("id2label", id2label), ("label2id", label2id)):
        _require(value is None or (isinstance(value, Mapping) and bool(value)), field, "null or a filled object", value)
    names: dict[int, str] | None = None
    if id2label is not None:
        try:
            names = {int(key): str(name) for key, name in id2label.items()}
        except (TypeError, ValueError):
            _require(False, "id2label", "label ids as keys", id2label)
    elif label2id is not None:
        whole = all(is_whole(i, 0, _MOST) for i in label2id.values())
        _require(whole, "label2id", "label ids as values", label2id)
        names = {i: str(name) for name, i in label2id.items()}
    if names is None:
        num_labels = 2 if num_labels is None else num_labels
        if is_whole(num_labels, 1, 1_000_000):
            names = {i: f"LABEL_{i}" for i in range(num_labels)}
    else:
        _require(sorted(names) == list(range(len(names))), "id2label", "ids 0 to n - 1", sorted(names))
        num_labels = len(names) if num_labels is None else num_labels
        _require(num_labels == len(names), "num_labels", f"the {len(names)} labels of id2label", num_labels)
    if label2id is None and names is not None:
        label2id = {name: i for i, name in names.items()}
    return num_labels, names, label2id


def _require(holds: bool, field: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError("breaks its rule", where=field, expected=rule, found=spelt(value))
