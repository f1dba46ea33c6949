"""The worker as a real process, against a scripted broker."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker.wire import codec, messages, payload, tether
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from tests.worker.conftest import ScriptedBroker, Start


pytestmark = [pytest.mark.process, pytest.mark.slow]

EPOCH = 7

PLAIN = """
import os, sys, time
from pathlib import Path

@tool(name="try.add")
def add(left: int, right: int = 1) -> int:
    "Add."
    return left + right

@tool(name="try.spin")
def spin(mark: str) -> None:
    Path(mark).touch()
    while True:
        time.sleep(0.01)

@tool(name="try.leave")
def leave() -> None:
    sys.exit(4)

@tool(name="try.who")
def who(context: ToolContext) -> dict[str, object]:
    remaining = context.remaining_s()
    return {"call_id": context.call_id, "who": context.caller.principal, "left": remaining,
            "scratch": str(context.scratch), "options": context.options,
            "secrets": dict(context.secrets)}

@tool(name="try.large")
def large(size: int) -> bytes:
    return bytes(size)

@tool(name="try.size")
def size(data: bytes) -> int:
    return len(data)

@tool(name="try.stream")
def stream(count: int, size: int = 1):
    for number in range(count):
        yield bytes(size) if size > 1 else number
"""

ASYNC = """
import asyncio

order = []

@tool(name="try.meet")
async def meet(parties: int) -> int:
    "Return once this many calls run at the same time."
    order.append(1)
    while len(order) < parties:
        await asyncio.sleep(0.001)
    return len(order)

@tool(name="try.wait")
async def wait() -> None:
    await asyncio.sleep(1000)

@tool(name="try.stream")
async def stream(count: int):
    for number in range(count):
        yield number

@tool(name="try.plain_stream")
def plain_stream(count: int):
    yield from range(count)

@tool(name="try.add")
def add(left: int, right: int) -> int:
    return left + right
