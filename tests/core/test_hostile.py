"""Peers that mean harm: what they say costs themselves, and neither the broker nor others."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import mcp_broker.limits as bounds
from mcp_broker.core import own_tools
from mcp_broker.errors import NotFound
from mcp_broker.wire import codec, messages, node
from tests.core.support import EPOCH, World, definition

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.routing import Routing


def nested(levels: int, inner: str = "") -> str:
    return "[" * levels + inner + "]" * levels


def refusals(world: World) -> list[str]:
    return [message.reason for message in world.machine.to_node if isinstance(message, node.WorkerRefused)]


def register(world: World, worker_id: str, *tools: messages.ToolDefinition) -> None:
    world.worker_says(worker_id, messages.Register(0, "MCPB", (1,), tools))


# -- rates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_per_s", [1e-300, 1e-307, 5e-324])
def test_rate_of_less_than_a_call_in_the_longest_time_counts_as_that(rate_per_s: float) -> None:
    world = World()
    session = world.hello()
    world.ready(rate_per_s=rate_per_s)
    first, second = world.call(), world.call()
    assert world.dispatched("echo-1") == [first]
    told = world.faults(session)[second]
    assert (told["code"], told["retry_after_s"]) == ("RATE_LIMITED", bounds.CALL_TIMEOUT_S_MAX)


# -- schemas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [nested(bounds.SCHEMA_DEPTH_MAX), '{"a":' * 64 + "1" + "}" * 64])
def test_schema_as_deep_as_may_be_is_listed(text: str) -> None:
    world = World()
    session = world.hello()
    world.ready(parameters=text)
    call_id = world.call(tool="system.tools")
    assert world.outcomes(session) == {call_id: "OK"}


@pytest.mark.parametrize("text", [nested(65), '{"a":' * 65 + "1" + "}" * 65, nested(40, nested(40, "1"))])
def test_deeper_schema_is_refused(text: str) -> None:
    world = World()
    world.admit("echo-1")
    register(world, "echo-1", definition("echo.echo", parameters=text))
    (told,) = refusals(world)
    assert "nested deeper than 64 levels" in told


def test_own_tool_that_breaks_costs_its_caller_an_answer_and_is_told_to_the_shell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_routing: Routing, _call: Call, _wanted: dict[str, Any]) -> dict[str, Any]:
        raise RecursionError("deep")

    broken_tool = own_tools.OwnTool(own_tools.TOOLS["system.tools"].definition, broken)
    monkeypatch.setitem(own_tools.TOOLS, "system.tools", broken_tool)
    world = World()
    session = world.hello()
    told: list[tuple[str, Exception]] = []
    world.machine.bug = lambda where, error: told.append((where, error))
    call_id = world.call(tool="system.tools")
    assert world.outcomes(session) == {call_id: "INTERNAL"}
    ((where, error),) = told
    assert where == "system.tools"
    assert isinstance(error, RecursionError)
    world.check()


def test_own_tool_that_refuses_is_no_bug() -> None:
    world = World()
    session = world.hello()
    call_id = world.call(tool="system.dead_letters", arguments=b"\x81\xa6action\xa4drop")
    assert world.outcomes(session) == {call_id: NotFound.code}


# -- what a pool's workers register -----------------------------------------------------------------------


def large_tools(first: int, count: int, size: int = 30_000) -> list[messages.ToolDefinition]:
    schema = json.dumps({"description": "x" * size})
    return [
        definition(f"echo.t{number}", parameters=schema, returns=schema)
        for number in range(first, first + count)
    ]


def test_worker_that_registers_again_brings_other_tools_in_place_of_its_own() -> None:
    world = World()
    world.serve("echo-1", 4, "echo", *large_tools(0, 15))
    register(world, "echo-1", *large_tools(15, 15))
    assert refusals(world) == []
    names = {tool.name for tool in world.machine.registry.tools.values() if tool.pool is not None}
    assert names == {f"echo.t{number}" for number in range(15, 30)}


def test_workers_of_a_pool_cannot_bring_more_together_than_one_could() -> None:
    world = World()
    world.serve("echo-1", 4, "echo", *large_tools(0, 15))
    world.admit("echo-2")
    for first in range(15, 300, 15):
        register(world, "echo-2", *large_tools(first, 15))
    assert len(refusals(world)) == 19
    assert "split the module" in refusals(world)[0]
    register(world, "echo-2", *large_tools(0, 15))
    world.worker_says("echo-2", messages.Ready(EPOCH, 4))
    told = [message for message in world.machine.to_node if isinstance(message, node.WorkerUp)]
    assert len(told) == 2
    assert all(len(codec.encode(message)) < bounds.REGISTER_BYTES_MAX + 1000 for message in told)


# -- acknowledgements -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rides_in_calls", [True, False])
def test_client_that_acknowledges_what_was_never_sent_is_refused(rides_in_calls: bool) -> None:
    world = World()
    session = world.hello()
    world.ready()
    first = world.call()
    world.answer("echo-1", first)
    world.heard_by(session)
    request = messages.Call(b"n" * 16, "echo.echo", 1000, b"\x80")
    message = messages.Calls(EPOCH, 2, (request,)) if rides_in_calls else messages.Ack(EPOCH, 2)
    world.client_says("c1", message)
    ((told, _),) = world.heard_by(session)
    assert isinstance(told, messages.Error)
    assert (told.code, told.fatal) == ("MALFORMED_FRAME", True)
    assert "2 outcomes are acknowledged, and 1 were sent" in told.message
    assert session.unacked_count == 1, "nothing of it counts as read"
    assert not world.machine.ledger.calls
    world.client_says("c1", messages.Ack(EPOCH, 1))
    assert session.unacked_count == 0
    world.check()
