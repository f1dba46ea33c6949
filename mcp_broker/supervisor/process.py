"""One child process: started in a session of its own, watched by a pidfd, signalled and reaped without a race.

Traps, and what is done about them:

- A pid may be reused once its process is reaped: groups are killed while the dead leader is still a zombie.
- The death signal of the kernel (PR_SET_PDEATHSIG) fires when the *thread* that spawned ends: only the main thread
  spawns. It is set between fork and exec, which costs vfork and half a millisecond: a program that imports for a
  second before it asks for the signal itself would outlive us by that. A change of uid clears it, so workers ask again.
- A full pipe blocks the child: :mod:`mcp_broker.supervisor.output` reads what it writes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import resource  # noqa: F401 (os.wait4 imports it when it is first called, which may find no descriptor left)
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_broker import proctable
from mcp_broker.confine import kernel
from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mcp_broker.supervisor.poller import Poller


#: why a process could not be started that may pass by itself: the machine has nothing left just now
SHORTAGES: Final = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS)
)


def no_start(what: str, error: OSError) -> SupervisionError:
    """Say that something could not be started; details hold the errno, which may be one of :data:`SHORTAGES`."""
    return SupervisionError(f"cannot start {what}: {error.strerror}", {"errno": error.errno})


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


def _tie(parent: int, prepare: Callable[[], None] | None) -> None:
    """Run in a child before its program: it dies with us."""
    kernel.die_with_parent(parent)
    if prepare is not None:
        prepare()


class Process:
    """A child: it runs, or is about to.

    Args:
        name: for logs.
        argv: the program and its arguments; no shell.
        env: its whole environment.
        cwd: where it starts.
        pass_fds: descriptors that it inherits, under the same numbers; all others are closed.
        poller: watches it.
        on_exit: called once, after the process and its group are dead and reaped.
        prepare: what else the child does before it becomes the program.

    Attributes:
        pid: 0 until it is born.
        is_doomed: it was killed before it was born, and is to be abandoned.
        failure: why it was never born.

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
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._expect(name, poller, on_exit)
        try:
            self.execute(argv, env=env, cwd=cwd, pass_fds=pass_fds, prepare=prepare)
        except SupervisionError:
            self.discard()
            raise

    @classmethod
    def unborn(cls, name: str, *, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Return a child that is still to come: by :meth:`execute` or :meth:`adopt`, or not at all by :meth:`abandon`."""
        process = cls.__new__(cls)
        process._expect(name, poller, on_exit)  # noqa: SLF001 (its own class)
        return process

    def _expect(self, name: str, poller: Poller, on_exit: Callable[[Exit], None]) -> None:
        self.name = name
        self.pid = 0
        self.starttime = 0
        self.started_at = time.monotonic()
        self.started_wall = time.time()
        self.is_doomed = False
        self.failure: SupervisionError | None = None
        self._poller = poller
        self._on_exit = on_exit
        self._on_birth: Callable[[], None] | None = None
        #: how it came to be: "exec" or "zygote"
        self.start = ""
        #: told of processes that we started by way of this one, and that may have left its control group
        self.on_descendant: Callable[[int], None] | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._pidfd: int | None = None
        self._is_over = False
        with contextlib.ExitStack() as undo:
            try:
                stdout, self._stdout_end = os.pipe2(os.O_CLOEXEC)
                undo.callback(os.close, stdout)
                undo.callback(os.close, self._stdout_end)
                stderr, self._stderr_end = os.pipe2(os.O_CLOEXEC)
            except OSError as error:
                raise no_start(name, error) from error
            undo.pop_all()
        self._stdout = Output(name, stdout, poller, logging.INFO)
        self._stderr = Output(name, stderr, poller, logging.WARNING, holds_records=True)

    # -- how it comes to be ----------------------------------------------------------------------------

    @property
    def output_fds(self) -> tuple[int, int]:
        """What is to be standard output and error of one that is unborn; they stay ours."""
        return self._stdout_end, self._stderr_end

    def execute(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path,
        pass_fds: Sequence[int],
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Start a program as this child.

        Raises:
            SupervisionError: it could not be started; it is as unborn as before.
        """
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
                stdout=self._stdout_end,
                stderr=self._stderr_end,
                # a session of its own: the terminal's Ctrl-C is for the supervisor, and a group can be killed whole
                start_new_session=True,
                umask=0o077,
                # there is one thread, and it holds no lock that the child would need
                preexec_fn=functools.partial(_tie, os.getpid(), prepare),  # noqa: PLW1509
            )
        except OSError as error:
            raise no_start(argv[0], error) from error
        except subprocess.SubprocessError as error:
            raise SupervisionError(f"cannot prepare the start of {argv[0]}: {error}") from error
        self.start = "exec"
        self._be(self._popen.pid)

    def adopt(self, pid: int) -> None:
        """Take a process that another one forked for us; it is our child since its parent ended.

        Raises:
            SupervisionError: it is not.
        """
        entry = proctable.read(pid)
        if entry is None or entry.ppid != os.getpid():
            raise SupervisionError(f"process {pid} is no child of ours")
        self.start = "zygote"
        self._be(pid)

    def _be(self, pid: int) -> None:
        self.pid = pid
        entry = proctable.read(pid)
        self.starttime = 0 if entry is None else entry.starttime
        # not reaped by anybody but us, so it is still the same process, dead or alive
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            # nobody would see its end
            self.pid = 0
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if self._popen is not None:
                self._popen.returncode = -signal.SIGKILL
            raise no_start(self.name, error) from error
        self._poller.add(self._pidfd, lambda _events: self._bury())
        os.close(self._stdout_end)
        os.close(self._stderr_end)
        if self.is_doomed:
            self.kill()
        if self._on_birth is not None:
            self._on_birth()

    def when_born(self, callback: Callable[[], None]) -> None:
        """Call back once it has a pid: now, if it has."""
        if self.pid:
            callback()
        else:
            self._on_birth = callback

    def abandon(self, failure: SupervisionError | None) -> None:
        """Say that an unborn child will never be; its owner hears of it as of an end.

        Args:
            failure: why it could not be started; None: it was killed before.
        """
        self.discard()
        self.failure = failure
        self._finish(Exit(code=None, signal=signal.SIGKILL, cpu_s=0.0, max_rss_kib=0))

    def discard(self) -> None:
        """Let go of an unborn child that nobody waits for."""
        os.close(self._stdout_end)
        os.close(self._stderr_end)
        self._stdout.close()
        self._stderr.close()

    # -- what can be done with it ------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """It is not reaped yet; also while it is unborn."""
        return not self._is_over

    @property
    def main_pid(self) -> int:
        """The process that does the work, which another may stand before."""
        return self.pid

    def orphans(self) -> list[int]:
        """Return what lost its parent below it and did not become our child."""
        return []

    @property
    def stderr_tail(self) -> str:
        """The last that it wrote to standard error."""
        return self._stderr.tail.decode(errors="replace")

    def signal(self, number: int) -> None:
        """Signal the process alone; a dead one feels nothing, and an unborn one neither."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL its whole group, or see to it that it is never born."""
        if self._pidfd is not None:
            # not reaped, so neither the pid nor the group's number can belong to anybody else
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            # it may have left its group
            self.signal(signal.SIGKILL)
        elif not self._is_over:
            self.is_doomed = True

    def _bury(self) -> None:
        if self._pidfd is None:
            return
        self.kill()
        try:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        except ChildProcessError:
            # reaped as a stray, by a supervisor that came to its end in disorder
            self._let_go(-signal.SIGKILL)
            self._finish(Exit(code=None, signal=signal.SIGKILL, cpu_s=0.0, max_rss_kib=0))
            return
        if pid == 0:  # the pidfd spoke too early, which no kernel does; it will again
            return
        code = os.waitstatus_to_exitcode(status)
        try:
            self._let_go(code)
        finally:
            # whatever that meets: nobody else will tell of this end
            self._finish(
                Exit(
                    code=code if code >= 0 else None,
                    signal=-code if code < 0 else None,
                    cpu_s=usage.ru_utime + usage.ru_stime,
                    max_rss_kib=usage.ru_maxrss,
                )
            )

    def _let_go(self, code: int) -> None:
        if self._popen is not None:
            # so that Popen never waits for a pid that is no longer its own
            self._popen.returncode = code
        if self._pidfd is not None:
            self._poller.remove(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        self._stdout.close()
        self._stderr.close()

    def _finish(self, end: Exit) -> None:
        self._is_over = True
        self._on_exit(end)
