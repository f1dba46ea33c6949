"""Pools at level sandboxed, with everything real: what ships works there, and nothing is left of what is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from mcp_broker import proctable
from mcp_broker.errors import CallError
from tests.isolation.conftest import DEMO_DATA, IS_ROOT, ORDINARY, need_sandbox
from tests.support.running import Running
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.process, pytest.mark.slow]

CONFIG = """
[pools.text]
module = "mcp_broker_workers.text"
isolation = "sandboxed"

[pools.sql]
module = "mcp_broker_workers.sql"
isolation = "sandboxed"
read = ["{demo_data}"]
options = {{ folder = "{demo_data}" }}

[pools.sequence]
module = "mcp_broker_workers.sequence"
isolation = "auto"

[pools.echo]
module = "mcp_broker_workers.echo"
isolation = "sandboxed"
""".replace("{demo_data}", DEMO_DATA)


@pytest.fixture(scope="module", params=["root", "ordinary"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One broker for all tests of a user, the last of which ends it."""
    if request.param == "root" and not IS_ROOT:
        pytest.skip("what root gets is tried by root only")
    need_sandbox()
    is_other = IS_ROOT and request.param == "ordinary"
    folder = tmp_path_factory.mktemp(f"sandboxed-{request.param}")
    prefix = (sys.executable, str(ORDINARY), str(folder)) if is_other else ()
    made = Running(folder, config=CONFIG, prefix=prefix)
    yield made
    made.stop()


def below(pid: int) -> dict[int, int]:
    """Return all that descend from a process: pid -> start time."""
    found: dict[int, int] = {}
    queue = [pid]
    while queue:
        for child in proctable.children(queue.pop()):
            entry = proctable.read(child)
            if entry is not None:
                found[child] = entry.starttime
                queue.append(child)
    return found


def left_of(processes: dict[int, int]) -> set[int]:
    entries = {pid: proctable.read(pid) for pid in processes}
    return {
        pid
        for pid, entry in entries.items()
        if entry is not None and entry.starttime == processes[pid] and entry.state != "Z"
    }


def test_what_ships_works_and_says_what_it_got_and_outlives_its_broker(running: Running) -> None:
    status = running.status()
    workers = [worker for pool in status["pools"] for worker in pool["workers"]]
    assert {worker["isolation"] for worker in workers} == {"sandboxed"}
    assert {worker["isolation_note"] for worker in workers} == {""}
    with running.client() as client:

        def works() -> None:
            assert client.call("text.word_count", {"text": "a b a"}) == {"a": 2, "b": 1}
            assert client.call("sequence.translate", {"sequence": "ATGGCC"}) == "MA"
            tables = client.call("sql.tables")
            assert {table["name"] for table in tables} >= {"penguins"}
            assert all(table["error"] is None for table in tables)

        works()
        os.kill(status["broker"]["pid"], signal.SIGKILL)
        works()
        after = running.status()
        assert after["broker"]["pid"] != status["broker"]["pid"]
        pids = sorted(worker["pid"] for pool in after["pools"] for worker in pool["workers"])
        assert pids == sorted(worker["pid"] for worker in workers), "the same workers, at the same addresses"


def test_a_call_that_does_not_end_is_killed_in_its_sandbox_and_says_where_it_was(running: Running) -> None:
    with running.client() as client:
        with pytest.raises(CallError) as late:
            client.call("echo.sleep", {"seconds": 60}, timeout_s=0.5)
        assert late.value.code == "DEADLINE_EXCEEDED"
        assert client.call("echo.echo", {"value": 7}, timeout_s=20) == 7


def test_a_worker_that_is_killed_is_replaced_and_its_sandbox_leaves_nothing(running: Running) -> None:
    status = running.status()
    (pool,) = (pool for pool in status["pools"] if pool["name"] == "echo")
    (worker,) = pool["workers"]
    entry = proctable.read(worker["pid"])
    assert entry is not None
    first = proctable.read(entry.ppid)
    assert first is not None
    of_it = {one.pid: one.starttime for one in (entry, first)} | below(first.ppid)
    scratch = (running.state_dir / "run").readlink() / worker["id"]
    os.kill(worker["pid"], signal.SIGKILL)
    wait_for(lambda: not left_of(of_it), what="its sandbox being gone")
    with running.client() as client:
        assert client.call("echo.echo", {"value": 7}, timeout_s=20) == 7
    deaths = [one for one in running.status()["deaths"] if one["worker_id"] == worker["id"]]
    assert [(one["pid"], one["signal"]) for one in deaths] == [(worker["pid"], "SIGKILL")]
    if IS_ROOT:
        wait_for(lambda: not scratch.exists(), what="its folder being gone")


def test_nothing_survives_a_killed_supervisor_by_a_second(running: Running) -> None:
    supervisor = running.status()["supervisor"]["pid"]
    everybody = below(supervisor)
    # for each of four: bubblewrap, the first process, the worker; and the broker
    assert len(everybody) >= 13
    os.kill(supervisor, signal.SIGKILL)
    began = time.monotonic()
    wait_for(lambda: not left_of(everybody), what="everybody being gone", within_s=5.0)
    assert time.monotonic() - began < 1.0
