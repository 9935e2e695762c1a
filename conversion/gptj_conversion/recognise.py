"""The format of a path, and the set of weights in it that is meant: known by what lies on the disk.

Where two formats fit (a folder with the weights of two frameworks), none is guessed, unless they hold the same model.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from gptj.config import GPTJConfig
from gptj.errors import ConfigError, FormatError, InputError, MissingFileError, shown
from gptj.paths import is_folder, likely_folder
from gptj.paths.json_file import read_json_object
from gptj.reading.weight_files import choose_set, refuse_folder, split_weights, weights_suffix
from gptj_conversion.common.source import Facts, Source
from gptj_conversion.formats import FORMATS, Format, Opening
from gptj_conversion.mesh.training_config import TrainingConfig, parse_config
from gptj_conversion.wrong_paths import find_config_file, refuse_what_is_known

__all__ = ["ConfigChoice", "Recognised", "recognise"]

ConfigChoice = TrainingConfig | GPTJConfig | str | os.PathLike[str] | None

_SUFFIXES = {".safetensors": "safetensors", ".bin": "bin", ".msgpack": "flax", ".h5": "tf"}
_SUFFIXES |= dict.fromkeys((".pt", ".pth", ".ckpt"), "bin")


@dataclasses.dataclass(frozen=True)
class Recognised:
    """A checkpoint that has been found.

    Attributes:
        format: the one that it is in.
        path: the folder or the archive.
        opening: how it is to be opened.
        opened: the source, where it had to be opened to be told from others.
    """

    format: Format
    path: Path
    opening: Opening
    opened: Source | None = None

    def open(self) -> Source:
        """The source, everything checked that can be without reading data."""
        return self.format.open(self.path, self.opening) if self.opened is None else self.opened

    def describe(self) -> Facts:
        """The facts; unlike `open`, with whatever keeps it from being converted as a problem."""
        return self.format.describe(self.path, self.opening, self.opened)


def recognise(
    path: str | os.PathLike[str],
    *,
    source_format: str | None,
    config: ConfigChoice,
    weights: str | None,
    follow_links: bool,
) -> Recognised:
    """The checkpoint at `path`; see `gptj_conversion.convert.open_source` for the arguments.

    Raises:
        MissingFileError: there is nothing that any reader knows.
        FormatError: several formats fit.
        GPTJError: the config cannot be read.
    """
    names = tuple(known.name for known in FORMATS)
    if source_format is not None and source_format not in names:
        raise InputError(
            "no such format", where="source_format", expected="one of " + ", ".join(names), found=shown(source_format)
        )
    path, weights = split_weights(_require_there(Path(path)), weights)
    opening = Opening(_read_config(config), weights, follow_links)
    chosen = source_format
    if chosen is None and weights is not None:
        chosen = _SUFFIXES.get(weights_suffix(weights))
    fitting = _find_fitting(path, chosen)
    if weights is None and all(known.files is not None for known in fitting):
        sets = {name: known for known in fitting for name in known.list_sets(path)}
        if sets:
            return _choose_set(path, sets, opening, say_others=source_format is None)
    if len(fitting) > 1:
        raise FormatError(
            "several formats fit",
            file=path,
            found=", ".join(f"{known.name} ({known.sign})" for known in fitting),
            hint=f"Choose one: source_format={fitting[0].name!r} or weights=FILE",
        )
    return Recognised(fitting[0], path, opening)


def _find_fitting(path: Path, chosen: str | None) -> list[Format]:
    """The formats that a path looks like, one at least; the chosen one alone, whether it looks like it or not.

    Raises:
        MissingFileError, FormatError: it looks like none, or like something that is no checkpoint.
    """
    candidates = [known for known in FORMATS if chosen in (None, known.name)]
    fitting = [known for known in candidates if known.fits(path)]
    if not fitting:
        refuse_what_is_known(path)
    if chosen is None and not fitting:
        refuse_folder(path, "one of: " + "; ".join(f"{known.sign} ({known.name})" for known in FORMATS))
    return candidates if chosen is not None else fitting


def _require_there(path: Path) -> Path:
    """The path, after it has been found to lead to something."""
    try:
        exists = path.exists() and bool(path.resolve())  # which fails where the current folder is gone
    except (OSError, ValueError) as error:
        raise FormatError(f"cannot be looked at: {error}", file=shown(path)) from None
    if not exists:
        raise MissingFileError("no such file or folder", file=path, hint=likely_folder(path))
    return path


def _choose_set(path: Path, sets: dict[str, Format], opening: Opening, *, say_others: bool) -> Recognised:
    """The one set of weights, or the first of several of the same names and shapes: those of their head's schema."""

    def open_set(name: str) -> tuple[Source, object]:
        source = sets[name].open(path, dataclasses.replace(opening, weights=name))
        return source, (source.head, source.config)

    name, opened = choose_set(path, [*sets], open_set, say_others=say_others)
    return Recognised(sets[name], path, dataclasses.replace(opening, weights=name), opened)


def _read_config(config: ConfigChoice) -> TrainingConfig | GPTJConfig | None:
    """The config of a file, or of the one in a folder: a training config or a config.json, which its keys tell."""
    if config is None or isinstance(config, TrainingConfig | GPTJConfig):
        return config
    if is_folder(config):
        config = find_config_file(Path(config))
    return parse_config(read_json_object(config, error=ConfigError), file=config)
