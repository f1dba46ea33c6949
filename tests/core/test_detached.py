"""Calls that outlive their client, and clients that take them up again."""

from __future__ import annotations

import pytest

import mcp_broker.limits as bounds
from mcp_broker.wire import messages, node, payload
from tests.core.support import EPOCH, FakeGrant, World, definition

ID = b"d" * 16


def says(
    world: World, name: str = "c1", *, detach: bool = False, attach: bool = False, again: bool = False
) -> None:
    extra = messages.CallExtra(detach=detach, attach=attach, again=again)
    request = messages.Call(ID, "system.attach" if attach else "echo.echo", 30_000, payload.pack({}), extra)
    world.client_says(name, messages.Calls(EPOCH, 0, (request,)))


def test_detached_call_goes_on_without_its_client_and_waits_to_be_fetched() -> None:
    world = World()
    world.hello("c1")
    world.ready()
    says(world, detach=True)
    world.client_says("c1", messages.Goodbye(EPOCH))
    world.check()
    assert world.interrupts() == []
    world.answer("echo-1", ID)
    later = world.hello("c2")
    says(world, "c2", attach=True)
    assert world.outcomes(later) == {ID: "OK"}
    says(world, "c2", attach=True)
    assert world.outcomes(later) == {ID: "NOT_FOUND"}, "it is given out once"
    world.check()


def test_call_that_still_runs_is_taken_over_by_whoever_attaches() -> None:
    world = World()
    world.hello("c1")
    world.ready()
    says(world, detach=True)
    world.machine.clients.unreachable(b"c1", world.now)
    world.later(bounds.RESUME_GRACE_S + 0.1)
    second = world.hello("c2")
    says(world, "c2", attach=True)
    world.check()
    world.answer("echo-1", ID)
    assert world.outcomes(second) == {ID: "OK"}
    world.check()


def test_call_of_a_session_whose_end_nobody_noticed_yet_can_be_taken_over() -> None:
    world = World()
    first = world.hello("c1")
    second = world.hello("c2")
    world.ready()
    says(world, detach=True)
    says(world, "c2", attach=True)
    world.answer("echo-1", ID)
    assert world.outcomes(second) == {ID: "OK"}
    assert world.outcomes(first) == {}


def test_nobody_else_may_attach() -> None:
    world = World()
    world.hello("c1", FakeGrant(principal="ada"))
    thief = world.hello("c2", FakeGrant(principal="bob"))
    world.ready()
    says(world, detach=True)
    world.client_says("c1", messages.Goodbye(EPOCH))
    says(world, "c2", attach=True)
    assert world.outcomes(thief) == {ID: "NOT_FOUND"}
    world.answer("echo-1", ID)
    says(world, "c2", attach=True)
    assert world.outcomes(thief) == {ID: "NOT_FOUND"}


@pytest.mark.parametrize("is_over", [True, False])
def test_nobody_may_attach_to_the_call_of_a_tool_that_he_may_not_call(is_over: bool) -> None:
    world = World()
    world.hello("c1")
    world.ready()
    says(world, detach=True)
    world.client_says("c1", messages.Goodbye(EPOCH))
    if is_over:
        world.answer("echo-1", ID)
    narrow = world.hello("c2", FakeGrant("other.tool"))
    says(world, "c2", attach=True)
    assert world.outcomes(narrow) == {ID: "FORBIDDEN"}
    expired = world.hello("c3", FakeGrant(expires_at=world.now))
    says(world, "c3", attach=True)
    assert world.outcomes(expired) == {ID: "UNAUTHENTICATED"}
    later = world.hello("c4")
    says(world, "c4", attach=True)
    if not is_over:
        world.answer("echo-1", ID)
    assert world.outcomes(later) == {ID: "OK"}, "it is not lost by that"
    world.check()


def test_attaching_that_is_sent_again_after_a_resume_is_answered_once() -> None:
    world = World()
    world.hello("c1")
    world.ready()
    says(world, detach=True)
    world.client_says("c1", messages.Goodbye(EPOCH))
    world.answer("echo-1", ID)
    session = world.hello("c2")
    says(world, "c2", attach=True)
    assert world.outcomes(session) == {ID: "OK"}, "and lost on its way"
    world.machine.clients.unreachable(b"c2", world.now)
    session = world.hello("c2", session_id=session.session_id)
    says(world, "c2", attach=True, again=True)
    assert world.outcomes(session) == {ID: "OK"}
    says(world, "c2", attach=True)
    assert world.outcomes(session) == {ID: "NOT_FOUND"}, "a new question has an answer of its own"


def test_detached_call_still_ends_at_its_deadline() -> None:
    world = World()
    world.hello("c1")
    world.ready()
    says(world, detach=True)
    world.client_says("c1", messages.Goodbye(EPOCH))
    world.later(31)
    assert world.interrupts()
    again = world.hello("c2")
    says(world, "c2", attach=True)
    assert world.outcomes(again) == {ID: "DEADLINE_EXCEEDED"}


