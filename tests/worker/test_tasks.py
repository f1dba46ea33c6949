"""Asynchronous tools: the tasks that run them, without a connection."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
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
    from collections.abc import Callable

CALLER = codec.raw(messages.Caller("ada", 0, ()))
CALL_ID = b"c" * 16


class Bench:
    """A loop with one call that has been given to it and not begun."""

    def __init__(self) -> None:
        self.began: list[str] = []

        @tool(name="try.it")
        async def it() -> str:
            """Wait, if it may."""
            self.began.append("it")
            await asyncio.sleep(1000)
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

    def begin(self, then: Callable[[], None], *, after_steps: int = 0) -> None:
        """Begin the call, let its task take so many steps, do something, and wait for its end."""

        async def run() -> None:
            self.loop._begin(self.session.start())
            for _ in range(after_steps):
                await asyncio.sleep(0)
            then()
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

    def stop() -> None:
        bench.interrupts.stopping = True
        bench.loop._cancel_all()

    bench.begin(stop)
    assert bench.began == []
    assert bench.said() == []
    assert bench.loop.has_ended()
