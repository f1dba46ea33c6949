"""Peers that mean harm: what they say costs themselves, and neither the broker nor others."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import mcp_broker.limits as bounds
from mcp_broker.core import own_tools
from mcp_broker.errors import NotFound
from mcp_broker.wire import codec, messages, node, payload
from tests.core.support import EPOCH, FakeGrant, World, definition

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

    broken_tool = replace(own_tools.TOOLS["system.tools"], answer=broken)
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


# -- questions about the broker ---------------------------------------------------------------------------------


def test_questions_beyond_a_turns_share_wait_for_the_next_turns() -> None:
    world = World()
    session = world.hello()
    many = world.calls("c1", ["system.status"] * 100)
    told: list[str] = []
    turns = 0
    while len(told) < len(many):
        answered = list(world.outcomes(session).values())
        assert 0 < len(answered) <= 2 * bounds.OWN_ANSWERS_MAX
        told += answered
        turns += 1
        assert world.machine.deadline() <= world.now or len(told) == len(many), "the next turn comes at once"
        world.check()
        world.machine.expire(world.now)
    assert told == ["OK"] * 100
    assert turns >= 100 // bounds.OWN_ANSWERS_MAX - 1
    assert not world.machine.enquiries


def test_who_asks_once_waits_for_nobody_who_asks_a_thousand_times() -> None:
    world = World()
    world.hello("greedy")
    modest = world.hello("modest")
    for _ in range(4):
        world.calls("greedy", ["system.tools"] * 250)
    call_id = world.call("modest", tool="system.tools")
    world.machine.expire(world.now)
    assert world.outcomes(modest) == {call_id: "OK"}


def test_large_answers_are_fewer_in_a_turn() -> None:
    world = World()
    session = world.hello()
    world.serve("echo-1", 4, "echo", *large_tools(0, 4))
    world.calls("c1", ["system.tools"] * 20)
    assert len(world.outcomes(session)) == 2
    world.machine.expire(world.now)
    assert len(world.outcomes(session)) == 2


def test_question_that_was_cancelled_before_its_turn_is_not_answered() -> None:
    world = World()
    session = world.hello()
    ids = world.calls("c1", ["system.status"] * (bounds.OWN_ANSWERS_MAX + 2))
    world.client_says("c1", messages.Cancel(EPOCH, (ids[-1],)))
    world.machine.expire(world.now)
    told = world.outcomes(session)
    assert told == {**dict.fromkeys(ids, "OK"), ids[-1]: "CANCELLED"}
    world.check()


def test_what_changes_a_tool_counts_for_the_next_call_however_many_questions_wait() -> None:
    world = World()
    session = world.hello()
    world.ready()
    world.calls("c1", ["system.status"] * 50)
    stop = messages.Call(b"s" * 16, "system.tools.stop", 1000, payload.pack({"tool": "echo.echo"}))
    call = messages.Call(b"c" * 16, "echo.echo", 1000, b"\x80")
    world.client_says("c1", messages.Calls(EPOCH, 0, (stop, call)))
    told = world.outcomes(session)
    assert (told[b"s" * 16], told[b"c" * 16]) == ("OK", "UNAVAILABLE")


def test_client_that_does_not_read_its_answers_gets_no_more_of_them() -> None:
    world = World()
    session = world.hello()
    world.serve("echo-1", 4, "echo", *large_tools(0, 15))
    codes: list[str] = []
    for _ in range(bounds.CLIENT_BEHIND_BYTES // bounds.REGISTER_BYTES_MAX + 10):
        world.call(tool="system.tools")
        world.machine.expire(world.now)
        codes += world.outcomes(session).values()
    assert session.unread_bytes < bounds.CLIENT_BEHIND_BYTES + 2 * bounds.BODY_BYTES_MAX
    assert codes[-1] == "OVERLOADED"
    world.client_says("c1", messages.Ack(EPOCH, session.sent))
    call_id = world.call(tool="system.tools")
    assert world.outcomes(session) == {call_id: "OK"}


def test_list_of_tools_follows_their_states_and_definitions() -> None:
    world = World()
    session = world.hello()

    def listed() -> tuple[str, str, str]:
        world.call(tool="system.tools", arguments=payload.pack({"name": "echo.echo"}))
        world.machine.expire(world.now)
        message, _ = world.heard_by(session)[-1]
        assert isinstance(message, messages.Outcomes)
        (tool,) = payload.unpack(message.outcomes[0].body or b"")["tools"]
        return tool["pool"], tool["state"], tool["version"]

    world.ready()
    assert listed() == ("echo", "ready", "1.0.0")
    report = node.PoolReport(name="echo", state="closing", wanted=0, workers=(), reason="closed")
    world.machine.from_node(node.Report((report,)), world.now)
    assert listed() == ("echo", "closing", "1.0.0")
    register(world, "echo-1", definition("echo.echo", version="2.0.0"))
    assert listed()[2] == "2.0.0"


# -- what a worker says of its failures ----------------------------------------------------------------------------


def test_details_of_a_workers_fault_are_not_taken_apart() -> None:
    world = World()
    session = world.hello()
    world.ready()
    call_id = world.call()
    details = payload.pack({"certificate": [[] for _ in range(32_000)]})
    fault = messages.Fault("no", False, details)
    world.worker_says(
        "echo-1",
        messages.Outcomes(EPOCH, 1, (messages.Outcome(call_id, "RESOURCE_EXHAUSTED", None, None, fault),)),
    )
    assert world.outcomes(session) == {call_id: "RESOURCE_EXHAUSTED"}
    (ended,) = world.machine.ledger.ended
    assert (ended.code, ended.message, ended.certificate) == ("RESOURCE_EXHAUSTED", "no", None)


def test_long_details_that_blame_the_caller_count_as_the_tools_failure() -> None:
    world = World()
    world.ready(depth=bounds.WORKER_DEPTH_MAX)
    details = payload.pack({"limit": "unread_bytes", "certificate": [[] for _ in range(32_000)]})
    fault = messages.Fault("no", False, details)
    for name in ("c1", "c2"):
        world.hello(name, FakeGrant(principal=name))
        for call_id in world.calls(name, ["echo.echo"] * bounds.BREAKER_CALLS_MIN):
            outcome = messages.Outcome(call_id, "RESOURCE_EXHAUSTED", None, None, fault)
            world.worker_says("echo-1", messages.Outcomes(EPOCH, 1, (outcome,)))
    condition = world.machine.registry.tools["echo.echo"].condition
    assert condition is not None
    assert condition.ladder is not None or not condition.is_plain
