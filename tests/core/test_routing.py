"""The broker's machine: acceptance, dispatch, deaths, deadlines, sessions."""

from __future__ import annotations

import pytest

import mcp_broker.limits as bounds
from mcp_broker.core import introspection
from mcp_broker.core.client_session import ClientState
from mcp_broker.wire import codec, messages, node
from tests.core.support import EPOCH, FakeGrant, World, definition


def test_call_without_a_worker_waits_for_one() -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1")
    world.died("echo-1")
    world.later(1)
    call_id = world.call()
    assert world.outcomes(session) == {}
    world.ready("echo-2")
    assert world.dispatched("echo-2") == [call_id]
    world.check()


def test_worker_with_no_credit_gets_no_calls() -> None:
    world = World()
    world.hello()
    world.ready(depth=2)
    first, second, third = world.call(), world.call(), world.call()
    assert world.dispatched("echo-1") == [first, second]
    world.answer("echo-1", first)
    assert world.dispatched("echo-1") == [third]
    world.check()


def test_call_goes_to_the_worker_that_holds_the_fewest() -> None:
    world = World()
    world.hello()
    world.ready("echo-1")
    world.ready("echo-2")
    for _ in range(6):
        world.call()
    assert len(world.dispatched("echo-1")) == len(world.dispatched("echo-2")) == 3


def test_deadline_passes_in_the_queue() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=0)
    call_id = world.call(timeout_s=0.5)
    world.later(0.4)
    assert world.outcomes(session) == {}
    world.later(0.2)
    assert world.outcomes(session) == {call_id: "DEADLINE_EXCEEDED"}
    assert world.interrupts() == [], "nothing ran, so nothing is killed"
    world.check()


def test_ended_call_occupies_its_worker_until_it_says_so() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=1)
    call_id = world.call(timeout_s=0.1)
    world.later(0.2)
    assert world.outcomes(session) == {call_id: "DEADLINE_EXCEEDED"}
    waiting = world.call()
    assert waiting not in world.dispatched("echo-1")
    world.answer("echo-1", call_id, "CANCELLED")
    assert world.dispatched("echo-1") == [waiting]
    assert world.outcomes(session) == {}, "the late outcome is nobody's"
    world.check()


def test_kill_stops_climbing_once_the_worker_has_answered() -> None:
    world = World()
    world.hello()
    world.ready()
    call_id = world.call()
    world.client_says("c1", messages.Cancel(EPOCH, (call_id,)))
    world.answer("echo-1", call_id, "CANCELLED")
    world.later(1)
    assert [interrupt.stage for interrupt in world.interrupts()] == ["raise"]


def test_a_call_that_starts_after_its_end_is_stopped_too() -> None:
    world = World()
    world.hello()
    world.ready()
    long, ended = world.call(), world.call(timeout_s=0.1)
    world.later(2)
    world.machine.to_node.clear()
    world.answer("echo-1", long)
    # it waited behind the long one, and the supervisor spares what has not started: only now a kill can reach it
    world.later(0.5)
    stages = [interrupt.stage for interrupt in world.interrupts() if interrupt.seq == 2]
    assert stages[:2] in (["term", "kill"], ["kill", "term"])
    world.answer("echo-1", ended, "CANCELLED")
    world.machine.to_node.clear()
    world.later(bounds.ORPHAN_S)
    assert world.interrupts() == []
    assert len(world.machine.timers) == 0


def whatever(world: World) -> list[node.Interrupt]:
    return [order for order in world.interrupts() if order.seq == node.WHATEVER]


def test_a_worker_that_never_lets_go_of_an_ended_call_is_killed_whatever_it_says_it_runs() -> None:
    world = World()
    world.hello()
    world.ready()
    world.call(timeout_s=0.1)
    world.later(bounds.KILL_UNHEEDED_S)
    assert whatever(world) == []
    # what it was given since then waits behind, and is no reason to spare it
    world.call(timeout_s=60)
    world.later(1)
    order = whatever(world)[0]
    assert (order.worker_id, order.stage, order.why) == ("echo-1", "kill", "deadline")


