"""One child process: started in a session of its own, watched by a pidfd, signalled and reaped without a race.

Traps, and what is done about them:

- A pid may be reused once its process is reaped: groups are killed while the dead leader is still a zombie.
- The death signal of the kernel (PR_SET_PDEATHSIG) fires when the *thread* that spawned ends: only the main thread
  spawns. The child sets it itself, since code between fork and exec would cost vfork.
- A full pipe blocks the child: both output pipes are read as they fill, and kept only in part.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_broker import limits, proctable
from mcp_broker.errors import SupervisionError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mcp_broker.supervisor.poller import Poller

_log = logging.getLogger("mcp_broker.supervisor.output")

_READ_BYTES: Final = 64 * 1024
#: What is read of a dead process's pipes: a grandchild may hold them open and write for ever.
_LAST_READS_MAX: Final = 16
_LINE_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended, and what it had cost.

    Args:
        code: exit code; None when a signal ended it.
        signal: number of the signal; None when it exited.
        max_rss_kib: peak resident memory, KiB.
    """

    code: int | None
    signal: int | None
    cpu_s: float
    max_rss_kib: int

    @property
    def signal_name(self) -> str:
        """Return SIGKILL and the like, or the number where it has no name."""
        try:
            return signal.Signals(self.signal or 0).name
        except ValueError:
            return f"signal {self.signal}"


class Output:
    """One output pipe of a child: its lines are logged, its end is kept.

    Args:
        name: who writes, for the log.
        fd: our end of the pipe; it becomes non-blocking and belongs to this object.
        level: of the log records.
    """

    def __init__(self, name: str, fd: int, poller: Poller, level: int) -> None:
        os.set_blocking(fd, False)
        self._name = name
        self._fd: int | None = fd
        self._poller = poller
        self._level = level
        self._line = b""
        self.tail = b""
        poller.add(fd, self._ready)

    def _ready(self, _events: int) -> None:
        self._read()

    def _read(self) -> bool:
        """Take what is there, one chunk at most; False at its end."""
        if self._fd is None:
            return False
        try:
            chunk = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._end()
            return False
        self.tail = (self.tail + chunk)[-limits.STDERR_TAIL_BYTES :]
        if _log.isEnabledFor(self._level):
            *lines, self._line = (self._line + chunk).split(b"\n")
            for line in lines:
                self._emit(line)
            if len(self._line) > _LINE_BYTES_MAX:
                self._emit(self._line)
                self._line = b""
        return True

    def _emit(self, line: bytes) -> None:
        text = line[:_LINE_BYTES_MAX].decode(errors="replace").rstrip()
        if text:
            _log.log(self._level, "%s: %s", self._name, text)

    def _end(self) -> None:
        if self._fd is not None:
            self._poller.remove(self._fd)
            os.close(self._fd)
            self._fd = None
            self._emit(self._line)

    def close(self) -> None:
        """Take what the dead process left in the pipe, then let go of it."""
        for _ in range(_LAST_READS_MAX):
            if not self._read():
                break
        self._end()


class Process:
    """A running child.

    Args:
        name: for logs.
        argv: the program and its arguments; no shell.
        env: its whole environment.
        cwd: where it starts.
        pass_fds: descriptors that it inherits, under the same numbers; all others are closed.
        poller: watches it.
        on_exit: called once, after the process and its group are dead and reaped.

    Raises:
        SupervisionError: it could not be started (no such program, no memory, no more processes).
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        pass_fds: Sequence[int],
        poller: Poller,
        on_exit: Callable[[Exit], None],
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SupervisionError(
                "processes are started by the main thread only: they die with their starter"
            )
        try:
            self._popen = subprocess.Popen(
                argv,
                env=env,
                cwd=cwd,
                pass_fds=pass_fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                # a session of its own: the terminal's Ctrl-C is for the supervisor, and a group can be killed whole
                start_new_session=True,
                umask=0o077,
            )
        except OSError as error:
            raise SupervisionError(f"cannot start {argv[0]}: {error.strerror}") from error
        self.name = name
        self.pid = self._popen.pid
        self.started_at = time.monotonic()
        self.started_wall = time.time()
        entry = proctable.read(self.pid)
        self.starttime = 0 if entry is None else entry.starttime
        self._poller = poller
        self._on_exit = on_exit
        self._pidfd: int | None = os.pidfd_open(self.pid)
        poller.add(self._pidfd, lambda _events: self._bury())
        assert self._popen.stdout is not None  # noqa: S101 (PIPE says so)
        assert self._popen.stderr is not None  # noqa: S101 (the same)
        self._stdout = Output(name, os.dup(self._popen.stdout.fileno()), poller, logging.INFO)
        self._stderr = Output(name, os.dup(self._popen.stderr.fileno()), poller, logging.WARNING)
        self._popen.stdout.close()
        self._popen.stderr.close()

    @property
    def is_alive(self) -> bool:
        """It is not reaped yet."""
        return self._pidfd is not None

    @property
    def stderr_tail(self) -> str:
        """The last that it wrote to standard error."""
        return self._stderr.tail.decode(errors="replace")

    def signal(self, number: int) -> None:
        """Signal the process alone; a dead one feels nothing."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL its whole group."""
        if self._pidfd is not None:
            # not reaped, so neither the pid nor the group's number can belong to anybody else
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            # it may have left its group
            self.signal(signal.SIGKILL)

    def _bury(self) -> None:
        if self._pidfd is None:
            return
        self.kill()
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:  # the pidfd spoke too early, which no kernel does; it will again
            return
        code = os.waitstatus_to_exitcode(status)
        # so that Popen never waits for a pid that is no longer its own
        self._popen.returncode = code
        self._poller.remove(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = None
        self._stdout.close()
        self._stderr.close()
        self._on_exit(
            Exit(
                code=code if code >= 0 else None,
                signal=-code if code < 0 else None,
                cpu_s=usage.ru_utime + usage.ru_stime,
                max_rss_kib=usage.ru_maxrss,
            )
        )
