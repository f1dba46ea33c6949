"""What the broker does about tools that fail, and with tools that operators steer; the workers' and the node's side is played."""

from __future__ import annotations

from typing import Any

import pytest

from mcp_broker import limits
from mcp_broker.core.lifecycle import State
from mcp_broker.wire import messages, node, payload
from tests.core.support import EPOCH, FakeGrant, World, certificate, definition

NAME = "echo.echo"


def serving(*traits: str, workers: int = 1, depth: int = 16, **changes: Any) -> World:
    world = World()
    world.hello("c1", FakeGrant(principal="ann"))
    world.hello("c2", FakeGrant(principal="bob"))
    for number in range(1, workers + 1):
        come(world, f"echo-{number}", *traits, depth=depth, **changes)
    return world


def come(
    world: World, worker_id: str, *traits: str, pool: str = "echo", depth: int = 16, **changes: Any
) -> None:
    world.admit(worker_id, pool)
    others = (definition("echo.other"),)
    tools = (definition(NAME, **changes), *others)
    world.worker_says(
        worker_id, messages.Register(0, "MCPB", (1,), tools, traits={NAME: traits} if traits else {})
    )
    world.worker_says(worker_id, messages.Ready(EPOCH, depth))
    world.later(0)


def steer(world: World, wish: str, tool: str = NAME, client: str = "c1", **more: str) -> dict[str, Any]:
    """Be an operator; return the answer, or the code of the refusal under "code"."""
    session = world.machine.clients.open[client.encode()]
    world.heard_by(session)
    packed = payload.pack({"tool": tool, **more})
    (call_id,) = world.calls(client, (f"system.tools.{wish}",), arguments=packed)
    world.later(0)
    for message, _ in world.heard_by(session):
        for outcome in message.outcomes if isinstance(message, messages.Outcomes) else ():
            if outcome.call_id == call_id and outcome.body is not None:
                answer: dict[str, Any] = payload.unpack_map(outcome.body)
                return answer
            if outcome.call_id == call_id and outcome.fault is not None:
                return {"code": outcome.code, **payload.unpack_map(outcome.fault.details)}
    raise AssertionError("no answer")


def state(world: World) -> State:
    condition = world.machine.registry.tools[NAME].condition
    assert condition is not None
    return condition.life.state


def hooks(world: World, worker_id: str = "echo-1") -> list[messages.Hook]:
    return [message for message in world.heard_by_worker(worker_id) if isinstance(message, messages.Hook)]


def wishes(world: World, kind: type) -> list[Any]:
    found = [message for message in world.machine.to_node if isinstance(message, kind)]
    world.machine.to_node = [message for message in world.machine.to_node if not isinstance(message, kind)]
    return found


def crash(world: World, worker_id: str, client: str = "c1") -> None:
    """Have a call end its worker by itself."""
    call_id = world.call(client)
    seq = world.machine.workers.by_id[worker_id].held[call_id].seq
    plain = certificate(worker_id, seq)
    died = node.Certificate(
        worker_id=worker_id, pool=plain.pool, pid=1, cause="exited with code 7", kind="exit", exit_code=7, started_seq=seq
    )  # fmt: skip
    world.machine.from_node(node.Died(died), world.now)
    world.later(limits.DEATH_SETTLE_S)


# -- operators ------------------------------------------------------------------------------------------


def test_a_paused_tools_calls_wait_and_hold_up_no_other_tool() -> None:
    world = serving()
    running = world.call()
    assert steer(world, "pause", reason="a look")["state"] == "pausing"
    world.answer("echo-1", running)
    world.later(0)
    assert state(world) is State.PAUSED
    world.dispatched("echo-1")
    waits, other = world.calls("c2", (NAME, "echo.other"))
    assert world.dispatched("echo-1") == [other]
    world.check()
    assert steer(world, "resume")["state"] == "active"
    assert world.dispatched("echo-1") == [waits]
    world.check()


