"""A command that several processes run as one: they find each other, agree on the seed, and the first one speaks."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

from gptj.backends import choose_backend

__all__ = ["together"]


@contextlib.contextmanager
def together(request: Any) -> Iterator[Any]:
    """The request as all processes agree on it; as it is, where it asks for no strategy.

    Raises:
        InputError: the framework cannot, or the launcher's variables are there in part.
    """
    if request.strategy is None:
        yield request
        return
    backend = choose_backend(request.backend)
    parallel: Any = importlib.import_module(f"gptj.{backend}.parallel")
    processes = parallel.join_processes()
    try:
        seed = parallel.share_number(secrets.randbits(62)) if request.seed is None else request.seed
        ending = (
            parallel.ending_together() if backend == "tf" else contextlib.nullcontext()
        )  # the launcher's, elsewhere
        with _silent(processes.rank > 0), ending:
            dp, tp = _complete(request.dp, request.tp, parallel.count_devices())
            chosen = request.seed is not None
            yield dataclasses.replace(request, backend=backend, seed=seed, chosen_seed=chosen, dp=dp, tp=tp)
    finally:
        parallel.leave_processes()


def _complete(dp: int | None, tp: int | None, devices: int) -> tuple[int | None, int | None]:
    """Both axes of the mesh where one is named: the other takes all devices that are left."""
    if dp is None and tp is None:
        return None, None
    return dp or devices // (tp or 1) or 1, tp or devices // (dp or 1) or 1


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """While this is open, nothing is printed but errors, where `silent`."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield
