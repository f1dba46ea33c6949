"""Recovery on real processes: a tool that crashes, hangs, keeps bad state or harms its neighbours, step by step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mcp_broker import Client, DeadlineExceeded, InvalidArgument, NotFound, Unavailable, WorkerLost
from tests.support.running import Running
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOOLS = '''
"""Tools that fail on request."""
import os, time
from mcp_broker.worker import on, tool

seen = []
state = {"value": 0}

@tool(name="r.pid")
def pid() -> int:
    """Return the worker's pid."""
    return os.getpid()

@tool(name="r.crash")
def crash(how: str = "exit") -> int:
    """End the process, or return its pid."""
    if how == "exit":
        os._exit(7)
    return os.getpid()

@tool(name="r.hang")
def hang() -> None:
    """Do not end, whatever one is told."""
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass

@tool(name="r.nap")
def nap(seconds: float, path: str) -> None:
    """Sleep; the file is there from the beginning."""
    open(path, "w").close()
    time.sleep(seconds)

@tool(name="r.stuck")
def stuck() -> None:
    """Have a hook that does not end."""

@on("reset", stuck)
def hang_on() -> None:
    time.sleep(600)

@tool(name="r.count")
def count() -> list[int]:
    """Count calls in this process."""
    state["value"] += 1
    return [state["value"], os.getpid()]

@tool(name="r.flaky", idempotent=True, recover=True)
def flaky(path: str) -> str:
    """Fail the first time."""
    if not os.path.exists(path):
        open(path, "w").close()
        raise OSError("not yet")
    return "now"

@on("reset", count)
def forget() -> None:
    state["value"] = 0

@tool(name="r.guarded")
def guarded(refuse: bool = False) -> list[str]:
    """Return what the hooks saw."""
    if refuse:
        raise ValueError("as wanted")
    return seen

@on("start", guarded)
def started() -> None:
    seen.append("start")

@on("pause", guarded)
def paused() -> None:
    seen.append("pause")

@on("resume", guarded)
def resumed() -> None:
    seen.append("resume")

@on("stop", guarded)
def stopped() -> None:
    raise OSError("the stop hook fails")

@on("before", guarded)
def before(tool: str, arguments: dict) -> None:
    seen.append(f"before {tool}")

@on("error", guarded)
def failed(tool: str, arguments: dict, error: Exception) -> None:
    seen.append(f"error {error}")