def test_call_that_is_not_detached_cannot_be_taken() -> None:
    world = World()
    world.hello("c1")
    second = world.hello("c2")
    world.ready()
    says(world)
    says(world, "c2", attach=True)
    assert world.outcomes(second) == {ID: "NOT_FOUND"}


def test_streaming_tool_cannot_be_detached() -> None:
    world = World()
    session = world.hello("c1")
    world.ready(streaming=True)
    says(world, detach=True)
    assert world.outcomes(session) == {ID: "INVALID_ARGUMENT"}


def test_outcomes_that_nobody_fetches_are_dropped_in_time_and_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounds, "DETACHED_MAX", 2)
    world = World()
    world.ready()
    for number in range(3):
        world.hello(f"c{number}")
        extra = messages.CallExtra(detach=True)
        call_id = bytes([number]) * 16
        request = messages.Call(call_id, "echo.echo", 30_000, payload.pack({}), extra)
        world.client_says(f"c{number}", messages.Calls(EPOCH, 0, (request,)))
        world.client_says(f"c{number}", messages.Goodbye(EPOCH))
        world.answer("echo-1", call_id)
    detached = world.machine.detached
    assert [call_id for _, call_id in detached.outcomes] == [b"\1" * 16, b"\2" * 16]
    world.later(bounds.DETACHED_TTL_S + 1)
    assert not detached.outcomes


def test_id_that_is_used_again_and_again_takes_up_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DETACHED_BYTES_MAX", 3 * bounds.RECORD_BYTES)
    world = World()
    world.ready()
    for number in range(20):
        world.hello(f"c{number}", FakeGrant(principal="ada"))
        says(world, f"c{number}", detach=True)
        world.client_says(f"c{number}", messages.Goodbye(EPOCH))
        world.answer("echo-1", ID)
    world.hello("bob", FakeGrant(principal="bob"))
    extra = messages.CallExtra(detach=True)
    request = messages.Call(b"b" * 16, "echo.echo", 30_000, payload.pack({}), extra)
    world.client_says("bob", messages.Calls(EPOCH, 0, (request,)))
    world.client_says("bob", messages.Goodbye(EPOCH))
    world.answer("echo-1", b"b" * 16)
    assert [call_id for _, call_id in world.machine.detached.outcomes] == [ID, b"b" * 16]
    bob = world.hello("bob", FakeGrant(principal="bob"))
    attach = messages.Call(b"b" * 16, "system.attach", 1, payload.pack({}), messages.CallExtra(attach=True))
    world.client_says("bob", messages.Calls(EPOCH, 0, (attach,)))
    assert world.outcomes(bob) == {b"b" * 16: "OK"}


def test_nobody_takes_the_place_of_an_outcome_by_using_its_id() -> None:
    world = World()
    world.ready()
    for name in ("ada", "bob"):
        world.hello(name, FakeGrant(principal=name))
        says(world, name, detach=True)
        world.client_says(name, messages.Goodbye(EPOCH))
        world.answer("echo-1", ID, "OK" if name == "ada" else "TOOL_FAILED")
    for name, code in (("ada", "OK"), ("bob", "TOOL_FAILED")):
        session = world.hello(name, FakeGrant(principal=name))
        says(world, name, attach=True)
        assert world.outcomes(session) == {ID: code}


def test_outcomes_of_one_principal_do_not_drive_out_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DETACHED_MAX", 5)
    world = World()
    world.ready()
    for number in range(20):
        name = "bob" if number == 0 else f"ada {number}"
        world.hello(name, FakeGrant(principal=name[:3]))
        extra = messages.CallExtra(detach=True)
        request = messages.Call(bytes([number]) * 16, "echo.echo", 30_000, payload.pack({}), extra)
        world.client_says(name, messages.Calls(EPOCH, 0, (request,)))
        world.client_says(name, messages.Goodbye(EPOCH))
        world.answer("echo-1", bytes([number]) * 16)
    kept = [(principal, call_id[0]) for principal, call_id in world.machine.detached.outcomes]
    assert kept == [("bob", 0), ("ada", 16), ("ada", 17), ("ada", 18), ("ada", 19)]


# -- over a broker that follows another ---------------------------------------------------------------------


def follows(*held: messages.Held) -> World:
    """A broker that follows another, and whose one worker has told what it holds."""
    world = World()
    world.admit("echo-1")
    tools = (definition("echo.echo"), definition("echo.safe", idempotent=True))
    world.worker_says("echo-1", messages.Register(0, "MCPB", (1,), tools, seq=9, held=held))
    world.worker_says("echo-1", messages.Ready(EPOCH, 4))
    return world


