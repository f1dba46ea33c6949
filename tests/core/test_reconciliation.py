"""What becomes of calls when the broker, or a worker's connection, is replaced under them."""

from __future__ import annotations

from typing import Any

import pytest

import mcp_broker.limits as bounds
from mcp_broker.core.budget import Bound
from mcp_broker.wire import codec, messages, node, payload
from tests.core.support import EPOCH, FakeGrant, World, certificate, definition

ID = b"i" * 16


def successor(*workers: str, started: dict[str, tuple[bytes, ...]] | None = None) -> World:
    """A broker that follows another one: workers were admitted, and their tools are known."""
    world = World()
    world.machine.lineage = "line"
    admitted = tuple(
        node.Admitted(thumbprint=f"key-{worker}", worker_id=worker, pool="echo") for worker in workers
    )
    world.machine.from_node(node.Admit(admitted), world.now)
    dead = tuple(certificate(worker, 1) for worker in started or {})
    world.machine.from_node(node.Deaths(dead, started or {}), world.now)
    world.machine.from_node(
        node.Tools("echo", (definition("echo.echo"), definition("echo.safe", idempotent=True))), world.now
    )
    return world


def again(
    world: World, call_id: bytes = ID, tool: str = "echo.echo", name: str = "c1", key: str | None = None
) -> None:
    extra = messages.CallExtra(again=True, idempotency_key=key)
    request = messages.Call(call_id, tool, 30_000, payload.pack({}), extra)
    world.client_says(name, messages.Calls(EPOCH, 0, (request,)))


def registers(world: World, worker: str, *held: messages.Held, seq: int = 0, let_go_ms: int = 0) -> None:
    tools = (definition("echo.echo"), definition("echo.safe", idempotent=True))
    world.worker_says(
        worker, messages.Register(0, "MCPB", (1,), tools, seq=seq, held=held, let_go_ms=let_go_ms)
    )
    world.worker_says(worker, messages.Ready(EPOCH, 16))


def test_welcome_names_the_lineage() -> None:
    world = successor()
    session = world.hello()
    ((welcome, _),) = world.heard_by(session)
    assert isinstance(welcome, messages.Welcome)
    assert welcome.lineage == "line"


def test_call_sent_again_waits_until_every_worker_has_said_what_it_holds() -> None:
    world = successor("echo-1", "echo-2")
    session = world.hello()
    again(world)
    registers(world, "echo-1")
    assert world.dispatched("echo-1") == []
    registers(world, "echo-2")
    assert world.dispatched("echo-1") + world.dispatched("echo-2") == [ID]
    assert world.outcomes(session) == {}
    world.check()


def test_new_call_does_not_wait_for_anybody() -> None:
    world = successor("echo-1", "echo-2")
    world.hello()
    registers(world, "echo-1")
    call_id = world.call()
    assert world.dispatched("echo-1") == [call_id]


@pytest.mark.parametrize("asked_first", [True, False])
def test_outcome_that_a_worker_kept_ends_the_call_whoever_comes_first(asked_first: bool) -> None:
    world = successor("echo-1")
    session = world.hello()
    if asked_first:
        again(world)
    registers(world, "echo-1", messages.Held(ID, 0, "tester"), seq=7)
    world.answer("echo-1", ID)
    if not asked_first:
        again(world)
    assert world.outcomes(session) == {ID: "OK"}
    assert world.dispatched("echo-1") == []
    world.check()


def test_worker_hears_that_a_kept_outcome_has_arrived_only_when_it_has() -> None:
    world = successor("echo-1")
    session = world.hello()
    registers(world, "echo-1", messages.Held(ID, 0, "tester"))
    world.answer("echo-1", ID)
    world.later(1)
    assert not [one for one in world.heard_by_worker("echo-1") if isinstance(one, messages.Ack)]
    again(world)
    assert world.outcomes(session) == {ID: "OK"}
    world.client_says("c1", messages.Ack(EPOCH, 1))
    world.later(1)
    assert messages.Ack(EPOCH, 1) in world.heard_by_worker("echo-1")