def test_a_paused_call_still_ends_at_its_deadline_and_is_told_what_it_waited_for() -> None:
    world = serving()
    steer(world, "pause", reason="a new model")
    session = world.machine.clients.open[b"c2"]
    world.heard_by(session)
    call_id = world.call("c2", timeout_s=1.0)
    world.later(1.1)
    ended = world.faults(session)[call_id]
    assert ended["code"] == "DEADLINE_EXCEEDED"
    assert (
        ended["was"] == f"waiting: its tool is paused, a new model (ann); `mcp-broker why {NAME}` tells more"
    )
    world.check()


def test_hooks_of_a_paused_tool_run_when_no_call_of_it_runs_and_before_it_counts_as_paused() -> None:
    world = serving("pause", "resume")
    running = world.call()
    steer(world, "pause")
    assert not hooks(world)
    world.answer("echo-1", running)
    world.later(0)
    (hook,) = hooks(world)
    assert (hook.event, hook.tool) == ("pause", NAME)
    assert state(world) is State.PAUSING
    world.worker_says("echo-1", messages.Hooked(EPOCH, hook.order, "OSError: busy"))
    assert state(world) is State.PAUSED
    assert "OSError: busy" in steer(world, "history")["history"][-1]["error"]


def test_a_resume_hook_that_fails_makes_the_tool_an_error_which_enable_mends() -> None:
    world = serving("resume")
    steer(world, "pause")
    steer(world, "resume")
    (hook,) = hooks(world)
    session = world.machine.clients.open[b"c2"]
    waits = world.call("c2")
    world.heard_by(session)
    world.worker_says("echo-1", messages.Hooked(EPOCH, hook.order, "OSError: no"))
    assert state(world) is State.ERROR
    assert world.outcomes(session) == {waits: "UNAVAILABLE"}
    assert steer(world, "enable")["state"] == "active"
    call_id = world.call("c2")
    assert call_id in world.dispatched("echo-1")
    world.check()


def killed(world: World) -> list[str]:
    """Return the workers that were to be killed for a hook since this was asked last."""
    return [
        one.worker_id for one in wishes(world, node.Interrupt) if (one.stage, one.why) == ("kill", "hook")
    ]


def test_a_hook_that_does_not_end_costs_its_worker_and_leaves_no_tool_stuck() -> None:
    world = serving("start", "stop")
    steer(world, "stop")
    assert state(world) is State.STOPPING
    world.later(limits.HOOK_S + 0.1)
    assert state(world) is State.STOPPED
    assert killed(world) == ["echo-1"]
    steer(world, "start")
    world.later(limits.HOOK_S + 0.1)
    assert state(world) is State.ERROR


def test_a_hook_that_does_not_end_costs_its_worker_however_many_calls_come_behind_it() -> None:
    world = serving("reset")
    before = world.call(tool="echo.other")
    steer(world, "reset")
    behind = world.call("c2", tool="echo.other")
    world.later(limits.HOOK_S + 0.1)
    assert killed(world) == [], "it may run the call that it was given before"
    world.answer("echo-1", before)
    world.later(limits.HOOK_S + 0.1)
    assert killed(world) == ["echo-1"]
    assert behind in world.machine.workers.by_id["echo-1"].held
    world.check()


def test_hooks_of_a_worker_that_dies_are_waited_for_no_more() -> None:
    world = serving("stop")
    steer(world, "stop")
    world.died("echo-1")
    world.later(0.1)
    assert state(world) is State.STOPPED


def test_a_stopped_tool_refuses_and_ends_what_waits() -> None:
    world = serving(depth=0)
    session = world.machine.clients.open[b"c2"]
    waits = world.call("c2")
    world.heard_by(session)
    assert steer(world, "stop")["state"] == "stopped"
    call_id = world.call("c2")
    assert world.outcomes(session) == {waits: "UNAVAILABLE", call_id: "UNAVAILABLE"}
    world.check()


