"""Payloads: what callers and tools say to each other, msgpack in a ``bin`` that the broker never opens.

Only what every language's msgpack has: nil, booleans, integers, floats, text, bytes, lists, maps. No ext
types, so that no payload can name a class to build; a timestamp is read as the seconds that it means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgpack
import msgspec

from mcp_broker.errors import MalformedFrame

if TYPE_CHECKING:
    from collections.abc import Sequence

#: One for all, since making a packer takes four times as long as packing a small payload. It takes exact types only,
#: so that no code of theirs runs in the middle of a pack: the GIL keeps each one whole.
_pack_exact: Final = msgpack.Packer(use_bin_type=True, strict_types=True).pack
#: how msgpack's own ext type, which asks no hook, is read: as a float
_TIMESTAMP_AS_SECONDS: Final = 1


def _refuse_ext(code: int, data: bytes) -> Any:  # noqa: ANN401 (msgpack's own signature)
    raise MalformedFrame(f"a payload may not hold ext type {code} ({len(data)} bytes)")


def pack(value: Any) -> bytes:  # noqa: ANN401 (any payload)
    """Turn a payload into bytes.

    Raises:
        TypeError: it holds something that msgpack cannot carry (the sender's fault).
        ValueError: an integer beyond 64 bits, or nested deeper than 511 levels.
    """
    packed: bytes
    try:
        try:
            packed = _pack_exact(value)
        except TypeError:
            # a tuple or a subclass somewhere in it, or what cannot be packed at all
            packed = msgpack.packb(value, use_bin_type=True)
    except OverflowError as error:
        raise ValueError(str(error)) from error
    return packed


#: As :func:`pack`, three times as quick, for who reads what came of it: it also writes what no payload holds.
pack_unchecked: Final[Callable[[Any], bytes]] = msgspec.msgpack.Encoder().encode


def reader_of(shape: Any) -> Callable[[bytes], object]:  # noqa: ANN401 (a type of plain values)
    """Return what reads payloads of one type only, as quickly, and raises for all others.

    Args:
        shape: built of ``str``, ``int``, ``float``, ``bool``, ``bytes``, ``None``, ``list``, ``tuple`` and ``dict``.
    """
    return msgspec.msgpack.Decoder(shape).decode


def pack_list_in_map(key: str, packed: Sequence[bytes]) -> bytes:
    """Pack a map of one list, whose items are packed already."""
    # a map of one pair begins with its head and its key
    head = _pack_exact({key: None})[:-1]
    return b"".join((head, msgpack.Packer().pack_array_header(len(packed)), *packed))


def unpack(data: bytes | memoryview) -> Any:  # noqa: ANN401 (any payload)
    """Turn bytes into a payload.

    Raises:
        MalformedFrame: the bytes are not one payload (the sender's fault).
    """
    try:
        return msgpack.unpackb(
            data, raw=False, strict_map_key=True, ext_hook=_refuse_ext, timestamp=_TIMESTAMP_AS_SECONDS
        )
    except MalformedFrame:
        raise
    # msgpack raises ValueError's kin, and StackError or RecursionError for depth
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise MalformedFrame(f"the payload is not msgpack: {error}") from error


def unpack_map(data: bytes | memoryview) -> dict[str, Any]:
    """As :func:`unpack`, for a map with text keys."""
    value = unpack(data)
    # strict_map_key has left text and bytes
    if type(value) is not dict or bytes in map(type, value):
        raise MalformedFrame("the payload is not a map with text keys")
    return value