@pytest.mark.parametrize("asked_first", [True, False])
def test_call_that_still_runs_is_not_run_again(asked_first: bool) -> None:
    world = successor("echo-1")
    session = world.hello()
    if asked_first:
        again(world)
    registers(world, "echo-1", messages.Held(ID, 5, "tester"), seq=9)
    if not asked_first:
        again(world)
    assert world.dispatched("echo-1") == []
    assert world.machine.ledger.calls[ID].seq == 5
    later = world.call()
    assert world.machine.ledger.calls[later].seq == 10, "numbers go on where the worker was"
    world.check()
    world.answer("echo-1", ID)
    assert world.outcomes(session) == {ID: "OK"}


def test_call_that_a_dead_worker_had_started_is_lost_with_its_certificate() -> None:
    world = successor(started={"echo-9": (ID,)})
    session = world.hello()
    again(world)
    ((message, _),) = world.heard_by(session)[-1:]
    assert isinstance(message, messages.Outcomes)
    (outcome,) = message.outcomes
    assert outcome.code == "WORKER_LOST"
    assert outcome.fault is not None
    assert payload.unpack_map(outcome.fault.details)["certificate"]["worker_id"] == "echo-9"


def test_calls_of_workers_that_died_with_hundreds_of_others_are_lost_too() -> None:
    recent = tuple(certificate(f"echo-{number}", 1) for number in range(bounds.DEATHS_MAX))
    other = certificate("echo-9999", 1)
    world = successor("echo-10000")
    told = node.Deaths(recent, {other.worker_id: (ID,)}, others=(other,))
    world.machine.from_node(codec.from_supervisor.decode(codec.encode(told)), world.now)
    session = world.hello()
    registers(world, "echo-10000")
    again(world)
    assert world.outcomes(session) == {ID: "WORKER_LOST"}
    assert tuple(world.machine.workers.deaths) == recent, "it is not recent for that"


def test_of_calls_that_the_dead_had_started_the_oldest_deaths_are_forgotten_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "STARTED_MAX", 2)
    old, young, now = (bytes([number]) * 16 for number in range(3))
    world = World()
    dead = (certificate("echo-2", 1), certificate("echo-1", 1))
    world.machine.from_node(node.Deaths(dead, {"echo-1": (old,), "echo-2": (young,)}), world.now)
    world.machine.from_node(node.Died(certificate("echo-3", 1), (now,)), world.now)
    assert list(world.machine.reconciliation._started) == [young, now]


def test_idempotent_call_that_a_dead_worker_had_started_runs_again() -> None:
    world = successor("echo-1", started={"echo-9": (ID,)})
    world.hello()
    registers(world, "echo-1")
    again(world, tool="echo.safe")
    assert world.dispatched("echo-1") == [ID]


def test_worker_that_dies_without_a_word_settles_what_was_in_doubt() -> None:
    world = successor("echo-1", "echo-2")
    session = world.hello()
    other = b"o" * 16
    again(world)
    again(world, other)
    registers(world, "echo-2")
    world.machine.from_node(node.Died(certificate("echo-1", 3), (ID,)), world.now)
    world.later(1)
    assert world.outcomes(session) == {ID: "WORKER_LOST"}
    assert world.dispatched("echo-2") == [other]
    world.check()


def test_call_in_doubt_ends_at_its_deadline_like_any_other() -> None:
    world = successor("echo-1")
    session = world.hello()
    again(world)
    world.later(31)
    assert world.outcomes(session) == {ID: "DEADLINE_EXCEEDED"}
    registers(world, "echo-1")
    assert world.dispatched("echo-1") == []
    assert not world.machine.reconciliation.doubts
    world.check()


def test_what_nobody_asks_for_is_let_go_and_stopped() -> None:
    world = successor("echo-1")
    registers(world, "echo-1", messages.Held(ID, 0, "tester"), messages.Held(b"r" * 16, 4, "tester"))
    world.answer("echo-1", ID)
    world.heard_by_worker("echo-1")
    world.later(bounds.ORPHAN_S + 1)
    heard = world.heard_by_worker("echo-1")
    assert messages.Cancel(EPOCH, (b"r" * 16,)) in heard
    assert messages.Ack(EPOCH, 1) in heard
    world.answer("echo-1", b"r" * 16, "CANCELLED")
    assert not world.machine.reconciliation.orphans


def test_an_outcome_that_comes_after_its_doubtful_call_has_ended_is_let_go() -> None:
    world = successor("echo-1")
    session = world.hello()
    registers(world, "echo-1", messages.Held(ID, 0, "tester"))
    again(world)
    world.client_says("c1", messages.Cancel(EPOCH, (ID,)))
    assert world.outcomes(session) == {ID: "CANCELLED"}
    world.answer("echo-1", ID)
    assert world.outcomes(session) == {}
    assert not world.machine.reconciliation.orphans
    assert world.machine.workers.by_id["echo-1"].receipts.advance() == 1, "the worker need not keep it"
    world.check()


def test_what_nobody_asks_for_is_killed_if_it_does_not_stop() -> None:
    world = successor("echo-1")
    world.hello()
    registers(world, "echo-1", messages.Held(ID, 3, "tester"), seq=3)
    world.later(bounds.ORPHAN_S + 0.3)
    assert [(order.seq, order.stage) for order in world.interrupts()][:3] == [
        (3, "raise"),
        (3, "term"),
        (3, "kill"),
    ]
    world.answer("echo-1", ID, "CANCELLED")
    world.machine.to_node.clear()
    world.later(1)
    assert world.interrupts() == []
    assert not world.machine.reconciliation.orphans


def test_worker_that_stays_silent_is_ended_once_nobody_can_be_waiting_for_its_call() -> None:
    world = successor("echo-1", "echo-2")
    world.hello()
    registers(world, "echo-2")
    again(world)
    world.later(bounds.ORPHAN_S + 0.1)
    assert world.interrupts() == []
    world.later(30.0)
    (order,) = world.interrupts()[:1]
    assert (order.worker_id, order.seq, order.stage, order.why) == (
        "echo-1",
        node.WHATEVER,
        "kill",
        "silence",
    )


def test_worker_of_a_new_broker_may_take_its_time_to_start() -> None:
    world = World()
    world.machine.from_node(node.Admit(()), world.now)
    late = node.Admitted(thumbprint="key-late", worker_id="late", pool="echo")
    world.machine.from_node(node.Admit((late,)), world.now)
    world.later(bounds.ORPHAN_S * 3)
    assert world.interrupts() == []


def test_call_sent_again_to_a_pool_that_closes_gets_the_outcome_that_its_worker_kept() -> None:
    world = neighbours()
    reports(world, good="closing", evil="ready")
    session = world.hello()
    comes(world, "good", messages.Held(ID, 0, "tester"), messages.Held(b"r" * 16, 4, "tester"))
    world.answer("good-1", ID)
    again(world, ID, "good.echo")
    again(world, b"r" * 16, "good.echo")
    unknown = b"u" * 16
    again(world, unknown, "good.echo")
    fresh = world.call(tool="good.echo")
    assert world.outcomes(session) == {ID: "OK", unknown: "UNAVAILABLE", fresh: "UNAVAILABLE"}
    world.answer("good-1", b"r" * 16)
    assert world.outcomes(session) == {b"r" * 16: "OK"}
    world.check()


def test_fresh_call_after_one_that_was_sent_again_in_the_same_message_is_refused_by_a_closing_pool() -> None:
    world = neighbours()
    reports(world, good="closing", evil="ready")
    session = world.hello()
    comes(world, "good", messages.Held(ID, 4, "tester"))
    requests = (
        messages.Call(ID, "good.echo", 30_000, b"\x80", messages.CallExtra(again=True)),
        messages.Call(b"f" * 16, "good.echo", 30_000, b"\x80"),
    )
    world.client_says("c1", messages.Calls(EPOCH, 0, requests))
    assert world.outcomes(session) == {b"f" * 16: "UNAVAILABLE"}
    world.check()