def test_what_a_dead_worker_had_not_started_does_not_wait_for_a_tool_that_is_stopped() -> None:
    world = serving()
    session = world.machine.clients.open[b"c2"]
    world.calls("c2", (NAME, NAME))
    steer(world, "stop")
    world.heard_by(session)
    world.died("echo-1", 1)
    world.later(0.1)
    assert sorted(world.outcomes(session).values()) == ["UNAVAILABLE", "WORKER_LOST"]
    assert state(world) is State.STOPPED
    world.check()


def test_a_disabled_tool_takes_no_new_calls_and_finishes_those_it_had() -> None:
    world = serving(depth=1)
    session = world.machine.clients.open[b"c2"]
    first, second = world.calls("c2", (NAME, NAME))
    steer(world, "disable", reason="moved")
    world.heard_by(session)
    refused = world.call("c2")
    assert world.faults(session)[refused]["reason"] == "moved (ann)"
    world.answer("echo-1", first)
    world.answer("echo-1", second)
    assert world.outcomes(session) == {first: "OK", second: "OK"}


def test_what_an_operator_takes_out_is_not_found_and_what_recovery_takes_out_is_unavailable() -> None:
    world = serving()
    session = world.machine.clients.open[b"c2"]
    steer(world, "unregister")
    world.heard_by(session)
    call_id = world.call("c2")
    assert world.outcomes(session) == {call_id: "NOT_FOUND"}
    steer(world, "enable")
    assert state(world) is State.ACTIVE
    call_id = world.call("c2")
    seq = world.machine.workers.by_id["echo-1"].seq
    violated = node.Certificate(
        worker_id="echo-1", pool="echo", pid=1, cause="killed by SIGSYS", kind="signal", signal="SIGSYS", started_seq=seq
    )  # fmt: skip
    world.machine.from_node(node.Died(violated), world.now)
    world.later(0.1)
    world.heard_by(session)
    call_id = world.call("c2")
    fault = world.faults(session)[call_id]
    assert (fault["code"], fault["state"]) == ("UNAVAILABLE", "unregistered")
    assert "security violation" in fault["reason"]


def test_what_cannot_be_done_is_refused_with_what_can() -> None:
    world = serving()
    refused = steer(world, "resume")
    assert refused["code"] == "INVALID_ARGUMENT"
    assert "pause" in refused["possible"]
    assert steer(world, "pause", tool="echo.ech")["code"] == "NOT_FOUND"
    assert steer(world, "pause", tool="system.status")["code"] == "NOT_FOUND"
    assert state(world) is State.ACTIVE


def test_a_call_after_a_change_in_the_same_message_sees_the_change() -> None:
    world = serving()
    session = world.machine.clients.open[b"c1"]
    world.call()
    world.heard_by(session)
    packed = payload.pack({"tool": NAME})
    ids = [b"x" * 16, b"y" * 16]
    requests = tuple(
        messages.Call(call_id, tool, 1000, packed)
        for call_id, tool in zip(ids, ("system.tools.disable", NAME), strict=True)
    )
    world.client_says("c1", messages.Calls(EPOCH, 0, requests))
    assert world.outcomes(session) == {ids[0]: "OK", ids[1]: "UNAVAILABLE"}


# -- recovery ----------------------------------------------------------------------------------------------


def test_a_crash_is_its_tools_and_the_next_success_proves_the_recovery() -> None:
    world = serving(workers=2)
    crash(world, "echo-1")
    told = steer(world, "history")
    assert told["ladder"]["attempts"][0]["outcome"] == "open"
    assert told["ladder"]["failures"][0]["principal"] == "ann"
    assert steer(world, "history", tool="echo.other")["ladder"] is None
    world.answer("echo-2", world.call())
    told = steer(world, "history")
    assert told["ladder"]["attempts"][0]["outcome"] == "succeeded"
    assert not wishes(world, node.Replace), "its supervisor restarts what has died by itself"


