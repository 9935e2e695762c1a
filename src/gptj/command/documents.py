"""Texts to be scored, from a file or from stdin: by the readers of `gptj generate`, with other members in a JSON line.

A line's object has "text", or "token_ids"; or "prompt" and "completion", of which the second is scored, both as text or
both as token ids. A member that is not read is said once; one that looks like a misspelt one is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from typing import Any

from gptj.command.prompts import Prompt, check_text, check_token_ids, read_lines, read_prompt
from gptj.errors import InputError, shown, warn_of

__all__ = ["Document", "read_documents"]

_MEMBERS = ("text", "token_ids", "prompt", "completion")


@dataclasses.dataclass(frozen=True)
class Document(Prompt):
    """One text, or the context of one.

    Attributes:
        completion: what is scored after the text or token ids, in the same form; None: they are scored themselves.
    """

    completion: str | tuple[int, ...] | None = None

    @property
    def content(self) -> str | tuple[int, ...]:
        """The text, or the token ids."""
        return self.text if self.text is not None else self.token_ids or ()


def read_documents(file: str, *, whole: bool = False) -> list[Document]:
    """The documents of a file or of stdin: its lines, or all of it as one text.

    Raises:
        InputError: it cannot be read, is not UTF-8, or has no text; or a line is not what its first line promises.
    """
    if whole:
        prompt = read_prompt(file)
        if not prompt.text:
            raise InputError("no text", file=prompt.file)
        return [Document(prompt.text, file=prompt.file)]
    reader = _Reader()
    prompts = read_lines(file, reader.document)
    return [one if isinstance(one, Document) else Document(one.text, file=one.file, line=one.line) for one in prompts]


class _Reader:
    """Makes documents of JSON objects, and says each member once that is not read."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def document(self, members: dict[str, Any], file: str, number: int) -> Document:
        where = f"line {number}"
        known = {key: members[key] for key in _MEMBERS if members.get(key) is not None}
        if known.keys() not in ({"text"}, {"token_ids"}, {"prompt", "completion"}):
            expected = '"text", "token_ids", or "prompt" and "completion"'
            found = shown(json.dumps(members))
            raise InputError("nothing to score, or too much", file=file, where=where, expected=expected, found=found)
        for key in members.keys() - known.keys() - self._said:
            meant = difflib.get_close_matches(key.lower(), _MEMBERS, n=1, cutoff=0.8)
            if meant and key not in _MEMBERS:
                hint = f"Did you mean {meant[0]}?"
                raise InputError("no such field", file=file, where=where, found=shown(key), hint=hint)
            self._said.add(key)
            if members[key] is not None:
                warn_of("a field that is not read", file=file, where=f"{where}: {shown(key)}")
        if "completion" not in known:
            text = check_text(known.get("text"), file, f"{where}: text")
            ids = check_token_ids(known.get("token_ids"), file, f"{where}: token_ids")
            return Document(text, ids, file=file, line=number)
        check = check_token_ids if isinstance(known["prompt"], list) else check_text
        prompt, completion = (check(known[key], file, f"{where}: {key}") for key in ("prompt", "completion"))
        if isinstance(prompt, str):
            return Document(prompt, file=file, line=number, completion=completion)
        return Document(None, prompt, file=file, line=number, completion=completion)
