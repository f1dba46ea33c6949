"""Calls that outlive their client, and clients that take them up again."""

from __future__ import annotations

import pytest

import mcp_broker.limits as bounds
from mcp_broker.wire import messages, payload
from tests.core.support import EPOCH, FakeGrant, World

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
    world.machine.clientele.unreachable(b"c1", world.now)
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
    world.machine.clientele.unreachable(b"c2", world.now)
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
