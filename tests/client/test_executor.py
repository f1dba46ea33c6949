"""The face of concurrent.futures: what code that is written to an executor may expect."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mcp_broker import Client, ToolExecutor, errors
from mcp_broker.client.sync import MAP_AHEAD
from mcp_broker.wire import messages, payload
from tests.client.support.broker import ScriptedBroker, ok
from tests.support.waiting import wait_for


@pytest.fixture
def client(broker: ScriptedBroker) -> Iterator[Client]:
    with Client.connect(broker.profile()) as connected:
        yield connected


def calls_at(broker: ScriptedBroker) -> int:
    return sum(len(message.calls) for message in broker.of_kind(messages.Calls))


def test_it_is_an_executor_whose_futures_are_standard_ones(client: Client) -> None:
    executor = ToolExecutor(client)
    assert isinstance(executor, concurrent.futures.Executor)
    futures = [executor.submit("echo", number=number) for number in range(20)]
    done, waiting = concurrent.futures.wait(futures, timeout=5)
    assert (len(done), len(waiting)) == (20, 0)
    assert sorted(future.result()["number"] for future in concurrent.futures.as_completed(futures)) == list(
        range(20)
    )


def test_arguments_of_any_name_reach_the_tool(client: Client) -> None:
    arguments: dict[str, Any] = {"tool": 1, "self": 2, "timeout": 3, "arguments": 4}
    assert ToolExecutor(client).submit("echo", **arguments).result(5) == arguments


def test_a_tool_that_fails_raises_its_error(client: Client) -> None:
    with pytest.raises(errors.ToolFailed):
        ToolExecutor(client).submit("fail").result(5)


def test_what_is_no_name_is_told_how_to_become_a_tool(client: Client) -> None:
    with pytest.raises(TypeError, match="@tool"):
        ToolExecutor(client).submit(len)  # type: ignore[arg-type]


def test_map_keeps_the_order_and_does_not_run_far_ahead(broker: ScriptedBroker, client: Client) -> None:
    asked = 0

    def arguments() -> Iterator[dict[str, int]]:
        nonlocal asked
        for number in range(1000):
            asked += 1
            yield {"n": number}

    results = ToolExecutor(client).map("echo", arguments(), chunksize=7)
    assert asked == MAP_AHEAD, "it begins at once, like any executor's map"
    assert next(results) == {"n": 0}
    assert asked == MAP_AHEAD
    assert next(results) == {"n": 1}
    assert asked == MAP_AHEAD + 1
    assert [result["n"] for result in results] == list(range(2, 1000))
    assert calls_at(broker) == 1000


def test_map_raises_at_the_place_of_the_call_that_failed(broker: ScriptedBroker, client: Client) -> None:
    results = ToolExecutor(client).map("fail", [{}, {}])
    with pytest.raises(errors.ToolFailed):
        next(results)


def test_map_stops_waiting_when_its_time_is_over(broker: ScriptedBroker, client: Client) -> None:
    results = ToolExecutor(client).map("hold", [{}, {}], timeout=0.05)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    assert len(wait_for(lambda: broker.of_kind(messages.Cancel))) > 0, (
        "and cancels what it no longer waits for"
    )


def test_map_whose_results_are_taken_after_the_block_has_them_all(client: Client) -> None:
    with ToolExecutor(client) as executor:
        results = executor.map("echo", ({"n": n} for n in range(400)))
        begun = executor.map("echo", ({"n": n} for n in range(400)))
        assert next(begun) == {"n": 0}
    assert [result["n"] for result in results] == list(range(400))
    assert [result["n"] for result in begun] == list(range(1, 400))


def test_map_whose_results_nobody_takes_is_run_all_the_same(broker: ScriptedBroker, client: Client) -> None:
    with ToolExecutor(client) as executor:
        executor.map("echo", ({"n": n} for n in range(300)))
    assert calls_at(broker) == 300


def test_map_that_is_dropped_half_way_cancels_the_rest(broker: ScriptedBroker, client: Client) -> None:
    def half(at: ScriptedBroker, session_id: bytes, call: messages.Call, packed: bytes) -> None:
        if payload.unpack_map(packed)["hold"]:
            at.held[call.call_id] = (session_id, call)
        else:
            at.outcome(session_id, ok(call.call_id, "done"))

    broker.script["half"] = half
    results = ToolExecutor(client).map("half", [{"hold": False}, {"hold": True}, {"hold": True}])
    wait_for(lambda: len(broker.held) == 2)
    assert next(results) == "done"
    assert broker.of_kind(messages.Cancel) == []
    del results
    wait_for(lambda: not broker.held)


def test_leaving_the_block_waits_for_all(broker: ScriptedBroker, client: Client) -> None:
    release = threading.Timer(0.1, broker.release)
    with ToolExecutor(client) as executor:
        future = executor.submit("hold")
        failed = executor.submit("fail")
        wait_for(lambda: broker.held)
        release.start()
    assert future.done()
    assert future.result() == "released"
    assert failed.done()
    release.join()
    assert client.call("echo", {"a": 1}) == {"a": 1}, "the client stays open"


def test_shutdown_takes_no_more_calls_and_cancels_if_asked(broker: ScriptedBroker, client: Client) -> None:
    executor = ToolExecutor(client)
    done, held = executor.submit("echo"), executor.submit("hold")
    assert done.result(5) == {}
    wait_for(lambda: broker.held)
    executor.shutdown(wait=False)
    assert not held.done()
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit("echo")
    with pytest.raises(RuntimeError, match="shut down"):
        executor.map("echo", [{}])
    assert held.cancel()
    other = ToolExecutor(client)
    futures = [other.submit("hold") for _ in range(10)]
    other.shutdown(cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    assert not done.cancelled()


def test_each_call_has_the_executor_s_timeout(client: Client) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        ToolExecutor(client, timeout_s=0.1).submit("hold").result(5)


def test_futures_that_are_done_are_not_kept(client: Client) -> None:
    executor = ToolExecutor(client)
    for result in executor.map("echo", ({} for _ in range(5000))):
        assert result == {}
    assert len(executor._futures) < 2000
