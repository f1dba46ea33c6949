"""Progress, and the time-out that it puts off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker.wire import messages, payload
from tests.core.support import EPOCH, FakeGrant, World

if TYPE_CHECKING:
    from mcp_broker.core.client_session import ClientSession


def calling(
    *, hears: bool = True, idle_ms: int | None = None, depth: int = 4
) -> tuple[World, ClientSession, bytes]:
    world = World()
    hello = messages.Hello(0, "MCPB", (1,), "t", capabilities=("progress",) if hears else ())
    session = world.machine.clients.hello(b"c1", "key-c1", hello, FakeGrant(), world.now)
    assert session is not None
    world.ready(streaming=True, depth=depth)
    return world, session, call(world, 1, idle_ms)


def call(world: World, number: int, idle_ms: int | None, timeout_ms: int = 30_000) -> bytes:
    call_id = number.to_bytes(16, "little")
    extra = messages.CallExtra(idle_timeout_ms=idle_ms)
    request = messages.Call(call_id, "echo.echo", timeout_ms, payload.pack({}), extra)
    world.client_says("c1", messages.Calls(EPOCH, 0, (request,)))
    return call_id


def report(world: World, call_id: bytes, fraction: float | None, text: str = "") -> None:
    item = messages.Progress(call_id, fraction, text)
    assert world.worker_says("echo-1", messages.Progresses(EPOCH, (item,)))


def news(world: World, session: ClientSession) -> list[tuple[float | None, str]]:
    return [
        (item.fraction, item.message)
        for message, _ in world.heard_by(session)
        if isinstance(message, messages.Progresses)
        for item in message.progress
    ]


def end_of(world: World, session: ClientSession) -> tuple[str, object]:
    [outcome] = [
        outcome
        for message, _ in world.heard_by(session)
        if isinstance(message, messages.Outcomes)
        for outcome in message.outcomes
    ]
    assert outcome.fault is not None
    return outcome.code, payload.unpack_map(outcome.fault.details).get("which")


def test_caller_hears_the_newest_progress_once() -> None:
    world, session, call_id = calling()
    report(world, call_id, 0.1)
    report(world, call_id, 0.2, "two")
    assert news(world, session) == [(0.2, "two")]
    assert news(world, session) == []
    report(world, call_id, None, "three")
    assert news(world, session) == [(None, "three")]


def test_progress_of_many_calls_goes_in_messages_of_a_batch() -> None:
    world, session, _ = calling(depth=256)
    ids = [call(world, number, None) for number in range(2, 257)]
    world.ready("echo-2", streaming=True, depth=256)
    held = world.machine.workers.by_id["echo-1"].held
    for call_id in [*ids]:
        if call_id in held:
            report(world, call_id, 0.5)
    assert len(news(world, session)) == len([one for one in ids if one in held]) > 100


def test_no_progress_comes_after_the_outcome_of_its_call() -> None:
    world, session, call_id = calling()
    report(world, call_id, 0.9)
    world.answer("echo-1", call_id)
    assert news(world, session) == []
    report(world, call_id, 1.0)
    assert news(world, session) == []


def test_client_that_does_not_take_progress_gets_none() -> None:
    world, session, call_id = calling(hears=False)
    report(world, call_id, 0.5)
    assert news(world, session) == []


def test_progress_while_the_client_is_away_waits_as_one() -> None:
    world, session, call_id = calling()
    world.heard_by(session)
    world.machine.clients.unreachable(b"c1", world.now)
    for step in range(100):
        report(world, call_id, step / 100)
    hello = messages.Hello(0, "MCPB", (1,), "t", session.session_id, ("progress",))
    world.machine.clients.hello(b"c1", "key-c1", hello, FakeGrant(), world.now)
    assert news(world, session) == [(0.99, "")]


def test_silent_call_ends_at_its_idle_timeout() -> None:
    world, session, _ = calling(idle_ms=500)
    world.later(0.45)
    assert world.outcomes(session) == {}
    world.later(0.1)
    assert end_of(world, session) == ("DEADLINE_EXCEEDED", "idle")
    assert [interrupt.why for interrupt in world.interrupts()] == ["deadline"]
    world.check()


def test_parts_and_progress_put_the_idle_timeout_off() -> None:
    world, session, call_id = calling(idle_ms=500)
    for index in range(5):
        world.later(0.4)
        if index % 2:
            report(world, call_id, None)
        else:
            part = messages.Part(call_id, index // 2, b"\xc0")
            world.worker_says("echo-1", messages.Partial(EPOCH, (part,)))
    assert world.outcomes(session) == {}
    world.later(0.55)
    assert end_of(world, session) == ("DEADLINE_EXCEEDED", "idle")


def test_timeout_caps_a_call_that_is_never_idle() -> None:
    world, session, _ = calling()
    busy = call(world, 2, 500, timeout_ms=1000)
    for _ in range(5):
        world.later(0.2)
        report(world, busy, 0.5)
    world.later(0.1)
    assert end_of(world, session) == ("DEADLINE_EXCEEDED", "timeout")


def test_call_that_waits_for_a_worker_is_not_idle() -> None:
    world, session, call_id = calling(idle_ms=300, depth=0)
    world.later(2)
    assert world.outcomes(session) == {}
    world.worker_says("echo-1", messages.Ready(EPOCH, 1))
    assert world.dispatched("echo-1") == [call_id]
    world.later(0.25)
    assert world.outcomes(session) == {}
    world.later(0.1)
    assert end_of(world, session) == ("DEADLINE_EXCEEDED", "idle")


def test_ended_calls_leave_no_idle_timeout_behind() -> None:
    world, _, call_id = calling(idle_ms=86_400_000)
    world.answer("echo-1", call_id)
    for number in range(2, 100):
        world.answer("echo-1", call(world, number, 1000 * number))
    assert world.machine.ledger._silent.deadline() is None
