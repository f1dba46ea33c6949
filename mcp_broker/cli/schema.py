"""JSON Schema as a command line needs it: reading ``key=value``, writing signatures and example calls."""

from __future__ import annotations

import base64
import binascii
import json
import shlex
from collections.abc import Sequence
from typing import Any, Final

from mcp_broker.errors import InvalidArgument

Schema = dict[str, Any]

_ABSENT: Final = object()
_SAMPLES: Final[dict[str, Any]] = {
    "string": "text",
    "integer": 1,
    "number": 1.5,
    "boolean": True,
    "array": [],
    "object": {},
    "null": None,
}


def load(text: str | Schema) -> Schema:
    """Return a schema from its JSON text; anything else counts as the schema that takes everything."""
    if isinstance(text, dict):
        return text
    try:
        schema = json.loads(text)
    except ValueError:
        return {}
    return schema if isinstance(schema, dict) else {}


def properties(schema: Schema) -> dict[str, Schema]:
    """Return the arguments of a tool, each with its own schema, references followed."""
    found = schema.get("properties")
    if not isinstance(found, dict):
        return {}
    return {name: _follow(part, schema) for name, part in found.items() if isinstance(part, dict)}


def _follow(part: Schema, whole: Schema) -> Schema:
    """Replace ``{"$ref": "#/$defs/X"}`` by X, one level, which is as deep as pydantic needs for an argument."""
    reference = part.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/$defs/"):
        target = whole.get("$defs", {}).get(reference.removeprefix("#/$defs/"))
        if isinstance(target, dict):
            return {**target, **{key: value for key, value in part.items() if key != "$ref"}}
    for key in ("anyOf", "oneOf"):
        if isinstance(part.get(key), list):
            options = [_follow(option, whole) for option in part[key] if isinstance(option, dict)]
            return {**part, key: options}
    return part


def types(part: Schema) -> set[str]:
    """Return the JSON types that an argument takes; empty when it takes anything."""
    kind = part.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {str(one) for one in kind}
    for key in ("anyOf", "oneOf"):
        if isinstance(part.get(key), list):
            found = [types(option) for option in part[key] if isinstance(option, dict)]
            return set().union(*found) if all(found) else set()
    values = [part["const"]] if "const" in part else part.get("enum")
    return {_type_of(value) for value in values} if isinstance(values, list) else set()


def is_binary(part: Schema) -> bool:
    """Tell whether an argument is bytes, which JSON writes as base64."""
    options = [part, *(part.get("anyOf") or []), *(part.get("oneOf") or [])]
    return any(
        isinstance(option, dict)
        and (option.get("format") in {"binary", "base64url"} or "contentEncoding" in option)
        for option in options
    )


def _type_of(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds: tuple[tuple[type, str], ...] = (
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
    )
    return next((name for cls, name in kinds if isinstance(value, cls)), "object")


def read_pairs(pairs: Sequence[tuple[str, str]], schema: Schema) -> dict[str, Any]:
    """Read ``key=value`` pairs by a tool's schema; a repeated key makes a list where the schema takes one.

    What does not fit is passed on as text: the tool's own validation names every fault at once.

    Raises:
        InvalidArgument: a key given twice that is no list, or bytes that are not base64 (the caller's fault).
    """
    known = properties(schema)
    arguments: dict[str, Any] = {}
    seen: set[str] = set()
    for key, text in pairs:
        part = known.get(key, {})
        is_list = "array" in types(part)
        value = _read(key, text, part)
        if key in seen and not is_list:
            raise InvalidArgument(f"{key} is given twice, and it is no list", {"path": key})
        if is_list and not isinstance(value, list):
            item = part.get("items")
            read = _read(key, text, item if isinstance(item, dict) else {})
            value = [*arguments.get(key, []), read]
        seen.add(key)
        arguments[key] = value
    return arguments


def _read(key: str, text: str, part: Schema) -> Any:  # noqa: ANN401 (any payload)
    allowed = types(part)
    if is_binary(part):
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidArgument(f"{key} takes bytes, written as base64", {"path": key}) from None
    if allowed and allowed <= {"string", "null"}:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    kind = _type_of(value)
    if not allowed or kind in allowed or (kind == "integer" and "number" in allowed):
        return value
    return text if "string" in allowed else value


def signature(name: str, schema: Schema, returns: Schema | None = None) -> str:
    """Return ``text.search(text: string, top: integer = 10) -> object``."""
    required = set(schema.get("required") or ())
    parts = []
    for key, part in properties(schema).items():
        kind = "bytes" if is_binary(part) else " | ".join(sorted(types(part))) or "any"
        default = "" if key in required else f" = {json.dumps(part.get('default'), ensure_ascii=False)}"
        parts.append(f"{key}: {kind}{default}")
    answer = " | ".join(sorted(types(returns))) if returns else ""
    return f"{name}({', '.join(parts)})" + (f" -> {answer}" if answer else "")


def example(schema: Schema) -> dict[str, Any]:
    """Return arguments that the schema takes: its own examples, or a sample of each required type."""
    given = schema.get("examples")
    if isinstance(given, list) and given and isinstance(given[0], dict):
        return dict(given[0])
    required = schema.get("required") or ()
    return {key: _sample(part) for key, part in properties(schema).items() if key in required}


def _sample(part: Schema) -> Any:  # noqa: ANN401 (any payload)
    examples = part.get("examples")
    for value in (
        part.get("const", _ABSENT),
        examples[0] if isinstance(examples, list) and examples else _ABSENT,
        part["enum"][0] if isinstance(part.get("enum"), list) and part["enum"] else _ABSENT,
        part.get("default", _ABSENT),
        part.get("minimum", _ABSENT),
    ):
        if value is not _ABSENT:
            return value
    if is_binary(part):
        return "aGVsbG8="
    kinds = types(part) - {"null"}
    return next((_SAMPLES[kind] for kind in _SAMPLES if kind in kinds), "text")


def example_call(name: str, schema: Schema) -> str:
    """Return the arguments of ``mcp-broker`` for an example call, quoted for a shell."""
    arguments = example(schema)
    if not arguments:
        return f"call {name}"
    return f"call {name} {shlex.quote(json.dumps(arguments, ensure_ascii=False))}"
