"""Asynchronous tools: the tasks that run them, without a connection."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker.wire import codec, messages
from mcp_broker.wire.marks import MARKS_BYTES, Marks
from mcp_broker.worker import tool
from mcp_broker.worker.execution import Execution
from mcp_broker.worker.interrupts import Interrupts
from mcp_broker.worker.session import Session
from mcp_broker.worker.tasks import ConcurrentLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CALLER = codec.raw(messages.Caller("ada", 0, ()))
CALL_ID = b"c" * 16


class Bench:
    """A loop with one call that has been given to it and not begun."""

    def __init__(self, body: Callable[[], Awaitable[object]] | None = None) -> None:
        self.began: list[str] = []
        self.left: asyncio.Task[None]

        @tool(name="try.it")
        async def it() -> str:
            """Wait, if it may."""
            self.began.append("it")
            await (body() if body is not None else asyncio.sleep(1000))
            return "done"

        marks = Marks(memoryview(bytearray(MARKS_BYTES)))
        self.interrupts = Interrupts(marks, -1)
        execution = Execution({it.name: it}, self.interrupts, {}, Path("scratch"), is_alone=False)
        self.session = Session((), 4, "test")
        self.session.opened(0.0)
        granted = messages.GrantedLimits(window=4, heartbeat_ms=250)
        self.hear(messages.Welcome(9, (1, 0), b"s" * 16, resumed=False, name="w-1", granted=granted))
        self.hear(
            messages.Dispatches(9, 0, (messages.Dispatch(1, CALL_ID, "try.it", 60_000, b"\x80", CALLER),))
        )
        self.session.outgoing.clear()
        nothing: Any = None
        self.loop = ConcurrentLoop(self.session, nothing, execution, self.interrupts)

    def hear(self, message: messages.Message) -> None:
        self.session.receive(codec.encode(message), None, time.monotonic())

    def said(self) -> list[str]:
        """Return the codes of the outcomes that go out."""
        self.session.flush()
        told = [codec.from_worker.decode(envelope) for envelope, _ in self.session.outgoing]
        return [
            outcome.code
            for message in told
            if isinstance(message, messages.Outcomes)
            for outcome in message.outcomes
        ]

    def cancel(self) -> None:
        """Hear that the caller has cancelled, and do what each turn does about that."""
        self.hear(messages.Cancel(9, (CALL_ID,)))
        self.loop._drop_unwanted()

    def stop(self) -> None:
        """Do what SIGTERM does."""
        self.interrupts.stopping = True
        self.loop._cancel_all()

    def begin(self, then: Callable[[], None], *, after_steps: int = 0, times: int = 1) -> None:
        """Begin the call, let its task take so many steps, do something so many times, and wait for its end."""

        async def run() -> None:
            self.loop._begin(self.session.start())
            for _ in range(after_steps):
                await asyncio.sleep(0)
            for _ in range(times):
                then()
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                await self.loop._stirred.wait()

        asyncio.run(run())
        assert not self.loop._tasks


@pytest.mark.parametrize("after_steps", [0, 3])
def test_interrupted_call_ends_once_whether_it_had_begun_or_not(after_steps: int) -> None:
    bench = Bench()
    bench.begin(lambda: bench.loop._interrupt(1), after_steps=after_steps)
    assert bench.began == ["it"] * bool(after_steps)
    assert bench.said() == ["CANCELLED"]
    assert not bench.session.running


def test_call_that_had_not_begun_when_the_worker_stops_is_left_to_another() -> None:
    bench = Bench()
    bench.begin(bench.stop)
    assert bench.began == []
    assert bench.said() == []
    assert bench.loop.has_ended()


def test_clean_up_may_wait_for_things_however_often_its_call_is_told_to_stop() -> None:
    cleaned: list[int] = []

    async def body() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for step in range(10):
                await asyncio.sleep(0)
                cleaned.append(step)

    bench = Bench(body)

    def ask() -> None:
        bench.cancel()
        bench.loop._interrupt(1)

    bench.begin(ask, after_steps=3, times=10)
    assert cleaned == list(range(10))
    assert bench.said() == ["CANCELLED"]


def test_clean_up_of_a_stream_that_nobody_takes_is_not_disturbed_by_its_deadline() -> None:
    bench = Bench()

    async def body() -> None:
        pending = next(iter(bench.loop._tasks))
        bench.loop._give_up(pending)
        for _ in range(5):
            await asyncio.sleep(0)

    bench = Bench(body)
    bench.begin(lambda: bench.loop._interrupt(1), after_steps=3, times=2)
    assert bench.said() == ["OK"]


def test_call_that_runs_when_the_worker_stops_for_another_ones_sake_is_lost_with_it() -> None:
    bench = Bench()
    bench.begin(bench.stop, after_steps=3)
    assert bench.began == ["it"]
    assert bench.said() == []
    assert bench.loop.has_ended()


def test_call_that_the_worker_stops_for_has_been_cancelled() -> None:
    asked: list[str] = []

    async def body() -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            asked.append("first")
            await asyncio.sleep(1000)

    bench = Bench(body)

    def end() -> None:
        if asked:
            bench.stop()
        else:
            bench.cancel()

    bench.begin(end, after_steps=3, times=3)
    assert bench.said() == ["CANCELLED"]
    assert bench.loop.has_ended()


async def _cancel_itself() -> None:
    task = asyncio.create_task(asyncio.sleep(1000))
    task.cancel()
    await task


async def _raise_cancelled() -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize("body", [_cancel_itself, _raise_cancelled])
def test_tool_that_is_cancelled_by_itself_has_failed(body: Callable[[], Awaitable[object]]) -> None:
    bench = Bench(body)
    bench.begin(lambda: None)
    assert bench.said() == ["TOOL_FAILED"]


def test_fault_of_ours_ends_its_call_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("a bug")

    bench = Bench()
    monkeypatch.setattr(bench.loop.execution, "prepare", broken)
    bench.begin(lambda: None)
    assert bench.said() == ["INTERNAL"]
    assert "LookupError: a bug" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["leave", "stop", "cancel all"])
def test_loop_goes_on_whatever_a_task_does_to_it(how: str) -> None:
    bench = Bench()
    turns: list[int] = []

    async def leave() -> None:
        sys.exit(3)

    async def turn(concurrency: int) -> None:
        turns.append(len(turns))
        if len(turns) == 2:
            if how == "leave":
                bench.left = asyncio.create_task(leave())
            elif how == "stop":
                asyncio.get_running_loop().stop()
            else:
                for task in asyncio.all_tasks():
                    task.cancel()
        elif len(turns) == 4:
            bench.interrupts.stopping = True
        await asyncio.sleep(0)

    read, write = os.pipe()
    bench.loop.link = SimpleNamespace(wake_fd=read, is_open=False)  # type: ignore[assignment]
    bench.loop._turn = turn  # type: ignore[method-assign]
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        serving = loop.create_task(bench.loop._serve(4))
        bench.loop._see_through(loop, serving)
        assert serving.result() is None
    assert turns == [0, 1, 2, 3]
    if how == "leave":
        assert isinstance(bench.left.exception(), SystemExit)
    os.close(read)
    os.close(write)
