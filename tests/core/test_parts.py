"""Streams over lost connections: what is kept, for how long, and what comes again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import mcp_broker.limits as bounds
from mcp_broker.wire import messages, payload
from tests.core.support import EPOCH, FakeGrant, World

if TYPE_CHECKING:
    from mcp_broker.core.client_session import ClientSession

WINDOW = bounds.STREAM_WINDOW_MAX


def streaming() -> tuple[World, ClientSession, bytes]:
    world = World()
    session = world.hello()
    world.ready(streaming=True)
    return world, session, world.call()


def part(world: World, call_id: bytes, *indexes: int, body: bytes | None = None) -> None:
    for index in indexes:
        inline = payload.pack(index) if body is None else None
        world.worker_says("echo-1", messages.Partial(EPOCH, (messages.Part(call_id, index, inline),)), body)


def end(world: World, call_id: bytes, parts: int) -> None:
    outcome = messages.Outcome(call_id, "OK", b"\xc0", parts=parts)
    world.worker_says("echo-1", messages.Outcomes(EPOCH, 1, (outcome,)))


def credit(world: World, call_id: bytes, limit: int) -> None:
    world.client_says("c1", messages.Credit(EPOCH, (messages.StreamCredit(call_id, limit),)))


def heard(world: World, session: ClientSession) -> list[int | str]:
    """Return the indexes of parts and the codes of outcomes that came, in order."""
    found: list[int | str] = []
    for message, _ in world.heard_by(session):
        if isinstance(message, messages.Partial):
            found += [part.index for part in message.parts]
        elif isinstance(message, messages.Outcomes):
            found += [outcome.code for outcome in message.outcomes]
    return found


def resume(world: World, session: ClientSession, ack: int = 0) -> None:
    world.machine.clients.unreachable(b"c1", world.now)
    hello = messages.Hello(0, "MCPB", (1,), "t", session.session_id, ack=ack)
    assert world.machine.clients.hello(b"c1", "key-c1", hello, FakeGrant(), world.now) is session


def test_parts_that_no_credit_covers_come_again_after_a_resume() -> None:
    world, session, call_id = streaming()
    part(world, call_id, *range(10))
    assert heard(world, session) == list(range(10))
    credit(world, call_id, WINDOW + 8)
    resume(world, session)
    part(world, call_id, 10)
    assert heard(world, session) == [8, 9, 10]


def test_parts_made_while_the_client_was_away_come_once() -> None:
    world, session, call_id = streaming()
    part(world, call_id, 0)
    world.machine.clients.unreachable(b"c1", world.now)
    part(world, call_id, 1, 2)
    resume(world, session)
    assert heard(world, session) == [0, 1, 2]


@pytest.mark.parametrize("heard_before", [True, False])
def test_parts_of_a_stream_that_has_ended_come_before_its_outcome(heard_before: bool) -> None:
    world, session, call_id = streaming()
    part(world, call_id, 0, 1)
    end(world, call_id, 2)
    if heard_before:
        assert heard(world, session) == [0, 1, "OK"]
    resume(world, session)
    assert heard(world, session) == [0, 1, "OK"]


def test_acknowledged_outcome_lets_go_of_its_parts() -> None:
    world, session, call_id = streaming()
    part(world, call_id, 0, 1)
    end(world, call_id, 2)
    heard(world, session)
    assert session.kept.size
    world.client_says("c1", messages.Ack(EPOCH, 1))
    assert (session.kept.by_call, session.kept.size) == ({}, 0)
    resume(world, session, ack=1)
    assert heard(world, session) == []


def test_parts_kept_are_bounded_in_number_and_bytes() -> None:
    world, session, call_id = streaming()
    # a caller that promises to take far more than it takes
    credit(world, call_id, 10_000)
    part(world, call_id, *range(3 * WINDOW))
    assert len(session.kept.by_call[call_id]) == WINDOW
    other = world.call()
    part(world, other, *range(WINDOW), body=bytes(2 * 1024 * 1024))
    assert session.kept.size <= bounds.STREAM_KEPT_BYTES_MAX
    kept = [len(entries) for entries in session.kept.by_call.values()]
    assert kept == [WINDOW, 7], "the stream that is too large pays, not the other"


def test_session_that_ends_keeps_nothing() -> None:
    world, session, call_id = streaming()
    part(world, call_id, 0)
    world.machine.clients.unreachable(b"c1", world.now)
    world.later(2)
    assert (session.kept.by_call, session.kept.size) == ({}, 0)


def test_stream_whose_parts_the_broker_never_had_does_not_succeed() -> None:
    world, session, call_id = streaming()
    part(world, call_id, 0)
    end(world, call_id, 3)
    assert heard(world, session) == [0, "BROKER_LOST"]


def test_outcome_of_a_worker_that_counts_no_parts_tells_the_brokers_count() -> None:
    world, session, call_id = streaming()
    part(world, call_id, 0, 1)
    end(world, call_id, 0)
    told = [message for message, _ in world.heard_by(session) if isinstance(message, messages.Outcomes)]
    assert [outcome.parts for message in told for outcome in message.outcomes] == [2]