def test_call_in_doubt_whose_pool_was_given_up_meanwhile_ends() -> None:
    world = neighbours()
    session = world.hello()
    again(world, ID, "good.echo")
    reports(world, good="failed", evil="ready")
    world.died("good-1")
    world.later(0.1)
    assert world.outcomes(session) == {ID: "UNAVAILABLE"}
    world.check()


def test_call_that_nobody_knows_is_asked_like_a_new_one_though_it_says_that_it_was_sent_before() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=200, rate_per_s=1.0, burst=2)
    waited = world.calls("c1", ["echo.echo"] * 5, again=True)
    assert world.dispatched("echo-1") == waited, "they may have waited at an earlier broker"
    world.later(bounds.ORPHAN_S)
    sent = world.calls("c1", ["echo.echo"] * 10, again=True)
    assert world.dispatched("echo-1") == sent[:2]
    assert set(world.outcomes(session).values()) == {"RATE_LIMITED"}
    assert world.machine.ledger.refused == {"RATE_LIMITED": 8}
    world.check()


def test_the_brokers_own_tools_are_asked_for_no_faster_by_who_says_that_he_asked_before() -> None:
    world = World()
    session = world.hello()
    world.machine.from_node(node.Limits({"rate_per_s": 1.0, "burst": 2}), world.now)
    world.calls("c1", ["system.tools"] * 5, again=True)
    codes = list(world.outcomes(session).values())
    assert (codes.count("OK"), codes.count("RATE_LIMITED")) == (2, 3)


def test_call_that_nobody_knows_does_not_pass_an_open_breaker() -> None:
    world = World()
    world.ready(depth=200)
    for name in ("a", "b"):
        session = world.hello(name, FakeGrant(principal=name))
        for _ in range(20):
            call_id = world.call(name)
            if call_id in world.dispatched("echo-1"):
                world.answer("echo-1", call_id, "TOOL_FAILED")
            world.heard_by(session)
    session = world.hello("c", FakeGrant(principal="c"))
    world.call("c", again=True)
    (refused,) = world.faults(session).values()
    assert (refused["code"], refused["reason"]) == ("UNAVAILABLE", "breaker open")
    assert world.dispatched("echo-1") == []
    world.check()


@pytest.mark.parametrize(("tool", "code"), [("echo.echo", "BROKER_LOST"), ("echo.safe", None)])
def test_call_whose_outcome_was_let_go_is_not_run_again_unless_it_may_be(tool: str, code: str | None) -> None:
    world = successor("echo-1")
    session = world.hello()
    registers(world, "echo-1", messages.Held(ID, 0, "tester"))
    world.answer("echo-1", ID)
    world.later(bounds.ORPHAN_S + 1)
    again(world, tool=tool)
    assert world.outcomes(session) == ({ID: code} if code else {})
    assert world.dispatched("echo-1") == ([] if code else [ID])


@pytest.mark.parametrize(("tool", "code"), [("echo.echo", "BROKER_LOST"), ("echo.safe", None)])
def test_call_whose_outcome_its_worker_may_have_let_go_is_not_run_again_unless_it_may_be(
    tool: str, code: str | None
) -> None:
    world = successor("echo-1", "echo-2")
    session = world.hello()
    again(world, tool=tool)
    registers(world, "echo-1", let_go_ms=5000)
    registers(world, "echo-2")
    assert world.outcomes(session) == ({ID: code} if code else {})
    given = world.dispatched("echo-1") + world.dispatched("echo-2")
    assert given == ([] if code else [ID])
    world.check()


