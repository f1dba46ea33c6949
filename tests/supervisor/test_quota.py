"""The kernel's own walls: what processes are told, and groups where they can be made."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mcp_broker import limits
from mcp_broker.config import PoolLimits, PoolTable
from mcp_broker.core.metering import Bounds
from mcp_broker.supervisor import cgroups, quota
from mcp_broker.supervisor.quota import Quotas
from tests.support.waiting import wait_for

BOUNDS = Bounds(memory_mb=40, processes=2)
INSTANCE = f"quota-test-{os.getpid()}"


def table(**changes: object) -> PoolTable:
    return PoolTable.model_validate({"module": "m", **changes})


def test_a_confined_worker_writes_no_file_larger_than_it_may_hold() -> None:
    confined = quota.rlimits(table(), is_confined=True, has_own_uid=False)
    assert confined == {"core": 0, "fsize": limits.SCRATCH_MB * 1024 * 1024}
    elsewhere = quota.rlimits(
        table(isolation="restricted", write=("/data",)), is_confined=True, has_own_uid=False
    )
    assert elsewhere == {"core": 0}, "files of its caller's may be as large as they like"


def test_processes_are_counted_for_a_uid_that_is_the_workers_own() -> None:
    assert quota.rlimits(table(), is_confined=False, has_own_uid=False) == {"core": 0}
    own = quota.rlimits(table(), is_confined=True, has_own_uid=True)
    assert own["nproc"] == (limits.PROCESSES + 1) * limits.TASKS_A_PROCESS


def test_the_address_space_is_never_limited() -> None:
    for confined in (False, True):
        assert not {"as", "data"} & quota.rlimits(table(), is_confined=confined, has_own_uid=confined).keys()


def test_a_worker_is_told_what_its_limits_may_become() -> None:
    assert quota.told(table())["open_files"] == limits.OPEN_FILES
    assert quota.told(table(limits=PoolLimits(adaptive=True)))["open_files"] == limits.OPEN_FILES_MAX


def test_without_groups_nothing_is_held_and_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "hierarchies", lambda *_: [])
    quotas = Quotas(INSTANCE)
    one = quotas.enter("w-1", lambda: [os.getpid()], BOUNDS)
    one.hold_to(BOUNDS)
    assert (one.members(), one.oom_kills, one.peak_mb, one.shared_kib) == (None, 0, 0.0, 0.0)
    quotas.leave(one)
    quotas.close()


@pytest.fixture
def quotas() -> Iterator[Quotas]:
    for controller in ("memory", "pids"):
        groups = cgroups.open_groups(INSTANCE, controller)
        if groups is None:
            pytest.skip(f"no control group with {controller} can be made here (it takes root, mostly)")
        groups.close()
    made = Quotas(INSTANCE)
    yield made

    def is_gone() -> bool:
        made.close()
        tops = [cgroups.Group(hierarchy.own / f"mcpb-{INSTANCE}") for hierarchy in cgroups.hierarchies()]
        for pid in {pid for top in tops for pid in top.pids()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            # an earlier test may have made us the one who reaps them
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return not any(top.exists for top in tops)

    wait_for(is_gone, what="the end of the groups")


def held(quotas: Quotas, code: str, bounds: Bounds = BOUNDS) -> tuple[subprocess.Popen[str], quota.Quota]:
    """Start a program that waits for a line, and put it into its groups."""
    program = f"import os, sys, subprocess\nsys.stdin.readline()\n{code}"
    popen = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return popen, quotas.enter("w-1", lambda: [popen.pid], bounds)


@pytest.mark.process
def test_the_kernel_ends_what_takes_too_much_memory_and_says_so(quotas: Quotas) -> None:
    popen, one = held(quotas, "own = bytearray(b'x') * (400 << 20)")
    popen.communicate("go\n")
    assert popen.returncode == -signal.SIGKILL
    assert one.oom_kills == 1
    assert 100 < one.peak_mb < 110, "the wall stands 64 MB above the limit"
    quotas.leave(one)


@pytest.mark.process
def test_memory_that_was_there_before_does_not_count_and_files_in_memory_do(quotas: Quotas) -> None:
    popen, one = held(
        quotas,
        "fd = os.memfd_create('tool'); [os.write(fd, b'x' * (1 << 20)) for _ in range(20)]; print('up', flush=True); sys.stdin.read()",
    )
    assert popen.stdin is not None
    assert popen.stdout is not None
    popen.stdin.write("go\n")
    popen.stdin.flush()
    assert popen.stdout.readline() == "up\n"
    assert 20 * 1024 <= one.shared_kib < 21 * 1024
    assert one.peak_mb < 45
    assert one.members() == [popen.pid]
    popen.communicate("")
    quotas.leave(one)


@pytest.mark.process
def test_a_fork_bomb_meets_a_wall(quotas: Quotas) -> None:
    code = (
        "import signal\nmade = 0\ntry:\n    while os.fork(): made += 1\n    signal.pause()\n"
        "except OSError as error: print(made, error.errno, flush=True)\nsignal.pause()"
    )
    popen, one = held(quotas, code, Bounds(memory_mb=400, processes=2))
    assert popen.stdin is not None
    assert popen.stdout is not None
    popen.stdin.write("go\n")
    popen.stdin.flush()
    made, number = map(int, popen.stdout.readline().split())
    assert number == errno.EAGAIN
    assert made == quota.tasks(2) - 1
    popen.kill()
    for pid in one.members() or ():
        if pid != popen.pid:
            os.kill(pid, signal.SIGKILL)
    popen.communicate()
    quotas.leave(one)


@pytest.mark.process
def test_a_child_that_ends_at_the_wrong_moment_takes_no_wall_away(quotas: Quotas) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    worker, late = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    # the worker starts another one while the first are moved in
    looks = iter([[gone.pid, worker.pid], [worker.pid, late.pid]])
    one = quotas.enter("w-1", lambda: next(looks, [worker.pid, late.pid]), BOUNDS)
    assert set(one.members() or ()) == {worker.pid, late.pid}
    walls = [
        file.read_text().strip()
        for hierarchy in cgroups.hierarchies()
        for name in ("memory.max", "memory.limit_in_bytes", "pids.max")
        if (file := hierarchy.own / f"mcpb-{INSTANCE}" / "w-1" / name).exists()
    ]
    assert sorted(walls) == sorted([str((40 + 64) << 20), str(quota.tasks(2))])
    for popen in (worker, late):
        popen.kill()
        popen.wait()
    quotas.leave(one)


@pytest.mark.process
def test_groups_that_a_killed_supervisor_left_go_at_the_next_start(quotas: Quotas) -> None:
    popen, _ = held(quotas, "sys.stdin.read()")
    popen.kill()
    popen.communicate()
    # as another process would, which knows nothing of the first one's workers
    again = Quotas(INSTANCE)
    assert again.enter("w-1", list, BOUNDS).members() == []
    again.close()
