"""Kill -9 of workers in mid-call and of supervisors at any instant: what it costs callers, and that nothing is left."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import proctable
from mcp_broker.errors import WorkerLost
from tests.support.load import percentile
from tests.support.ports import free_span
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from tests.soak.conftest import Start
    from tests.support.load import Soak
    from tests.support.running import Running

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

TOOLS = '''
"""Tools of the standard library that leave something of each kind."""
import os, signal, subprocess, sys, time
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from mcp_broker.worker import tool, ToolContext

@tool(name="t.stay")
def stay(context: ToolContext, ports: bool) -> Iterator[int]:
    """Make a child, files, shared memory and a lease, and stay."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    for number in range(20):
        (context.scratch / str(number)).write_bytes(bytes(10_000))
    try:
        memory = shared_memory.SharedMemory(create=True, size=10_000)
        resource_tracker.unregister(memory._name, "shared_memory")
    except PermissionError:
        pass
    lease = context.lease_port() if ports else None
    yield os.getpid()
    signal.pause()

@tool(name="t.pid")
def pid() -> int:
    """Return the worker's pid."""
    return os.getpid()
'''
CONFIG = """
[pools.t]
module = "fault_tools"
path = ["{folder}"]
min = 1
isolation = "LEVEL"
network = "NETWORK"

[ports]
min = FIRST
max = LAST
"""
#: of the acceptance, seconds: medians
ERROR_S = 0.05
WHOLE_S = 0.3
SPARE_S = 0.05


def config_at(level: str) -> str:
    first = free_span(8)
    config = CONFIG.replace("LEVEL", level).replace(
        "NETWORK", "full" if level == "process" or os.geteuid() else "loopback"
    )
    return config.replace("FIRST", str(first)).replace("LAST", str(first + 7))


def instance_of(running: Running) -> str:
    return str(json.loads((running.state_dir / "counters.json").read_text())["instance"])


def processes_of(instance: str) -> dict[int, str]:
    """Return the living processes that name an instance in their environment: pid -> which of it they are."""
    found = {}
    for entry in proctable.read_all().values():
        environment = proctable.environment(entry.pid)
        if entry.state != "Z" and environment.get(b"MCPB_INSTANCE") == instance.encode():
            found[entry.pid] = environment.get(b"MCPB_WORKER", b"").decode()
    return found


def is_of_a_tool(pid: int) -> bool:
    """Tell whether a process was started by a tool; nobody can end such a one when the supervisor is killed."""
    try:
        return b"time.sleep(600)" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def shared_of(instance: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if f"mcpb-{instance}-" in name]  # noqa: PTH208 (names only)


@pytest.mark.parametrize("level", ["process", "restricted"])
def test_a_worker_killed_in_mid_call_costs_its_caller_milliseconds_and_leaves_nothing(
    start: Start, soak: Soak, level: str
) -> None:
    kills = soak.count(sample=5, full=100)
    errors: list[float] = []
    wholes: list[float] = []
    reclaims: list[float] = []
    with start(tools=TOOLS, config=config_at(level)) as running, running.client() as client:
        instance = instance_of(running)
        client.call("t.pid")
        settled = set(processes_of(instance).values())
        for kill in range(kills):
            parts = client.stream("t.stay", {"ports": True}, timeout_s=60)
            next(parts)
            (pool,) = client.call("system.status")["pools"]
            worker = pool["workers"][0]
            begun = time.monotonic()
            os.kill(worker["pid"], 9)
            with pytest.raises(WorkerLost):
                next(parts)
            errors.append(time.monotonic() - begun)
            client.call("t.pid", timeout_s=60)
            wholes.append(time.monotonic() - begun)
            record = wait_for(
                lambda: client.call("system.why", {"id": worker["id"]})["reclaim"],  # noqa: B023 (called here)
                within_s=30,
                what="the reclaim record",
            )
            reclaims.append(record["ms"] / 1000)
            assert [step["left"] for step in record["steps"] if step["left"]] == []
            soak.progress(f"{kill + 1} of {kills} kills")
        status = client.call("system.status")
        (worker,) = status["pools"][0]["workers"]
        assert status["ports"] == []
        assert shared_of(instance) == []
        names = {name.rpartition("-")[0] for name in processes_of(instance).values()}
        assert names == {name.rpartition("-")[0] for name in settled}
        assert len([name for name in processes_of(instance).values() if name == worker["id"]]) >= 1
        lives = [name for name in processes_of(instance).values() if name.startswith("t-")]
        assert set(lives) == {worker["id"]}
        run = {path.name.removesuffix(".json") for path in (running.state_dir / "run").iterdir()}
        assert {name for name in run if name.startswith("t-")} == {worker["id"]}
    for name, took in (("error", errors), ("whole pool", wholes), ("all taken back", reclaims)):
        soak.report(name, f"median {percentile(took, 0.5) * 1000:.1f} ms, worst {max(took) * 1000:.1f} ms")
    if soak.is_full:
        assert percentile(errors, 0.5) < ERROR_S
        assert percentile(wholes, 0.5) < WHOLE_S


@pytest.mark.parametrize("level", ["process", "restricted", "sandboxed"])
def test_a_spare_takes_the_place_of_a_killed_worker_at_once(start: Start, soak: Soak, level: str) -> None:
    kills = soak.count(sample=3, full=30)
    took: list[float] = []
    config = config_at(level).replace("min = 1\n", "min = 1\nspare = 1\n")
    with start(tools=TOOLS, config=config) as running, running.client() as client:

        def both() -> list[Any]:
            """Return the worker and its spare, once there are such."""
            (pool,) = client.call("system.status")["pools"]
            workers = sorted(pool["workers"], key=lambda one: str(one["state"]))
            return workers if [one["state"] for one in workers] == ["ready", "spare"] else []

        for kill in range(kills):
            worker, spare = wait_for(both, within_s=30, what="a worker and its spare")
            parts = client.stream("t.stay", {"ports": False}, timeout_s=60)
            next(parts)
            begun = time.monotonic()
            os.kill(worker["pid"], 9)
            client.call("t.pid", timeout_s=60)
            took.append(time.monotonic() - begun)
            with pytest.raises(WorkerLost):
                next(parts)
            assert wait_for(both, within_s=30, what="another spare")[0]["id"] == spare["id"]
            soak.progress(f"{kill + 1} of {kills} kills")
    soak.report(
        "whole pool", f"median {percentile(took, 0.5) * 1000:.1f} ms, worst {max(took) * 1000:.1f} ms"
    )
    if soak.is_full:
        assert percentile(took, 0.5) < SPARE_S


def launch(running: Running) -> None:
    """Start it again, and do not wait for anything."""
    command = [sys.executable, "-m", "mcp_broker", "start", "--config", str(running.folder / "config.toml")]
    running.process = subprocess.Popen(
        [*command, "--state-dir", str(running.state_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def test_a_supervisor_killed_at_any_instant_leaves_nobody_and_its_successor_nothing(
    start: Start, soak: Soak
) -> None:
    kills = soak.count(sample=5, full=50)
    chance = random.Random(7)
    ends: list[float] = []
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent,
        start(tools=TOOLS, config=config_at("process")) as running,
    ):
        instance = instance_of(running)
        entry = proctable.read(innocent.pid)
        assert entry is not None
        for kill in range(kills):
            if kill % 2 == 0:
                # in mid-call, once it is up
                wait_for(running.is_ready, within_s=30, what="the broker being ready")
                with running.client() as client:
                    next(client.stream("t.stay", {"ports": kill % 4 == 0}, timeout_s=60))
                    running.process.kill()
            else:
                # any instant of a start
                time.sleep(chance.uniform(0.0, 1.5))
                running.process.kill()
            running.process.wait()
            begun = time.monotonic()
            wait_for(
                lambda: all(map(is_of_a_tool, processes_of(instance))),
                within_s=3,
                what="the end of broker, zygote and workers",
            )
            ends.append(time.monotonic() - begun)
            # a record whose pid is somebody else's by now
            run = (running.state_dir / "run").resolve()
            run.mkdir(parents=True, exist_ok=True)
            planted = {"pid": innocent.pid, "starttime": entry.starttime - 1, "boot_id": proctable.boot_id()}
            (run / "old-1.json").write_text(json.dumps(planted))
            launch(running)
            soak.progress(f"{kill + 1} of {kills} kills")
        wait_for(running.is_ready, within_s=30, what="the broker being ready")
        (pool,) = running.status()["pools"]
        alive = {worker["id"] for worker in pool["workers"]}
        assert {name for name in processes_of(instance).values() if name.startswith("t-")} == alive
        assert shared_of(instance) == []
        named = {path.name.removesuffix(".json") for path in (running.state_dir / "run").iterdir()}
        assert {name for name in named if name.startswith(("t-", "old-"))} == alive
        groups = Path("/sys/fs/cgroup/unified") / f"mcpb-{instance}"
        if groups.is_dir():
            assert {path.name for path in groups.iterdir() if path.is_dir()} <= alive
        assert innocent.poll() is None, "whoever only has a recorded pid is left alone"
        innocent.kill()
    assert shared_of(instance) == []
    assert processes_of(instance) == {}
    took = f"median {percentile(ends, 0.5) * 1000:.0f} ms, worst {max(ends) * 1000:.0f} ms"
    soak.report("all of its children gone", took)
    assert max(ends) < (1.0 if soak.is_full else 3.0)
