"""Versions of what a backend computes with, as records and traces say them."""

from __future__ import annotations

import importlib.metadata
import platform

import gptj

__all__ = ["library_versions"]

_DISTRIBUTIONS = {
    "pt": ("torch",),
    "tf": ("tensorflow", "tensorflow-cpu", "keras"),
    "flax": ("jax", "jaxlib", "flax"),
}


def library_versions(backend: str) -> dict[str, str]:
    """The versions of what a backend computes with, by distribution."""
    versions = {"gptj": gptj.__version__, "python": platform.python_version()}
    for name in ("numpy", "ml_dtypes", *_DISTRIBUTIONS[backend]):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
