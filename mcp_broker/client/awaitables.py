"""What the asyncio client returns: itself, the future of one call, and the parts of one streamed result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Self

from mcp_broker import errors
from mcp_broker.client.stream import Inbox

if TYPE_CHECKING:
    from mcp_broker.client.aio import AsyncClient
    from mcp_broker.client.session import PendingCall
    from mcp_broker.wire.messages import Usage


class Connecting:
    """What AsyncClient.connect returns: await it, or enter it with ``async with``."""

    def __init__(self, connect: Callable[[], Coroutine[Any, Any, AsyncClient]]) -> None:
        self._connect = connect
        self._client: AsyncClient | None = None

    def __await__(self) -> Generator[Any, None, AsyncClient]:
        return self._connect().__await__()

    async def __aenter__(self) -> AsyncClient:
        self._client = await self
        return self._client

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            await self._client.close()


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


class AsyncInbox(Inbox):
    """Where the client puts parts and end, for one task that waits for them."""

    #: done when there is something
    news: asyncio.Future[None] | None = None

    def done(self) -> bool:
        """Tell whether the end is there; as a future does."""
        return self.ended

    def _wake(self) -> None:
        if self.news is not None and not self.news.done():
            self.news.set_result(None)


class AsyncPartStream:
    """An asynchronous iterator over the parts of a call's result, in order, as they come.

    The call is made when its ``async with`` block is entered, or else when the first part is asked for. Each step may
    raise the call's CallError; parts before it stay true. A tool that does not stream gives its result as the only part
    (none, if that is None). Leaving the block, :meth:`aclose`, or dropping the iterator, as a loop does that is left
    early, cancels the call if it has not ended.
    """

    def __init__(self, client: AsyncClient, begin: Callable[[AsyncInbox], Awaitable[None]]) -> None:
        self._client = client
        #: makes the call; None: that was done, or will never be
        self._begin: Callable[[AsyncInbox], Awaitable[None]] | None = begin
        # apart from the iterator, so that dropping that one is noticed
        self._inbox = AsyncInbox()

    @property
    def call_id(self) -> bytes:
        """The call's id on the wire, 16 bytes.

        Raises:
            RuntimeError: the call has not been made (the caller's fault).
        """
        if not self._inbox.is_made:
            raise RuntimeError(
                "the call has no id before it is made: enter the stream, or take its first part"
            )
        return self._inbox.pending.call_id

    @property
    def usage(self) -> Usage | None:
        """What the execution cost, once it has ended."""
        return self._inbox.usage

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401
        await self._made()
        inbox = self._inbox
        while not inbox.parts:
            if inbox.ended:
                error, inbox.error = inbox.error, None
                if error is not None:
                    raise error
                raise StopAsyncIteration
            inbox.news = asyncio.get_running_loop().create_future()
            try:
                await inbox.news
            except asyncio.CancelledError:
                self.cancel()
                raise
        part = inbox.parts.popleft()
        if not inbox.ended:
            self._client.took(inbox.pending)
        return part

    async def _made(self) -> None:
        begin, self._begin = self._begin, None
        if begin is None:
            return
        try:
            await begin(self._inbox)
        except BaseException:
            self._inbox.ended = True
            raise

    def cancel(self) -> bool:
        """Cancel the call; the parts that came before can still be taken. False if it had ended."""
        inbox = self._inbox
        if inbox.ended or inbox.is_made:
            return not inbox.ended and self._client.cancel_pending(inbox.pending)
        self._begin = None
        inbox.settle(None, errors.Cancelled("cancelled by its caller before it was made"), None)
        return True

    async def aclose(self) -> None:
        """Cancel the call, if it has not ended, and drop what came."""
        self.cancel()
        self._inbox.parts.clear()
        self._inbox.error = None

    async def __aenter__(self) -> Self:
        await self._made()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        inbox = self._inbox
        if inbox.is_made and not inbox.ended:
            self._client.orphan(inbox.pending)
