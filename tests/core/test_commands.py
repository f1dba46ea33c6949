"""Calls that the supervisor carries out: passed on, answered once, and not waited for without end."""

from __future__ import annotations

from typing import Any

import pytest

from mcp_broker import limits
from mcp_broker.core.own_tools import TOOLS
from mcp_broker.wire import messages, node, payload
from tests.core.support import EPOCH, World

SCALE = "system.pools.scale"


def ask(world: World, timeout_s: float = 60.0, **arguments: Any) -> tuple[bytes, list[node.Command]]:
    (call_id,) = world.calls("c1", [SCALE], timeout_s, payload.pack(arguments))
    return call_id, [message for message in world.machine.to_node if isinstance(message, node.Command)]


def test_a_command_is_passed_on_with_its_principal_and_ends_with_the_supervisors_answer() -> None:
    world = World()
    session = world.hello()
    session.takes = frozenset({"progress"})
    call_id, (command,) = ask(world, pool="text", workers=3)
    assert (command.name, command.arguments) == (SCALE, {"pool": "text", "workers": 3})
    assert command.principal == session.grant.caller.principal
    assert command.timeout_ms == 60_000
    assert world.outcomes(session) == {}
    world.machine.from_node(node.Progressed(command.id, 0.5, "1 of 2"), world.now)
    (told,) = [message for message, _ in world.heard_by(session)]
    assert isinstance(told, messages.Progresses)
    assert told.progress == (messages.Progress(call_id, 0.5, "1 of 2"),)
    world.machine.from_node(node.Commanded(command.id, "OK", {"ready": 3}), world.now)
    (message, _), = world.heard_by(session)  # fmt: skip
    assert isinstance(message, messages.Outcomes)
    (outcome,) = message.outcomes
    assert outcome.body is not None
    assert (outcome.code, payload.unpack(outcome.body)) == ("OK", {"ready": 3})
    world.check()


def test_a_command_that_was_refused_fails_with_the_supervisors_code_and_sentence() -> None:
    world = World()
    session = world.hello()
    call_id, (command,) = ask(world, pool="txt")
    answer = node.Commanded(command.id, "NOT_FOUND", {}, "there is no pool 'txt'", {"did_you_mean": ["text"]})
    world.machine.from_node(answer, world.now)
    assert world.faults(session) == {call_id: {"code": "NOT_FOUND", "did_you_mean": ["text"]}}
    world.machine.from_node(answer, world.now)
    world.check()


def test_a_supervisor_that_says_nothing_makes_the_command_unavailable_and_one_that_goes_on_speaking_does_not() -> (
    None
):
    world = World()
    session = world.hello()
    quiet, _ = ask(world, pool="text")
    spoken, commands = ask(world, pool="text")
    world.later(limits.COMMAND_SILENCE_S - 1)
    world.machine.from_node(node.Progressed(commands[1].id, None, "waits"), world.now)
    world.later(2)
    assert world.faults(session) == {quiet: {"code": "UNAVAILABLE", "reason": "supervisor_silent"}}
    world.later(limits.COMMAND_SILENCE_S)
    assert world.faults(session)[spoken]["code"] == "UNAVAILABLE"
    assert not world.machine.commands.pending


@pytest.mark.parametrize("end", ["deadline", "cancel"])
def test_a_command_that_its_caller_does_not_wait_for_is_forgotten(end: str) -> None:
    world = World()
    session = world.hello()
    call_id, (command,) = ask(world, timeout_s=1.0, pool="text")
    if end == "deadline":
        world.later(1.5)
    else:
        world.client_says("c1", messages.Cancel(EPOCH, (call_id,)))
    code = "DEADLINE_EXCEEDED" if end == "deadline" else "CANCELLED"
    assert world.outcomes(session) == {call_id: code}
    world.machine.from_node(node.Commanded(command.id, "OK", {}), world.now)
    assert world.outcomes(session) == {}
    assert not world.machine.commands.pending


def test_so_many_commands_are_under_way_and_no_more() -> None:
    world = World()
    session = world.hello()
    for _ in range(limits.COMMANDS_MAX):
        ask(world, pool="text")
    one_more, _ = ask(world, pool="text")
    assert world.outcomes(session) == {one_more: "OVERLOADED"}


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({}, "/pool"),
        ({"pool": 3}, "/pool"),
        ({"pool": "text", "workers": "3"}, "/workers"),
        ({"pool": "text", "workers": True}, "/workers"),
        ({"pool": "text", "workers": -1}, "/workers"),
        ({"pool": "text", "workres": 1}, "/workres"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anybody_is_asked(
    arguments: dict[str, Any], path: str
) -> None:
    world = World()
    session = world.hello()
    call_id, commands = ask(world, **arguments)
    (fault,) = world.faults(session)[call_id]["faults"]
    assert fault["path"] == path
    assert commands == []


def test_every_tool_that_the_supervisor_carries_out_may_be_called_twice() -> None:
    assert all(tool.definition.idempotent for tool in TOOLS.values())