@pytest.mark.parametrize(("tool", "code"), [("echo.echo", "BROKER_LOST"), ("echo.safe", None)])
def test_call_of_a_session_that_was_given_up_is_not_run_again_unless_it_may_be(
    tool: str, code: str | None
) -> None:
    world = World()
    session = world.hello()
    world.admit("echo-1")
    registers(world, "echo-1")
    ended = world.call(tool=tool)
    assert world.dispatched("echo-1") == [ended]
    world.answer("echo-1", ended)
    assert world.outcomes(session) == {ended: "OK"}, "and lost on its way"
    world.machine.clients.unreachable(b"c1", world.now)
    world.later(bounds.RESUME_GRACE_S + 0.1)
    session = world.hello("c1", session_id=session.session_id)
    again(world, ended, tool)
    assert world.outcomes(session) == ({ended: code} if code else {})
    assert world.dispatched("echo-1") == ([] if code else [ended])


def test_outcomes_that_a_worker_let_go_count_until_nobody_can_ask_for_them_and_for_its_pool_only() -> None:
    world = successor("echo-1")
    world.serve("other-1", 4, "other", definition("other.echo"))
    world.hello()
    registers(world, "echo-1", let_go_ms=5000)
    again(world, tool="other.echo")
    assert world.dispatched("other-1") == [ID]
    world.later(5.1)
    again(world, b"l" * 16)
    assert world.dispatched("echo-1") == [b"l" * 16]


def test_what_a_worker_let_go_under_this_broker_stops_no_call_that_this_broker_never_had() -> None:
    world = World()
    world.hello()
    world.ready()
    world.machine.workers.unreachable(b"echo-1")
    registers(world, "echo-1", let_go_ms=5000)
    again(world)
    assert world.dispatched("echo-1") == [ID]


def test_client_that_acknowledges_nothing_holds_up_no_more_than_a_worker_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "HELD_MAX", 8)
    world = World()
    world.ready()
    world.hello("idle")
    world.answer("echo-1", world.call("idle"))
    busy = world.hello("busy")
    worker = world.machine.workers.by_id["echo-1"]
    most = 0
    for count in range(1, 31):
        world.answer("echo-1", world.call("busy"))
        world.heard_by(busy)
        world.client_says("busy", messages.Ack(EPOCH, count))
        worker.receipts.advance()
        most = max(most, len(worker.receipts))
    assert most == 8
    assert worker.receipts.advance() == 31


def test_outcome_that_somebody_asks_for_is_not_let_go_while_it_is_on_its_way() -> None:
    world = successor("echo-1")
    session = world.hello()
    registers(world, "echo-1", messages.Held(ID, 0, "tester"))
    again(world)
    world.later(bounds.ORPHAN_S + 1)
    world.answer("echo-1", ID)
    assert world.outcomes(session) == {ID: "OK"}
    world.check()


def test_outcome_of_another_principals_call_is_nobody_elses() -> None:
    world = successor("echo-1")
    session = world.hello()
    registers(world, "echo-1", messages.Held(ID, 0, "somebody"))
    world.answer("echo-1", ID)
    again(world)
    assert world.outcomes(session) == {ID: "INVALID_ARGUMENT"}


def neighbours() -> World:
    """A broker that follows another one, with a worker of each of two pools."""
    world = World()
    admitted = tuple(
        node.Admitted(thumbprint=f"key-{pool}-1", worker_id=f"{pool}-1", pool=pool)
        for pool in ("good", "evil")
    )
    world.machine.from_node(node.Admit(admitted), world.now)
    for pool in ("good", "evil"):
        world.machine.from_node(node.Tools(pool, (definition(f"{pool}.echo"),)), world.now)
    return world


def comes(world: World, pool: str, *held: messages.Held) -> None:
    tools = (definition(f"{pool}.echo"),)
    world.worker_says(f"{pool}-1", messages.Register(0, "MCPB", (1,), tools, seq=9, held=held))
    world.worker_says(f"{pool}-1", messages.Ready(EPOCH, 4))