def test_from_the_second_crash_in_a_row_calls_wait_out_a_penalty() -> None:
    world = serving(workers=3)
    crash(world, "echo-1")
    assert state(world) is State.ACTIVE
    crash(world, "echo-2")
    assert state(world) is State.RECOVERING
    waits = world.call("c2")
    assert not world.dispatched("echo-3")
    world.later(limits.PENALTY_S)
    assert world.dispatched("echo-3") == [waits]
    assert state(world) is State.ACTIVE
    world.check()


def test_a_limit_that_a_living_worker_tells_of_runs_reset_hooks_and_else_replaces_it() -> None:
    world = serving("reset")
    world.answer("echo-1", world.call(), "RESOURCE_EXHAUSTED")
    world.later(0)
    (hook,) = hooks(world)
    assert hook.event == "reset"
    assert state(world) is State.RECOVERING
    world.worker_says("echo-1", messages.Hooked(EPOCH, hook.order))
    assert state(world) is State.ACTIVE
    assert not wishes(world, node.Replace)
    bare = serving()
    bare.answer("echo-1", bare.call(), "RESOURCE_EXHAUSTED")
    bare.later(0)
    assert [wish.worker_id for wish in wishes(bare, node.Replace)] == ["echo-1"]
    bare.machine.from_node(node.Retire(("echo-1",)), bare.now)
    bare.later(0)
    assert state(bare) is State.ACTIVE


def test_a_reset_hook_that_fails_is_followed_by_another_process() -> None:
    world = serving("reset")
    steer(world, "reset")
    (hook,) = hooks(world)
    world.worker_says("echo-1", messages.Hooked(EPOCH, hook.order, "OSError: no"))
    assert state(world) is State.ERROR, "an operator hears of it"
    steer(world, "enable")
    world.answer("echo-1", world.call(), "RESOURCE_EXHAUSTED")
    world.later(0)
    (hook,) = hooks(world)
    world.worker_says("echo-1", messages.Hooked(EPOCH, hook.order, "OSError: no"))
    assert [wish.worker_id for wish in wishes(world, node.Replace)] == ["echo-1"], (
        "recovery goes on by itself"
    )


def test_processes_that_cannot_be_replaced_keep_nobody_waiting_for_ever() -> None:
    world = serving()
    steer(world, "recover")
    assert state(world) is State.RECOVERING
    world.later(limits.RECOVER_S + 0.1)
    assert state(world) is State.ERROR


def test_a_tool_that_crashes_again_and_again_moves_to_a_worker_of_its_own_and_back_when_it_is_forgiven() -> (
    None
):
    world = serving(workers=6)
    for number in range(1, 5):
        crash(world, f"echo-{number}")
        world.later(2.0)
    (wish,) = wishes(world, node.Isolate)
    assert (wish.pool, wish.tool, wish.wanted) == ("echo", NAME, True)
    waits, other = world.calls("c2", (NAME, "echo.other"))
    dispatched = [*world.dispatched("echo-5"), *world.dispatched("echo-6")]
    assert (other in dispatched, waits in dispatched) == (True, False)
    come(world, "echo~echo.echo-9", pool="echo~echo.echo", depth=1)
    world.later(limits.PENALTY_S_MAX)
    assert world.dispatched("echo~echo.echo-9") == [waits]
    assert steer(world, "history")["isolated"]
    assert world.machine.registry.tools["echo.other"].pool is world.machine.dispatcher.pools["echo"]
    world.check()
    # others of the module may come and go meanwhile
    come(world, "echo-7")
    assert steer(world, "history")["isolated"]
    world.answer("echo~echo.echo-9", waits)
    steer(world, "enable")
    assert not steer(world, "history")["isolated"]
    (wish,) = wishes(world, node.Isolate)
    assert not wish.wanted
    world.check()


