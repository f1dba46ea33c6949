"""The supervisor is killed at random instants, also while its workers are being born: nobody outlives it by a second."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mcp_broker import proctable
from mcp_broker.supervisor import reclaim
from mcp_broker.supervisor.runtime import VARIABLE
from tests.support.running import Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from tests.support.load import Soak

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

CONFIG = """
[pools.process]
module = "mcp_broker_workers.echo"

[pools.restricted]
module = "mcp_broker_workers.text"
isolation = "restricted"

[pools.auto]
module = "mcp_broker_workers.sequence"
isolation = "auto"
spare = 1
"""
#: from an interpreter's start to a little after the last worker is ready
INSTANTS_S = (0.3, 3.0)
#: how long whoever dies with his supervisor may take
GONE_S = 1.0


def below(pid: int) -> dict[int, int]:
    """Return all that descend from a process: pid -> start time."""
    found: dict[int, int] = {}
    queue = [pid]
    while queue:
        for child in proctable.children(queue.pop()):
            entry = proctable.read(child)
            if entry is not None and child not in found:
                found[child] = entry.starttime
                queue.append(child)
    return found


def of_instance(state_dir: Path) -> dict[int, int]:
    """Return all whose environment names a state directory's instance, whoever their parent is: pid -> start time."""
    try:
        instance = json.loads((state_dir / "counters.json").read_text())["instance"].encode()
    except OSError:
        return {}
    return {
        entry.pid: entry.starttime
        for entry in proctable.read_all().values()
        if entry.state != "Z"
        and proctable.environment(entry.pid).get(reclaim.INSTANCE_VARIABLE.encode()) == instance
    }


def left_of(processes: dict[int, int]) -> list[int]:
    entries = {pid: proctable.read(pid) for pid in processes}
    return [
        pid
        for pid, entry in entries.items()
        if entry is not None and entry.starttime == processes[pid] and entry.state != "Z"
    ]


def test_nobody_outlives_a_killed_supervisor_whenever_it_is_killed(
    soak: Soak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    monkeypatch.setenv(VARIABLE, str(runtime))
    tmp_path.chmod(0o755)
    chance = random.Random(4)
    took_s = []
    running = Running(tmp_path, config=CONFIG, ready=False)
    for _ in range(soak.count(sample=3, full=50)):
        until = time.monotonic() + chance.uniform(*INSTANTS_S)
        while time.monotonic() < until:
            time.sleep(0.001)
        everybody = below(running.process.pid)
        os.kill(running.process.pid, signal.SIGKILL)
        began = time.monotonic()
        # some are being born just now
        while left_of(everybody) or of_instance(running.state_dir):
            assert time.monotonic() - began < 3 * GONE_S, of_instance(running.state_dir)
        took_s.append(time.monotonic() - began)
        running.process.wait()
        running.start(ready=False)
    wait_for(running.is_ready, within_s=30, what="the last one being ready")
    running.stop()
    # the last one has cleared what all before it left
    assert list(runtime.rglob("*")) == []
    soak.report("supervisors killed", len(took_s))
    soak.report(
        "all gone after, ms", f"{statistics.median(took_s) * 1000:.0f}, at most {max(took_s) * 1000:.0f}"
    )
    assert max(took_s) < GONE_S
