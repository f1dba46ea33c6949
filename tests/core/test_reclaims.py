"""What was taken back after a death is told to whoever asks for the worker, also by a broker that came later."""

from __future__ import annotations

from typing import Any

from mcp_broker.core import introspection
from mcp_broker.wire import node
from mcp_broker.wire.ports import PortReport
from mcp_broker.wire.reclaims import Reclaim, Taken
from tests.core.support import World, certificate

RECORD = Reclaim(
    worker_id="echo-1", pool="echo", pid=1, level="process", steps=(Taken(step="scratch", count=3),), ms=4.5
)


def why(world: World, wanted: str) -> dict[str, Any]:
    call: Any = None  # who asks makes no difference
    return introspection.why(world.machine, call, {"id": wanted})


def test_a_reclaim_record_comes_some_time_after_the_death_and_is_told_with_it() -> None:
    world = World()
    world.ready()
    world.died("echo-1")
    assert why(world, "echo-1")["reclaim"] is None, "it goes on"
    world.machine.from_node(node.Reclaimed(RECORD), world.now)
    told = why(world, "echo-1")["reclaim"]
    assert told["steps"] == [{"step": "scratch", "count": 3, "bytes": 0, "ms": 0.0, "left": []}]


def test_a_death_is_told_with_the_calls_that_ended_by_it() -> None:
    world = World()
    world.hello()
    world.ready()
    call_id = world.call()
    world.died("echo-1", started_seq=1)
    world.later(1)
    told = why(world, "echo-1")["calls"]
    assert told == [{"call_id": call_id.hex(), "tool": "echo.echo", "code": "WORKER_LOST"}]


def test_calls_that_shared_one_execution_are_told_with_its_death() -> None:
    world = World()
    world.hello()
    world.ready(depth=4)
    first, second = world.call(idempotency_key="k"), world.call(idempotency_key="k")
    world.died("echo-1", started_seq=1)
    world.later(1)
    assert {one["call_id"] for one in why(world, "echo-1")["calls"]} == {first.hex(), second.hex()}
    told = why(world, first.hex())
    assert (told["kind"], told["code"]) == ("call", "WORKER_LOST")
    assert told["certificate"]["worker_id"] == "echo-1"


def test_a_new_broker_knows_the_records_of_before() -> None:
    world = World()
    world.machine.from_node(node.Deaths((certificate("echo-1", 0),), {}, (RECORD,)), world.now)
    assert why(world, "echo-1")["reclaim"]["ms"] == 4.5


def test_leased_ports_are_as_the_last_report_says() -> None:
    world = World()
    for ports in ((PortReport(port=18000, state="active", owner="echo-1"),), ()):
        world.machine.from_node(node.Report((), ports), world.now)
        assert world.machine.workers.ports == ports
