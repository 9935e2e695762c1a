"""The errors of the server, in the one shape that OpenAI's clients know.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

A message says what the reader of the answer can do something about: never a path of the machine, never a traceback.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from gptj.errors import GPTJError, is_out_of_memory, shown
from gptj.serving.engine import Closed, Full

__all__ = ["Refusal", "refusal_of"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """An HTTP error in the shape that OpenAI's clients know.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the request that it is about.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def of_field(cls, param: str, expected: str, found: Any, *, place: str | None = None) -> Refusal:
        """The refusal of a field's value, or of what stands at a place inside it."""
        said = f"{place or param}: expected {expected}, found {_kind(found)}"
        return cls(400, said, param=param, code="invalid_value")


def _kind(value: Any) -> str:
    """A value of JSON as a message shows it: short, and in JSON's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict):
        spelt = _spelt(value) if len(value) <= 20 else ""
        if 0 < len(spelt) <= 80:
            return spelt
        return f"a list of {len(value)}" if isinstance(value, list) else f"an object of {len(value)}"
    return shown(value, longest=60)


def _spelt(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return ""


def refusal_of(error: BaseException) -> Refusal:
    """The answer to an error that was raised while a request was read or computed."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, Full):
        return Refusal(429, str(error), code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, Closed):
        return Refusal(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, GPTJError) and isinstance(error, ValueError):
        told = copy.copy(error)
        told.file = None
        name, bracket, rest = (error.where or "").partition("[")
        param = _CALLED.get(name, name) or None
        told.where = None if param is None else f"{param}{bracket}{rest}"
        return Refusal(400, str(told), param=param, code="invalid_value")
    if isinstance(error, GPTJError) and error.file is None:
        return Refusal(500, str(error), code="computation_failed")
    if is_out_of_memory(error):
        return Refusal(500, "out of memory", code="out_of_memory")
    return Refusal(500, "an error inside the server; its log says more", code="internal_error")


_CALLED = {
    "max_new_tokens": "max_tokens",
    "input_ids": "prompt",
    "text": "prompt",
    "sequence_bias": "logit_bias",
}
