"""What the asyncio client returns: the future of one call, and the parts of one streamed result."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from mcp_broker import errors
    from mcp_broker.client.aio import AsyncClient
    from mcp_broker.client.session import PendingCall
    from mcp_broker.wire.messages import Usage


class AsyncCallFuture(asyncio.Future[Any]):
    """The outcome of one call; awaiting it gives the result or raises the CallError.

    Attributes:
        usage: what the execution cost, once done; None where nothing ran.
    """

    usage: Usage | None = None
    pending: PendingCall

    def __init__(self, client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self._client = client

    @property
    def call_id(self) -> bytes:
        """The call's id on the wire, 16 bytes."""
        return self.pending.call_id

    def settle(self, value: Any, error: errors.CallError | None, usage: Usage | None) -> None:  # noqa: ANN401
        """Take the outcome; called by the client, once."""
        if self.done():
            return
        self.usage = usage
        if error is None:
            self.set_result(value)
        else:
            self.set_exception(error)

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ANN401 (asyncio's signature)
        """Cancel the call: CANCEL is sent, and who awaits gets asyncio.CancelledError. False if it is done."""
        cancelled = super().cancel(msg)
        if cancelled:
            self._client.cancel_pending(self.pending)
        return cancelled


class AsyncPartStream:
    """An asynchronous iterator over the parts of a call's result; as the blocking client's PartStream."""

    pending: PendingCall

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._parts: deque[Any] = deque()
        self._fed = 0
        self._ended = False
        self._error: errors.CallError | None = None
        self._news: asyncio.Future[None] | None = None
        self.usage: Usage | None = None

    @property
    def call_id(self) -> bytes:
        """The call's id on the wire, 16 bytes."""
        return self.pending.call_id

    def feed(self, part: Any) -> None:  # noqa: ANN401 (any payload)
        """Take the next part; called by the client."""
        self._fed += 1
        self._parts.append(part)
        self._wake()

    def settle(self, value: Any, error: errors.CallError | None, usage: Usage | None) -> None:  # noqa: ANN401
        """Take the end; called by the client, once."""
        self.usage = usage
        self._error = error
        if value is not None and not self._fed:
            self._parts.append(value)
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def __aiter__(self) -> AsyncPartStream:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401
        while not self._parts:
            if self._ended:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopAsyncIteration
            self._news = asyncio.get_running_loop().create_future()
            try:
                await self._news
            except asyncio.CancelledError:
                self.cancel()
                raise
        part = self._parts.popleft()
        if not self._ended:
            self._client.took(self.pending)
        return part

    def cancel(self) -> bool:
        """Cancel the call; False if it had ended."""
        return not self._ended and self._client.cancel_pending(self.pending)

    async def aclose(self) -> None:
        """Cancel the call, if it has not ended, and drop what came."""
        self.cancel()
        self._parts.clear()
        self._error = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