@pytest.mark.parametrize("first", ["good", "evil"])
@pytest.mark.parametrize("asked_first", [True, False])
def test_no_worker_can_answer_for_another_pools_call(first: str, asked_first: bool) -> None:
    world = neighbours()
    session = world.hello()
    if asked_first:
        again(world, tool="good.echo")
    held = {"good": messages.Held(ID, 9, "tester"), "evil": messages.Held(ID, 0, "tester")}
    second = "evil" if first == "good" else "good"
    comes(world, first, held[first])
    comes(world, second, held[second])
    world.answer("evil-1", ID)
    if not asked_first:
        again(world, tool="good.echo")
    assert world.outcomes(session) == {}, "its own worker runs it"
    world.check()
    world.answer("good-1", ID, "TOOL_FAILED")
    assert world.outcomes(session) == {ID: "TOOL_FAILED"}


def test_no_worker_can_say_that_it_died_of_another_pools_call() -> None:
    world = neighbours()
    world.hello()
    comes(world, "evil", messages.Held(ID, 9, "tester"))
    comes(world, "good")
    world.machine.from_node(node.Died(certificate("evil-1", 9), (ID,)), world.now)
    world.later(0.1)
    again(world, tool="good.echo")
    assert world.dispatched("good-1") == [ID]


def reports(world: World, **pools: str) -> None:
    """Say how the pools are, by name."""
    told = tuple(
        node.PoolReport(name=name, state=state, wanted=1, reason="why", workers=())  # type: ignore[arg-type]
        for name, state in pools.items()
    )
    world.machine.from_node(node.Report(told), world.now)


def test_no_worker_can_take_the_name_of_another_pools_tool_because_it_comes_first() -> None:
    world = neighbours()
    reports(world, good="ready", evil="ready")
    world.worker_says(
        "evil-1", messages.Register(0, "MCPB", (1,), (definition("evil.echo"), definition("good.echo")))
    )
    (refused,) = world.heard_by_worker("evil-1")
    assert isinstance(refused, messages.Error)
    assert "already served by pool 'good'" in refused.message
    comes(world, "good")
    world.hello()
    call_id = world.call(tool="good.echo")
    assert world.dispatched("good-1") == [call_id]


@pytest.mark.parametrize("pools", [{"evil": "ready"}, {"evil": "ready", "good": "closed"}])
def test_the_name_of_a_tool_whose_pool_is_closed_or_no_more_may_move(pools: dict[str, str]) -> None:
    world = neighbours()
    reports(world, **pools)
    world.serve("evil-1", 4, "evil", definition("evil.echo"), definition("good.echo"))
    world.hello()
    call_id = world.call(tool="good.echo")
    assert world.dispatched("evil-1") == [call_id]


def test_outcome_of_another_principals_call_is_nobody_elses_also_if_that_was_asked_for_first() -> None:
    world = successor("echo-1")
    session = world.hello()
    again(world)
    registers(world, "echo-1", messages.Held(ID, 0, "somebody"))
    world.answer("echo-1", ID)
    assert world.outcomes(session) == {ID: "INVALID_ARGUMENT"}
    world.check()


def test_what_a_worker_says_that_it_holds_replaces_what_it_said_before() -> None:
    world = successor("echo-1")
    session = world.hello()
    for start in range(0, 1000, 100):
        held = [
            messages.Held(bytes(12) + n.to_bytes(4, "big"), n % 2, "tester")
            for n in range(start, start + 100)
        ]
        registers(world, "echo-1", *held)
    reconciliation = world.machine.reconciliation
    assert len(reconciliation.orphans) == 100
    assert len(world.machine.timers) < 10
    again(world, bytes(16))
    assert world.outcomes(session) == {bytes(16): "BROKER_LOST"}, "it told of it once, and holds it no more"
    world.later(bounds.ORPHAN_S + 1)
    assert len(reconciliation.orphans) == 50
    assert {orphan.is_unwanted for orphan in reconciliation.orphans.values()} == {True}


def test_a_worker_runs_no_more_than_it_may_whatever_it_says() -> None:
    world = successor("echo-1")
    held = [messages.Held(bytes(12) + n.to_bytes(4, "big"), 1 + n, "tester") for n in range(1000)]
    registers(world, "echo-1", *held)
    assert len(world.machine.reconciliation.orphans) == bounds.WORKER_DEPTH_MAX


