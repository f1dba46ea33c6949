"""The sending of one argument in chunks: a thread of its own, or a task, reads the source.

The source is the caller's code: it may block, or raise, and nobody else may wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Any

from mcp_broker.client.sources import chunks_of, split

if TYPE_CHECKING:
    from mcp_broker.client.aio import AsyncClient
    from mcp_broker.client.leadership import Leadership
    from mcp_broker.client.session import PendingCall, Upload


class ChunkRoom:
    """A chunk may be sent, or the call has ended."""

    def __init__(self, pending: PendingCall, upload: Upload) -> None:
        self._pending = pending
        self._upload = upload

    @property
    def seats(self) -> list[threading.Event] | None:
        """Threads that wait for it."""
        return self._upload.seats

    @seats.setter
    def seats(self, seats: list[threading.Event] | None) -> None:
        self._upload.seats = seats

    @property
    def ready(self) -> bool:
        """It is there."""
        return self._upload.has_room or self._pending.has_ended


def start(threads: Leadership, pending: PendingCall, upload: Upload) -> None:
    """Begin to send."""
    thread = threading.Thread(
        target=_feed, args=(threads, pending, upload), name="mcp-broker-upload", daemon=True
    )
    thread.start()


def _feed(threads: Leadership, pending: PendingCall, upload: Upload) -> None:
    room = ChunkRoom(pending, upload)
    try:
        chunks = chunks_of(upload.source)
        data: Any = b"first"
        while data:
            threads.await_end(room, None)
            if pending.has_ended:
                return
            data = next(chunks, b"")
            threads.feed(pending, data)
    except Exception as error:  # noqa: BLE001 (whatever the caller's source raises ends its call)
        threads.fail(pending, error)


async def feed_later(client: AsyncClient, pending: PendingCall, upload: Upload) -> None:
    """Send the argument of a call in an event loop; a source that blocks is read in a thread."""
    try:
        async with contextlib.aclosing(_later(upload.source)) as chunks:
            data: Any = b"first"
            while data and await client.room_for_chunk(pending, upload):
                data = await anext(chunks, b"")
                client.feed(pending, data)
    except Exception as error:  # noqa: BLE001 (whatever the caller's source raises ends its call)
        client.fail(pending, error)


async def _later(source: Any) -> AsyncGenerator[bytes, None]:  # noqa: ANN401 (what is_source takes)
    if isinstance(source, AsyncIterator):
        async for piece in source:
            for chunk in split(piece):
                yield chunk
        return
    chunks = chunks_of(source)
    while chunk := await asyncio.to_thread(next, chunks, b""):
        yield chunk