def test_a_worker_is_not_killed_for_an_ended_call_while_one_that_it_had_beside_it_may_run() -> None:
    world = World()
    session = world.hello()
    world.ready()
    # its outcome may wait in the worker for that of the next one, which takes its time
    ended, long = world.call(timeout_s=0.1), world.call(timeout_s=30)
    world.later(29)
    assert whatever(world) == []
    assert world.outcomes(session) == {ended: "DEADLINE_EXCEEDED"}
    world.answer("echo-1", ended)
    world.answer("echo-1", long)
    assert world.outcomes(session) == {long: "OK"}
    world.later(bounds.KILL_UNHEEDED_S * 2)
    assert whatever(world) == []
    assert len(world.machine.timers) == 0


def test_outcome_that_was_on_its_way_when_the_worker_died_still_counts() -> None:
    world = World()
    session = world.hello()
    world.ready()
    call_id = world.call()
    world.died("echo-1", started_seq=1)
    world.answer("echo-1", call_id)
    world.later(1)
    assert world.outcomes(session) == {call_id: "OK"}


def test_started_call_of_a_tool_that_is_not_idempotent_is_never_run_again() -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1")
    world.ready("echo-2")
    world.call()
    call_id = world.call()
    victim = "echo-1" if call_id in world.dispatched("echo-1") else "echo-2"
    world.died(victim, started_seq=1)
    world.later(1)
    assert world.outcomes(session)[call_id] == "WORKER_LOST"
    other = "echo-2" if victim == "echo-1" else "echo-1"
    assert call_id not in world.dispatched(other)


def test_calls_that_a_dead_worker_had_not_started_go_to_another_at_once_and_first() -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1", depth=3)
    held = [world.call() for _ in range(3)]
    waiting = world.call()
    world.ready("echo-2", depth=3)
    assert world.dispatched("echo-2") == [waiting]
    world.died("echo-1", started_seq=1)
    world.later(1)
    assert world.outcomes(session) == {held[0]: "WORKER_LOST"}
    assert world.dispatched("echo-2") == held[1:]
    world.check()


def test_worker_learns_which_of_its_outcomes_arrived() -> None:
    world = World()
    session = world.hello()
    world.ready()
    call_id = world.call()
    world.heard_by_worker("echo-1")
    world.answer("echo-1", call_id)
    assert world.outcomes(session) == {call_id: "OK"}
    world.later(bounds.HEARTBEAT_S * 2)
    assert not [one for one in world.heard_by_worker("echo-1") if isinstance(one, messages.Ack)]
    world.client_says("c1", messages.Ack(EPOCH, 1))
    world.later(bounds.HEARTBEAT_S * 2)
    assert messages.Ack(EPOCH, 1) in world.heard_by_worker("echo-1")


def test_renewed_token_must_be_the_same_principals() -> None:
    world = World()
    session = world.hello()
    clients = world.machine.clients
    assert not clients.renew(b"c1", "key-c1", FakeGrant(principal="somebody else"), world.now)
    assert session.grant.caller.principal == "tester"
    assert clients.renew(b"c1", "key-c1", FakeGrant(expires_at=world.now + 5), world.now)


def test_failed_pool_tells_its_callers_at_once() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=0)
    waiting = world.call()
    report = node.PoolReport(name="echo", state="failed", wanted=1, reason="No module named 'duckdb'")
    world.machine.from_node(node.Report((report,)), world.now)
    later = world.call()
    assert world.outcomes(session) == {waiting: "UNAVAILABLE", later: "UNAVAILABLE"}
    world.check()


def test_expired_grant_refuses_calls_on_a_live_session() -> None:
    world = World()
    session = world.hello(grant=FakeGrant(expires_at=world.now + 1))
    world.ready()
    fine = world.call()
    world.later(2)
    refused = world.call()
    world.answer("echo-1", fine)
    assert world.outcomes(session) == {refused: "UNAUTHENTICATED", fine: "OK"}