def test_outcomes_that_nobody_asks_for_are_kept_up_to_a_bound_for_each_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "HELD_BYTES_MAX", 250_000)
    world = successor("echo-1")
    session = world.hello()
    ids = [bytes([n]) * 16 for n in range(1, 5)]
    registers(world, "echo-1", *(messages.Held(one, 0, "tester") for one in ids))

    def answers(call_id: bytes) -> None:
        outcome = messages.Outcome(call_id, "OK", None)
        world.worker_says("echo-1", messages.Outcomes(EPOCH, 1, (outcome,)), bytes(100_000))

    for one in ids[:3]:
        answers(one)
    for one in ids:
        again(world, one)
    assert world.outcomes(session) == {ids[0]: "OK", ids[1]: "OK", ids[2]: "BROKER_LOST"}
    answers(ids[3])
    assert world.outcomes(session) == {ids[3]: "OK"}
    world.check()


@pytest.mark.parametrize("seq", [3, 0])
@pytest.mark.parametrize("asked_first", [True, False])
def test_call_that_a_dead_worker_had_said_it_holds_is_lost_also_where_its_marks_are_forgotten(
    seq: int, asked_first: bool
) -> None:
    world = successor("echo-1", "echo-2")
    session = world.hello()
    registers(world, "echo-2")
    if asked_first:
        again(world)
    registers(world, "echo-1", messages.Held(ID, seq, "tester"), seq=900)
    world.died("echo-1", started_seq=900)
    world.later(0.1)
    if not asked_first:
        again(world)
    assert world.outcomes(session) == {ID: "WORKER_LOST"}
    assert world.dispatched("echo-2") == []
    world.check()


def test_connection_that_ends_costs_no_call() -> None:
    world = World()
    session = world.hello()
    world.ready(depth=4)
    runs, done, waits = (world.call() for _ in range(3))
    world.heard_by_worker("echo-1")
    world.machine.workers.unreachable(b"echo-1")
    assert world.outcomes(session) == {}
    held: tuple[Any, ...] = (messages.Held(done, 0, "tester"), messages.Held(runs, 1, "tester"))
    tools = (definition("echo.echo"),)
    world.worker_says("echo-1", messages.Register(0, "MCPB", (1,), tools, seq=3, held=held))
    world.worker_says("echo-1", messages.Ready(EPOCH, 4))
    assert world.dispatched("echo-1") == [waits], "what had not started is given anew"
    world.check()
    for call_id in (done, runs, waits):
        world.answer("echo-1", call_id)
    assert set(world.outcomes(session).values()) == {"OK"}
    world.check()


def test_stream_does_not_outlive_its_workers_connection() -> None:
    world = World()
    session = world.hello()
    world.ready(streaming=True)
    call_id = world.call()
    world.heard_by_worker("echo-1")
    world.worker_says("echo-1", messages.Partial(EPOCH, (messages.Part(call_id, 0, b"\x01"),)))
    tools = (definition("echo.echo", streaming=True),)
    held = (messages.Held(call_id, 1, "tester"),)
    world.worker_says("echo-1", messages.Register(0, "MCPB", (1,), tools, seq=1, held=held))
    assert world.outcomes(session) == {call_id: "BROKER_LOST"}
    assert messages.Cancel(EPOCH, (call_id,)) in world.heard_by_worker("echo-1")


def test_stream_that_an_earlier_broker_carried_ends_for_whoever_asks() -> None:
    world = successor("echo-1")
    session = world.hello()
    tools = (definition("echo.echo", streaming=True),)
    held = (messages.Held(ID, 5, "tester"),)
    world.worker_says("echo-1", messages.Register(0, "MCPB", (1,), tools, seq=5, held=held))
    again(world)
    assert world.outcomes(session) == {ID: "BROKER_LOST"}


def test_a_call_in_doubt_whose_tool_has_got_a_worker_of_its_own_is_settled_by_those_that_could_hold_it() -> (
    None
):
    world = successor("echo-1")
    world.hello()
    again(world)
    machine = world.machine
    target = machine.dispatcher.pool("echo~echo.echo")
    machine.health.placement.move(machine.registry.tools["echo.echo"], target, world.now)
    world.check()
    registers(world, "echo-1")
    world.check()
    assert not machine.reconciliation.doubts
    assert list(machine.dispatcher.pool("echo~echo.echo").backlog) == [ID]


