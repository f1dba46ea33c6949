"""The loop of a worker with asynchronous tools: one thread, one asyncio loop, up to ``concurrency`` calls at a time.

Synchronous tools run inline, between the steps of the asynchronous ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from mcp_broker.wire import messages
from mcp_broker.worker import forks
from mcp_broker.worker.bytestream import ByteStream
from mcp_broker.worker.execution import Execution, Finished, Run
from mcp_broker.worker.interrupts import CallInterrupted, Interrupts
from mcp_broker.worker.link import Link, LinkLost
from mcp_broker.worker.outcomes import fault
from mcp_broker.worker.shell import Shell
from mcp_broker.worker.uploads import Received

if TYPE_CHECKING:
    from mcp_broker.worker.session import Pending, Session


class ConcurrentLoop(Shell):
    """Runs calls as tasks; they start in the order of their seq."""

    def __init__(self, session: Session, link: Link, execution: Execution, interrupts: Interrupts) -> None:
        super().__init__(session, link, execution, interrupts)
        self._tasks: dict[int, tuple[Pending, asyncio.Task[None]]] = {}
        self._stirred = asyncio.Event()
        #: set, and replaced, after each turn that heard the broker
        self._heard = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        interrupts.started = interrupts.marks.start_beside

    def report_from_afar(self, pending: Pending, fraction: float | None, message: str) -> None:
        """Have the loop's thread report it."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.report, pending, fraction, message)

    def open_upload(self, pending: Pending) -> ByteStream:
        """Begin to take a running call's upload; ``async for`` lets other calls run meanwhile."""
        self.session.uploads[pending.dispatch.call_id] = Received(deque())
        return ByteStream.over(
            functools.partial(self.read, pending), functools.partial(self._read_later, pending)
        )

    def run(self, concurrency: int) -> None:
        """Serve until the broker drains the worker or SIGTERM comes.

        Raises:
            ConfigError: the broker refuses the tools.
        """
        asyncio.run(self._serve(concurrency))
        self.end()

    async def _serve(self, concurrency: int) -> None:
        loop = self._loop = asyncio.get_running_loop()

        def interrupt(seq: int) -> None:
            loop.call_soon_threadsafe(self._interrupt, seq)

        self.interrupts.elsewhere = interrupt
        loop.add_reader(self.link.wake_fd, self._woken)
        while not self.has_ended():
            try:
                await self._turn(concurrency)
            except LinkLost:
                self.lost()
            if self.interrupts.stopping:
                self._cancel_all()
        loop.remove_reader(self.link.wake_fd)

    async def _turn(self, concurrency: int) -> None:
        if forks.is_fork:
            # of a coroutine that waits: its loop belongs to the worker
            forks.leave()
        session, link = self.session, self.link
        was_open = link.is_open
        timeout_s = self.connect()
        if link.is_open and not was_open:
            self._watch()
        if link.is_open and link.is_readable():
            self.take()
            heard, self._heard = self._heard, asyncio.Event()
            heard.set()
        if session.orders:
            self.obey()
        self._drop_unwanted()
        while session.inbox and len(self._tasks) < concurrency and not self.interrupts.stopping:
            self._begin(session.start())
        session.flush()
        self.send()
        # the fd tells of changes only, and sending may have read ahead: ask once more before waiting
        if link.is_open:
            if link.is_readable():
                await asyncio.sleep(0)
                return
            timeout_s = link.tick_s(timeout_s)
        if not self._tasks:
            self.interrupts.rested()
        if self.interrupts.stopping and self._tasks:
            timeout_s = min(timeout_s, 0.05)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stirred.wait(), timeout_s)
        self._stirred.clear()

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self.link.fd, self._stirred.set)

    def lost(self) -> None:
        """Drop the connection, and the reader of its fd first: its number is used again."""
        if self.link.is_open:
            asyncio.get_running_loop().remove_reader(self.link.fd)
        super().lost()

    def _woken(self) -> None:
        self.link.drain_wake()
        self._stirred.set()

    # -- stopping calls ---------------------------------------------------------------------------------

    def _interrupt(self, seq: int) -> None:
        for pending, task in self._tasks.values():
            if pending.dispatch.seq == seq:
                task.cancel()

    def _drop_unwanted(self) -> None:
        if self.session.cancelled:
            for pending, task in self._tasks.values():
                if pending.dispatch.call_id in self.session.cancelled:
                    task.cancel()

    def _cancel_all(self) -> None:
        for _, task in self._tasks.values():
            task.cancel()

    # -- calls --------------------------------------------------------------------------------------------

    def _begin(self, pending: Pending) -> None:
        task = asyncio.create_task(self._run(pending))
        task.add_done_callback(functools.partial(self._ended, pending))
        self._tasks[id(pending)] = pending, task

    def _ended(self, pending: Pending, task: asyncio.Task[None]) -> None:
        """End a call too whose task was cancelled before its first step, and so ran nothing of what ends one."""
        self.interrupts.marks.end(pending.dispatch.call_id)
        if self._tasks.pop(id(pending), None) is None or not task.cancelled():
            return
        call_id = pending.dispatch.call_id
        if self.interrupts.stopping:
            # its caller did not want that: it has not started, and will elsewhere
            self.session.running.pop(call_id, None)
        else:
            self.session.finish(pending, fault(call_id, "CANCELLED", "cancelled before it started"))
        self._stirred.set()

    async def _run(self, pending: Pending) -> None:
        started_ns = time.monotonic_ns()
        outcome, body = await self._outcome(pending, started_ns)
        self.session.finish(pending, outcome, body)
        self.session.pace.served(time.monotonic_ns() - started_ns, 1)
        self._tasks.pop(id(pending), None)
        self._stirred.set()

    async def _outcome(self, pending: Pending, started_ns: int) -> Finished:
        prepared = self.execution.prepare(pending, started_ns)
        if isinstance(prepared, messages.Outcome):
            return prepared, None
        run, arguments = prepared
        try:
            if not run.plan.tool.is_async:
                finished = self.execution.invoke(run, arguments)
                return finished if not isinstance(finished, Run) else (await self._stream(finished), None)
            value = run.plan.function(**arguments)
            if inspect.isasyncgen(value):
                run.stream = value
                return await self._async_stream(run), None
            return self.execution.returned(run, await value)
        except (asyncio.CancelledError, CallInterrupted):
            if run.context is not None:
                run.context.cancelled = True
            return self.execution.cancelled(run), None
        except BaseException as error:  # also SystemExit: a tool does not end its worker by accident
            return self.execution.failed(run, error), None

    async def _stream(self, run: Run) -> messages.Outcome:
        """Drive a synchronous generator, each step inline."""
        try:
            while True:
                part = self.execution.step(run)
                if not isinstance(part, bytes):
                    return part
                await self._send_part(run, part)
        except asyncio.CancelledError:
            return self.execution.stop(run)

    async def _async_stream(self, run: Run) -> messages.Outcome:
        stream: Any = run.stream
        async with contextlib.aclosing(stream):
            async for value in stream:
                part = self.execution.part(run, value)
                if not isinstance(part, bytes):
                    return part
                await self._send_part(run, part)
        return self.execution.ended(run)

    async def _credit(self, run: Run) -> None:
        while not self.session.may_send(run.pending, run.index):
            left_s = run.pending.deadline - time.monotonic()
            if left_s <= 0 or run.pending.life != self.session.life:
                raise asyncio.CancelledError
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._heard.wait(), left_s)

    async def _read_later(self, pending: Pending) -> bytes:
        while (data := self.session.read(pending)) is None:
            # the turn sends the credit, and hears the answer
            self._stirred.set()
            left_s = pending.deadline - time.monotonic()
            if left_s <= 0:
                raise asyncio.CancelledError
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._heard.wait(), left_s)
        self._stirred.set()
        return data

    async def _send_part(self, run: Run, part: bytes) -> None:
        await self._credit(run)
        if not self.session.part(run.pending, run.index, part):
            raise asyncio.CancelledError
        run.index += 1
        self._stirred.set()
        await asyncio.sleep(0)