def test_tool_registered_later_is_found_by_old_sessions() -> None:
    world = World()
    session = world.hello()
    missing = world.call()
    world.ready()
    world.call()
    assert world.outcomes(session) == {missing: "NOT_FOUND"}
    assert len(world.dispatched("echo-1")) == 1


def test_tool_of_a_pool_that_is_starting_is_not_said_to_be_missing() -> None:
    world = World()
    session = world.hello()
    starting = node.PoolReport(name="echo", state="starting", wanted=1)
    world.machine.from_node(node.Report((starting,)), world.now)
    early = world.call()
    assert world.faults(session)[early]["pools"] == ["echo"]
    world.ready()
    missing = world.call(tool="echo.nothing")
    assert world.outcomes(session) == {missing: "NOT_FOUND"}


def test_tool_that_is_only_remembered_may_move_to_another_pool() -> None:
    world = World()
    session = world.hello()
    world.machine.from_node(node.Tools("old", (definition("echo.echo"),)), world.now)
    waiting = world.call()
    world.ready()
    moved = world.call()
    assert world.dispatched("echo-1") == [moved]
    world.admit("old-1", pool="old")
    world.worker_says("old-1", messages.Register(0, "MCPB", (1,), (definition("echo.echo"),)))
    assert any(isinstance(message, node.WorkerRefused) for message in world.machine.to_node)
    failed = node.PoolReport(name="old", state="failed", wanted=1, reason="its tools are served elsewhere")
    world.machine.from_node(node.Report((failed,)), world.now)
    assert world.outcomes(session) == {waiting: "UNAVAILABLE"}


def test_new_definition_of_a_live_tool_is_refused() -> None:
    world = World()
    world.ready("echo-1")
    world.admit("echo-2")
    changed = definition("echo.echo", version="2.0.0")
    world.worker_says("echo-2", messages.Register(0, "MCPB", (1,), (changed,)))
    assert any(isinstance(message, node.WorkerRefused) for message in world.machine.to_node)


def test_new_definition_replaces_the_old_one_when_nobody_serves_it() -> None:
    world = World()
    world.ready("echo-1")
    world.died("echo-1")
    world.later(1)
    world.ready("echo-2", version="2.0.0")
    assert world.machine.registry.tools["echo.echo"].definition.version == "2.0.0"


def test_names_under_system_are_the_brokers_own() -> None:
    world = World()
    world.admit("evil-1", "evil")
    world.worker_says("evil-1", messages.Register(0, "MCPB", (1,), (definition("system.status"),)))
    assert any(isinstance(message, node.WorkerRefused) for message in world.machine.to_node)
    assert world.machine.registry.tools["system.status"].pool is None


def test_session_that_is_lost_keeps_its_calls_for_a_moment() -> None:
    world = World()
    session = world.hello()
    world.ready()
    call_id = world.call()
    world.machine.clients.unreachable(b"c1", world.now)
    world.later(bounds.RESUME_GRACE_S / 2)
    assert world.interrupts() == []
    resumed = world.hello(session_id=session.session_id)
    world.later(2)
    assert resumed is session
    world.answer("echo-1", call_id)
    assert world.outcomes(session) == {call_id: "OK"}


def test_session_that_does_not_come_back_has_its_calls_cancelled() -> None:
    world = World()
    session = world.hello()
    world.ready()
    world.call()
    world.machine.clients.unreachable(b"c1", world.now)
    world.later(bounds.RESUME_GRACE_S + 0.01)
    assert session.state is ClientState.CLOSED
    assert [interrupt.why for interrupt in world.interrupts()] == ["cancel"]
    assert world.machine.ledger.failed == {"CANCELLED": 1}
    world.check()


