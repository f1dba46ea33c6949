"""Hypothesis strategies for every message, made from the structs' own types and bounds."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from mcp_broker.wire import codec, messages

#: text that UTF-8 can carry
TEXT = st.characters(exclude_categories=["Cs"])
#: enough to try every bound, small enough to be quick; the bounds themselves have tests of their own
LONG = 300
MANY = 4


def _of(kind: inspect.Type) -> st.SearchStrategy[Any]:  # noqa: C901, PLR0911, PLR0912 (one return a type)
    match kind:
        case inspect.Metadata():
            return _of(kind.type)
        case inspect.UnionType():
            return st.one_of([_of(part) for part in kind.types])
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            return st.integers(kind.ge, kind.le)
        case inspect.FloatType():
            return st.floats(
                kind.gt if kind.ge is None else kind.ge, kind.le, exclude_min=kind.gt is not None
            )
        case inspect.BytesType():
            most = min(kind.max_length or LONG, max(LONG, kind.min_length or 0))
            return st.binary(min_size=kind.min_length or 0, max_size=most)
        case inspect.StrType() if kind.pattern:
            return st.from_regex(kind.pattern.replace(r"\d", "[0-9]"), alphabet="ab.-+09_z").filter(
                lambda text: len(text) <= (kind.max_length or LONG)
            )
        case inspect.StrType():
            return st.text(TEXT, min_size=kind.min_length or 0, max_size=min(kind.max_length or LONG, LONG))
        case inspect.VarTupleType():
            return st.lists(_of(kind.item_type), min_size=kind.min_length or 0, max_size=MANY).map(tuple)
        case inspect.TupleType():
            return st.tuples(*[_of(part) for part in kind.item_types])
        case inspect.StructType():
            return struct(kind.cls)
        case inspect.DictType():
            return st.dictionaries(_of(kind.key_type), _of(kind.value_type), max_size=MANY)
        case inspect.RawType():
            return struct(messages.Caller).map(codec.raw)
        case _:
            raise AssertionError(kind)


@functools.cache
def struct(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Return legal values of a struct."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return st.fixed_dictionaries({field.name: _of(field.type) for field in info.fields}).map(
        lambda fields: cls(**fields)
    )


#: what msgpack can say and a payload may hold
payloads = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(allow_nan=False),
        st.text(TEXT, max_size=20),
        st.binary(max_size=20),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(TEXT, max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