'''


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("recovery"), tools=TOOLS) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with running.client() as client:
        yield client


def history(client: Client, tool: str) -> dict[str, Any]:
    answer: dict[str, Any] = client.call("system.tools.history", {"tool": tool})
    return answer


def steer(client: Client, wish: str, tool: str, **more: str) -> dict[str, Any]:
    answer: dict[str, Any] = client.call(f"system.tools.{wish}", {"tool": tool, **more})
    return answer


def test_a_crash_is_followed_by_another_process_and_counts_as_recovered_when_a_call_succeeds(
    client: Client,
) -> None:
    before = client.call("r.pid")
    with pytest.raises(WorkerLost):
        client.call("r.crash")
    (attempt,) = history(client, "r.crash")["ladder"]["attempts"]
    assert (attempt["step"], attempt["cause"], attempt["outcome"]) == ("restart", "crash", "open")
    assert client.call("r.crash", {"how": "not"}) != before
    told = history(client, "r.crash")
    assert told["ladder"]["attempts"][0]["outcome"] == "succeeded"
    assert told["ladder"]["success_rate"] == 1.0
    assert told["ladder"]["failures"][0]["resources"]["max_rss_kib"] > 1000
    assert history(client, "r.pid")["ladder"] is None, "its neighbour is not to blame"


def test_a_tool_that_cannot_be_stopped_at_its_deadline_costs_its_process(client: Client) -> None:
    before = client.call("r.pid")
    with pytest.raises(DeadlineExceeded):
        client.call("r.hang", timeout_s=0.3)
    assert (
        wait_for(lambda: history(client, "r.hang")["ladder"], what="the kill is noted")["attempts"][0][
            "cause"
        ]
        == "timeout"
    )
    assert client.call("r.pid") != before


def test_reset_hooks_drop_state_and_keep_the_process(client: Client) -> None:
    value, pid = client.call("r.count")
    assert client.call("r.count") == [value + 1, pid]
    steer(client, "reset", "r.count")
    assert client.call("r.count") == [1, pid]
    assert history(client, "r.count")["state"] == "active"


def test_a_tool_without_reset_hooks_gets_another_process_instead(client: Client) -> None:
    before = client.call("r.pid")
    steer(client, "reset", "r.pid")
    assert client.call("r.pid") != before
    assert [change["event"] for change in history(client, "r.pid")["history"]][-2:] == ["recover", "done"]


def test_an_idempotent_tool_that_says_so_is_run_again_after_an_exception(
    client: Client, tmp_path: Path
) -> None:
    assert client.call("r.flaky", {"path": str(tmp_path / "there")}) == "now"
    (attempt,) = history(client, "r.flaky")["ladder"]["attempts"]
    assert (attempt["step"], attempt["outcome"]) == ("retry", "succeeded")


def test_calls_of_a_paused_tool_wait_and_its_hooks_run(client: Client) -> None:
    assert client.call("r.guarded")[0] == "start"
    assert steer(client, "pause", "r.guarded", reason="a look")["state"] in {"pausing", "paused"}
    wait_for(lambda: history(client, "r.guarded")["state"] == "paused", what="it is paused")
    waits = client.submit("r.guarded")
    assert client.call("r.pid")
    assert not waits.done()
    with pytest.raises(InvalidArgument, match="cannot start") as refused:
        steer(client, "start", "r.guarded")
    assert "resume" in refused.value.details["possible"]
    steer(client, "resume", "r.guarded")
    assert waits.result(10)[-3:] == ["pause", "resume", "before r.guarded"]
    with pytest.raises(Exception, match="as wanted"):
        client.call("r.guarded", {"refuse": True})
    assert client.call("r.guarded")[-2:] == ["error as wanted", "before r.guarded"]


def test_a_stop_hook_that_fails_leaves_the_tool_stopped_and_is_told(client: Client) -> None:
    steer(client, "stop", "r.guarded")
    wait_for(lambda: history(client, "r.guarded")["state"] == "stopped", what="it is stopped")
    assert "the stop hook fails" in history(client, "r.guarded")["history"][-1]["error"]
    with pytest.raises(Unavailable, match="stopped"):
        client.call("r.guarded")
    steer(client, "start", "r.guarded")
    wait_for(lambda: history(client, "r.guarded")["state"] == "active", what="it serves again")
    assert client.call("r.guarded")


def test_a_tool_that_is_taken_out_is_not_there_until_an_operator_enables_it(client: Client) -> None:
    steer(client, "unregister", "r.count")
    with pytest.raises(NotFound):
        client.call("r.count")
    steer(client, "enable", "r.count")
    assert client.call("r.count")


def test_a_tool_that_crashes_often_gets_a_worker_of_its_own_and_its_neighbours_keep_theirs(
    client: Client,
) -> None:
    while not history(client, "r.crash")["isolated"]:
        with pytest.raises(WorkerLost):
            client.call("r.crash")
    own = client.call("r.crash", {"how": "not"})
    shared = client.call("r.pid")
    assert own != shared
    with pytest.raises(WorkerLost):
        client.call("r.crash")
    assert client.call("r.pid") == shared, "it was not in that process"
    pools = {pool["name"]: pool for pool in client.call("system.status")["pools"]}
    assert pools["t~r.crash"]["tools"] == ["r.crash"]
    steer(client, "enable", "r.crash")
    wait_for(lambda: not history(client, "r.crash")["isolated"], what="it is among the others again")
    assert client.call("r.crash", {"how": "not"}) == shared
    wait_for(
        lambda: (
            "t~r.crash"
            not in {pool["name"] for pool in client.call("system.status")["pools"] if pool["workers"]}
        ),
        what="its own worker is gone",
    )


def test_a_tool_has_a_worker_of_its_own_until_it_is_enabled_whichever_broker_serves(
    client: Client, tmp_path: Path
) -> None:
    steer(client, "isolate", "r.count")
    wait_for(lambda: history(client, "r.count")["isolated"], what="its own worker")
    own = client.call("r.count")[1]
    for _ in range(3):
        kill_broker(client)
        assert client.call("r.count", timeout_s=20)[1] == own
        assert client.call("r.pid", timeout_s=20) != own
    steer(client, "isolate", "r.nap")
    wait_for(lambda: history(client, "r.nap")["isolated"], what="its own worker")
    mark = tmp_path / "runs"
    runs = client.submit("r.nap", {"seconds": 1.0, "path": str(mark)})
    wait_for(mark.exists, what="the call runs")
    # told before the call ends: whoever follows this broker goes on with it
    steer(client, "enable", "r.nap")
    kill_broker(client)
    runs.result(20)
    wait_for(lambda: not history(client, "r.nap")["isolated"], what="it is among the others again")
    assert history(client, "r.count")["isolated"]
    steer(client, "enable", "r.count")
    wait_for(lambda: not history(client, "r.count")["isolated"], what="so is the other")
    assert client.call("r.count")[1] == client.call("r.pid")


def kill_broker(client: Client) -> None:
    os.kill(client.call("system.status")["broker"]["pid"], signal.SIGKILL)


def test_what_an_operator_disabled_stays_so_when_the_broker_is_replaced(
    running: Running, client: Client
) -> None:
    steer(client, "disable", "r.count", reason="under repair")
    kill_broker(client)
    with pytest.raises(Unavailable, match="under repair"):
        client.call("r.count", timeout_s=10)
    steer(client, "enable", "r.count")
    assert client.call("r.count")


def test_what_an_operator_disabled_last_stays_so_when_its_supervisor_was_busy_as_the_broker_died(
    running: Running, client: Client
) -> None:
    worker = client.call("r.pid")
    broker = client.call("system.status")["broker"]["pid"]
    # it finds the death of the worker first, and tells a broker of it that is dead
    supervisor = psutil.Process(running.process.pid)
    supervisor.suspend()
    try:
        wait_for(lambda: supervisor.status() == psutil.STATUS_STOPPED, what="the supervisor stands still")
        os.kill(worker, signal.SIGKILL)
        steer(client, "disable", "r.count", reason="under repair")
        os.kill(broker, signal.SIGKILL)
        # its descriptors are closed with the last of its threads
        dead, tasks = psutil.Process(broker), Path(f"/proc/{broker}/task")
        wait_for(
            lambda: dead.status() == psutil.STATUS_ZOMBIE and len(list(tasks.iterdir())) == 1,
            what="the broker's death",
        )
    finally:
        supervisor.resume()
    with pytest.raises(Unavailable, match="under repair"):
        client.call("r.count", timeout_s=10)
    steer(client, "enable", "r.count")
    assert client.call("r.count")


def test_a_hook_that_does_not_end_costs_its_worker_and_holds_up_other_tools_no_longer(client: Client) -> None:
    before = client.call("r.pid")
    steer(client, "reset", "r.stuck")
    # they come behind the hook, one after the other
    calls = [client.submit("r.pid", {}, timeout_s=25) for _ in range(3)]
    (after,) = {call.result(25) for call in calls}
    assert after != before
    death = client.call("system.status")["deaths"][0]
    assert (death["pid"], death["kind"]) == (before, "hook")


def test_a_sigkill_from_outside_is_nobodys_fault(running: Running, client: Client) -> None:
    before = history(client, "r.pid")["ladder"]

    pid = client.call("r.pid")
    os.kill(pid, signal.SIGKILL)
    assert client.call("r.pid") != pid
    assert history(client, "r.pid")["ladder"] == before
