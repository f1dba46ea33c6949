"""Payloads: what callers and tools say to each other, msgpack in a ``bin`` that the broker never opens.

Only what every language's msgpack has: nil, booleans, integers, floats, text, bytes, lists, maps. No ext
types, so that no payload can name a class to build.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack

from mcp_broker.errors import MalformedFrame

#: the heads of a timestamp: each ext of type -1, of 4, 8 or 12 bytes
_FIXEXT_4: Final = b"\xd6\xff"
_FIXEXT_8: Final = b"\xd7\xff"
_EXT_8: Final = b"\xc7\x0c\xff"


def _refuse_ext(code: int, data: bytes) -> Any:  # noqa: ANN401 (msgpack's own signature)
    raise MalformedFrame(f"a payload may not hold ext type {code} ({len(data)} bytes)")


def pack(value: Any) -> bytes:  # noqa: ANN401 (any payload)
    """Turn a payload into bytes.

    Raises:
        TypeError: it holds something that msgpack cannot carry (the sender's fault).
        ValueError: an integer beyond 64 bits, or nested deeper than 511 levels.
    """
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True)
    except OverflowError as error:
        raise ValueError(str(error)) from error
    return packed


def unpack(data: bytes) -> Any:  # noqa: ANN401 (any payload)
    """Turn bytes into a payload.

    Raises:
        MalformedFrame: the bytes are not one payload (the sender's fault).
    """
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_refuse_ext)
    except MalformedFrame:
        raise
    # msgpack raises ValueError's kin, and StackError or RecursionError for depth
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedFrame(f"the payload is not msgpack: {error}") from error
    # msgpack answers its own ext type, the timestamp, without asking; its three heads are rare in other data
    if (_FIXEXT_4 in data or _FIXEXT_8 in data or _EXT_8 in data) and _holds_timestamp(value):
        raise MalformedFrame("a payload may not hold a timestamp: send seconds, or ISO 8601 text")
    return value


def _holds_timestamp(value: Any) -> bool:  # noqa: ANN401 (any payload)
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, msgpack.Timestamp):
            return True
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, dict):
            waiting += one.values()
    return False


def unpack_map(data: bytes) -> dict[str, Any]:
    """As :func:`unpack`, for a map with text keys."""
    value = unpack(data)
    # strict_map_key has left text and bytes
    if type(value) is not dict or bytes in map(type, value):
        raise MalformedFrame("the payload is not a map with text keys")
    return value
