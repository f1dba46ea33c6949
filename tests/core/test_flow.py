"""Flow control and fairness in the broker's machine: who waits, who is served, who is told to come back."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

import mcp_broker.limits as bounds
from mcp_broker.core import introspection
from mcp_broker.core.budget import Bound, Budget
from mcp_broker.core.fairness import CLASSES
from mcp_broker.wire import messages, node
from mcp_broker.wire.messages import Priority
from tests.core.support import EPOCH, FakeGrant, World, definition

if TYPE_CHECKING:
    from mcp_broker.core.client_session import ClientSession

ROOMY = Bound(1000, 1_000_000)


def enter(world: World, name: str, **grant: int) -> ClientSession:
    """Open a session of a principal of that name."""
    return world.hello(name, FakeGrant(principal=name, **grant))


def work(world: World, times: int, worker_id: str = "echo-1") -> list[bytes]:
    """Have a worker answer what it was given, one call at a time; return the calls in the order of their service."""
    done: list[bytes] = []
    given: list[bytes] = []
    for _ in range(times):
        given += world.dispatched(worker_id)
        if not given:
            break
        done.append(given.pop(0))
        world.answer(worker_id, done[-1])
        world.check()
    return done


# -- between principals ---------------------------------------------------------------------------------


def test_flood_of_one_principal_delays_another_by_one_call() -> None:
    world = World()
    enter(world, "alice")
    enter(world, "bob")
    world.ready(depth=1)
    world.calls("alice", ["echo.echo"] * 200)
    work(world, 10)
    urgent = world.call("bob")
    assert urgent in work(world, 3)


def test_sessions_of_one_principal_share_its_turns() -> None:
    world = World()
    bob = FakeGrant(principal="bob")
    for name in ("b1", "b2", "b3"):
        world.hello(name, bob)
    enter(world, "alice")
    world.ready(depth=0)
    bobs = {call for name in ("b1", "b2", "b3") for call in world.calls(name, ["echo.echo"] * 10)}
    world.calls("alice", ["echo.echo"] * 20)
    world.worker_says("echo-1", messages.Ready(EPOCH, 1))
    done = work(world, 20)
    assert len(bobs.intersection(done)) == 10


def test_weight_of_a_token_is_its_principals_share() -> None:
    world = World()
    enter(world, "alice", weight=3)
    enter(world, "bob")
    world.ready(depth=0)
    alices = set(world.calls("alice", ["echo.echo"] * 40))
    world.calls("bob", ["echo.echo"] * 40)
    world.worker_says("echo-1", messages.Ready(EPOCH, 1))
    assert len(alices.intersection(work(world, 40))) == 30


def test_free_workers_are_given_calls_at_once_in_the_order_of_submission() -> None:
    world = World()
    enter(world, "alice", priority=0)
    world.ready(depth=4)
    low = world.call("alice", priority=Priority.LOW)
    high = world.call("alice", priority=Priority.HIGH)
    assert world.dispatched("echo-1") == [low, high]
    assert not world.machine.dispatcher.budget.total.calls


def test_large_calls_take_more_of_a_turn() -> None:
    world = World()
    enter(world, "alice")
    enter(world, "bob")
    world.ready(depth=0)
    for _ in range(10):
        world.calls("alice", ["echo.echo"], arguments=bytes(bounds.COST_BYTES))
    bobs = set(world.calls("bob", ["echo.echo"] * 20))
    world.worker_says("echo-1", messages.Ready(EPOCH, 1))
    assert len(bobs.intersection(work(world, 15))) == 10


# -- priority --------------------------------------------------------------------------------------------


def test_higher_priority_is_served_first() -> None:
    world = World()
    enter(world, "alice", priority=0)
    world.ready(depth=0)
    low = world.call("alice", priority=Priority.LOW)
    normal = world.call("alice")
    high = world.call("alice", priority=Priority.HIGH)
    world.worker_says("echo-1", messages.Ready(EPOCH, 1))
    assert work(world, 3) == [high, normal, low]


def test_priority_counts_at_most_as_the_token_allows() -> None:
    world = World()
    enter(world, "alice", priority=1)
    enter(world, "bob", priority=1)
    world.ready(depth=0)
    first = world.call("bob")
    pushing = world.call("alice", priority=Priority.HIGH)
    world.worker_says("echo-1", messages.Ready(EPOCH, 1))
    assert work(world, 2) == [first, pushing]


def test_low_call_that_waited_long_enough_comes_before_fresh_ones_above() -> None:
    world = World()
    enter(world, "alice", priority=0)
    enter(world, "bob", priority=0)
    world.ready(depth=1)
    world.calls("alice", ["echo.echo"] * 50, priority=Priority.HIGH)
    low = world.call("bob", priority=Priority.LOW)
    work(world, 10)
    for _ in range(CLASSES - 1):
        world.later(bounds.PRIORITY_AGE_S + 0.1)
        assert low not in work(world, 1)
    assert low in work(world, 3)


def test_classes_are_those_of_the_wire() -> None:
    assert len(Priority) == CLASSES


# -- caps of single tools -----------------------------------------------------------------------------------


def test_capped_tool_is_held_by_at_most_so_many_places_and_blocks_no_other() -> None:
    world = World()
    enter(world, "alice")
    tools = definition("echo.slow", concurrency_max=2), definition("echo.echo")
    world.serve("echo-1", 4, "echo", *tools)
    world.serve("echo-2", 4, "echo", *tools)
    slow = world.calls("alice", ["echo.slow"] * 5)
    world.check()
    others = world.calls("alice", ["echo.echo", "echo.slow", "echo.echo"])
    given = world.dispatched("echo-1") + world.dispatched("echo-2")
    assert sorted(given) == sorted([*slow[:2], others[0], others[2]])
    holder = next(worker for worker in world.machine.workers.by_id.values() if slow[0] in worker.held)
    world.answer(holder.worker_id, slow[0])
    assert world.dispatched("echo-1") + world.dispatched("echo-2") == [slow[2]]
    world.check()


def test_call_that_ended_keeps_its_place_in_the_cap_until_its_worker_lets_go() -> None:
    world = World()
    enter(world, "alice")
    world.ready(depth=4, concurrency_max=1)
    first = world.call("alice", timeout_s=0.1)
    second = world.call("alice")
    world.later(0.2)
    assert world.dispatched("echo-1") == [first]
    world.answer("echo-1", first, "CANCELLED")
    assert world.dispatched("echo-1") == [second]
    world.check()


def test_death_of_a_worker_gives_its_places_in_the_cap_back() -> None:
    world = World()
    enter(world, "alice")
    world.ready("echo-1", depth=4, concurrency_max=2)
    calls = [world.call("alice") for _ in range(3)]
    world.ready("echo-2", depth=4, concurrency_max=2)
    world.check()
    world.died("echo-1", started_seq=1)
    world.later(1)
    assert world.dispatched("echo-2") == calls[1:]
    world.check()


def test_new_version_of_a_tool_may_bring_another_cap_while_calls_wait() -> None:
    world = World()
    enter(world, "alice")
    world.ready("echo-1", depth=4)
    world.died("echo-1")
    world.later(1)
    calls = [world.call("alice") for _ in range(5)]
    world.ready("echo-2", depth=4, concurrency_max=1)
    assert world.dispatched("echo-2") == calls[:1]
    world.check()
    world.died("echo-2", started_seq=0)
    world.later(1)
    world.ready("echo-3", depth=4, concurrency_max=3)
    assert Counter(world.dispatched("echo-3")) <= Counter(calls)
    world.check()
    assert len(world.machine.workers.by_id["echo-3"].held) == 3


def test_waiting_call_of_a_capped_tool_can_be_cancelled_and_expires() -> None:
    world = World()
    session = enter(world, "alice")
    world.ready(depth=4, concurrency_max=1)
    world.call("alice")
    cancelled, expired = world.call("alice"), world.call("alice", timeout_s=0.1)
    world.client_says("alice", messages.Cancel(EPOCH, (cancelled,)))
    world.later(0.2)
    assert world.outcomes(session) == {cancelled: "CANCELLED", expired: "DEADLINE_EXCEEDED"}
    world.check()


# -- budgets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        (Budget(Bound(3, 1000), ROOMY, ROOMY), "pool_calls"),
        (Budget(Bound(100, 3), ROOMY, ROOMY), "pool_bytes"),
        (Budget(ROOMY, Bound(3, 1000), ROOMY), "principal_calls"),
        (Budget(ROOMY, Bound(100, 3), ROOMY), "principal_bytes"),
        (Budget(ROOMY, ROOMY, Bound(3, 1000)), "broker_calls"),
        (Budget(ROOMY, ROOMY, Bound(100, 3)), "broker_bytes"),
    ],
)
def test_call_beyond_a_budget_is_refused_to_the_call_and_names_the_limit(budget: Budget, limit: str) -> None:
    world = World()
    world.machine.dispatcher.budget = budget
    session = enter(world, "alice")
    world.ready(depth=1)
    # a call of one byte: the first goes to the worker, three wait, in one message or in several
    calls = [*world.calls("alice", ["echo.echo"] * 6), world.call("alice")]
    faults = world.faults(session)
    assert list(faults) == calls[4:]
    details = faults[calls[4]]
    assert (details["code"], details["limit"], details["maximum"]) == ("OVERLOADED", limit, 3)
    assert (details["waiting_calls"], details["waiting_bytes"], details["pool"]) == (3, 3, "echo")
    assert details["retry_after_s"] == bounds.RETRY_AFTER_S
    world.check()
    world.answer("echo-1", calls[0])
    assert world.outcomes(session) == {calls[0]: "OK"}
    last = world.call("alice")
    assert world.faults(session) == {}, "there is room again"
    assert last in world.machine.ledger.calls


def test_flood_of_one_principal_leaves_room_for_others_to_wait() -> None:
    world = World()
    world.machine.dispatcher.budget = Budget(Bound(10, 1000), Bound(3, 1000), ROOMY)
    alice, bob = enter(world, "alice"), enter(world, "bob")
    world.ready(depth=0)
    world.calls("alice", ["echo.echo"] * 100)
    call = world.call("bob")
    assert len(world.faults(alice)) == 97
    assert world.faults(bob) == {}
    assert call in world.machine.ledger.calls


def test_calls_that_wait_again_after_a_death_are_never_refused() -> None:
    world = World()
    world.machine.dispatcher.budget = Budget(Bound(2, 1000), ROOMY, ROOMY)
    session = enter(world, "alice")
    world.ready("echo-1", depth=4)
    world.calls("alice", ["echo.echo"] * 6)
    world.died("echo-1", started_seq=0)
    world.later(1)
    assert world.faults(session) == {}
    assert world.machine.dispatcher.pools["echo"].waiting.calls == 6
    world.check()


def test_call_that_a_free_worker_can_take_is_not_refused_because_capped_ones_fill_the_budget() -> None:
    world = World()
    world.machine.dispatcher.budget = Budget(Bound(2, 1000), ROOMY, ROOMY)
    session = enter(world, "alice")
    world.serve("echo-1", 8, "echo", definition("echo.slow", concurrency_max=1), definition("echo.echo"))
    world.calls("alice", ["echo.slow"] * 3)
    call = world.call("alice")
    assert world.faults(session) == {}
    assert call in world.dispatched("echo-1")


def test_refused_call_with_a_key_leaves_the_key_free() -> None:
    world = World()
    world.machine.dispatcher.budget = Budget(Bound(1, 1000), ROOMY, ROOMY)
    session = enter(world, "alice")
    world.ready(depth=0)
    first = world.call("alice")
    refused = world.call("alice", idempotency_key="k")
    assert world.faults(session)[refused]["code"] == "OVERLOADED"
    world.worker_says("echo-1", messages.Ready(EPOCH, 1))
    world.answer("echo-1", first)
    again = world.call("alice", idempotency_key="k")
    assert world.dispatched("echo-1") == [first, again]
    world.check()


def test_calls_that_follow_one_which_may_not_wait_end_with_it() -> None:
    world = World()
    budget = world.machine.dispatcher.budget = Budget(Bound(1, 1000), ROOMY, ROOMY)
    session = enter(world, "alice")
    world.ready(depth=0)
    leader, *followers = [world.call("alice", idempotency_key="k") for _ in range(300)]
    # the one that would run in its place finds no room any more
    budget.pool = Bound(0, 0)
    world.client_says("alice", messages.Cancel(EPOCH, (leader,)))
    ends = world.outcomes(session)
    assert ends.pop(leader) == "CANCELLED"
    assert ends == dict.fromkeys(followers, "OVERLOADED")
    assert not world.machine.idempotency.records
    world.check()


def test_time_to_try_again_follows_how_fast_the_backlog_drains() -> None:
    world = World()
    world.machine.dispatcher.budget = Budget(Bound(200, 10_000), ROOMY, ROOMY)
    session = enter(world, "alice")
    world.ready(depth=1)
    world.calls("alice", ["echo.echo"] * 201)
    answered = world.dispatched("echo-1")
    for _ in range(100):
        world.later(0.02)
        world.answer("echo-1", answered.pop())
        answered += world.dispatched("echo-1")
        world.call("alice")
        world.heard_by(session)
    # 50 a second: a tenth of 200 takes 0.4 s
    refused = world.call("alice")
    assert world.faults(session)[refused]["retry_after_s"] == pytest.approx(0.4, rel=0.1)
    world.later(60)
    assert world.machine.dispatcher.pools["echo"].retry_after_s(10**9) == bounds.RETRY_AFTER_S_MAX
    assert world.machine.dispatcher.pools["echo"].retry_after_s(0) == bounds.RETRY_AFTER_S_MIN


# -- rates -----------------------------------------------------------------------------------------------------


def boot(**limits: float) -> node.Boot:
    return node.Boot(
        EPOCH, 0, 0, "", "", b"", b"", {}, "", "", {"drain_s": 1.0, **limits}, 1, 0.0
    )  # fmt: skip


def test_principal_beyond_its_rate_is_told_when_to_come_back_over_all_its_sessions() -> None:
    world = World()
    world.machine.from_node(boot(rate_per_s=10.0, burst=2), world.now)
    first, second = enter(world, "alice"), world.hello("a2", FakeGrant(principal="alice"))
    other = enter(world, "bob")
    world.ready()
    calls = [*world.calls("alice", ["echo.echo"] * 3), world.call("a2")]
    assert world.faults(first)[calls[2]] == {
        "code": "RATE_LIMITED", "limit": "principal_rate", "rate_per_s": 10.0, "burst": 2,
        "retry_after_s": 0.1, "tool": "echo.echo", "principal": "alice",
    }  # fmt: skip
    assert set(world.faults(second)) == {calls[3]}
    world.call("bob")
    assert world.faults(other) == {}
    world.later(0.101)
    world.call("alice")
    assert world.faults(first) == {}
    world.check()


def test_tool_beyond_its_rate_is_refused_to_all_callers_and_no_other_tool_with_it() -> None:
    world = World()
    alice, bob = enter(world, "alice"), enter(world, "bob")
    world.serve("echo-1", 16, "echo", definition("echo.slow", rate_per_s=1, burst=1), definition("echo.echo"))
    world.call("alice", "echo.slow")
    calls = world.calls("bob", ["echo.echo", "echo.slow", "echo.echo"])
    assert {call: details["limit"] for call, details in world.faults(bob).items()} == {calls[1]: "tool_rate"}
    assert world.faults(alice) == {}
    assert len(world.dispatched("echo-1")) == 3
    world.check()


def test_operators_rate_for_a_pool_replaces_what_its_tools_say() -> None:
    world = World()
    session = enter(world, "alice")
    report = node.PoolReport(name="echo", state="ready", wanted=1, rate_per_s=5.0, burst=3)
    world.machine.from_node(node.Report((report,)), world.now)
    world.ready(rate_per_s=1, burst=1)
    world.calls("alice", ["echo.echo"] * 4)
    assert len(world.faults(session)) == 1
    # the supervisor reports often; that fills no bucket
    world.machine.from_node(node.Report((report,)), world.now)
    world.call("alice")
    assert len(world.faults(session)) == 1
    world.machine.from_node(node.Report((node.PoolReport(name="echo", state="ready", wanted=1),)), world.now)
    world.calls("alice", ["echo.echo"] * 2)
    assert len(world.faults(session)) == 1, "the tool's own rate counts again"


def test_call_that_is_sent_again_is_not_counted_twice() -> None:
    world = World()
    world.machine.from_node(boot(rate_per_s=1.0, burst=1), world.now)
    session = enter(world, "alice")
    world.admit("echo-1")
    sent = b"s" * 16
    held = (messages.Held(sent, 1, "alice"),)
    world.worker_says(
        "echo-1", messages.Register(0, "MCPB", (1,), (definition("echo.echo"),), seq=1, held=held)
    )
    world.worker_says("echo-1", messages.Ready(EPOCH, 4))
    world.call("alice")
    request = messages.Call(sent, "echo.echo", 30_000, b"\x80", messages.CallExtra(again=True))
    world.client_says("alice", messages.Calls(EPOCH, 0, (request, request)))
    assert world.faults(session) == {}
    assert sent in session.live
    world.later(bounds.ORPHAN_S)
    world.calls("alice", ["echo.echo"] * 2, again=True)
    (fault,) = world.faults(session).values()
    assert fault["code"] == "RATE_LIMITED", "its word alone is not enough"


def test_refusals_for_the_rate_that_nobody_acknowledges_are_bounded() -> None:
    world = World()
    world.machine.from_node(boot(rate_per_s=0.01, burst=1), world.now)
    session = enter(world, "alice")
    world.ready()
    for _ in range(100):
        world.calls("alice", ["echo.echo"] * bounds.BATCH_MAX)
        world.check()
    assert session.session_id not in world.machine.clients.sessions
    assert not world.machine.ledger.calls


# -- what is told --------------------------------------------------------------------------------------------------


def test_status_tells_what_waits_and_what_was_refused_and_why() -> None:
    world = World()
    world.machine.dispatcher.budget = Budget(Bound(2, 1000), ROOMY, ROOMY)
    enter(world, "alice")
    world.ready(depth=1)
    world.calls("alice", ["echo.echo"] * 5)
    world.call("alice", "echo.nothing")
    status = introspection.status(world.machine)
    assert status["calls"]["refused"] == {"OVERLOADED": 2, "NOT_FOUND": 1}
    assert (status["calls"]["accepted"], status["calls"]["queued"], status["calls"]["in_flight"]) == (3, 2, 1)
    (pool,) = status["pools"]
    assert (pool["queued"], pool["queued_bytes"]) == (2, 2)
