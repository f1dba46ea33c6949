"""Payloads: what callers and tools say to each other, msgpack in a ``bin`` that the broker never opens.

Only what every language's msgpack has: nil, booleans, integers, floats, text, bytes, lists, maps. No ext
types, so that no payload can name a class to build.
"""

from __future__ import annotations

from typing import Any

import msgpack

from mcp_broker.errors import MalformedFrame


def _refuse_ext(code: int, data: bytes) -> Any:  # noqa: ANN401 (msgpack's own signature)
    raise MalformedFrame(f"a payload may not hold ext type {code} ({len(data)} bytes)")


def pack(value: Any) -> bytes:  # noqa: ANN401 (any payload)
    """Turn a payload into bytes.

    Raises:
        TypeError: it holds something that msgpack cannot carry (the sender's fault).
        ValueError: an integer beyond 64 bits, or nested too deep.
    """
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(data: bytes) -> Any:  # noqa: ANN401 (any payload)
    """Turn bytes into a payload.

    Raises:
        MalformedFrame: the bytes are not one payload (the sender's fault).
    """
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_refuse_ext)
    except MalformedFrame:
        raise
    # msgpack raises ValueError's kin, and StackError or RecursionError for depth
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedFrame(f"the payload is not msgpack: {error}") from error


def unpack_map(data: bytes) -> dict[str, Any]:
    """As :func:`unpack`, for a map with text keys."""
    value = unpack(data)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise MalformedFrame("the payload is not a map with text keys")
    return value
