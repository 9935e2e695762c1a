"""A folder's chat template, rendered as transformers does it, in jinja2's sandbox.

A template is a program that came with the weights. The sandbox keeps it from Python's insides, and lets it change
nothing that it is given.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from gptj.errors import TokenizerError
from gptj.paths import find_beside
from gptj.paths.json_file import encoding_hint, read_json_object, read_small_file
from gptj.serving.refusals import Refusal

__all__ = ["CHAT_TEMPLATE_FILE", "ChatTemplate"]

CHAT_TEMPLATE_FILE = "chat_template.jinja"
_CONFIG_FILE = "tokenizer_config.json"


class ChatTemplate:
    """Messages to a prompt.

    Args:
        source: the template.
        tokens: the special tokens that it may name: bos_token and so on.
        file: where it came from.

    Raises:
        TokenizerError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str | None], *, file: Path | None = None) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _generation_blocks()]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise TokenizerError(f"the chat template is none of jinja2's: {error}", file=file) from error
        self._tokens = {name: token or "" for name, token in tokens.items()}

    @classmethod
    def of_folder(cls, directory: Path, tokenizer: Any) -> ChatTemplate | None:
        """The template of a model's folder, None where it has none.

        Raises:
            TokenizerError: there is one that cannot be used.
        """
        source = None
        if (path := find_beside(directory, CHAT_TEMPLATE_FILE)) is not None:
            data = read_small_file(path)
            try:
                source = data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                problem, hint = f"the chat template is not UTF-8: {error.reason}", encoding_hint(data)
                raise TokenizerError(problem, file=path, hint=hint) from error
        elif (path := find_beside(directory, _CONFIG_FILE)) is not None:
            source = _stored(read_json_object(path).get("chat_template"), path)
        if source is None or path is None:
            return None
        if tokenizer is None:
            raise TokenizerError("a chat template without a tokenizer", file=path)
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return cls(source, {name: getattr(tokenizer, name) for name in names}, file=path)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that asks for the assistant's next message.

        Raises:
            Refusal: the template refuses the messages, or fails on them.
        """
        given = [dict(message) for message in messages]
        try:
            return self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=True, **self._tokens
            )
        except Refusal:
            raise
        except Exception as error:  # whatever a template does
            message = "the chat template fails on these messages"
            raise Refusal(400, message, param="messages", code="invalid_value") from error


def _stored(value: Any, path: Path) -> str | None:
    """The template of tokenizer_config.json: a text, or of several named ones the default."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    if value is None or isinstance(value, str):
        return value
    raise TokenizerError("not a template", file=path, where="chat_template", expected="a text")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _generation_blocks() -> Any:
    """The extension for {% generation %} ... {% endgeneration %}, which mark what is learnt, and change no prompt."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    return Generation


def _refuse(message: str) -> Any:
    raise Refusal(400, f"the chat template refuses: {str(message)[:200]}", param="messages", code="invalid_value")