"""


def value(outcome: messages.Outcome) -> Any:
    assert outcome.code == "OK", outcome.fault
    assert outcome.body is not None
    return payload.unpack(outcome.body)


def test_registers_all_tools_and_answers(broker: ScriptedBroker, start: Start) -> None:
    worker = start(PLAIN)
    register = broker.welcome()
    assert [tool.name for tool in register.tools][:2] == ["try.add", "try.spin"]
    outcome = broker.call("try.add", {"left": 2, "right": 3})
    assert value(outcome) == 5
    assert outcome.usage is not None
    assert abs(outcome.usage.finished_wall_ms / 1000 - time.time()) < 60
    assert outcome.usage.max_rss_kib > 1000
    assert worker.marks.started_seq == 1


def test_answers_a_batch_in_few_messages_numbered_on(broker: ScriptedBroker, start: Start) -> None:
    start(PLAIN)
    broker.welcome()
    broker.give(*(broker.dispatch("try.add", {"left": number}) for number in range(200)))
    firsts: list[tuple[int, int]] = []
    results: list[int] = []
    while len(results) < 200:
        message = broker.hear(messages.Outcomes)
        firsts.append((message.first, len(results)))
        results += [value(outcome) for outcome in message.outcomes]
    assert results == list(range(1, 201))
    assert all(first == before + 1 for first, before in firsts)
    assert len(firsts) < 100


def test_wrong_arguments_never_reach_the_tool(broker: ScriptedBroker, start: Start) -> None:
    start(PLAIN)
    broker.welcome()
    outcome = broker.call("try.add", {"left": "2", "rihgt": 1})
    assert outcome.code == "INVALID_ARGUMENT"
    assert outcome.fault is not None
    details = payload.unpack(outcome.fault.details)
    assert [fault["path"] for fault in details["faults"]] == ["/left", "/rihgt"]
    assert "did you mean 'right'" in outcome.fault.message


def test_exit_of_a_tool_is_its_failure_not_the_workers(broker: ScriptedBroker, start: Start) -> None:
    start(PLAIN)
    broker.welcome()
    outcome = broker.call("try.leave")
    assert outcome.code == "TOOL_FAILED"
    assert outcome.fault is not None
    assert outcome.fault.message == "SystemExit: 4"
    assert value(broker.call("try.add", {"left": 1})) == 2


def test_context_tells_of_call_caller_and_pool(broker: ScriptedBroker, start: Start, tmp_path: Any) -> None:
    start(PLAIN, options={"folder": "data"}, secrets={"key": "open sesame"})
    broker.welcome()
    told = value(broker.call("try.who", timeout_ms=5000))
    assert told["who"] == "ada"
    assert told["options"] == {"folder": "data"}
    assert told["secrets"] == {"key": "open sesame"}
    assert told["scratch"] == str(tmp_path)
    assert told["call_id"] == f"{1:032x}"
    assert 0 < told["left"] <= 5


def test_large_payloads_take_the_second_frame_both_ways(broker: ScriptedBroker, start: Start) -> None:
    start(PLAIN)
    broker.welcome()
    assert value(broker.call("try.size", {"data": bytes(1_000_000)})) == 1_000_000
    outcome = broker.call("try.large", {"size": 1_000_000})
    assert outcome.code == "OK"
    assert outcome.body is None
    assert payload.unpack(broker.bodies[0]) == bytes(1_000_000)
    outcome = broker.call("try.large", {"size": 2_000_000})
    assert outcome.code == "PAYLOAD_TOO_LARGE"
    assert outcome.fault is not None
    assert payload.unpack(outcome.fault.details)["limit_bytes"] < 2_000_000


def test_signal_stops_the_call_that_it_is_meant_for(
    broker: ScriptedBroker, start: Start, tmp_path: Any
) -> None:
    worker = start(PLAIN)
    broker.welcome()
    spin = broker.dispatch("try.spin", {"mark": str(tmp_path / "spins")})
    add = broker.dispatch("try.add", {"left": 1})
    broker.give(spin, add)
    wait_for((tmp_path / "spins").exists)
    assert worker.marks.started_seq == spin.seq
    worker.marks.interrupt_seq = add.seq
    os.kill(worker.pid, signal.SIGUSR1)
    worker.marks.interrupt_seq = spin.seq
    os.kill(worker.pid, signal.SIGUSR1)
    stopped, added = broker.outcomes(2)
    assert stopped.code == "CANCELLED"
    assert value(added) == 2


def test_a_call_that_was_cancelled_behind_a_long_one_does_not_run(
    broker: ScriptedBroker, start: Start, tmp_path: Any
) -> None:
    worker = start(PLAIN)
    broker.welcome()
    spin = broker.dispatch("try.spin", {"mark": str(tmp_path / "spins")})
    broker.give(spin)
    wait_for((tmp_path / "spins").exists)
    # both wait in the socket while the first call runs
    unwanted = broker.dispatch("try.add", {"left": 1})
    broker.give(unwanted)
    broker.say(messages.Cancel(EPOCH, (unwanted.call_id,)))
    worker.marks.interrupt_seq = spin.seq
    os.kill(worker.pid, signal.SIGUSR1)
    assert [outcome.code for outcome in broker.outcomes(2)] == ["CANCELLED", "CANCELLED"]
    assert worker.marks.started_seq == spin.seq


def test_stream_waits_for_credit(broker: ScriptedBroker, start: Start) -> None:
    start(PLAIN)
    broker.welcome(stream_window=4)
    call = broker.dispatch("try.stream", {"count": 6})
    broker.give(call)
    parts = [broker.hear(messages.Partial).parts[0] for _ in range(4)]
    assert [part.index for part in parts] == [0, 1, 2, 3]
    # a heartbeat is answered while it waits, and no part comes before its answer
    broker.say(messages.Heartbeat(EPOCH))
    broker.hear(messages.Heartbeat)
    broker.say(messages.Credit(EPOCH, (messages.StreamCredit(call.call_id, 6),)))
    parts += [broker.hear(messages.Partial).parts[0] for _ in range(2)]
    assert [payload.unpack(part.body or b"") for part in parts] == list(range(6))
    assert value(broker.outcomes(1)[0]) is None


def test_cancel_ends_a_stream_without_credit(broker: ScriptedBroker, start: Start) -> None:
    start(PLAIN)
    broker.welcome(stream_window=1)
    call = broker.dispatch("try.stream", {"count": 6, "size": 100_000})
    broker.give(call)
    broker.hear(messages.Partial)
    assert len(payload.unpack(broker.bodies[0])) == 100_000
    broker.say(messages.Cancel(EPOCH, (call.call_id,)))
    (outcome,) = broker.outcomes(1)
    assert outcome.code == "CANCELLED"


def test_drain_finishes_what_it_holds_and_leaves(broker: ScriptedBroker, start: Start) -> None:
    worker = start(PLAIN)
    broker.welcome()
    broker.give(*(broker.dispatch("try.add", {"left": number}) for number in range(5)))
    broker.say(messages.Drain(EPOCH))
    assert [value(outcome) for outcome in broker.outcomes(5)] == [1, 2, 3, 4, 5]
    broker.hear(messages.Goodbye)
    assert worker.ended() == 0


HELD_UP = """
import asyncio, atexit, multiprocessing, re, time
from concurrent.futures import ProcessPoolExecutor
from mcp_broker import limits
from mcp_broker.worker import on