def test_quiet_brings_an_isolated_tool_back_by_itself() -> None:
    world = serving(workers=6)
    for number in range(1, 5):
        crash(world, f"echo-{number}")
        world.later(2.0)
    come(world, "echo~echo.echo-9", pool="echo~echo.echo", depth=1)
    assert steer(world, "history")["isolated"]
    world.later(limits.LADDER_QUIET_S + 1)
    assert not steer(world, "history")["isolated"]


def test_without_a_worker_of_its_own_in_time_a_tool_goes_on_where_it_is() -> None:
    world = serving(workers=6)
    for number in range(1, 5):
        crash(world, f"echo-{number}")
        world.later(2.0)
    assert state(world) is State.RECOVERING
    world.later(limits.RECOVER_S)
    assert state(world) is State.ACTIVE
    told = steer(world, "history")
    assert not told["isolated"]
    assert "no worker of its own" in told["ladder"]["attempts"][-1]["error"]


def apart(state: node.PoolState, reason: str = "") -> node.Report:
    """Tell how the pools are: that of the tool alone is so."""
    return node.Report(
        (
            node.PoolReport(name="echo", state="ready", wanted=2),
            node.PoolReport(name="echo~echo.echo", state=state, wanted=1, reason=reason),
        )
    )


def test_a_pool_of_its_own_that_is_not_ready_in_time_goes_again() -> None:
    world = serving(workers=2)
    steer(world, "isolate")
    assert [wish.wanted for wish in wishes(world, node.Isolate)] == [True]
    world.later(limits.RECOVER_S)
    assert [(wish.pool, wish.tool, wish.wanted) for wish in wishes(world, node.Isolate)] == [
        ("echo", NAME, False)
    ]


def test_a_pool_of_its_own_that_fails_is_not_waited_for_and_goes_again() -> None:
    world = serving(workers=2)
    steer(world, "isolate")
    wishes(world, node.Isolate)
    waits = world.call()
    world.machine.from_node(apart("failed", "no module named x"), world.now)
    world.later(0.3)
    assert state(world) is State.ACTIVE
    assert waits in [*world.dispatched("echo-1"), *world.dispatched("echo-2")]
    assert [wish.wanted for wish in wishes(world, node.Isolate)] == [False]
    assert "no module named x" in steer(world, "history")["history"][-1]["error"]
    # and it may be tried again
    steer(world, "isolate")
    assert state(world) is State.RECOVERING
    assert [wish.wanted for wish in wishes(world, node.Isolate)] == [True]
    world.check()


def test_a_pool_of_its_own_goes_again_when_calls_of_the_tool_go_on_too_long_to_move_it() -> None:
    world = serving(workers=2)
    world.call()
    steer(world, "isolate")
    come(world, "echo~echo.echo-9", pool="echo~echo.echo", depth=1)
    wishes(world, node.Isolate)
    world.later(limits.RECOVER_S + 1)
    assert not steer(world, "history")["isolated"]
    assert [wish.wanted for wish in wishes(world, node.Isolate)] == [False]


def alone(world: World) -> None:
    """Have the tool served by a worker of its own."""
    steer(world, "isolate")
    come(world, "echo~echo.echo-9", pool="echo~echo.echo", depth=1)
    world.machine.from_node(apart("ready"), world.now)
    wishes(world, node.Isolate)
    assert steer(world, "history")["isolated"]


def test_a_pool_of_its_own_that_is_wanted_again_before_the_tool_is_there_is_not_ended_in_between() -> None:
    world = serving(workers=2)
    steer(world, "isolate")
    steer(world, "isolate")
    assert [wish.wanted for wish in wishes(world, node.Isolate)] == [True, True]


