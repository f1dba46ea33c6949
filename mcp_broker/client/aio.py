"""The asyncio client: the loop watches the socket's raw fd, and one turn takes all that has come.

Not one await a receive: a future is completed by the turn that its outcome came in. What is submitted in one turn
of the loop goes out as one batch; a call that is alone goes out at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from mcp_broker import limits
from mcp_broker.client import connection, progress
from mcp_broker.client.awaitables import AsyncCallFuture, AsyncInbox, AsyncPartStream, Connecting
from mcp_broker.client.feeder import feed_later
from mcp_broker.client.link import Link
from mcp_broker.client.session import State, Wishes, shrunk
from mcp_broker.client.sync import ATTACH, MAP_AHEAD, NO_ARGUMENTS, asked, prepared, seconds
from mcp_broker.client.targets import OVER, window_full
from mcp_broker.wire.messages import Priority

if TYPE_CHECKING:
    from mcp_broker.auth.profile import Profile
    from mcp_broker.client.options import CallOptions
    from mcp_broker.client.session import PendingCall, Upload
    from mcp_broker.transport import Connection

#: messages of which one turn of the loop takes the outcomes, before others have their turn
TURN_MAX: Final = 64


class AsyncClient:
    """A session with a broker for one event loop; ``async with AsyncClient.connect() as client``."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._session = link.session
        self._generation = connection.generation
        self._loop = asyncio.get_running_loop()
        self._watched: Connection | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._turn_is_due = False
        #: tasks that wait for a place in the window, or for the session
        self._waiting: deque[asyncio.Future[None]] = deque()
        #: tasks that send arguments in chunks
        self._feeders: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    def connect(
        cls, profile: str | os.PathLike[str] | Profile | None = None, *, timeout_s: float = limits.CONNECT_S
    ) -> Connecting:
        """Connect; as :meth:`mcp_broker.Client.connect`, awaited or entered."""
        return Connecting(functools.partial(cls.open, profile, timeout_s))

    @classmethod
    async def open(cls, profile: str | os.PathLike[str] | Profile | None, timeout_s: float) -> AsyncClient:
        """Connect; :meth:`connect` is what to call."""
        link = Link.of(profile)
        client = cls(link)
        session = link.session
        session.wanted = True
        link.dial(monotonic())
        try:
            client._turn()
            async with asyncio.timeout(timeout_s):
                while session.state is not State.OPEN and session.state not in OVER:
                    await client._news()
        except TimeoutError:
            await client.close()
            raise link.unreachable(timeout_s) from None
        except BaseException:
            await client.close()
            raise
        session.wanted = False
        if session.refusal is not None:
            await client.close()
            raise session.refusal
        return client

    @property
    def principal(self) -> str:
        """Who the broker takes this client for."""
        return self._session.name

    # -- calls ------------------------------------------------------------------------------------------------

    async def call(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:  # noqa: ANN401 (any payload)
        """Call a tool and await its result; cancelling the awaiting task cancels the call.

        Arguments as in :meth:`mcp_broker.Client.call`; ``on_progress`` is called in the loop.

        Raises:
            CallError: it ended without a result.
            ClientClosed, WrongProcess: this client takes no calls any more, or not in a process that was forked later.
            TypeError, ValueError: there is no such option, or the arguments hold something that cannot be sent.
        """
        future = AsyncCallFuture(self, self._loop)
        packed, wishes = prepared("call", arguments, options)
        await self._submit(tool, seconds(timeout_s), packed, future, wishes=wishes)
        return await future

    async def submit(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncCallFuture:
        """Call a tool; await a place in the window, and return a future of the result.

        Raises:
            Overloaded: the window stayed full for ``timeout_s``.
            ClientClosed, WrongProcess, TypeError, ValueError: as :meth:`call`.
        """
        future = AsyncCallFuture(self, self._loop)
        packed, wishes = prepared("submit", arguments, options)
        await self._submit(tool, seconds(timeout_s), packed, future, wishes=wishes)
        return future

    async def map(
        self,
        tool: str,
        arguments: Iterable[Mapping[str, Any]],
        *,
        timeout_s: float | None = None,
        priority: int = Priority.NORMAL,
    ) -> AsyncGenerator[Any, None]:
        """Yield the results of many calls, in order; up to 128 are under way at a time.

        Raises:
            CallError: at the place of the call that failed; the calls after it are cancelled.
        """
        ahead: deque[AsyncCallFuture] = deque()
        options: CallOptions = {} if priority == Priority.NORMAL else {"priority": priority}
        try:
            for one in arguments:
                ahead.append(await self.submit(tool, one, timeout_s=timeout_s, **options))
                if len(ahead) >= MAP_AHEAD:
                    yield await ahead.popleft()
            while ahead:
                yield await ahead.popleft()
        finally:
            for future in ahead:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # taken, so that asyncio does not call it forgotten

    def stream(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncPartStream:
        """Call a streaming tool and iterate over the parts of its result as they come.

        ``async for part in client.stream(...)``, or ``async with client.stream(...) as parts`` for one who wants to know
        the call's id, to cancel it from elsewhere, or to be sure when it ends. Leaving either early cancels the call.

        Raises:
            TypeError, ValueError: as :meth:`call`. What else :meth:`submit` raises comes where the call is made: on
                entering, or with the first part.
        """
        packed, wishes = prepared("stream", arguments, options)
        begin = functools.partial(
            self._submit, tool, seconds(timeout_s), packed, streamed=True, wishes=wishes
        )
        return AsyncPartStream(self, begin)

    async def tools(
        self, name: str | None = None, capability: str | None = None, tag: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the definitions of the tools that this client may call, filtered."""
        answer = await self.call("system.tools", asked(name=name, capability=capability, tag=tag))
        tools: list[dict[str, Any]] = answer["tools"]
        return tools

    async def attach(self, call_id: bytes, *, timeout_s: float | None = None) -> AsyncCallFuture:
        """Take up a detached call; as :meth:`mcp_broker.Client.attach`."""
        future = AsyncCallFuture(self, self._loop)
        wishes = Wishes(attach_to=call_id)
        await self._submit(ATTACH, seconds(timeout_s), NO_ARGUMENTS, future, wishes=wishes)
        return future

    def cancel(self, call: AsyncCallFuture | AsyncPartStream | bytes) -> bool:
        """Cancel a call, by its future, stream or id; False if it has ended."""
        if not isinstance(call, bytes):
            return call.cancel()
        pending = self._session.book.calls.get(call)
        return pending is not None and self.cancel_pending(pending)

    async def close(self) -> None:
        """End the session; calls that have not ended are cancelled."""
        if self._closed or self._generation != connection.generation:
            return
        self._closed = True
        self._watch(None)
        self._link.close()
        if self._timer is not None:
            self._timer.cancel()
        self._settle()
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- inside -------------------------------------------------------------------------------------------------

    async def _submit(
        self,
        tool: str,
        timeout_s: float,
        packed: bytes,
        waiter: AsyncCallFuture | AsyncInbox,
        *,
        streamed: bool = False,
        wishes: Wishes | None = None,
    ) -> None:
        if self._generation != connection.generation:
            raise connection.wrong_process()
        session = self._session
        if len(packed) >= limits.COMPRESS_BYTES_MIN and session.compresses:
            packed, wishes = shrunk(packed, wishes)
        if not session.has_room and session.state not in OVER:
            await self._room(timeout_s)
            if waiter.done():
                # cancelled meanwhile
                return
        waiter.pending = session.submit(
            tool, timeout_s, packed, monotonic(), waiter, streamed=streamed, wishes=wishes
        )
        if wishes is not None and wishes.upload is not None:
            task = self._loop.create_task(feed_later(self, waiter.pending, wishes.upload))
            self._feeders.add(task)
            task.add_done_callback(self._feeders.discard)
        if not session.book.in_flight:
            self._turn()
        else:
            self._turn_soon()

    async def room_for_chunk(self, pending: PendingCall, upload: Upload) -> bool:
        """Wait until a chunk may be sent; False if the call has ended."""
        while not (upload.has_room or pending.has_ended):
            await self._news()
        return not pending.has_ended

    def feed(self, pending: PendingCall, data: bytes) -> None:
        """Send the next chunk of a call's argument; no bytes: that was all."""
        self._session.book.uploads.add(pending, data)
        self._turn_soon()

    def fail(self, pending: PendingCall, error: Exception) -> None:
        """End a call whose argument cannot be read."""
        self._session.book.spoil(pending, error)
        self._turn_soon()

    async def _room(self, timeout_s: float) -> None:
        session = self._session
        try:
            async with asyncio.timeout(timeout_s):
                while not session.has_room and session.state not in OVER:
                    await self._news()
        except TimeoutError:
            raise window_full(session.granted.window) from None

    async def _news(self) -> None:
        """Wait until something has changed."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(future)
        await future

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def cancel_pending(self, pending: PendingCall) -> bool:
        """End a call as CANCELLED and tell the broker now; False if it had ended."""
        done = self._session.cancel(pending)
        if done:
            self._turn()
        return done

    def orphan(self, pending: PendingCall) -> None:
        """Nobody can take this call's parts any more. Safe in a destructor, which may run in any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it all this
            self._loop.call_soon_threadsafe(self.cancel_pending, pending)

    def took(self, pending: PendingCall) -> None:
        """A part of a stream was taken."""
        self._session.took(pending)
        if self._session.book.credits:
            self._turn_soon()

    def _turn_soon(self) -> None:
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Send what waits, take what has come, and see to the next turn."""
        self._turn_is_due = False
        if self._closed:
            return
        link, session = self._link, self._session
        now = monotonic()
        turns = 0
        while link.serve(now):
            self._settle()
            turns += 1
            if turns >= TURN_MAX:
                self._turn_soon()
                break
        self._settle()
        if link.connection is not self._watched:
            self._watch(link.connection)
        if self._waiting and (session.has_room or session.state is not State.OPEN):
            self._wake()
        # stay awake only while there is something to wait for
        if session.is_needed:
            self._wake_at(now + link.wait_s(now))

    def _wake_at(self, at: float) -> None:
        # loop.time() is monotonic() on every loop that we know, but only its own clock is promised
        when = self._loop.time() + max(0.0, at - monotonic())
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._turn()

    def _watch(self, current: Connection | None) -> None:
        # the old socket may be closed already; its number may even be the new one's
        if self._watched is not None:
            self._loop.remove_reader(self._watched.fd)
        self._watched = current
        if current is not None:
            self._loop.add_reader(current.fd, self._turn)

    def _settle(self) -> None:
        book = self._session.book
        if book.arrived:
            arrived, book.arrived = book.arrived, []
            for pending, part in arrived:
                pending.waiter.feed(part)
        if book.progressed:
            for tell in progress.reports(book):
                tell()
        if book.ended:
            ended, book.ended = book.ended, []
            for end in ended:
                # future and call hold each other: taken apart here, they cost the collector nothing
                waiter, end.pending.waiter = end.pending.waiter, None
                if end.pending.upload is not None:
                    book.uploads.raised.append(end.pending)
                waiter.settle(end.value, end.error, end.usage)
        if book.uploads.raised:
            book.uploads.raised = []
            self._wake()