RUNS = messages.Held(ID, 9, "tester", "echo.echo", 60_000)
HAS_ENDED = messages.Held(ID, 0, "tester", "echo.echo")


def test_detached_call_that_runs_is_taken_over_at_the_broker_that_follows() -> None:
    world = follows(RUNS)
    session = world.hello()
    says(world, attach=True)
    world.check()
    assert world.outcomes(session) == {}
    world.client_says("c1", messages.Goodbye(EPOCH))
    assert world.interrupts() == [], "it is still detached"
    later = world.hello("c2")
    says(world, "c2", attach=True)
    world.later(bounds.ORPHAN_S + 1)
    world.answer("echo-1", ID)
    assert world.outcomes(later) == {ID: "OK"}
    assert world.dispatched("echo-1") == []
    world.check()


def test_detached_call_that_nobody_asks_for_at_the_broker_that_follows_goes_on_until_its_own_deadline() -> (
    None
):
    world = follows(RUNS)
    world.later(50)
    assert world.interrupts() == []
    world.later(11)
    assert [order.seq for order in world.interrupts()][:1] == [9]
    session = world.hello()
    says(world, attach=True)
    assert world.outcomes(session) == {ID: "DEADLINE_EXCEEDED"}
    world.answer("echo-1", ID, "CANCELLED")
    says(world, attach=True)
    assert world.outcomes(session) == {ID: "NOT_FOUND"}
    assert not world.machine.reconciliation.orphans


@pytest.mark.parametrize("held", [RUNS, HAS_ENDED])
@pytest.mark.parametrize("after_s", [0.0, bounds.ORPHAN_S + 1, 600.0])
def test_outcome_of_a_detached_call_waits_at_the_broker_that_follows(
    held: messages.Held, after_s: float
) -> None:
    world = follows(held)
    world.answer("echo-1", ID)
    world.later(after_s)
    session = world.hello()
    says(world, attach=True)
    assert world.outcomes(session) == {ID: "OK"}
    world.client_says("c1", messages.Ack(EPOCH, 1))
    assert world.machine.workers.by_id["echo-1"].receipts.advance() == 1, "its worker need not keep it"
    world.later(bounds.ORPHAN_S)
    assert not world.machine.reconciliation.orphans
    world.check()


def test_outcome_of_a_detached_call_may_still_be_on_its_way_to_the_broker_that_follows() -> None:
    world = follows(HAS_ENDED)
    session = world.hello()
    says(world, attach=True)
    assert world.outcomes(session) == {}
    world.answer("echo-1", ID)
    assert world.outcomes(session) == {ID: "OK"}
    world.check()


@pytest.mark.parametrize("tool", ["echo.echo", "echo.safe"])
@pytest.mark.parametrize("attached", [True, False])
def test_detached_call_dies_with_its_worker_also_at_the_broker_that_follows(
    tool: str, attached: bool
) -> None:
    world = follows(messages.Held(ID, 9, "tester", tool, 60_000))
    session = world.hello()
    if attached:
        says(world, attach=True)
    world.died("echo-1", started_seq=9)
    world.later(0.1)
    if not attached:
        says(world, attach=True)
    assert world.outcomes(session) == {ID: "WORKER_LOST"}, "its arguments died with it"
    world.check()


def test_nobody_else_may_attach_at_the_broker_that_follows_either() -> None:
    world = follows(RUNS)
    thief = world.hello("c1", FakeGrant(principal="bob"))
    says(world, "c1", attach=True)
    assert world.outcomes(thief) == {ID: "NOT_FOUND"}
    narrow = world.hello("c2", FakeGrant("other.tool"))
    says(world, "c2", attach=True)
    assert world.outcomes(narrow) == {ID: "FORBIDDEN"}


@pytest.mark.parametrize("tool", ["echo.echo", "evil.echo"])
def test_no_worker_can_make_itself_the_one_that_holds_another_pools_detached_call(tool: str) -> None:
    world = follows(RUNS)
    world.admit("evil-1", "evil")
    held = (messages.Held(ID, 0, "tester", tool),)
    world.worker_says("evil-1", messages.Register(0, "MCPB", (1,), (definition("evil.echo"),), held=held))
    world.worker_says("evil-1", messages.Ready(EPOCH, 4))
    world.answer("evil-1", ID)
    session = world.hello()
    says(world, attach=True)
    assert world.outcomes(session) == ({} if tool == "echo.echo" else {ID: "NOT_FOUND"})


def test_whoever_attaches_before_all_workers_have_spoken_is_told_to_come_back() -> None:
    world = World()
    admitted = (node.Admitted(thumbprint="key-echo-1", worker_id="echo-1", pool="echo"),)
    world.machine.from_node(node.Admit(admitted), world.now)
    session = world.hello()
    says(world, attach=True)
    (told,) = world.faults(session).values()
    assert (told["code"], told["reason"]) == ("UNAVAILABLE", "starting")