def test_unacknowledged_outcomes_are_sent_again_with_their_numbers() -> None:
    world = World()
    session = world.hello()
    world.ready()
    first, second = world.call(), world.call()
    world.answer("echo-1", first)
    world.heard_by(session)
    world.answer("echo-1", second)
    world.heard_by(session)
    world.client_says("c1", messages.Ack(EPOCH, 1))
    world.machine.clients.unreachable(b"c1", world.now)
    world.hello(session_id=session.session_id)
    again = [message for message, _ in world.heard_by(session) if isinstance(message, messages.Outcomes)]
    assert [(message.first, message.outcomes[0].call_id) for message in again] == [(2, second)]


def test_call_that_is_sent_again_after_a_resume_does_not_run_again() -> None:
    world = World()
    session = world.hello()
    world.ready()
    ended, running = world.call(), world.call()
    world.machine.clients.unreachable(b"c1", world.now)
    world.answer("echo-1", ended)
    world.hello(session_id=session.session_id)
    world.answer("echo-1", running)
    world.heard_by_worker("echo-1")
    again = tuple(messages.Call(call_id, "echo.echo", 1000, b"\x80") for call_id in (ended, running))
    world.client_says("c1", messages.Calls(EPOCH, 0, again))
    assert world.dispatched("echo-1") == []
    assert world.outcomes(session) == {ended: "OK", running: "OK"}
    world.check()


def test_call_that_is_sent_again_while_the_broker_drains_goes_on() -> None:
    world = World()
    session = world.hello()
    world.ready()
    call_id = world.call()
    world.machine.from_node(node.Shutdown(5.0), world.now)
    again = messages.Call(call_id, "echo.echo", 1000, b"\x80")
    world.client_says("c1", messages.Calls(EPOCH, 0, (again,)))
    assert world.outcomes(session) == {}
    world.answer("echo-1", call_id)
    assert world.outcomes(session) == {call_id: "OK"}
    world.check()


@pytest.mark.parametrize("does_acknowledge", [True, False])
def test_broker_that_drains_stays_until_its_last_outcomes_are_acknowledged_or_for_a_moment(
    does_acknowledge: bool,
) -> None:
    world = World()
    session = world.hello()
    world.ready()
    call_id = world.call()
    world.machine.from_node(node.Shutdown(5.0), world.now)
    world.answer("echo-1", call_id)
    world.later(0.1)
    # the client answers this one with ACK
    heard = [type(message) for message, _ in world.heard_by(session)]
    assert heard[-1] is messages.Heartbeat
    assert messages.Outcomes in heard
    assert world.machine.drained is False
    assert world.machine.deadline() <= world.now + bounds.PART_S
    if does_acknowledge:
        world.client_says("c1", messages.Ack(EPOCH, 1))
    world.later(0.01 if does_acknowledge else bounds.PART_S)
    assert bool(world.machine.drained)
    assert [type(message) for message, _ in world.heard_by(session)][-1] is messages.Goodbye


def test_call_with_an_id_in_use_by_another_session_is_refused() -> None:
    world = World()
    world.hello("c1")
    other = world.hello("c2")
    world.ready()
    call_id = world.call("c1")
    stolen = messages.Calls(EPOCH, 0, (messages.Call(call_id, "echo.echo", 1000, b"\x80"),))
    world.client_says("c2", stolen)
    assert world.outcomes(other) == {call_id: "INVALID_ARGUMENT"}
    assert len(world.dispatched("echo-1")) == 1
    world.check()


def test_window_bounds_what_a_session_may_have_unfinished() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=1)
    for _ in range(bounds.CLIENT_WINDOW_MAX):
        world.call()
    assert world.outcomes(session) == {}
    refused = world.call()
    assert world.outcomes(session) == {refused: "OVERLOADED"}


def test_parts_out_of_order_end_the_stream_as_the_workers_fault() -> None:
    world = World()
    session = world.hello()
    world.ready(streaming=True)
    call_id = world.call()
    world.worker_says("echo-1", messages.Partial(EPOCH, (messages.Part(call_id, 1, b"\xc0"),)))
    assert world.outcomes(session) == {call_id: "INTERNAL"}


