"""An argument that is sent in chunks, as its session knows it.

The worker's limit says which chunks may be sent, and confirms: those below it less a window were read. What is not
confirmed is kept, and sent again when the session is resumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.wire import messages
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.client.session.pending import PendingCall
    from mcp_broker.wire.messages import Message


class Upload(Slim):
    """What was sent of one argument.

    Attributes:
        source: where the shell finds the bytes; opaque here.
        limit: chunks with an index below it may be sent.
        next_index: the number of the next chunk.
        is_whole: the last chunk was sent.
        kept: chunks that were not confirmed, oldest first.
        seats: who waits for room; the shell's.
    """

    source: Any
    kept: deque[tuple[int, bytes, bool]]
    limit: int = 0
    next_index: int = 0
    is_whole: bool = False
    seats: list[Any] | None = None

    @property
    def has_room(self) -> bool:
        """Tell whether the next chunk may be sent."""
        return self.next_index < self.limit

    def raise_limit(self, limit: int, window: int) -> bool:
        """Take the worker's limit; False if it says nothing new."""
        if limit <= self.limit:
            return False
        self.limit = limit
        while self.kept and self.kept[0][0] < limit - window:
            self.kept.popleft()
        return True

    def add(self, data: bytes, *, last: bool) -> tuple[int, bytes, bool]:
        """Number the next chunk, and keep it."""
        chunk = (self.next_index, data, last)
        self.next_index += 1
        self.is_whole = last
        self.kept.append(chunk)
        return chunk


def packed(epoch: int, call_id: bytes, chunk: tuple[int, bytes, bool]) -> tuple[Message, bytes | None]:
    """Return a chunk as a message and its second frame."""
    index, data, last = chunk
    if len(data) <= limits.INLINE_BYTES_MAX:
        return messages.Chunks(epoch, (messages.Chunk(call_id, index, data, last),)), None
    return messages.Chunks(epoch, (messages.Chunk(call_id, index, None, last),)), data


class Uploads:
    """The uploads of one session's calls.

    Args:
        calls: the session's unfinished calls.

    Attributes:
        chunks: what is to be sent, as (call id, chunk).
        raised: calls whose chunks have room since the shell last took this list; the shell adds those that ended.
        window: how many chunks a worker holds.
    """

    def __init__(self, calls: dict[bytes, PendingCall]) -> None:
        self._calls = calls
        self.chunks: list[tuple[bytes, tuple[int, bytes, bool]]] = []
        self.raised: list[PendingCall] = []
        self.window: int = limits.UPLOAD_WINDOW_MAX

    def credit(self, credits_: Iterable[messages.StreamCredit]) -> None:
        """Take what workers say of their reading."""
        for credit in credits_:
            pending = self._calls.get(credit.call_id)
            if pending is None or pending.upload is None or pending.has_ended:
                continue
            if pending.upload.raise_limit(credit.limit, self.window):
                self.raised.append(pending)

    def add(self, pending: PendingCall, data: bytes) -> None:
        """Send a call's next chunk; no bytes: that was all. Nothing if the call has ended."""
        if pending.upload is not None and not pending.has_ended:
            self.chunks.append((pending.call_id, pending.upload.add(data, last=not data)))

    def requests(self, epoch: int) -> list[tuple[Message, bytes | None]]:
        """Return the chunks to send, and forget that they are to be sent."""
        chunks, self.chunks = self.chunks, []
        return [packed(epoch, call_id, chunk) for call_id, chunk in chunks]

    def resume(self) -> None:
        """Say again what the old connection may have lost."""
        self.chunks = [
            (pending.call_id, chunk)
            for pending in self._calls.values()
            if pending.upload is not None and not pending.has_ended
            for chunk in pending.upload.kept
        ]
