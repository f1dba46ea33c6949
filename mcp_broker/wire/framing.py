"""The socketpair's framing: a 4-byte big-endian length, then so many bytes. Source: docs/protocol.md, "Node link"."""

from __future__ import annotations

from typing import Final

from mcp_broker import limits
from mcp_broker.errors import MalformedFrame

HEAD_BYTES: Final = 4


def frame(body: bytes) -> bytes:
    """Put a length before one message."""
    return len(body).to_bytes(HEAD_BYTES, "big") + body


class FrameReader:
    """Collects what a stream delivers until a whole message is there."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> list[bytes]:
        """Take the next bytes of the stream; return the messages that they complete, in order.

        Raises:
            MalformedFrame: a length above the bound; the stream cannot be read further.
        """
        self._buffer += received
        whole: list[bytes] = []
        while len(self._buffer) >= HEAD_BYTES:
            length = int.from_bytes(self._buffer[:HEAD_BYTES], "big")
            if length > limits.NODE_BYTES_MAX:
                raise MalformedFrame(
                    f"a node message of {length} bytes; the limit is {limits.NODE_BYTES_MAX}"
                )
            end = HEAD_BYTES + length
            if len(self._buffer) < end:
                break
            whole.append(bytes(self._buffer[HEAD_BYTES:end]))
            del self._buffer[:end]
        return whole
