"""What a caller may give in place of bytes: an open file, or an iterator of bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from mcp_broker import limits
from mcp_broker.client.session import Upload, Wishes
from mcp_broker.wire import payload


def is_source(value: Any) -> bool:  # noqa: ANN401 (any argument)
    """Tell whether a value is read, and not sent as it is."""
    return hasattr(value, "read") or isinstance(value, Iterator | AsyncIterator)


def pack_rest(
    arguments: Mapping[str, Any] | None, wishes: Wishes | None, error: TypeError
) -> tuple[bytes, Wishes]:
    """Pack arguments that did not pack, without the one that is to be sent in chunks.

    Raises:
        TypeError: ``error``, if there is none; or there are several (the caller's fault).
        ValueError: what is left cannot be packed.
    """
    given = arguments if isinstance(arguments, Mapping) else {}
    names = [name for name, value in given.items() if is_source(value)]
    if not names:
        raise error
    if len(names) > 1:
        raise TypeError(f"one argument of a call may be a file or an iterator, not {' and '.join(names)}")
    wishes = wishes or Wishes()
    wishes.upload_name = names[0]
    wishes.upload = Upload(given[names[0]], deque())
    return payload.pack({name: value for name, value in given.items() if name != names[0]}), wishes


def chunks_of(source: Any) -> Iterator[bytes]:  # noqa: ANN401 (what is_source takes)
    """Yield a source's bytes in chunks that a message takes; none is empty.

    Raises:
        TypeError: it gives something else than bytes (the caller's fault).
    """
    read = getattr(source, "read", None)
    if read is not None:
        while piece := read(limits.CHUNK_BYTES_MAX):
            yield from split(piece)
        return
    for piece in source:
        yield from split(piece)


def split(piece: Any) -> Iterator[bytes]:  # noqa: ANN401 (whatever the source gave)
    """Yield a piece in chunks that a message takes.

    Raises:
        TypeError: it is not bytes (the caller's fault).
    """
    if isinstance(piece, str):
        raise TypeError(
            "the source gives text; open the file with mode 'rb', or encode what the iterator yields"
        )
    if not isinstance(piece, bytes | bytearray | memoryview):
        raise TypeError(f"the source gives {type(piece).__name__}, not bytes")
    whole = bytes(piece)
    for at in range(0, len(whole), limits.CHUNK_BYTES_MAX):
        yield whole[at : at + limits.CHUNK_BYTES_MAX]
