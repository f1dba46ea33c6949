"""Results of tools as payload bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticSerializationError, to_jsonable_python

from mcp_broker import limits
from mcp_broker.errors import MalformedFrame, PayloadTooLarge, ToolFailed
from mcp_broker.wire import payload

if TYPE_CHECKING:
    from mcp_broker.worker.tool import Tool

#: kinds of core schemas whose values hold no map, whose keys would have to be looked at
_KINDS: Final = {"str": str, "bytes": bytes, "int": int, "float": float, "bool": bool, "none": type(None)}
_FLAT: Final = frozenset(_KINDS.values())

# looked up for every result
_pack_unchecked: Final = payload.pack_unchecked

Reader = Callable[[bytes], object]


def pack(value: Any, tool: Tool[..., Any], read: Reader | None) -> bytes:
    """Turn a result, or a part, into a payload.

    Args:
        value: what the tool returned.
        tool: the tool; its ``result`` converts models, dataclasses, dates and the like.
        read: reads what fits the annotation; see :func:`reader_of`.

    Raises:
        ToolFailed: the result holds something that a payload cannot carry (the tool author's fault).
        PayloadTooLarge: it is larger than a message may be.
    """
    try:
        if type(value) in _FLAT:
            packed = payload.pack(value)
        elif read is None:
            packed = _pack_read(value)
        else:
            # msgspec writes and reads a small map in the time that msgpack takes to write it
            try:
                packed = _pack_unchecked(value)
                read(packed)
            except Exception:  # it is not what the annotation says, and may be sent all the same
                packed = _pack_read(value)
    except (TypeError, ValueError, OverflowError, RecursionError, MalformedFrame):
        packed = _pack_converted(value, tool.result, tool.name)
    if len(packed) > limits.BODY_BYTES_MAX:
        raise PayloadTooLarge(
            f"the result of {tool.name} has {len(packed)} bytes; the limit is {limits.BODY_BYTES_MAX}. "
            "Return less, or stream it in parts from a generator",
            {"limit_bytes": limits.BODY_BYTES_MAX, "bytes": len(packed)},
        )
    return packed


def _pack_read(value: Any) -> bytes:
    packed = payload.pack(value)
    # msgpack writes integer keys that no reader takes; rare, and found only by reading
    payload.unpack(packed)
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


def reader_of(schema: Any) -> Reader | None:
    """Return what reads the values of a core schema and raises for all others; None if it holds more than plain values."""
    shape = _shape(schema)
    return None if shape is None else payload.reader_of(shape)


def _shape(schema: Any) -> Any:
    kind = schema.get("type")
    if kind in _KINDS:
        return _KINDS[kind]
    if kind == "dict":
        values = _shape(schema.get("values_schema", {}))
        # text as keys is all that a payload has
        is_text = schema.get("keys_schema", {}).get("type") == "str"
        return dict[str, values] if is_text and values is not None else None  # type: ignore[valid-type]
    if kind in {"list", "set", "frozenset"}:
        items = _shape(schema.get("items_schema", {}))
        return None if items is None else list[items]  # type: ignore[valid-type]
    if kind == "nullable":
        inner = _shape(schema["schema"])
        return None if inner is None else inner | None
    if kind == "tuple" and "variadic_item_index" not in schema:
        shapes = tuple(_shape(item) for item in schema["items_schema"])
        return None if None in shapes else tuple[shapes]  # type: ignore[valid-type]
    return None
