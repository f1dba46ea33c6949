"""A client that is slow to read: its calls wait, its memory is bounded, and it loses nothing that could be kept."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

import mcp_broker.limits as bounds
from mcp_broker.wire import messages, node, payload
from tests.core.support import EPOCH, FakeGrant, World, definition

if TYPE_CHECKING:
    from mcp_broker.core.client_session import ClientSession

BODY = bytes(1024 * 1024)
#: results after which a client is behind
BEHIND = bounds.CLIENT_BEHIND_BYTES // len(BODY)


def answer_large(world: World, worker_id: str, call_id: bytes, body: bytes = BODY) -> None:
    outcome = messages.Outcome(call_id, "OK", None, None)
    world.worker_says(worker_id, messages.Outcomes(EPOCH, 1, (outcome,)), body)


def behind(calls: int, depth: int = 1) -> tuple[World, list[bytes]]:
    """A client that has asked for so much and read nothing; returns the calls that wait for it."""
    world = World()
    session = world.hello()
    world.ready(depth=depth)
    ids = [world.call() for _ in range(calls)]
    done = 0
    while given := world.dispatched("echo-1"):
        for call_id in given:
            answer_large(world, "echo-1", call_id)
            world.heard_by(session)
            done += 1
        world.check()
    return world, ids[done:]


def test_client_that_reads_nothing_has_its_calls_wait() -> None:
    world, waiting = behind(100)
    assert len(waiting) == 100 - BEHIND
    session = world.machine.clients.open[b"c1"]
    assert session.unacked_bytes < bounds.CLIENT_BEHIND_BYTES + 2 * len(BODY)
    assert world.call() in world.machine.ledger.calls, "more are accepted, up to the window"
    assert world.dispatched("echo-1") == []
    world.check()


def test_another_client_is_served_meanwhile() -> None:
    world, _ = behind(100)
    other = world.hello("c2")
    call_id = world.call("c2")
    assert world.dispatched("echo-1") == [call_id]
    world.answer("echo-1", call_id)
    assert world.outcomes(other) == {call_id: "OK"}


def test_calls_go_on_in_their_order_once_the_client_has_read() -> None:
    world, waiting = behind(100)
    last = world.call()
    world.client_says("c1", messages.Ack(EPOCH, BEHIND // 2))
    assert world.dispatched("echo-1") == [], "not before half of it is read"
    world.client_says("c1", messages.Ack(EPOCH, BEHIND))
    world.check()
    run = []
    while given := world.dispatched("echo-1"):
        run += given
        for call_id in given:
            world.answer("echo-1", call_id)
    assert run == [*waiting, last]
    world.check()


def test_acknowledgement_that_rides_in_calls_or_hello_counts_too() -> None:
    for again in (True, False):
        world, waiting = behind(30)
        session = world.machine.clients.open[b"c1"]
        if again:
            world.machine.clients.unreachable(b"c1", world.now)
            hello = messages.Hello(0, "MCPB", (1,), "token", session.session_id, ack=BEHIND)
            world.machine.clients.hello(b"c1", "key-c1", hello, session.grant, world.now)
        else:
            request = messages.Call(b"n" * 16, "echo.echo", 1000, payload.pack({}))
            world.client_says("c1", messages.Calls(EPOCH, BEHIND, (request,)))
        assert world.dispatched("echo-1") == waiting[:1]
        world.check()


def test_tool_with_large_results_is_given_few_calls_at_a_time_to_begin_with() -> None:
    world, _ = behind(3, depth=1)
    world.client_says("c1", messages.Ack(EPOCH, 3))
    world.ready("echo-2", depth=200)
    calls = [world.call() for _ in range(100)]
    assert world.dispatched("echo-2") == calls[1:BEHIND], "one is at the other worker"
    world.check()


def test_small_results_of_a_tool_that_was_expected_to_make_large_ones_let_the_others_go_on() -> None:
    world, _ = behind(3, depth=1)
    world.client_says("c1", messages.Ack(EPOCH, 3))
    for _ in range(100):
        world.call()
    done = 0
    while given := world.dispatched("echo-1"):
        for call_id in given:
            world.answer("echo-1", call_id)
        done += len(given)
        world.check()
    assert done == 100
    assert world.machine.registry.tools["echo.echo"].result_bytes == 0
    assert not len(world.machine.dispatcher.backpressure)


def test_results_beyond_the_bound_are_dropped_and_said_to_be() -> None:
    # nobody knew that they would be large
    world = World()
    session = world.hello()
    world.ready("echo-1", depth=bounds.WORKER_DEPTH_MAX)
    world.ready("echo-2", depth=bounds.WORKER_DEPTH_MAX)
    for _ in range(400):
        world.call()
    given = [(name, call_id) for name in ("echo-1", "echo-2") for call_id in world.dispatched(name)]
    assert len(given) == 400
    for number, (worker_id, call_id) in enumerate(given):
        answer_large(world, worker_id, call_id)
        assert session.unread_bytes <= bounds.CLIENT_UNREAD_BYTES_MAX + bounds.ENVELOPE_BYTES_MAX
        if number % 7 == 0:
            world.heard_by(session)
    kept = bounds.CLIENT_UNREAD_BYTES_MAX // len(BODY)
    world.heard_by(session)
    assert sum(len(sent.entries) for sent in session.unacked) == 400
    assert kept - 1 <= world.machine.ledger.succeeded <= kept, "envelopes take some room too"
    assert world.machine.ledger.failed == {"RESOURCE_EXHAUSTED": 400 - world.machine.ledger.succeeded}
    last = session.unacked[-1].entries[-1]
    assert "echo.echo ran" in last.fault.message
    assert payload.unpack_map(last.fault.details)["limit_bytes"] == bounds.CLIENT_UNREAD_BYTES_MAX
    assert not last.fault.retryable
    world.check()


def test_share_of_a_call_whose_worker_dies_goes_with_it() -> None:
    world, _ = behind(3, depth=1)
    session = world.machine.clients.open[b"c1"]
    world.client_says("c1", messages.Ack(EPOCH, 3))
    world.call()
    assert session.expected_bytes == len(BODY)
    world.died("echo-1", started_seq=4)
    world.later(1)
    assert list(world.outcomes(session).values()) == ["WORKER_LOST"]
    assert session.expected_bytes == 0


def test_time_passes_for_calls_that_wait_for_their_client() -> None:
    world, waiting = behind(30)
    session = world.machine.clients.open[b"c1"]
    world.client_says("c1", messages.Cancel(EPOCH, (waiting[0],)))
    assert world.outcomes(session) == {waiting[0]: "CANCELLED"}
    world.check()
    world.later(60)
    assert world.outcomes(session) == dict.fromkeys(waiting[1:], "DEADLINE_EXCEEDED")
    assert world.machine.dispatcher.pools["echo"].waiting.bytes == 0
    world.check()


def test_client_that_goes_away_leaves_nothing() -> None:
    world, waiting = behind(30)
    world.client_says("c1", messages.Goodbye(EPOCH, "done"))
    assert world.machine.ledger.failed == {"CANCELLED": len(waiting)}
    assert len(world.machine.dispatcher.backpressure) == 0
    world.check()


def test_pool_that_is_given_up_ends_calls_that_wait_for_their_client() -> None:
    world, waiting = behind(30)
    session = world.machine.clients.open[b"c1"]
    report = node.PoolReport(
        name="echo", state="failed", wanted=1, workers=(), restarts=0, reason="no module"
    )
    world.machine.from_node(node.Report((report,)), world.now)
    assert world.outcomes(session) == dict.fromkeys(waiting, "UNAVAILABLE")
    world.check()


def test_small_results_never_make_calls_wait() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=1)
    for number in range(3000):
        call_id = world.call()
        assert world.dispatched("echo-1") == [call_id]
        world.answer("echo-1", call_id)
        world.heard_by(session)
        if number % 500 == 0:
            world.client_says("c1", messages.Ack(EPOCH, session.sent))
    assert not world.machine.dispatcher.backpressure


def test_detached_calls_that_wait_for_a_client_that_goes_away_go_on_without_it() -> None:
    world, _ = behind(BEHIND)
    session = world.machine.clients.open[b"c1"]
    extra = messages.CallExtra(detach=True)
    calls = [
        messages.Call(bytes([0xD0 + n]) * 16, "echo.echo", 30_000, payload.pack({}), extra) for n in range(3)
    ]
    world.client_says("c1", messages.Calls(EPOCH, 0, tuple(calls)))
    assert len(world.machine.dispatcher.backpressure) == 3
    world.client_says("c1", messages.Goodbye(EPOCH, "later"))
    run = []
    while given := world.dispatched("echo-1"):
        run += given
        for call_id in given:
            answer_large(world, "echo-1", call_id)
    assert run == [call.call_id for call in calls]
    assert session.expected_bytes == 0
    assert len(world.machine.dispatcher.backpressure) == 0


@pytest.mark.parametrize("large", [False, True])
def test_client_with_large_results_has_its_share_of_the_places_and_no_more(large: bool) -> None:
    world = World()
    world.ready(depth=1)
    sessions = {
        name: world.hello(name, FakeGrant(principal=name, weight=weight, priority=priority))
        for name, weight, priority in (("large", 1, 0), ("even", 1, 0), ("heavy", 3, 0), ("low", 100, 2))
    }
    body = BODY[:200_000] if large else None
    world.call("large")
    served: list[str] = []
    for _ in range(600):
        (call_id,) = world.dispatched("echo-1")
        name = next(name for name, session in sessions.items() if call_id in session.live)
        served.append(name)
        if name == "large" and body is not None:
            answer_large(world, "echo-1", call_id, body)
        else:
            world.answer("echo-1", call_id)
        for each, session in sessions.items():
            world.heard_by(session)
            world.client_says(each, messages.Ack(EPOCH, session.sent))
            # all ask for more than is done, and "large" for more than its client may be expected to read at a time
            missing = (300 if each == "large" else 20) - len(session.live)
            world.calls(each, ["echo.echo"] * missing)
        world.later(0.001)
    world.check()
    assert bool(world.machine.dispatcher.backpressure) is large
    shares = Counter(served[100:])
    assert shares["low"] == 0, "a lower class waits"
    assert abs(shares["large"] - 100) <= 10
    assert abs(shares["even"] - 100) <= 10
    assert abs(shares["heavy"] - 300) <= 10


def test_outcomes_of_others_do_not_look_at_clients_that_are_behind() -> None:
    world, _ = behind(100)
    world.hello("c2")
    world.serve("fast-1", 4, "fast", definition("fast.echo"))
    looked: list[str] = []
    relieve = world.machine.dispatcher.relieve

    def look(session: ClientSession, now: float) -> None:
        looked.append(session.routing_id.decode())
        relieve(session, now)

    world.machine.dispatcher.relieve = look  # type: ignore[method-assign]
    call_id = world.call("c2", "fast.echo")
    world.answer("fast-1", call_id)
    assert looked == []
    # one of its own had a place when it fell behind: its end is news
    session = world.machine.clients.open[b"c1"]
    world.client_says("c1", messages.Ack(EPOCH, BEHIND))
    looked.clear()
    (given, *_) = world.dispatched("echo-1")
    world.answer("echo-1", given)
    assert looked == ["c1"]
    assert session.is_behind
    world.check()


def test_calls_without_a_client_go_on_when_those_before_them_died_with_their_worker() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=64)
    first = world.call()
    answer_large(world, "echo-1", first)
    world.heard_by(session)
    world.client_says("c1", messages.Ack(EPOCH, 1))
    ids = [world.call(detach=True) for _ in range(BEHIND + 10)]
    given = world.dispatched("echo-1")[1:]
    assert len(given) < len(ids)
    world.client_says("c1", messages.Goodbye(EPOCH))
    world.admit("echo-2")
    world.died("echo-1", started_seq=1 + len(given))
    world.later(0.1)
    world.serve("echo-2", 64, "echo", definition("echo.echo"))
    world.later(bounds.HEARTBEAT_S)
    assert world.dispatched("echo-2") == ids[len(given) :]
    world.check()


def test_what_all_clients_have_yet_to_read_is_bounded_and_costs_who_reads_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "UNREAD_BYTES_MAX", 10 * len(BODY))
    world = World()
    greedy = [world.hello(f"g{number}", FakeGrant(principal="greedy")) for number in range(4)]
    modest = world.hello("m", FakeGrant(principal="modest"))
    world.ready(depth=bounds.WORKER_DEPTH_MAX)
    for name, count in (("g0", 1), ("g1", 4), ("g2", 2), ("g3", 2), ("m", 3)):
        for _ in range(count):
            world.call(name)
    for call_id in world.dispatched("echo-1"):
        answer_large(world, "echo-1", call_id)
    waiting = world.call("g1")
    for session in (*greedy, modest):
        world.heard_by(session)
    world.later(bounds.HEARTBEAT_S)
    left = world.machine.clients.sessions.values()
    assert set(left) == {greedy[0], greedy[2], greedy[3], modest}, "8 MiB, after the largest went"
    assert sum(session.held_bytes for session in left) <= bounds.UNREAD_BYTES_MAX
    assert world.machine.clients.cut_offs == 1
    assert waiting not in world.machine.ledger.calls, "what it still waits for is cancelled"
    assert not world.client_says("g1", messages.Ack(EPOCH, 4)), "its client is told that it has no session"
    world.check()


def test_parts_that_nobody_takes_count_as_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "UNREAD_BYTES_MAX", 2 * len(BODY))
    world = World()
    session = world.hello()
    world.ready(streaming=True)
    call_id = world.call()
    for index in range(3):
        part = messages.Part(call_id, index, None)
        world.worker_says("echo-1", messages.Partial(EPOCH, (part,)), BODY)
    world.heard_by(session)
    world.later(bounds.HEARTBEAT_S)
    assert not world.machine.clients.sessions


def test_one_principal_cannot_have_all_sessions() -> None:
    world = World()
    for number in range(bounds.PRINCIPAL_SESSIONS_MAX):
        world.hello(f"g{number}", FakeGrant(principal="greedy"))
    hello = messages.Hello(0, "MCPB", (1,), "token")
    more = (FakeGrant(principal="greedy"), FakeGrant(principal="modest"))
    opened = [
        world.machine.clients.hello(grant.caller.principal.encode(), "key", hello, grant, world.now)
        for grant in more
    ]
    assert [session is not None for session in opened] == [False, True]
