"""What docs/protocol.md must say of each struct, told by the structs themselves."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from mcp_broker.wire import messages


class Row(NamedTuple):
    """One field as a row of the document: its place (a number, or a map's key), name, type, and default."""

    at: str
    name: str
    type: str
    default: str


def default_of(field: inspect.Field) -> Any:
    """Return what a missing field means."""
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _number(value: float) -> str:
    return "2^53" if value == 2**53 else f"{int(value):,}"


def _span(low: int | None, high: int | None) -> str:
    if low is not None and low == high:
        return f" {_number(low)}"
    if high is None:
        return "" if not low else f" ≥ {_number(low)}"
    return f" {_number(low)}..{_number(high)}" if low else f" ≤ {_number(high)}"


def type_text(kind: inspect.Type) -> str:  # noqa: PLR0911 (one return a type)
    """Return a type and its bounds in the document's words."""
    match kind:
        case inspect.Metadata():
            return type_text(kind.type)
        case inspect.UnionType():
            some = [type_text(part) for part in kind.types if not isinstance(part, inspect.NoneType)]
            return " or ".join([*some, *(["nil"] if kind.includes_none else [])])
        case inspect.IntType():
            return f"uint{_span(kind.ge, kind.le)}"
        case inspect.FloatType():
            if kind.ge is not None:
                return f"float {kind.ge:g}..{kind.le:g}"
            return f"float > {kind.gt:g}, ≤ {_number(kind.le or 0)}"
        case inspect.BoolType():
            return "bool"
        case inspect.BytesType():
            return f"bin{_span(kind.min_length, kind.max_length)}"
        case inspect.StrType():
            return f"str{_span(kind.min_length, kind.max_length)}{', pattern' if kind.pattern else ''}"
        case inspect.VarTupleType():
            return f"list{_span(kind.min_length, kind.max_length)} of {type_text(kind.item_type)}"
        case inspect.DictType():
            size = _span(kind.min_length, kind.max_length)
            return f"map{size} of {type_text(kind.key_type)} to {type_text(kind.value_type)}"
        case inspect.TupleType():
            return f"[{', '.join(type_text(part) for part in kind.item_types)}]"
        case inspect.StructType():
            return kind.cls.__name__
        case inspect.RawType():
            return "Caller"
        case _:
            raise AssertionError(kind)


def rows(struct: type[msgspec.Struct]) -> list[Row]:
    """Return the rows of a message, item or record."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    first = 1 if issubclass(struct, messages.Message) else 0
    return [
        Row(
            str(first + index) if struct.__struct_config__.array_like else "map",
            field.encode_name,
            type_text(field.type),
            "required" if field.required else json.dumps(default_of(field)).replace("null", "nil"),
        )
        for index, field in enumerate(info.fields)
    ]
