"""JSON checked against a JSON schema, as far as the schema of our own documents goes.

Known: type, enum, const, minimum, required, properties, additionalProperties, items, anyOf and $ref into $defs (JSON
Schema 2020-12). Another keyword that would judge a value is an error here, not passed over. A member that the schema
does not name is lawful, and reported to who asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gptj.errors import FormatError, shown

__all__ = ["check_schema"]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": (int,), "number": (int, float),
}  # fmt: skip
_KNOWN = frozenset(
    {"type", "enum", "const", "minimum", "required", "properties", "additionalProperties", "items", "anyOf", "$ref"}
)
_SAID = frozenset({"$schema", "$defs", "title", "description"})

Schema = Mapping[str, Any]


def check_schema(value: object, schema: Schema, *, unknown: Callable[[str], None] | None = None) -> None:
    """Make sure that a JSON value follows a schema.

    Args:
        value: as `json.loads` gives it.
        schema: the same; its `$defs` are what its `$ref`s mean.
        unknown: told the place of each member that the schema does not name.

    Raises:
        FormatError: naming the place of the first value that does not.

    >>> check_schema({"a": [1, "x"]}, {"properties": {"a": {"items": {"type": "integer"}}}})
    Traceback (most recent call last):
    gptj.errors.FormatError: a[1]: breaks its rule (expected integer, found 'x')
    """
    _check(value, schema, schema.get("$defs", {}), "", unknown)


def _check(
    value: Any, schema: Schema, definitions: Mapping[str, Schema], where: str, unknown: Callable[[str], None] | None
) -> None:
    """The same, of the value at the place `where`."""
    assert schema.keys() <= _KNOWN | _SAID, f"unknown keywords: {sorted(schema.keys() - _KNOWN - _SAID)}"
    if "$ref" in schema:
        return _check(value, definitions[schema["$ref"].removeprefix("#/$defs/")], definitions, where, unknown)
    if "anyOf" in schema and not any(_follows(value, one, definitions) for one in schema["anyOf"]):
        raise _broken(where, _spell(schema, definitions), value)
    if not _is_of(value, schema):
        raise _broken(where, _spell(schema, definitions), value)
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                raise FormatError("is missing", where=_join(where, name))
        others = schema.get("additionalProperties")
        for name, member in value.items():
            rule = schema.get("properties", {}).get(name, others)
            if rule is not None:
                _check(member, rule, definitions, _join(where, name), unknown)
            elif unknown is not None and "properties" in schema:
                unknown(_join(where, name))
    elif isinstance(value, list) and "items" in schema:
        for number, member in enumerate(value):
            _check(member, schema["items"], definitions, f"{where}[{number}]", unknown)
    return None


def _is_of(value: Any, schema: Schema) -> bool:
    """Whether the value itself, not what is in it, is of the schema's type, values and range."""
    types = schema.get("type", ())
    types = (types,) if isinstance(types, str) else types
    return (
        (not types or any(_is_type(value, name) for name in types))
        and ("enum" not in schema or any(_is_same(value, one) for one in schema["enum"]))
        and ("const" not in schema or _is_same(value, schema["const"]))
        and ("minimum" not in schema or not _is_type(value, "number") or value >= schema["minimum"])
    )


def _follows(value: Any, schema: Schema, definitions: Mapping[str, Schema]) -> bool:
    try:
        _check(value, schema, definitions, "", None)
    except FormatError:
        return False
    return True


def _is_type(value: Any, name: str) -> bool:
    """Whether a value is of a JSON type. A whole float is an integer, as the standard has it; true is no number."""
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def _is_same(value: Any, other: Any) -> bool:
    """Equality, in which true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _join(where: str, name: str) -> str:
    spelt = name if name.isidentifier() else shown(name, longest=40)
    return f"{where}.{spelt}" if where else spelt


def _broken(where: str, expected: str, value: object) -> FormatError:
    found = type(value).__name__ if isinstance(value, dict | list) else shown(value, longest=60)
    return FormatError("breaks its rule", where=where or None, expected=expected, found=found)


def _spell(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """The values that follow a schema, in words."""
    if "$ref" in schema:
        return _spell(definitions[schema["$ref"].removeprefix("#/$defs/")], definitions)
    if "anyOf" in schema:
        return " or ".join(_spell(one, definitions) for one in schema["anyOf"])
    if "const" in schema:
        return shown(schema["const"])
    if "enum" in schema:
        return " or ".join(map(shown, schema["enum"]))
    types = schema["type"]
    least = f" of at least {schema['minimum']}" if "minimum" in schema else ""
    return (types if isinstance(types, str) else " or ".join(types)) + least
