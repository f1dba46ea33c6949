"""Results of tools as payload bytes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticSerializationError, to_jsonable_python

from mcp_broker import limits
from mcp_broker.errors import MalformedFrame, PayloadTooLarge, ToolFailed
from mcp_broker.wire import payload

if TYPE_CHECKING:
    from mcp_broker.worker.tool import Tool

_PLAIN: Final = (str, bytes, int, float, bool, type(None))
#: a value of these types holds no map, whose keys would have to be looked at
_FLAT: Final = frozenset(_PLAIN)


def pack(value: Any, tool: Tool[..., Any], *, keys_are_text: bool) -> bytes:
    """Turn a result, or a part, into a payload.

    Args:
        value: what the tool returned.
        tool: the tool; its ``result`` converts models, dataclasses, dates and the like.
        keys_are_text: the result's type rules out maps with other keys, so that nobody need look.

    Raises:
        ToolFailed: the result holds something that a payload cannot carry (the tool author's fault).
        PayloadTooLarge: it is larger than a message may be.
    """
    try:
        packed = payload.pack(value)
        if not keys_are_text and type(value) not in _FLAT:
            # msgpack writes integer keys that no reader takes; rare, and found only by reading
            payload.unpack(packed)
    except (TypeError, ValueError, OverflowError, RecursionError, MalformedFrame):
        packed = _pack_converted(value, tool.result, tool.name)
    if len(packed) > limits.BODY_BYTES_MAX:
        raise PayloadTooLarge(
            f"the result of {tool.name} has {len(packed)} bytes; the limit is {limits.BODY_BYTES_MAX}. "
            "Return less, or stream it in parts from a generator",
            {"limit_bytes": limits.BODY_BYTES_MAX, "bytes": len(packed)},
        )
    return packed


def _pack_converted(value: Any, adapter: TypeAdapter[Any], tool: str) -> bytes:
    try:
        dumped = adapter.dump_python(value, mode="python", warnings=False)
    except Exception:  # the value is not of the annotated type; what it really holds is looked at below
        dumped = value
    try:
        return payload.pack(_plain(dumped, ""))
    except _NotPlainError as error:
        raise ToolFailed(
            f"{tool} returned {error.type_name} at {error.path or '/'}, which cannot be sent",
            {"type": error.type_name, "path": error.path or "/"},
        ) from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise ToolFailed(
            f"the result of {tool} cannot be sent: {error}", {"type": type(value).__name__}
        ) from error


class _NotPlainError(Exception):
    """A value that a payload cannot carry."""

    def __init__(self, path: str, type_name: str) -> None:
        super().__init__(path, type_name)
        self.path = path
        self.type_name = type_name


def _plain(value: Any, path: str) -> Any:
    """Reduce a value to what msgpack carries; bytes stay bytes."""
    if type(value) in _FLAT:
        return value
    if isinstance(value, dict):
        return {_key(key, path): _plain(item, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, f"{path}/{number}") for number, item in enumerate(value)]
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="python"), path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: _plain(getattr(value, item.name), f"{path}/{item.name}")
            for item in dataclasses.fields(value)
        }
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    try:
        plain = to_jsonable_python(value)
    except (PydanticSerializationError, ValueError) as error:
        raise _NotPlainError(path, f"{type(value).__module__}.{type(value).__qualname__}") from error
    return plain if type(plain) in _FLAT else _plain(plain, path)


def _key(key: Any, path: str) -> str:
    if isinstance(key, str):
        return str(key)
    plain = _plain(key, path)
    if plain is None or isinstance(plain, bool):
        return {None: "null", True: "true", False: "false"}[plain]
    if isinstance(plain, str | int | float):
        return str(plain)
    raise _NotPlainError(path, f"a key of type {type(key).__qualname__}")


def has_text_keys(schema: Any) -> bool:
    """Tell whether a core schema rules out maps whose keys are not text."""
    if isinstance(schema, dict):
        kind = schema.get("type")
        if kind == "dict":
            return schema.get("keys_schema", {}).get("type") == "str" and has_text_keys(
                schema.get("values_schema", {"type": "any"})
            )
        if kind in {"str", "int", "float", "bool", "none", "bytes"}:
            return True
        if kind in {"list", "set", "frozenset"}:
            return has_text_keys(schema.get("items_schema", {"type": "any"}))
        if kind == "nullable":
            return has_text_keys(schema["schema"])
        if kind == "tuple":
            return all(has_text_keys(item) for item in schema["items_schema"])
    return False