OTHER = b"o" * 16


@pytest.mark.parametrize("ran", ["running", "ended"])
@pytest.mark.parametrize("spoke", ["before", "after"])
def test_key_whose_call_still_runs_is_not_run_again_for_who_follows_it(ran: str, spoke: str) -> None:
    world = successor("echo-1", "echo-2")
    follower, first = world.hello("c1"), world.hello("c2")
    held = messages.Held(ID, 5 if ran == "running" else 0, "tester")
    if spoke == "before":
        registers(world, "echo-1", held, seq=9)
    # who follows comes first, and neither worker knows of keys
    again(world, OTHER, key="k")
    if spoke == "after":
        registers(world, "echo-1", held, seq=9)
    registers(world, "echo-2")
    world.later(1)
    assert world.dispatched("echo-1") + world.dispatched("echo-2") == []
    world.check()
    again(world, ID, name="c2", key="k")
    world.check()
    world.answer("echo-1", ID)
    assert world.outcomes(first) == {ID: "OK"}
    assert world.outcomes(follower) == {OTHER: "OK"}
    assert world.dispatched("echo-1") + world.dispatched("echo-2") == []
    world.check()


def test_key_is_run_once_it_is_known_that_nothing_runs_for_it() -> None:
    world = successor("echo-1")
    world.hello("c1")
    world.hello("c2")
    registers(world, "echo-1", messages.Held(ID, 5, "tester"), messages.Held(OTHER, 0, "tester"), seq=9)
    again(world, b"k" * 16, key="k")
    again(world, ID, name="c2", key="another")
    again(world, OTHER, name="c2")
    assert world.dispatched("echo-1") == [], "what ended may be its outcome, until that is here"
    world.answer("echo-1", OTHER)
    world.later(0.1)
    assert world.dispatched("echo-1") == [b"k" * 16]
    world.check()


def test_key_waits_no_longer_than_what_nobody_asks_for_is_kept() -> None:
    world = successor("echo-1")
    world.hello()
    registers(world, "echo-1", messages.Held(ID, 5, "tester"), seq=9)
    again(world, OTHER, key="k")
    world.later(bounds.ORPHAN_S - 1)
    assert world.dispatched("echo-1") == []
    world.later(1.1)
    world.answer("echo-1", ID, "CANCELLED")
    world.later(0.1)
    assert world.dispatched("echo-1") == [OTHER]
    world.check()


def test_what_workers_hold_of_another_principal_keeps_no_key_waiting() -> None:
    world = successor("echo-1")
    world.hello()
    registers(world, "echo-1", messages.Held(ID, 5, "somebody"), seq=9)
    again(world, OTHER, key="k")
    assert world.dispatched("echo-1") == [OTHER]


def test_calls_in_doubt_take_up_room_to_wait_and_one_beyond_it_is_not_said_to_have_never_started() -> None:
    world = successor("echo-1", "echo-2")
    world.machine.dispatcher.budget.principal = Bound(3, 1_000_000)
    session = world.hello()
    registers(world, "echo-1")
    calls = [bytes([number]) * 16 for number in range(1, 6)]
    for call_id in calls:
        again(world, call_id)
        world.check()
    assert world.outcomes(session) == dict.fromkeys(calls[3:], "BROKER_LOST")
    assert world.machine.dispatcher.budget.total.calls == 3
    world.client_says("c1", messages.Cancel(EPOCH, (calls[0],)))
    world.check()
    assert world.machine.dispatcher.budget.total.calls == 2
    registers(world, "echo-2", messages.Held(calls[1], 3, "tester"), seq=3)
    world.check()
    assert world.dispatched("echo-1") + world.dispatched("echo-2") == calls[2:3]
    assert world.machine.dispatcher.budget.total.calls == 0
