"""Idempotency keys: one execution a key, and its outcome for whoever comes later."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import pytest

import mcp_broker.limits as bounds
from mcp_broker.core.budget import Bound
from mcp_broker.wire import messages, node, payload
from tests.core.support import EPOCH, FakeGrant, World, definition

if TYPE_CHECKING:
    from collections.abc import Callable


def keyed(
    world: World,
    number: int,
    key: str = "k",
    name: str = "c1",
    arguments: object = None,
    timeout_ms: int = 30_000,
) -> bytes:
    call_id = b"k" * 15 + bytes([number])
    extra = messages.CallExtra(idempotency_key=key)
    packed = payload.pack({} if arguments is None else arguments)
    request = messages.Call(call_id, "echo.echo", timeout_ms, packed, extra)
    world.client_says(name, messages.Calls(EPOCH, 0, (request,)))
    return call_id


def test_calls_with_one_key_are_one_execution() -> None:
    world = World()
    session = world.hello()
    world.ready()
    first, second = keyed(world, 1), keyed(world, 2)
    assert world.dispatched("echo-1") == [first]
    world.answer("echo-1", first)
    assert world.outcomes(session) == {first: "OK", second: "OK"}
    world.check()


def test_outcome_is_replayed_for_its_time_and_then_the_tool_runs_again() -> None:
    world = World()
    session = world.hello()
    world.ready()
    first = keyed(world, 1)
    world.answer("echo-1", first, "TOOL_FAILED")
    world.dispatched("echo-1")
    second = keyed(world, 2)
    assert world.outcomes(session) == {first: "TOOL_FAILED", second: "TOOL_FAILED"}
    assert world.dispatched("echo-1") == []
    world.later(bounds.IDEMPOTENCY_TTL_S + 1)
    world.heard_by(session)
    third = keyed(world, 3)
    assert world.dispatched("echo-1") == [third]


def test_same_key_with_other_arguments_is_refused() -> None:
    world = World()
    session = world.hello()
    world.ready()
    keyed(world, 1, arguments={"a": 1})
    second = keyed(world, 2, arguments={"a": 2})
    assert world.outcomes(session) == {second: "INVALID_ARGUMENT"}


def test_keys_belong_to_a_principal_and_a_tool() -> None:
    world = World()
    world.hello("c1", FakeGrant(principal="ada"))
    world.hello("c2", FakeGrant(principal="bob"))
    world.ready()
    mine, theirs = keyed(world, 1), keyed(world, 2, name="c2")
    other = keyed(world, 3, key="another")
    assert world.dispatched("echo-1") == [mine, theirs, other]


@pytest.mark.parametrize("code", ["CANCELLED", "DEADLINE_EXCEEDED"])
def test_first_follower_runs_when_the_first_caller_gave_up(code: str) -> None:
    world = World()
    session = world.hello()
    world.ready()
    first = keyed(world, 1, timeout_ms=1000)
    second, third = keyed(world, 2), keyed(world, 3)
    world.dispatched("echo-1")
    if code == "CANCELLED":
        world.client_says("c1", messages.Cancel(EPOCH, (first,)))
    else:
        world.later(1.1)
    assert world.dispatched("echo-1") == [second]
    world.answer("echo-1", second)
    assert world.outcomes(session) == {first: code, second: "OK", third: "OK"}
    world.check()


def test_follower_that_gives_up_costs_the_others_nothing() -> None:
    world = World()
    session = world.hello()
    world.ready()
    first, second, third = (keyed(world, number) for number in (1, 2, 3))
    world.client_says("c1", messages.Cancel(EPOCH, (second,)))
    world.answer("echo-1", first)
    assert world.outcomes(session) == {first: "OK", second: "CANCELLED", third: "OK"}


@pytest.mark.parametrize("idempotent", [True, False])
def test_tool_that_may_have_done_its_work_is_not_run_again_for_the_key(idempotent: bool) -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1", idempotent=idempotent)
    first = keyed(world, 1)
    world.died("echo-1", started_seq=1)
    world.later(1)
    world.ready("echo-2", idempotent=idempotent)
    if idempotent:
        assert world.dispatched("echo-2") == [first], "the broker itself runs it again"
        return
    second = keyed(world, 2)
    assert world.outcomes(session) == {first: "WORKER_LOST", second: "WORKER_LOST"}
    assert world.dispatched("echo-2") == []


def test_session_that_ends_hands_the_key_to_its_followers_elsewhere() -> None:
    world = World()
    world.hello("c1")
    other = world.hello("c2")
    world.ready()
    keyed(world, 1)
    second = keyed(world, 2, name="c2")
    world.dispatched("echo-1")
    world.client_says("c1", messages.Goodbye(EPOCH))
    assert world.dispatched("echo-1") == [second]
    world.answer("echo-1", second)
    assert world.outcomes(other) == {second: "OK"}


def test_streaming_tool_takes_no_key() -> None:
    world = World()
    session = world.hello()
    world.ready(streaming=True)
    assert world.outcomes(session) == {}
    call_id = keyed(world, 1)
    assert world.outcomes(session) == {call_id: "INVALID_ARGUMENT"}


def test_remembered_outcomes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "IDEMPOTENCY_BYTES_MAX", 3 * bounds.RECORD_BYTES)
    monkeypatch.setattr(bounds, "IDEMPOTENCY_KEYS_MAX", 3)
    world = World()
    session = world.hello()
    world.ready()
    for number in range(5):
        world.answer("echo-1", keyed(world, number, key=f"key {number}"))
    assert len(world.machine.idempotency.records) == 2, "each takes a little more than a bare record"
    world.outcomes(session)
    open_calls = [keyed(world, number, key=f"open {number}") for number in range(10, 14)]
    assert world.outcomes(session) == {open_calls[3]: "OVERLOADED"}, "what is under way is not forgotten"
    world.answer("echo-1", open_calls[0])
    world.outcomes(session)
    assert keyed(world, 20, key="next") in world.machine.ledger.calls


def test_keys_of_one_principal_cost_no_other_one_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "IDEMPOTENCY_KEYS_MAX", 8)
    world = World()
    sessions = {name: world.hello(name, FakeGrant(principal=name)) for name in ("ada", "bob")}
    world.ready()
    first = keyed(world, 1, key="bob's", name="bob")
    world.answer("echo-1", first)
    for number in range(10, 40):
        world.answer("echo-1", keyed(world, number, key=f"{number}", name="ada"))
    assert set(world.outcomes(sessions["ada"]).values()) == {"OK"}
    second, third = keyed(world, 2, key="bob's", name="bob"), keyed(world, 3, key="new", name="bob")
    assert world.dispatched("echo-1")[-1] == third, "the one ran, the other had its outcome"
    assert world.outcomes(sessions["bob"]) == {first: "OK", second: "OK"}
    assert keyed(world, 4, key="39", name="ada") not in world.machine.ledger.calls, "her latest are kept"


def test_large_outcomes_of_one_principal_cost_no_other_one_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "IDEMPOTENCY_BYTES_MAX", 1_000_000)
    world = World()
    bob = world.hello("bob", FakeGrant(principal="bob"))
    world.hello("ada", FakeGrant(principal="ada"))
    world.ready()
    world.answer("echo-1", keyed(world, 1, name="bob"))
    for number in range(10, 20):
        call_id = keyed(world, number, key=f"{number}", name="ada")
        outcome = messages.Outcome(call_id, "OK", None)
        world.worker_says("echo-1", messages.Outcomes(EPOCH, 1, (outcome,)), bytes(400_000))
    assert list(world.outcomes(bob).values()) == ["OK"]
    again = keyed(world, 2, name="bob")
    assert world.outcomes(bob) == {again: "OK"}


def test_outcome_that_is_let_go_is_kept_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Body(bytearray):
        """One whose end can be seen."""

    monkeypatch.setattr(bounds, "IDEMPOTENCY_BYTES_MAX", 1_000_000)
    world = World()
    session = world.hello()
    world.ready()
    ends = []
    for number in range(10):
        body = Body(400_000)
        ends.append(weakref.ref(body))
        call_id = keyed(world, number, key=f"{number}")
        outcome = messages.Outcome(call_id, "OK", None)
        world.worker_says("echo-1", messages.Outcomes(EPOCH, 1, (outcome,)), body)  # type: ignore[arg-type] # as good
        del body
        world.heard_by(session)
        world.client_says("c1", messages.Ack(EPOCH, session.sent))
    assert [end() is None for end in ends] == [True] * 8 + [False] * 2


def test_poisoned_call_is_kept_for_somebody_to_look_at() -> None:
    world = World()
    session = world.hello()
    call_id = b""
    for life in (1, 2):
        world.ready(f"echo-{life}", idempotent=True)
        call_id = call_id or world.call()
        world.died(f"echo-{life}", started_seq=1)
        world.later(1)
    assert world.outcomes(session) == {call_id: "POISONED"}

    def ask(number: int, **arguments: str) -> messages.Outcome:
        request = messages.Call(bytes([number]) * 16, "system.dead_letters", 1000, payload.pack(arguments))
        world.client_says("c1", messages.Calls(EPOCH, 0, (request,)))
        ((message, _),) = world.heard_by(session)
        assert isinstance(message, messages.Outcomes)
        return message.outcomes[0]

    (listed,) = payload.unpack_map(ask(1).body or b"")["dead_letters"]
    assert (listed["call_id"], listed["tool"], listed["workers"]) == (
        call_id.hex(), "echo.echo", ["echo-1", "echo-2"],
    )  # fmt: skip
    shown = payload.unpack_map(ask(2, action="show", id=call_id.hex()).body or b"")["dead_letter"]
    assert shown["arguments"] == payload.pack({})
    assert [one["worker_id"] for one in shown["certificates"]] == ["echo-1", "echo-2"]
    assert ask(3, action="show", id="ffff").code == "NOT_FOUND"
    assert ask(4, action="burn", id=call_id.hex()).code == "INVALID_ARGUMENT"
    assert ask(5, action="drop", id=call_id.hex()[:31]).code == "OK"
    assert payload.unpack_map(ask(6).body or b"") == {"dead_letters": []}


def test_dead_letters_are_bounded_by_count_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DEAD_LETTERS_MAX", 2)
    world = World()
    world.hello()
    for life in range(1, 7, 2):
        world.ready(f"echo-{life}", idempotent=True)
        world.call()
        world.died(f"echo-{life}", started_seq=1)
        world.later(0.1)
        world.ready(f"echo-{life + 1}", idempotent=True)
        world.died(f"echo-{life + 1}", started_seq=1)
        world.later(0.1)
    letters = world.machine.dispatcher.dead_letters
    assert len(letters) == 2
    world.later(bounds.DEAD_LETTER_TTL_S + 1)
    assert len(letters) == 0


def several(world: World, *names: str, timeout_ms: int = 30_000, **extra: object) -> list[bytes]:
    """Calls with one key, one after another, by these clients."""
    more = messages.CallExtra(**{"idempotency_key": "k", **extra})  # type: ignore[arg-type] # what the tests give
    call_ids = [b"s" * 15 + bytes([number]) for number in range(len(names))]
    for name, call_id in zip(names, call_ids, strict=True):
        request = messages.Call(call_id, "echo.echo", timeout_ms, payload.pack({}), more)
        world.client_says(name, messages.Calls(EPOCH, 0, (request,)))
    return call_ids


@pytest.mark.parametrize("goodbye", [True, False])
def test_session_that_ends_leaves_none_of_its_calls_to_run_for_nobody(goodbye: bool) -> None:
    world = World()
    world.hello("c1")
    other = world.hello("c2")
    world.ready("echo-1", depth=16)
    calls = several(world, "c1", "c1", "c2", "c1", "c1")
    assert world.dispatched("echo-1") == calls[:1]
    world.check()
    if goodbye:
        world.client_says("c1", messages.Goodbye(EPOCH))
    else:
        world.machine.clients.unreachable(b"c1", world.now)
        world.later(bounds.RESUME_GRACE_S + 0.1)
    assert world.dispatched("echo-1") == [calls[2]], "somebody waits for that one"
    world.check()
    world.answer("echo-1", calls[2])
    assert world.outcomes(other) == {calls[2]: "OK"}
    world.check()


def test_calls_whose_time_is_over_together_begin_nothing() -> None:
    world = World()
    session = world.hello()
    world.ready()
    calls = several(world, "c1", "c1", "c1", timeout_ms=1000)
    assert world.dispatched("echo-1") == calls[:1]
    world.later(1.5)
    assert world.dispatched("echo-1") == []
    assert world.outcomes(session) == dict.fromkeys(calls, "DEADLINE_EXCEEDED")
    assert not world.machine.idempotency.records
    world.check()


def test_broker_that_stops_begins_nothing() -> None:
    world = World()
    session = world.hello()
    world.ready()
    calls = several(world, "c1", "c1", "c1")
    assert world.dispatched("echo-1") == calls[:1]
    world.machine.from_node(node.Shutdown(0.1), world.now)
    world.client_says("c1", messages.Cancel(EPOCH, (calls[0],)))
    assert world.dispatched("echo-1") == calls[1:2], "what was accepted goes on while there is time"
    world.later(bounds.PART_S + 0.2)
    assert world.machine.drained
    assert world.dispatched("echo-1") == []
    assert world.outcomes(session) == {
        calls[0]: "CANCELLED", calls[1]: "BROKER_LOST", calls[2]: "BROKER_LOST",
    }  # fmt: skip


def stop_tool(world: World) -> None:
    operator = world.hello("operator")
    arguments = payload.pack({"tool": "echo.echo"})
    stop = messages.Call(b"o" * 16, "system.tools.stop", 30_000, arguments)
    world.client_says("operator", messages.Calls(EPOCH, 0, (stop,)))
    assert set(world.outcomes(operator).values()) <= {"OK"}


def give_pool_up(world: World) -> None:
    report = node.PoolReport(
        name="echo", state="failed", wanted=1, workers=(), restarts=0, reason="no module"
    )
    world.machine.from_node(node.Report((report,)), world.now)


@pytest.mark.parametrize("end", [stop_tool, give_pool_up])
def test_followers_of_a_call_that_nobody_will_run_end_with_it(end: Callable[[World], None]) -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1", depth=1)
    world.hello("busy")
    busy = world.call("busy")
    calls = several(world, "c1", "c1", "c1")
    assert world.dispatched("echo-1") == [busy]
    end(world)
    assert world.outcomes(session) == dict.fromkeys(calls, "UNAVAILABLE")
    world.answer("echo-1", busy)
    assert world.dispatched("echo-1") == []
    world.check()


@pytest.mark.parametrize("end", [stop_tool, give_pool_up])
def test_follower_is_not_given_to_a_tool_that_takes_none(end: Callable[[World], None]) -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1", depth=1)
    calls = several(world, "c1", "c1", "c1")
    assert world.dispatched("echo-1") == calls[:1]
    end(world)
    assert world.outcomes(session) == {}, "it runs, and they wait for it"
    world.client_says("c1", messages.Cancel(EPOCH, (calls[0],)))
    assert world.outcomes(session) == {
        calls[0]: "CANCELLED", calls[1]: "UNAVAILABLE", calls[2]: "UNAVAILABLE",
    }  # fmt: skip
    world.answer("echo-1", calls[0])
    assert world.dispatched("echo-1") == []
    world.check()


def test_followers_take_up_room_to_wait_and_hold_no_arguments() -> None:
    world = World()
    world.machine.dispatcher.budget.principal = Bound(5, 1_000_000)
    world.ready("echo-1", depth=1)
    refused = 0
    large = payload.pack({"text": "x" * 900_000})
    for number in range(20):
        session = world.hello(f"c{number}")
        extra = messages.CallExtra(idempotency_key="k", detach=True)
        request = messages.Call(bytes([number]) * 16, "echo.echo", 30_000, None, extra)
        world.client_says(f"c{number}", messages.Calls(EPOCH, 0, (request,)), large)
        refused += list(world.outcomes(session).values()) == ["OVERLOADED"]
        world.client_says(f"c{number}", messages.Goodbye(EPOCH))
        world.check()
    calls = world.machine.ledger.calls
    assert (len(calls), refused) == (1 + 5, 20 - 6)
    assert sum(call.bytes_held() for call in calls.values()) == len(large)
    world.answer("echo-1", bytes(16), "CANCELLED")
    worker = world.machine.workers.by_id["echo-1"]
    (second,) = worker.held.values()
    assert second.call_id == b"\1" * 16
    assert second.packed_arguments() == large, "the one that runs in its place is given the arguments"
    world.check()


def test_session_that_ends_while_its_follower_is_refused_ends_each_call_once() -> None:
    world = World()
    world.machine.dispatcher.budget.principal = Bound(2, 1_000_000)
    world.hello("c1", FakeGrant(principal="ada"))
    other = world.hello("c2", FakeGrant(principal="ada"))
    world.ready("echo-1", depth=1)
    calls = several(world, "c1", "c2", "c1")
    world.machine.dispatcher.budget.principal = Bound(0, 0)
    world.client_says("c1", messages.Goodbye(EPOCH))
    assert world.outcomes(other) == {calls[1]: "OVERLOADED"}
    assert not world.machine.ledger.calls
    world.check()


def test_follower_whose_tool_gets_a_worker_of_its_own_counts_there() -> None:
    world = World()
    session = world.hello()
    world.serve("echo-1", 1, "echo", definition("echo.echo"), definition("echo.other"))
    world.call(tool="echo.other")
    calls = several(world, "c1", "c1", "c1")
    machine = world.machine
    target = machine.dispatcher.pool("echo~echo.echo")
    machine.health.placement.move(machine.registry.tools["echo.echo"], target, world.now)
    world.check()
    assert target.waiting.calls == 3
    world.serve("own-1", 1, "echo~echo.echo", definition("echo.echo"))
    assert world.dispatched("own-1") == calls[:1]
    world.answer("own-1", calls[0])
    assert world.outcomes(session) == dict.fromkeys(calls, "OK")
    world.check()
    assert machine.dispatcher.budget.total.calls == 0