def test_worker_is_told_what_its_caller_takes_and_how_the_arguments_are_encoded() -> None:
    world = World()
    hello = messages.Hello(0, "MCPB", (1,), "t", capabilities=("zstd", "x-other"))
    world.machine.clients.hello(b"c1", "key-c1", hello, FakeGrant(), world.now)
    world.ready()
    extra = messages.CallExtra(encoding="zstd")
    request = messages.Call(b"i" * 16, "echo.echo", 1000, b"opaque", extra)
    world.client_says("c1", messages.Calls(EPOCH, 0, (request,)))
    [dispatch] = [
        dispatch
        for message in world.heard_by_worker("echo-1")
        if isinstance(message, messages.Dispatches)
        for dispatch in message.calls
    ]
    assert (dispatch.arguments, dispatch.extra) == (b"opaque", extra)
    assert codec.decode_caller(dispatch.caller).encodings == ("zstd",)
    world.machine.clients.renew(b"c1", "key-c1", FakeGrant(), world.now)
    session = world.machine.clients.open[b"c1"]
    assert codec.decode_caller(session.caller_raw).encodings == ("zstd",)


def test_brokers_own_tools_open_no_encoded_arguments() -> None:
    world = World()
    session = world.hello()
    request = messages.Call(b"i" * 16, "system.tools", 1000, b"x", messages.CallExtra(encoding="zstd"))
    world.client_says("c1", messages.Calls(EPOCH, 0, (request,)))
    assert world.outcomes(session) == {b"i" * 16: "INVALID_ARGUMENT"}


def test_worker_may_not_speak_for_the_broker() -> None:
    world = World()
    session = world.hello()
    world.ready()
    call_id = world.call()
    world.answer("echo-1", call_id, "FORBIDDEN")
    assert world.outcomes(session) == {call_id: "INTERNAL"}


def test_refusals_that_nobody_acknowledges_are_bounded() -> None:
    world = World()
    session = world.hello(grant=FakeGrant("other.tool"))
    for _ in range(8 * bounds.CLIENT_WINDOW_MAX):
        world.call()
        world.heard_by(session)
    assert len(session.unacked) <= 4 * bounds.CLIENT_WINDOW_MAX
    assert session.state is ClientState.CLOSED
    assert len(world.machine.ledger) == 0


def test_credit_that_lets_nobody_go_on_is_not_forwarded() -> None:
    world = World()
    world.hello()
    world.ready()
    call_id = world.call()
    world.heard_by_worker("echo-1")
    for limit in range(10_000):
        world.client_says("c1", messages.Credit(EPOCH, (messages.StreamCredit(call_id, 2**40 + limit),)))
    assert world.heard_by_worker("echo-1") == [], "the tool does not stream"


def test_credit_of_a_stream_is_bounded_by_the_parts_taken() -> None:
    world = World()
    world.hello()
    world.ready(streaming=True)
    call_id = world.call()
    world.heard_by_worker("echo-1")
    for limit in range(10_000):
        world.client_says("c1", messages.Credit(EPOCH, (messages.StreamCredit(call_id, limit),)))
    credits_ = [
        message for message in world.heard_by_worker("echo-1") if isinstance(message, messages.Credit)
    ]
    assert sum(len(message.credits) for message in credits_) <= bounds.STREAM_AHEAD_MAX
    assert max(credit.limit for message in credits_ for credit in message.credits) == bounds.STREAM_AHEAD_MAX


def test_worker_that_is_about_to_run_out_hears_of_a_little_credit() -> None:
    world = World()
    world.hello()
    world.ready(streaming=True)
    call_id = world.call()
    for index in range(bounds.STREAM_WINDOW_MAX - 2):
        world.worker_says("echo-1", messages.Partial(EPOCH, (messages.Part(call_id, index, b"\xc0"),)))
    world.heard_by_worker("echo-1")
    limit = bounds.STREAM_WINDOW_MAX + 2
    world.client_says("c1", messages.Credit(EPOCH, (messages.StreamCredit(call_id, limit),)))
    [heard] = world.heard_by_worker("echo-1")
    assert heard == messages.Credit(EPOCH, (messages.StreamCredit(call_id, limit),))


