"""Processes that a call started end with it; those of earlier calls, and other workers', stay."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from mcp_broker import proctable
from mcp_broker.worker import offspring
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.process


@pytest.fixture
def earlier() -> Iterator[psutil.Process]:
    """A process that was there before the call."""
    with subprocess.Popen(["sleep", "999"]) as process:
        # start times are told in ticks
        wait_for(lambda: proctable.ticks_at(time.monotonic_ns()) > _entry(process.pid).starttime)
        yield psutil.Process(process.pid)
        process.kill()


def _entry(pid: int) -> proctable.Entry:
    entry = proctable.read(pid)
    assert entry is not None
    return entry


def _grandchildren(process: subprocess.Popen[bytes], count: int) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    wait_for(lambda: len(parent.children()) == count, what="the shell's children")
    return parent.children()


def test_a_call_s_processes_are_killed_with_their_descendants(earlier: psutil.Process) -> None:
    began_ns = time.monotonic_ns()
    with subprocess.Popen(["sh", "-c", "sleep 999 & setsid sleep 999 & wait"]) as shell:
        family = _grandchildren(shell, 2)
        assert offspring.kill_since(began_ns) == 3
        assert shell.wait(5) < 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert earlier.is_running()


def test_an_orphan_that_names_this_worker_is_killed_and_another_s_is_not(
    monkeypatch: pytest.MonkeyPatch, earlier: psutil.Process
) -> None:
    # whom this test's own parent has adopted, as a supervisor would
    adopter = os.getppid()
    began_ns = time.monotonic_ns()
    with (
        subprocess.Popen(["sleep", "999"], env={proctable.WORKER_VARIABLE: "t-1"}) as mine,
        subprocess.Popen(["sleep", "999"], env={proctable.WORKER_VARIABLE: "t-2"}) as another,
    ):
        real = proctable.read_all

        def adopted() -> dict[int, proctable.Entry]:
            table = real()
            for pid in (mine.pid, another.pid):
                if pid in table:
                    entry = table[pid]
                    table[pid] = proctable.Entry(
                        pid, adopter, entry.state, entry.starttime, entry.rss_kib, entry.cpu_s
                    )
            return table

        monkeypatch.setattr(proctable, "read_all", adopted)
        monkeypatch.setenv(proctable.WORKER_VARIABLE, "t-1")
        assert offspring.kill_since(began_ns) == 1
        assert mine.wait(5) < 0
        assert another.poll() is None
        another.kill()


def test_nothing_started_is_nothing_killed(earlier: psutil.Process) -> None:
    assert offspring.kill_since(time.monotonic_ns()) == 0
    assert earlier.is_running()
