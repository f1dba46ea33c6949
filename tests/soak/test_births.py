"""The supervisor is killed while workers die and are born: nothing outlives it, and its successor touches nobody else."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mcp_broker import proctable
from tests.supervisor.conftest import Node, is_running, of_instance, start
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from tests.supervisor.conftest import Start
    from tests.support.load import Soak

__all__ = ["start"]

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

#: of the supervisor's life, until it is killed: booting, all at work, workers dying and being born
LIFE_S = 0.9
#: what the promise says
GONE_S = 1.0


def live(node: Node, until: float) -> None:
    """Have workers die, so that others are being started, until the time has come."""
    while (left_s := until - time.monotonic()) > 0:
        for pid in proctable.children(node.pid):
            name = proctable.environment(pid).get(b"MCPB_WORKER", b"")
            if name.startswith((b"forked-", b"executed-")):
                os.kill(pid, signal.SIGKILL)
        time.sleep(min(left_s, random.uniform(0, 0.1)))


def wait_until_gone(node: Node, within_s: float) -> None:
    left: list[int] = []

    def is_gone() -> bool:
        left[:] = of_instance(node.state_dir)
        return not left

    try:
        wait_for(is_gone, what="the end of all", within_s=within_s)
    except AssertionError as error:
        error.add_note("\n".join(map(described, left)))
        raise


def described(pid: int) -> str:
    """Return what is to be known of a process that should not be there."""
    entry = proctable.read(pid)
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return f"{entry} {command} {proctable.environment(pid).get(b'MCPB_WORKER')!r}"


def plant(state_dir: Path, stranger: int) -> None:
    """Have a record name a process that has only the pid of one that was ours."""
    entry = proctable.read(stranger)
    assert entry is not None
    run_dir = state_dir / "run"
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {"pid": stranger, "starttime": entry.starttime - 1, "boot_id": proctable.boot_id()}
    (run_dir / "old-1.json").write_text(json.dumps(record))


def test_nothing_outlives_a_supervisor_that_is_killed_in_the_middle_of_births(
    start: Start,
    soak: Soak,
) -> None:
    times = []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        for number in range(soak.count(sample=2, full=50)):
            # every second one in the middle of its boot
            lives_s = random.uniform(0, LIFE_S)
            how = "zygote" if number % 4 else "exec"
            pools = {"forked": {"started_seq": 1}, "executed": {"started_seq": 1}}
            node = start(pools=pools, how=how)
            born = time.monotonic()
            if number % 2:
                node.event("PoolReady")
                born = time.monotonic()
            live(node, born + lives_s)
            node.popen.kill()
            node.popen.wait()
            killed = time.monotonic()
            wait_until_gone(node, GONE_S if soak.is_full else 10 * GONE_S)
            times.append(time.monotonic() - killed)
            plant(node.state_dir, stranger.pid)
            again = start(how=how)
            again.event("PoolReady")
            assert is_running(stranger.pid), "the wrong process"
            assert again.stop() == 0
            assert of_instance(again.state_dir) == []
            assert list(again.runtime_dir.iterdir()) == []
            assert not (again.state_dir / "run").exists()
        stranger.kill()
    soak.report("kills", len(times))
    soak.report("all gone after, at most", f"{max(times) * 1000:.0f} ms")