def test_credit_given_while_the_call_waits_reaches_its_worker() -> None:
    world = World()
    world.hello()
    world.ready(depth=0, streaming=True)
    call_id = world.call()
    world.client_says("c1", messages.Credit(EPOCH, (messages.StreamCredit(call_id, 40),)))
    world.worker_says("echo-1", messages.Ready(EPOCH, 1))
    kinds = [type(message) for message in world.heard_by_worker("echo-1")]
    assert kinds.index(messages.Dispatches) < kinds.index(messages.Credit)


def test_parts_beyond_the_credit_end_the_stream_as_the_workers_fault() -> None:
    world = World()
    session = world.hello()
    world.ready(streaming=True)
    call_id = world.call()
    for index in range(bounds.STREAM_WINDOW_MAX + 1):
        world.worker_says("echo-1", messages.Partial(EPOCH, (messages.Part(call_id, index, b"\xc0"),)))
    assert world.outcomes(session) == {call_id: "INTERNAL"}
    world.later(1)
    stages = [interrupt.stage for interrupt in world.interrupts()]
    assert stages[:3] == ["raise", "term", "kill"], "its slot is freed"
    world.check()


def test_id_of_an_ended_call_that_a_worker_still_holds_cannot_be_used_again() -> None:
    world = World()
    world.hello("c1")
    other = world.hello("c2")
    world.ready()
    call_id = world.call("c1")
    world.client_says("c1", messages.Cancel(EPOCH, (call_id,)))
    again = messages.Calls(EPOCH, 0, (messages.Call(call_id, "echo.echo", 1000, b"\x80"),))
    world.client_says("c2", again)
    assert world.outcomes(other) == {call_id: "INVALID_ARGUMENT"}
    world.answer("echo-1", call_id)
    assert world.outcomes(other) == {}
    world.client_says("c2", again)
    assert world.dispatched("echo-1")[-1:] == [call_id], "once the worker has let go, it is free"


def test_suggestions_are_few_in_a_given_time() -> None:
    world = World()
    session = world.hello()
    world.ready()
    for _ in range(bounds.HINTS_MAX + 5):
        world.call(tool="echo.ecko")
    said = [
        outcome.fault.message
        for message, _ in world.heard_by(session)
        if isinstance(message, messages.Outcomes)
        for outcome in message.outcomes
        if outcome.fault is not None
    ]
    assert sum("did you mean" in text for text in said) == bounds.HINTS_MAX


@pytest.mark.parametrize("text", ["[" * 10_000, '{"maximum": 100000000000000000000}', '{"a":"\\ud800"}', "{"])
def test_schema_that_could_not_be_listed_is_refused(text: str) -> None:
    world = World()
    world.admit("echo-1")
    world.worker_says(
        "echo-1", messages.Register(0, "MCPB", (1,), (definition("echo.echo", parameters=text),))
    )
    assert any(isinstance(message, node.WorkerRefused) for message in world.machine.to_node)


def test_two_calls_cannot_share_a_second_frame() -> None:
    world = World()
    session = world.hello()
    world.ready()
    calls = tuple(messages.Call(bytes([at]) * 16, "echo.echo", 1000, None) for at in (1, 2))
    world.client_says("c1", messages.Calls(EPOCH, 0, calls), b"\x80")
    assert world.outcomes(session) == {call.call_id: "INVALID_ARGUMENT" for call in calls}


def test_pool_is_ready_when_its_workers_can_be_shown_too() -> None:
    world = World()
    world.ready()

    def pool(*workers: node.WorkerReport) -> tuple[str, int]:
        report = node.PoolReport(name="echo", state="ready", wanted=1, workers=workers)
        world.machine.from_node(node.Report((report,)), world.now)
        (told,) = introspection.status(world.machine)["pools"]
        return told["state"], told["ready"]

    assert pool() == ("starting", 0), "it has registered, and its supervisor has not told of it yet"
    assert pool(node.WorkerReport(id="echo-1", pid=7, state="running", since_wall=0.0)) == ("ready", 1)
