"""Calls whose worker was killed for a limit: charged to the one that ran, told with the limit, never tried again."""

from __future__ import annotations

from mcp_broker.wire import node
from tests.core.support import World


def killed_for(limit: str, started_seq: int) -> node.Certificate:
    return node.Certificate(
        worker_id="echo-1", pool="echo", pid=1, cause="it used 130 MB, and its limit memory_mb is 100",
        kind="limit", signal="SIGKILL", started_seq=started_seq, limit=limit, limit_value=100.0, used=130.0,
    )  # fmt: skip


def world_of(*, idempotent: bool) -> World:
    world = World()
    world.ready("echo-1", depth=3, idempotent=idempotent)
    return world


def test_a_call_that_exceeded_a_limit_ends_with_it_also_when_its_tool_could_run_again() -> None:
    for idempotent in (False, True):
        world = world_of(idempotent=idempotent)
        session = world.hello()
        ran, waited = world.call(), world.call()
        world.machine.from_node(node.Died(killed_for("memory_mb", 1)), world.now)
        world.ready("echo-2", depth=3, idempotent=idempotent)
        world.later(1)
        told = world.faults(session)
        assert set(told) == {ran}, "what it had not started goes to another worker"
        assert told[ran]["code"] == "RESOURCE_EXHAUSTED"
        assert [told[ran][key] for key in ("limit", "limit_value", "used")] == ["memory_mb", 100.0, 130.0]
        assert told[ran]["certificate"]["kind"] == "limit"
        assert world.dispatched("echo-2") == [waited]
        world.check()


def test_of_several_calls_that_ran_together_those_that_may_are_tried_again() -> None:
    world = world_of(idempotent=True)
    session = world.hello()
    together = [world.call(), world.call()]
    world.machine.from_node(node.Died(killed_for("memory_mb", 2)), world.now)
    world.ready("echo-2", depth=3, idempotent=True)
    world.later(1)
    assert world.outcomes(session) == {}
    assert world.dispatched("echo-2") == together

    world = world_of(idempotent=False)
    session = world.hello()
    together = [world.call(), world.call()]
    world.machine.from_node(node.Died(killed_for("memory_mb", 2)), world.now)
    world.later(1)
    told = world.faults(session)
    assert {call_id: (one["code"], one["among"]) for call_id, one in told.items()} == dict.fromkeys(
        together, ("RESOURCE_EXHAUSTED", 2)
    )
