"""An argument that comes in chunks, as its worker holds it."""

from __future__ import annotations

from collections import deque

from mcp_broker.wire.structs import Slim


class Received(Slim):
    """What came and was not read: at most a window.

    Attributes:
        limit: chunks with an index below it may come, as the caller knows.
        taken: how many were read.
        is_whole: nothing more will come.
    """

    chunks: deque[bytes]
    limit: int = 0
    taken: int = 0
    is_whole: bool = False

    def add(self, data: bytes, *, last: bool) -> None:
        """Take what came."""
        if data:
            self.chunks.append(data)
        self.is_whole = self.is_whole or last

    def take(self) -> bytes | None:
        """Return the next chunk; no bytes at the end; None while it is not there yet."""
        if not self.chunks:
            return b"" if self.is_whole else None
        self.taken += 1
        return self.chunks.popleft()

    def raised(self, window: int) -> int | None:
        """Return a limit that is worth telling the caller: at the first reading, then every half window."""
        limit = self.taken + window
        if self.is_whole or (self.limit and limit - self.limit < max(1, window // 2)):
            return None
        self.limit = limit
        return limit