def test_a_tool_whose_own_pool_is_no_more_is_served_among_the_others_again_with_what_waits() -> None:
    for told in (
        node.Report((node.PoolReport(name="echo", state="ready", wanted=2),)),
        apart("closed", "its tool is not served apart"),
    ):
        world = serving(workers=2)
        alone(world)
        world.died("echo~echo.echo-9")
        world.later(limits.DEATH_SETTLE_S)
        waits = world.call()
        world.machine.from_node(told, world.now)
        assert waits in [*world.dispatched("echo-1"), *world.dispatched("echo-2")]
        assert not steer(world, "history")["isolated"]
        assert wishes(world, node.Isolate) == [], "nobody is asked to end what is gone, or may be wanted anew"
        world.check()


def test_a_tool_stays_in_its_own_pool_that_goes_until_what_its_worker_holds_has_ended() -> None:
    world = serving(workers=2)
    alone(world)
    gone = node.Report((node.PoolReport(name="echo", state="ready", wanted=2),))
    runs = world.call()
    world.machine.from_node(gone, world.now)
    assert steer(world, "history")["isolated"]
    world.answer("echo~echo.echo-9", runs)
    world.died("echo~echo.echo-9")
    world.later(limits.DEATH_SETTLE_S)
    world.machine.from_node(gone, world.now)
    assert not steer(world, "history")["isolated"]
    assert "echo~echo.echo" not in world.machine.dispatcher.pools
    world.check()


def test_a_tool_that_comes_back_from_its_own_pool_is_what_the_workers_there_brought_meanwhile() -> None:
    world = serving()
    alone(world)
    for worker_id in ("echo-2", "echo-3"):
        admitted = node.Admitted(thumbprint=f"key-{worker_id}", worker_id=worker_id, pool="echo", edition=2)
        world.machine.from_node(node.Admit((admitted,)), world.now)
    tools = (definition(NAME, version="2.0.0"), definition("echo.other"))
    world.worker_says("echo-2", messages.Register(0, "MCPB", (1,), tools))
    world.worker_says("echo-2", messages.Ready(EPOCH, 16))
    assert [one.edition for one in wishes(world, node.Superseded)] == [2]
    assert world.machine.registry.tools[NAME].definition.version == "1.0.0", "it is served apart yet"
    steer(world, "enable")
    assert world.machine.registry.tools[NAME].definition.version == "2.0.0"
    told = [one for one in wishes(world, node.WorkerUp) if one.worker_id == "echo-2"][-1]
    assert NAME in {tool.name for tool in told.tools}, "a broker that follows knows it from the beginning"
    world.worker_says("echo-3", messages.Register(0, "MCPB", (1,), tools))
    assert not [one for one in world.heard_by_worker("echo-3") if isinstance(one, messages.Error)]
    # and one that would bring another to where the tool is not served now is refused as early as any
    alone(world)
    world.admit("echo-4")
    other = (definition(NAME, version="3.0.0"), definition("echo.other"))
    world.machine.workers.by_id["echo-4"].edition = 2
    world.worker_says("echo-4", messages.Register(0, "MCPB", (1,), other))
    (error,) = [one for one in world.heard_by_worker("echo-4") if isinstance(one, messages.Error)]
    assert "differs from what the other workers" in error.message


def test_to_enable_a_tool_lets_go_of_a_pool_of_its_own_that_it_is_not_served_by() -> None:
    world = serving(workers=2)
    world.machine.from_node(apart("failed", "an earlier broker wanted it"), world.now)
    steer(world, "enable")
    assert [(wish.pool, wish.tool, wish.wanted) for wish in wishes(world, node.Isolate)] == [
        ("echo", NAME, False)
    ]
    world.machine.from_node(node.Report((node.PoolReport(name="echo", state="ready", wanted=2),)), world.now)
    steer(world, "enable")
    assert wishes(world, node.Isolate) == []


