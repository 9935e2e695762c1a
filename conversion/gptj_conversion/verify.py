"""A written directory checked against its manifest, in whichever format it is, without the source that it came from."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from gptj.config import GPTJConfig
from gptj.config.schema import TensorSpec, schema
from gptj.errors import FormatError, MissingFileError, shown
from gptj.parity.fingerprint import check_fingerprint, compare_fingerprint
from gptj.reading.folder import require_directory, verify_checkpoint
from gptj.reading.manifest import (
    MANIFEST_FILE,
    FoundTensor,
    Manifest,
    VerifiedManifest,
    verify_manifest,
    warn_of_unchecked,
)
from gptj.reading.weight_files import safe_path, split_weights
from gptj.writing.folder import canonical_tensors
from gptj_conversion.common.source import Source
from gptj_conversion.convert import open_source, target_formats

__all__ = ["verify"]


def verify(
    directory: str | os.PathLike[str],
    *,
    fingerprint: bool = False,
    weights: str | None = None,
    follow_links: bool = False,
) -> VerifiedManifest:
    """The directory's manifest, after everything that it hashes has been read again and found to be the same.

    Each file is hashed as it lies there, and each tensor as our reader gives it, in its canonical layout: so the files
    are those that were written, and the reader still makes of them what it did then. What else lies in the directory is
    not checked: the result's `unchecked` has the names, of which a warning is given.

    Args:
        directory: what `gptj convert` wrote, in any format.
        weights: the file that is meant, which the manifest must list.
        fingerprint: also run the float64 reference, and compare its logits with the noted ones.
        follow_links: accept links that lead out of the directory.

    Raises:
        MissingFileError: there is no manifest; or no fingerprint in it, where one is to be compared.
        FormatError: files or tensors differ; all of them are named.
        ParityError: the reference computes something else.
        GPTJError: the directory cannot be opened.
    """
    directory, weights = split_weights(directory, weights)
    require_directory(directory)
    try:
        noted = Manifest.from_file(safe_path(directory, MANIFEST_FILE, follow_links=follow_links))
        written = noted.weights_format
    except MissingFileError as error:
        error.hint = "Only what gptj wrote has one, at its root: gptj convert makes one"
        raise
    if weights is not None and weights not in noted.files:
        raise MissingFileError(
            "the manifest is not of these weights",
            file=directory / MANIFEST_FILE,
            where=shown(weights),
            expected=f"one of the {len(noted.files)} files that it lists",
        )
    if written == "safetensors":
        manifest = verify_checkpoint(directory, weights=weights, follow_links=follow_links)
        if fingerprint:
            check_fingerprint(directory, weights=weights, follow_links=follow_links)
        return manifest
    if written not in target_formats():
        raise FormatError(
            "no such format",
            file=directory / MANIFEST_FILE,
            where="weights_format",
            expected="one of " + ", ".join(target_formats()),
            found=shown(written),
        )
    find = functools.partial(_find_tensors, weights=weights, follow_links=follow_links)
    config = functools.partial(_read_config, directory, weights=weights, follow_links=follow_links)
    manifest = verify_manifest(directory, config=config, find=find, follow_links=follow_links)
    warn_of_unchecked(directory, manifest)
    if fingerprint:
        source, rows = _open_written(directory, manifest, weights=weights, follow_links=follow_links)
        by_name = {row.name: row for row in rows}
        assert source.config is not None
        compare_fingerprint(
            directory, source.config, source.head, lambda name: source.read(by_name[name]), follow_links=follow_links
        )
    return manifest


def _find_tensors(
    directory: Path, manifest: Manifest, *, weights: str | None, follow_links: bool
) -> dict[str, FoundTensor]:
    """Every canonical tensor of the directory, through its format's reader; one is in memory at a time."""
    return canonical_tensors(*_open_written(directory, manifest, weights=weights, follow_links=follow_links))


def _read_config(directory: Path, manifest: Manifest, *, weights: str | None, follow_links: bool) -> GPTJConfig:
    source, _ = _open_written(directory, manifest, weights=weights, follow_links=follow_links)
    assert source.config is not None
    return source.config


def _open_written(
    directory: Path, manifest: Manifest, *, weights: str | None, follow_links: bool
) -> tuple[Source, tuple[TensorSpec, ...]]:
    source = open_source(directory, source_format=manifest.weights_format, weights=weights, follow_links=follow_links)
    if source.config is None:
        raise FormatError("says nothing of heads, rotary width and positions", file=directory)
    return source, schema(source.config, source.head)
