"""SIGHUP: an operator's wish to reload, or a terminal that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.supervisor.conftest import NODE, is_running, of_instance
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.process, pytest.mark.slow]

#: makes its standard input the terminal of its session, then becomes the rest of its command line
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# whoever runs the tests may have been started by nohup
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def started(tmp_path: Path, manner: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a supervisor in a terminal of its own; yields it and our end of the terminal."""
    config = tmp_path / "c.toml"
    config.write_text('[pools.fake]\nmodule = "fake"\n')
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", IN_TERMINAL, manner, sys.executable, str(NODE)]
    process = subprocess.Popen(
        [*command, str(tmp_path / "state"), str(config)],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )
    os.close(theirs)
    try:
        assert process.stdout is not None
        while "PoolReady" not in process.stdout.readline():
            assert process.poll() is None
        yield process, ours
    finally:
        pids = of_instance(tmp_path / "state")
        process.kill()
        process.wait()
        for pid in pids:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()


def test_a_supervisor_ends_with_the_terminal_that_it_was_started_in(tmp_path: Path) -> None:
    with started(tmp_path, "plain") as (process, terminal):
        os.kill(process.pid, signal.SIGHUP)
        assert process.stdout is not None
        assert "Reloaded" in process.stdout.readline(), "the terminal is still there"
        os.close(terminal)
        assert process.wait(20) == 0
        wait_for(lambda: not of_instance(tmp_path / "state"), what="no process is left")


def test_a_supervisor_that_was_started_by_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    with started(tmp_path, "nohup") as (process, terminal):
        os.close(terminal)
        assert process.stdout is not None
        assert "Reloaded" in process.stdout.readline()
        assert process.poll() is None
