"""The loop of a worker with asynchronous tools: one thread, one asyncio loop, up to ``concurrency`` calls at a time.

Synchronous tools run inline, between the steps of the asynchronous ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any

from mcp_broker.wire import messages
from mcp_broker.wire.structs import Slim
from mcp_broker.worker import forks
from mcp_broker.worker.bytestream import ByteStream
from mcp_broker.worker.execution import Execution, Finished, Run
from mcp_broker.worker.interrupts import CallInterrupted, Interrupts
from mcp_broker.worker.link import Link, LinkLost
from mcp_broker.worker.outcomes import fault, shown
from mcp_broker.worker.shell import Shell
from mcp_broker.worker.uploads import Received

if TYPE_CHECKING:
    from mcp_broker.worker.session import Pending, Session


class Running(Slim):
    """A call that runs as a task.

    Attributes:
        is_asked: it was told to stop for its own sake. Its clean-up may wait for things, so it is not told again.
    """

    pending: Pending
    task: asyncio.Task[None] | None = None
    is_asked: bool = False

    def cancel(self) -> None:
        """Have it stop; for its caller, or at its deadline."""
        if not self.is_asked and self.task is not None:
            self.is_asked = True
            self.task.cancel()


class ConcurrentLoop(Shell):
    """Runs calls as tasks; they start in the order of their seq."""

    def __init__(self, session: Session, link: Link, execution: Execution, interrupts: Interrupts) -> None:
        super().__init__(session, link, execution, interrupts)
        self._tasks: dict[Pending, Running] = {}
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
        runner = asyncio.Runner()
        loop = runner.get_loop()
        self._see_through(loop, loop.create_task(self._serve(concurrency)))
        self.end()
        # tasks and threads that tools left behind may take their time, or leave
        with contextlib.suppress(BaseException):
            runner.close()

    def _see_through(self, loop: asyncio.AbstractEventLoop, serving: asyncio.Task[None]) -> None:
        """Run the loop until we have served, whoever else stops it.

        A task of a tool's own that leaves, and ``loop.stop()``, end the running of the loop, and nothing in it.
        """
        while not serving.done():
            try:
                loop.run_until_complete(serving)
            except (SystemExit, KeyboardInterrupt, RuntimeError):
                if serving.done() or loop.is_closed():
                    raise

    async def _serve(self, concurrency: int) -> None:
        loop = self._loop = asyncio.get_running_loop()
        serving: Any = asyncio.current_task()

        def interrupt(seq: int) -> None:
            loop.call_soon_threadsafe(self._interrupt, seq)

        self.interrupts.elsewhere = interrupt
        loop.add_reader(self.link.wake_fd, self._woken)
        is_told = False
        while not self.has_ended():
            try:
                await self._turn(concurrency)
            except LinkLost:
                self.lost()
            except asyncio.CancelledError:
                # a tool cancelled all tasks that it found; none of ours cancels this one
                serving.uncancel()
            if self.interrupts.stopping and not is_told:
                is_told = True
                self._cancel_all()
        loop.remove_reader(self.link.wake_fd)
        if self.link.is_open:
            loop.remove_reader(self.link.fd)

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
        for running in self._tasks.values():
            if running.pending.dispatch.seq == seq:
                running.cancel()

    def _drop_unwanted(self) -> None:
        if self.session.cancelled:
            for running in self._tasks.values():
                if running.pending.dispatch.call_id in self.session.cancelled:
                    running.cancel()

    def _cancel_all(self) -> None:
        """Have every call stop, since the worker ends; also one that was asked before and goes on."""
        for running in self._tasks.values():
            if running.task is not None:
                running.task.cancel()

    # -- calls --------------------------------------------------------------------------------------------

    def _begin(self, pending: Pending) -> None:
        running = self._tasks[pending] = Running(pending)
        running.task = asyncio.create_task(self._run(running))
        running.task.add_done_callback(functools.partial(self._ended, running))

    def _ended(self, running: Running, task: asyncio.Task[None]) -> None:
        """End a call too whose task ran nothing of what ends one.

        It was cancelled before its first step, or a fault of ours came between.
        """
        pending = running.pending
        self.interrupts.marks.end(pending.dispatch.call_id)
        if self._tasks.pop(pending, None) is None:
            return
        call_id = pending.dispatch.call_id
        if not task.cancelled():
            error = task.exception()
            text = f"the worker failed at the call: {type(error).__name__}: {shown(error)}"
            self.session.finish(pending, fault(call_id, "INTERNAL", text))
            with contextlib.suppress(Exception):
                traceback.print_exception(error)
        elif self.interrupts.stopping and not self._is_asked(running):
            # its caller did not want that: it has not started, and will elsewhere
            self.session.running.pop(call_id, None)
        else:
            self.session.finish(pending, fault(call_id, "CANCELLED", "cancelled before it started"))
        self._stirred.set()

    def _is_asked(self, running: Running) -> bool:
        return running.is_asked or running.pending.dispatch.call_id in self.session.cancelled

    async def _run(self, running: Running) -> None:
        pending = running.pending
        started_ns = time.monotonic_ns()
        outcome, body = await self._outcome(running, started_ns)
        if self.interrupts.stopping and outcome.code == "CANCELLED" and not self._is_asked(running):
            # SIGTERM came for another one: this call is lost with its worker, and runs again if it may
            self.session.running.pop(pending.dispatch.call_id, None)
        else:
            self.session.finish(pending, outcome, body)
        self.session.pace.served(time.monotonic_ns() - started_ns, 1)
        self._tasks.pop(pending, None)
        self._stirred.set()

    async def _outcome(self, running: Running, started_ns: int) -> Finished:
        pending = running.pending
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
        except (asyncio.CancelledError, CallInterrupted) as error:
            if isinstance(error, asyncio.CancelledError) and not (
                running.is_asked or self.is_unwanted(pending)
            ):
                # it cancelled itself, or what it waited for
                return self.execution.failed(run, error), None
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
        except (asyncio.CancelledError, CallInterrupted):
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

    def _give_up(self, pending: Pending) -> None:
        """Count a call that we stop ourselves as asked: who asks next would hit its clean-up."""
        self._tasks[pending].is_asked = True

    async def _credit(self, run: Run) -> None:
        while not self.session.may_send(run.pending, run.index):
            left_s = run.pending.deadline - time.monotonic()
            if left_s <= 0 or run.pending.life != self.session.life:
                self._give_up(run.pending)
                raise CallInterrupted
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._heard.wait(), left_s)

    async def _read_later(self, pending: Pending) -> bytes:
        while (data := self.session.read(pending)) is None:
            # the turn sends the credit, and hears the answer
            self._stirred.set()
            left_s = pending.deadline - time.monotonic()
            if left_s <= 0:
                self._give_up(pending)
                raise asyncio.CancelledError
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._heard.wait(), left_s)
        self._stirred.set()
        return data

    async def _send_part(self, run: Run, part: bytes) -> None:
        await self._credit(run)
        if not self.session.part(run.pending, run.index, part):
            self._give_up(run.pending)
            raise CallInterrupted
        run.index += 1
        self._stirred.set()
        await asyncio.sleep(0)
