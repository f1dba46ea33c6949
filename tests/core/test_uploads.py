"""Arguments in chunks: counted, passed on, and never held."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import mcp_broker.limits as bounds
from mcp_broker.wire import codec, messages, payload
from tests.core.support import EPOCH, FakeGrant, World

if TYPE_CHECKING:
    from mcp_broker.core.client_session import ClientSession

WINDOW = bounds.UPLOAD_WINDOW_MAX


def uploading(depth: int = 4, **changes: Any) -> tuple[World, ClientSession, bytes]:
    world = World()
    session = world.hello()
    world.ready(depth=depth, **changes)
    extra = messages.CallExtra(upload="data")
    request = messages.Call(b"u" * 16, "echo.echo", 30_000, payload.pack({}), extra)
    world.client_says("c1", messages.Calls(EPOCH, 0, (request,)))
    return world, session, b"u" * 16


def reads(world: World, call_id: bytes, limit: int) -> None:
    credit = messages.StreamCredit(call_id, limit)
    assert world.worker_says("echo-1", messages.Credit(EPOCH, (credit,)))


def sends(world: World, call_id: bytes, *indexes: int, body: bytes | None = None, last: bool = False) -> None:
    for index in indexes:
        chunk = messages.Chunk(call_id, index, b"abc" if body is None else None, last)
        world.client_says("c1", messages.Chunks(EPOCH, (chunk,)), body)


def passed_on(world: World, worker_id: str = "echo-1") -> list[int]:
    return [
        chunk.index
        for message in world.heard_by_worker(worker_id)
        if isinstance(message, messages.Chunks)
        for chunk in message.chunks
    ]


def limits_told(world: World, session: ClientSession) -> list[int]:
    return [
        credit.limit
        for message, _ in world.heard_by(session)
        if isinstance(message, messages.Credit)
        for credit in message.credits
    ]


def test_chunks_go_on_in_the_turn_that_they_came_in() -> None:
    world, session, call_id = uploading()
    reads(world, call_id, WINDOW)
    assert limits_told(world, session) == [WINDOW]
    sends(world, call_id, 0, 1)
    assert passed_on(world) == [0, 1]
    large = bytes(bounds.CHUNK_BYTES_MAX)
    sends(world, call_id, 2, body=large, last=True)
    worker = world.machine.workers.by_id["echo-1"]
    [(envelope, body)] = worker.take_outbox(EPOCH)
    assert body is large, "not copied"
    assert codec.to_worker.decode(envelope) == messages.Chunks(
        EPOCH, (messages.Chunk(call_id, 2, None, True),)
    )
    world.answer("echo-1", call_id)
    assert world.outcomes(session) == {call_id: "OK"}


def test_large_chunk_acknowledges_no_outcomes() -> None:
    world, _, call_id = uploading()
    reads(world, call_id, WINDOW)
    worker = world.machine.workers.by_id["echo-1"]
    world.heard_by_worker("echo-1")
    told, worker.told = worker.told, -1
    sends(world, call_id, 0, body=bytes(100_000))
    world.heard_by_worker("echo-1")
    assert worker.told == -1
    worker.told = told


@pytest.mark.parametrize(
    ("indexes", "code"),
    [((1,), "INVALID_ARGUMENT"), ((*range(WINDOW + 1),), "INVALID_ARGUMENT")],
    ids=["out of order", "beyond the limit"],
)
def test_chunk_that_may_not_come_ends_the_call_and_stops_the_tool(
    indexes: tuple[int, ...], code: str
) -> None:
    world, session, call_id = uploading()
    reads(world, call_id, WINDOW)
    sends(world, call_id, *indexes)
    assert world.outcomes(session) == {call_id: code}
    assert [interrupt.stage for interrupt in world.interrupts()] == ["raise"]
    world.check()


def test_chunk_before_anybody_reads_after_the_last_or_too_large_ends_the_call() -> None:
    world, session, call_id = uploading(depth=0)
    sends(world, call_id, 0)
    assert world.outcomes(session) == {call_id: "INVALID_ARGUMENT"}, "nobody holds it"
    world, session, call_id = uploading()
    reads(world, call_id, WINDOW)
    sends(world, call_id, 0, last=True)
    sends(world, call_id, 1)
    assert world.outcomes(session) == {call_id: "INVALID_ARGUMENT"}
    world, session, call_id = uploading()
    reads(world, call_id, WINDOW)
    sends(world, call_id, 0, body=bytes(bounds.CHUNK_BYTES_MAX + 1))
    assert world.outcomes(session) == {call_id: "PAYLOAD_TOO_LARGE"}
    world.check()


def test_worker_cannot_open_more_than_a_window() -> None:
    world, session, call_id = uploading()
    reads(world, call_id, 10**6)
    reads(world, call_id, 10**7)
    assert limits_told(world, session) == [WINDOW]
    sends(world, call_id, 0)
    reads(world, call_id, 10**6)
    assert limits_told(world, session) == [WINDOW + 1]


def test_chunks_and_limits_of_a_call_without_an_upload_are_ignored() -> None:
    world = World()
    session = world.hello()
    world.ready()
    call_id = world.call()
    sends(world, call_id, 0)
    reads(world, call_id, 16)
    sends(world, b"x" * 16, 0)
    assert (passed_on(world), limits_told(world, session)) == ([], [])
    world.answer("echo-1", call_id)
    assert world.outcomes(session) == {call_id: "OK"}


def test_resumed_upload_goes_on_where_the_broker_is() -> None:
    world, session, call_id = uploading()
    reads(world, call_id, WINDOW)
    sends(world, call_id, 0, 1)
    world.machine.clients.unreachable(b"c1", world.now)
    reads(world, call_id, WINDOW + 2)
    hello = messages.Hello(0, "MCPB", (1,), "t", session.session_id)
    world.machine.clients.hello(b"c1", "key-c1", hello, FakeGrant(), world.now)
    assert limits_told(world, session) == [WINDOW + 2]
    sends(world, call_id, 0, 1, 2)
    assert passed_on(world) == [0, 1, 2], "what came again is dropped"


def test_upload_that_nobody_began_to_read_may_go_to_another_worker() -> None:
    world, session, call_id = uploading(depth=1, idempotent=True)
    world.died("echo-1", started_seq=1)
    world.later(1)
    world.ready("echo-2", idempotent=True)
    assert world.dispatched("echo-2") == [call_id]
    assert world.outcomes(session) == {}


def test_upload_whose_worker_died_reading_is_not_run_again() -> None:
    world, session, call_id = uploading(depth=1, idempotent=True)
    reads(world, call_id, WINDOW)
    world.died("echo-1", started_seq=1)
    world.later(1)
    assert world.outcomes(session) == {call_id: "WORKER_LOST"}
    world.check()


def test_reading_puts_the_idle_timeout_off() -> None:
    world = World()
    session = world.hello()
    world.ready()
    extra = messages.CallExtra(upload="data", idle_timeout_ms=500)
    request = messages.Call(b"u" * 16, "echo.echo", 30_000, payload.pack({}), extra)
    world.client_says("c1", messages.Calls(EPOCH, 0, (request,)))
    for step in range(4):
        world.later(0.4)
        reads(world, b"u" * 16, WINDOW + step)
    assert world.outcomes(session) == {}
    world.later(0.6)
    assert world.outcomes(session) == {b"u" * 16: "DEADLINE_EXCEEDED"}


@pytest.mark.parametrize("also", [{"detach": True}, {"idempotency_key": "k"}])
def test_upload_can_be_neither_detached_nor_keyed(also: dict[str, Any]) -> None:
    world = World()
    session = world.hello()
    world.ready()
    extra = messages.CallExtra(upload="data", **also)
    request = messages.Call(b"u" * 16, "echo.echo", 30_000, payload.pack({}), extra)
    world.client_says("c1", messages.Calls(EPOCH, 0, (request,)))
    assert world.outcomes(session) == {b"u" * 16: "INVALID_ARGUMENT"}
