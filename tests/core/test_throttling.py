"""Workers that are close to a limit, by their node's word, get no calls until they are not any more."""

from __future__ import annotations

from mcp_broker.wire import messages, node
from tests.core.support import EPOCH, World


def report(world: World, **levels: node.Pressure) -> None:
    workers = tuple(
        node.WorkerReport(id=f"echo-{number}", pid=1, state="running", since_wall=0.0, pressure=level)
        for number, level in levels.items()
    )
    pool = node.PoolReport(name="echo", state="ready", wanted=len(workers), workers=workers)
    world.machine.from_node(node.Report((pool,)), world.now)


def levels(*each: node.Pressure) -> dict[str, node.Pressure]:
    return {str(number): level for number, level in enumerate(each, start=1)}


def test_a_throttled_worker_gets_no_calls_and_others_get_them() -> None:
    world = World()
    world.hello()
    world.ready("echo-1", depth=1)
    world.ready("echo-2", depth=1)
    report(world, **levels("throttle", "warning"))
    first, waiting = world.call(), world.call()
    assert world.dispatched("echo-2") == [first]
    assert world.dispatched("echo-1") == []
    world.answer("echo-2", first)
    assert world.dispatched("echo-2") == [waiting], "a warning changes nothing"
    world.check()


def test_what_waits_goes_to_a_worker_that_is_no_longer_throttled() -> None:
    world = World()
    session = world.hello()
    world.ready("echo-1", depth=2)
    report(world, **levels("throttle"))
    call_id = world.call()
    assert world.dispatched("echo-1") == []
    report(world, **levels("warning"))
    assert world.dispatched("echo-1") == [call_id]
    world.answer("echo-1", call_id)
    assert world.outcomes(session) == {call_id: "OK"}
    world.check()


def test_what_a_worker_announces_while_it_is_throttled_counts_later() -> None:
    world = World()
    world.hello()
    world.ready("echo-1", depth=1)
    report(world, **levels("throttle"))
    world.worker_says("echo-1", messages.Ready(EPOCH, 3))
    calls = [world.call() for _ in range(4)]
    assert world.dispatched("echo-1") == []
    report(world, **levels("normal"))
    assert world.dispatched("echo-1") == calls[:3]
    world.check()


def test_a_worker_that_is_measured_gets_no_call_before_it_was() -> None:
    world = World()
    world.hello()
    admitted = node.Admitted(thumbprint="key-echo-1", worker_id="echo-1", pool="echo", is_measured=True)
    world.machine.from_node(node.Admit((admitted,)), world.now)
    world.ready("echo-1", depth=1)
    call_id = world.call()
    report(world, **levels("unmeasured"))
    assert world.dispatched("echo-1") == []
    report(world, **levels("normal"))
    assert world.dispatched("echo-1") == [call_id]
    world.check()