def test_a_paused_tool_is_not_recovered_behind_its_operators_back() -> None:
    world = serving(workers=3)
    crash(world, "echo-1")
    call_id = world.call()
    steer(world, "pause")
    worker = next(worker for worker in world.machine.workers.by_id.values() if call_id in worker.held)
    seq = worker.held[call_id].seq
    gone = node.Certificate(
        worker_id=worker.worker_id,
        pool="echo",
        pid=1,
        cause="exited with code 7",
        kind="exit",
        started_seq=seq,
    )
    world.machine.from_node(node.Died(gone), world.now)
    world.later(0.1)
    assert state(world) is State.PAUSED
    assert steer(world, "history")["ladder"]["attempts"][-1]["error"].startswith("not done")


def test_an_exception_runs_again_only_where_the_author_says_so() -> None:
    world = serving("recover", idempotent=True)
    session = world.machine.clients.open[b"c2"]
    call_id = world.call("c2")
    world.dispatched("echo-1")
    world.answer("echo-1", call_id, "TOOL_FAILED")
    assert world.dispatched("echo-1") == [call_id]
    world.answer("echo-1", call_id, "OK")
    assert world.outcomes(session) == {call_id: "OK"}
    world.check()
    plain = serving(idempotent=True)
    call_id = plain.call("c2")
    plain.dispatched("echo-1")
    plain.answer("echo-1", call_id, "TOOL_FAILED")
    assert plain.dispatched("echo-1") == []
    assert steer(plain, "history")["ladder"] is None


def test_an_exception_is_run_again_no_more_often_than_any_other_call() -> None:
    world = serving("recover", idempotent=True)
    session = world.machine.clients.open[b"c2"]
    call_id = world.call("c2")
    for _ in range(limits.ATTEMPTS_MAX):
        world.answer("echo-1", call_id, "TOOL_FAILED")
        world.later(limits.PENALTY_S_MAX)
    assert world.outcomes(session)[call_id] == "TOOL_FAILED"


def test_while_workers_of_two_editions_serve_a_tool_it_is_updating() -> None:
    world = serving()
    running = world.call()
    admitted = node.Admitted(thumbprint="key-echo-2", worker_id="echo-2", pool="echo", edition=1)
    world.machine.from_node(node.Admit((admitted,)), world.now)
    tools = (definition(NAME, version="2.0.0"), definition("echo.other"))
    world.worker_says("echo-2", messages.Register(0, "MCPB", (1,), tools))
    world.worker_says("echo-2", messages.Ready(EPOCH, 4))
    world.later(0)
    assert state(world) is State.UPDATING
    call_id = world.call("c2")
    assert world.dispatched("echo-2") == [call_id], "the new version serves at once"
    world.answer("echo-1", running)
    world.later(0)
    world.died("echo-1")
    world.later(0.1)
    assert state(world) is State.ACTIVE
    assert [change["event"] for change in steer(world, "history")["history"]] == ["ready", "update", "done"]


# -- another broker ---------------------------------------------------------------------------------------


def test_a_broker_that_follows_knows_what_operators_did() -> None:
    world = serving()
    steer(world, "disable", reason="moved")
    told = wishes(world, node.Standings)[-1]
    after = World()
    after.machine.from_node(told, after.now)
    after.hello("c2")
    come(after, "echo-1")
    session = after.machine.clients.open[b"c2"]
    after.heard_by(session)
    call_id = after.call("c2")
    assert after.faults(session)[call_id]["reason"] == "moved (ann)"
    assert steer(after, "enable", client="c2")["state"] == "active"


def following(standings: node.Standings, pool: str = "echo") -> World:
    """Have a broker that follows another, which said so much of its tools; those of this pool are known."""
    world = World()
    world.hello("c1", FakeGrant(principal="ann"))
    world.hello("c2", FakeGrant(principal="bob"))
    tools = (definition(NAME), definition("echo.other"))
    world.machine.from_node(node.Tools(pool, tools if pool == "echo" else tools[:1]), world.now)
    world.machine.from_node(standings, world.now)
    return world


OWN = "echo~echo.echo"