limits.HOOK_S = 0.5
how = ""

async def stay() -> None:
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass

@tool(name="try.hold")
def hold(by: str) -> list[int]:
    "Return the processes that nobody here ends."
    global how, kept
    how = by
    if by == "exit function":
        atexit.register(time.sleep, 1000)
    if by == "process":
        kept = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        kept.start()
        return [kept.pid]
    if by == "executor":
        kept = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))
        kept.submit(abs, 1).result()
        return list(kept._processes)
    return []

@on("stop")
def stop() -> None:
    if how == "hook":
        time.sleep(1000)
    if how == "C code":
        re.match("(a+)+$", "a" * 60 + "b")
"""
HELD_UP_IN_A_LOOP = (
    HELD_UP
    + """
@tool(name="try.leave_behind")
async def leave_behind(what: str) -> None:
    global kept
    if what == "thread":
        kept = asyncio.create_task(asyncio.to_thread(time.sleep, 1000))
    else:
        kept = asyncio.create_task(stay())
    await asyncio.sleep(0)
"""
)


@pytest.mark.parametrize("by", ["hook", "C code", "exit function", "process", "executor"])
@pytest.mark.parametrize("source", [HELD_UP, HELD_UP_IN_A_LOOP], ids=["plain", "async"])
def test_worker_that_is_held_up_at_its_end_ends_all_the_same_and_says_where(
    source: str, by: str, broker: ScriptedBroker, start: Start
) -> None:
    worker = start(source)
    broker.welcome()
    children = value(broker.call("try.hold", {"by": by}))
    broker.say(messages.Drain(EPOCH))
    try:
        assert worker.ended() == 1
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
    assert "Timeout (0:00:00.5" in worker.stderr()
    assert worker.marks.is_resting


def test_worker_that_is_told_to_end_at_once_is_not_missed_for_long(
    broker: ScriptedBroker, start: Start
) -> None:
    worker = start(HELD_UP.replace("limits.HOOK_S = 0.5", "limits.HOOK_S = 1000"))
    broker.welcome()
    value(broker.call("try.hold", {"by": "hook"}))
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.ended() == 1
    assert "Timeout (0:00:01)" in worker.stderr()


@pytest.mark.parametrize("what", ["thread", "task"])
def test_worker_says_goodbye_before_it_waits_for_what_tools_left_in_its_loop(
    what: str, broker: ScriptedBroker, start: Start
) -> None:
    worker = start(HELD_UP_IN_A_LOOP)
    broker.welcome()
    value(broker.call("try.leave_behind", {"what": what}))
    broker.say(messages.Drain(EPOCH))
    broker.hear(messages.Goodbye)
    assert worker.ended() == 1
    assert "Timeout (0:00:00.5" in worker.stderr()


def test_outcomes_are_sent_before_stop_hooks_run(broker: ScriptedBroker, start: Start) -> None:
    start(HELD_UP.replace("limits.HOOK_S = 0.5", "limits.HOOK_S = 1000"))
    broker.welcome()
    broker.give(broker.dispatch("try.hold", {"by": "hook"}))
    broker.say(messages.Drain(EPOCH))
    assert value(broker.outcomes(1)[0]) == []


def test_worker_whose_standard_streams_are_broken_ends_with_its_code(
    broker: ScriptedBroker, start: Start
) -> None:
    worker = start(
        """
