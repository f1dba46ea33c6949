"""Local processes at isolation level `process`: the supervisor's uid and file system, nothing else of its."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from mcp_broker.errors import SupervisionError
from mcp_broker.proctable import WORKER_VARIABLE
from mcp_broker.supervisor.launch import Launcher
from mcp_broker.supervisor.process import Exit, Process
from mcp_broker.supervisor.reclaim import INSTANCE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mcp_broker.supervisor.launch import BrokerOrder, WorkerOrder
    from mcp_broker.supervisor.poller import Poller

#: What a child sees of our environment: where programs and libraries are, and the language. Secrets are
#: everything else, so the list says what passes and not what is held back.
PASSED: Final = ("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH")
#: glibc gives large blocks back to the kernel when they are freed, and pays with a page fault for every 4 KiB when it
#: takes them again: ten times the copy of a 1 MiB payload. A few payloads' worth is kept instead. See mallopt(3).
ALLOCATOR: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(8 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 1024 * 1024),
}


class LocalLauncher(Launcher):
    """Starts children of this process, each by executing its program.

    Args:
        worker: the worker program, after the interpreter.
        broker: the broker program, after the interpreter.
    """

    def __init__(
        self,
        worker: Sequence[str] = ("-m", "mcp_broker.worker"),
        broker: Sequence[str] = ("-m", "mcp_broker.broker"),
    ) -> None:
        self._worker = tuple(worker)
        self._broker = tuple(broker)

    def launch_worker(self, order: WorkerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Start a worker."""
        process = Process.unborn(order.worker_id, poller=poller, on_exit=on_exit)
        try:
            self.execute(process, order)
        except (SupervisionError, OSError):
            process.discard()
            raise
        return process

    def execute(self, process: Process, order: WorkerOrder) -> None:
        """Have an unborn worker be born.

        Raises:
            SupervisionError: it could not be started, and is as unborn as before.
        """
        boot_fd = sealed(order.boot)
        try:
            python = order.pool.python or sys.executable
            fds = ("--boot-fd", str(boot_fd), "--tether-fd", str(order.tether_fd))
            process.execute(
                # -P: what a tool writes into its working directory is never imported
                [python, "-P", *self._worker, *fds],
                env=worker_environment(order),
                cwd=order.scratch,
                pass_fds=(boot_fd, order.tether_fd, *order.pass_fds),
            )
        finally:
            os.close(boot_fd)

    def launch_broker(self, order: BrokerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Start the broker with our own interpreter."""
        return Process(
            order.name,
            [sys.executable, "-P", *self._broker, "--link-fd", str(order.link_fd)],
            env=environment(order.name, order.instance, order.scratch),
            cwd=order.scratch,
            pass_fds=(order.link_fd, *order.pass_fds),
            poller=poller,
            on_exit=on_exit,
        )


def worker_environment(order: WorkerOrder) -> dict[str, str]:
    """Return a worker's whole environment."""
    return {**environment(order.worker_id, order.instance, order.scratch), **order.pool.env}


def environment(name: str, instance: str, home: Path) -> dict[str, str]:
    """Return what every child's environment holds."""
    passed = {variable: os.environ[variable] for variable in PASSED if variable in os.environ}
    own = {"HOME": str(home), "TMPDIR": str(home), "PYTHONUNBUFFERED": "1"}
    return {**passed, **ALLOCATOR, **own, WORKER_VARIABLE: name, INSTANCE_VARIABLE: instance}


def sealed(data: bytes, name: str = "mcpb-boot") -> int:
    """Return a descriptor of a boot record: memory that only who has it can open, and is read once."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