@pytest.mark.parametrize("first", ["echo-1", f"{OWN}-9"])
def test_a_tool_with_a_worker_of_its_own_has_it_under_the_next_broker_whoever_comes_first(first: str) -> None:
    before = serving(workers=2)
    alone(before)
    before.later(0.3)
    steer(before, "pause", tool="echo.other")
    after = following(wishes(before, node.Standings)[-1])
    waits = after.call("c2")
    for worker_id, pool in sorted([("echo-1", "echo"), (f"{OWN}-9", OWN)], key=lambda one: one[0] != first):
        come(after, worker_id, pool=pool, depth=1)
        after.later(0.1)
    assert waits in after.dispatched(f"{OWN}-9")
    assert steer(after, "history")["isolated"]
    assert steer(after, "history", tool="echo.other")["state"] == "paused"
    after.check()


def test_a_paused_tool_with_a_worker_of_its_own_has_it_when_it_is_resumed_under_the_next_broker() -> None:
    before = serving(workers=2)
    alone(before)
    steer(before, "pause")
    before.later(0.3)
    after = following(wishes(before, node.Standings)[-1])
    for worker_id, pool in (("echo-1", "echo"), (f"{OWN}-9", OWN)):
        come(after, worker_id, pool=pool, depth=1)
    assert state(after) is State.PAUSED
    waits = after.call("c2")
    steer(after, "resume")
    assert after.dispatched(f"{OWN}-9") == [waits]
    after.check()


@pytest.mark.parametrize("knows", ["echo", OWN])
def test_a_tool_that_was_to_come_back_does_so_under_the_next_broker(knows: str) -> None:
    before = serving(workers=2)
    alone(before)
    before.call()
    steer(before, "enable")
    assert steer(before, "history")["isolated"], "its call runs yet"
    after = following(wishes(before, node.Standings)[-1], pool=knows)
    for worker_id, pool in ((f"{OWN}-9", OWN), ("echo-1", "echo")):
        come(after, worker_id, pool=pool, depth=1)
    after.later(0.1)
    assert not steer(after, "history")["isolated"]
    assert [wish.wanted for wish in wishes(after, node.Isolate)] == [False]
    after.check()


def test_without_its_own_worker_in_time_a_tool_goes_on_among_the_others_under_the_next_broker() -> None:
    after = following(node.Standings((node.Standing(tool=NAME, apart=True),)))
    come(after, "echo-1")
    waits = after.call("c2")
    assert after.dispatched("echo-1") == []
    after.later(limits.RECOVER_S)
    assert after.dispatched("echo-1") == [waits]
    assert [wish.wanted for wish in wishes(after, node.Isolate)] == [True, False]


def test_a_tool_that_is_being_isolated_serves_where_it_is_when_an_operator_enables_it() -> None:
    world = serving(workers=2)
    steer(world, "isolate")
    assert state(world) is State.RECOVERING
    steer(world, "enable")
    assert state(world) is State.ACTIVE
    assert not wishes(world, node.Isolate)[-1].wanted
    # its worker may come all the same
    come(world, f"{OWN}-9", pool=OWN, depth=1)
    world.later(1)
    assert not steer(world, "history")["isolated"]


def test_a_tool_that_is_recalled_in_a_pool_of_its_own_counts_as_isolated_before_its_worker_has_come() -> None:
    after = following(node.Standings((node.Standing(tool=NAME, apart=True),)), pool=OWN)
    assert steer(after, "history")["isolated"]


def test_a_worker_of_its_own_that_has_lost_its_tool_is_refused() -> None:
    world = World()
    world.admit("echo~echo.gone-1", "echo~echo.gone")
    tools = (definition("echo.other"),)
    world.worker_says("echo~echo.gone-1", messages.Register(0, "MCPB", (1,), tools))
    (error,) = world.heard_by_worker("echo~echo.gone-1")
    assert isinstance(error, messages.Error)
    assert "no tool 'echo.gone' any more" in error.message