import sys

class Broken:
    def write(self, text):
        raise LookupError
    flush = write

@tool(name="try.breaks")
def breaks() -> None:
    sys.stdout = None
    sys.stderr = Broken()
"""
    )
    broker.welcome()
    assert value(broker.call("try.breaks")) is None
    broker.say(messages.Drain(EPOCH))
    broker.hear(messages.Goodbye)
    assert worker.ended() == 0


def test_sigterm_stops_the_running_call_and_the_worker(
    broker: ScriptedBroker, start: Start, tmp_path: Any
) -> None:
    worker = start(PLAIN)
    broker.welcome()
    broker.give(broker.dispatch("try.spin", {"mark": str(tmp_path / "spins")}))
    wait_for((tmp_path / "spins").exists)
    os.kill(worker.pid, signal.SIGTERM)
    assert broker.outcomes(1)[0].code == "CANCELLED"
    broker.hear(messages.Goodbye)
    assert worker.ended() == 0


@pytest.mark.parametrize("source", [PLAIN, ASYNC], ids=["plain", "async"])
def test_sigterm_ends_an_idle_worker(source: str, broker: ScriptedBroker, start: Start) -> None:
    worker = start(source)
    broker.welcome()
    os.kill(worker.pid, signal.SIGTERM)
    broker.hear(messages.Goodbye)
    assert worker.ended() == 0


@pytest.mark.parametrize("source", [PLAIN, ASYNC], ids=["plain", "async"])
def test_end_of_the_tether_ends_the_worker(source: str, broker: ScriptedBroker, start: Start) -> None:
    worker = start(source)
    broker.welcome()
    worker.tether.close()
    assert worker.ended() == 0


@pytest.mark.parametrize("source", [PLAIN, ASYNC], ids=["plain", "async"])
def test_a_spare_says_that_it_is_warm_and_connects_when_it_is_told_to_go(
    source: str, broker: ScriptedBroker, start: Start
) -> None:
    spare = start(source, is_spare=True)
    assert tether.from_worker.decode(spare.tether.recv(4096)) == tether.Warm()
    assert broker.socket.poll(0) == 0, "the broker has not heard of it"
    spare.tether.send(codec.encode(tether.Go()))
    assert [tool.name for tool in broker.welcome().tools]


def test_a_spare_that_waits_ends_with_sigterm_and_with_its_tether(
    broker: ScriptedBroker, start: Start
) -> None:
    for end in (lambda worker: os.kill(worker.pid, signal.SIGTERM), lambda worker: worker.tether.close()):
        spare = start(PLAIN, is_spare=True)
        assert spare.tether.recv(4096)
        end(spare)
        assert spare.ended() == 0
    assert broker.socket.poll(0) == 0


@pytest.mark.parametrize("source", [PLAIN, ASYNC], ids=["plain", "async"])
def test_broker_that_goes_silent_is_registered_with_again(
    source: str, broker: ScriptedBroker, start: Start
) -> None:
    worker = start(source)
    broker.welcome()
    assert value(broker.call("try.add", {"left": 1, "right": 1})) == 2
    old = broker.peer
    register = broker.welcome(epoch=EPOCH + 1)
    assert broker.peer != old
    assert (register.seq, [one.seq for one in register.held]) == (1, [0])
    again = broker.hear(messages.Outcomes)
    assert (again.first, value(again.outcomes[0])) == (1, 2), "nobody said that it had arrived"
    broker.give(broker.dispatch("try.add", {"left": 2, "right": 2}), epoch=EPOCH + 1)
    assert value(broker.outcomes(1)[0]) == 4
    assert worker.marks.started_seq == 2
    assert worker.marks.started_calls() == (b"\0" * 15 + b"\1", b"\0" * 15 + b"\2")


@pytest.mark.parametrize("source", [PLAIN, ASYNC], ids=["plain", "async"])
def test_lost_connection_is_opened_again_at_once(source: str, broker: ScriptedBroker, start: Start) -> None:
    start(source)
    broker.welcome()
    began = time.monotonic()
    broker.restart()
    broker.welcome(epoch=EPOCH + 1)
    assert time.monotonic() - began < 2.5


def test_refused_tools_end_the_worker_with_the_reason(broker: ScriptedBroker, start: Start) -> None:
    worker = start(PLAIN)
    broker.hear(messages.Register)
    broker.say(messages.Error(EPOCH, "INVALID_ARGUMENT", "try.add is taken", b"\x80", fatal=True))
    assert worker.ended() == 3
    assert worker.stderr() == (
        "mcp-broker worker: pool test: the broker refused its tools: INVALID_ARGUMENT: try.add is taken\n"
    )


def test_module_that_describes_too_much_is_one_clear_line(start: Start) -> None:
    worker = start(
        """
def described() -> None: ...

described.__doc__ = "\u00e9" * 4000
for number in range(150):
    globals()[f"t{number}"] = tool(name=f"try.t{number}")(described)
"""
    )
    assert worker.ended() == 3
    (line,) = worker.stderr().splitlines()
    assert line.startswith("mcp-broker worker: pool test: the tools of tried_tools take 1,2")
    assert line.endswith(" bytes to describe; the limit is 1,052,672; split the module")


def test_module_that_cannot_be_imported_is_one_clear_line(start: Start) -> None:
    worker = start("import no_such_library")
    assert worker.ended() == 3
    assert worker.stderr() == (
        "mcp-broker worker: pool test: cannot import tried_tools: No module named 'no_such_library'\n"
    )


def test_async_tools_run_at_the_same_time(broker: ScriptedBroker, start: Start) -> None:
    start(ASYNC, concurrency=3)
    broker.welcome()
    broker.give(*(broker.dispatch("try.meet", {"parties": 3}) for _ in range(3)))
    assert [value(outcome) for outcome in broker.outcomes(3)] == [3, 3, 3]


def test_signal_stops_one_async_call_of_several(broker: ScriptedBroker, start: Start) -> None:
    worker = start(ASYNC, concurrency=3)
    broker.welcome()
    first, second = broker.dispatch("try.wait"), broker.dispatch("try.wait")
    broker.give(first, second)
    wait_for(lambda: worker.marks.started_seq == second.seq)
    worker.marks.interrupt_seq = first.seq
    os.kill(worker.pid, signal.SIGUSR1)
    (outcome,) = broker.outcomes(1)
    assert (outcome.call_id, outcome.code) == (first.call_id, "CANCELLED")
    broker.say(messages.Cancel(EPOCH, (second.call_id,)))
    (outcome,) = broker.outcomes(1)
    assert (outcome.call_id, outcome.code) == (second.call_id, "CANCELLED")


@pytest.mark.parametrize("tool", ["try.stream", "try.plain_stream"])
def test_async_worker_streams_under_credit(tool: str, broker: ScriptedBroker, start: Start) -> None:
    start(ASYNC)
    broker.welcome(stream_window=2)
    call = broker.dispatch(tool, {"count": 5})
    broker.give(call)
    parts = [broker.hear(messages.Partial).parts[0] for _ in range(2)]
    broker.say(messages.Heartbeat(EPOCH))
    broker.hear(messages.Heartbeat)
    broker.say(messages.Credit(EPOCH, (messages.StreamCredit(call.call_id, 5),)))
    parts += [broker.hear(messages.Partial).parts[0] for _ in range(3)]
    assert [part.index for part in parts] == [0, 1, 2, 3, 4]
    assert value(broker.outcomes(1)[0]) is None
