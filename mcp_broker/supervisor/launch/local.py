"""Local processes at isolation level `process`: the supervisor's uid and file system, nothing else of its."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from mcp_broker.proctable import WORKER_VARIABLE
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


class LocalLauncher:
    """Starts children of this process.

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
        """Start a worker; its boot record is in memory that only it can open, and is read once."""
        boot_fd = os.memfd_create("mcpb-boot", os.MFD_CLOEXEC)
        try:
            _write_all(boot_fd, order.boot)
            os.lseek(boot_fd, 0, os.SEEK_SET)
            python = order.pool.python or sys.executable
            fds = ("--boot-fd", str(boot_fd), "--tether-fd", str(order.tether_fd))
            return Process(
                order.worker_id,
                # -P: what a tool writes into its working directory is never imported
                [python, "-P", *self._worker, *fds],
                env={**_environment(order.worker_id, order.instance, order.scratch), **order.pool.env},
                cwd=order.scratch,
                pass_fds=(boot_fd, order.tether_fd, *order.pass_fds),
                poller=poller,
                on_exit=on_exit,
            )
        finally:
            os.close(boot_fd)

    def launch_broker(self, order: BrokerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Start the broker with our own interpreter."""
        return Process(
            order.name,
            [sys.executable, "-P", *self._broker, "--link-fd", str(order.link_fd)],
            env=_environment(order.name, order.instance, order.scratch),
            cwd=order.scratch,
            pass_fds=(order.link_fd, *order.pass_fds),
            poller=poller,
            on_exit=on_exit,
        )


def _environment(name: str, instance: str, scratch: Path) -> dict[str, str]:
    passed = {variable: os.environ[variable] for variable in PASSED if variable in os.environ}
    own = {"HOME": str(scratch), "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    return {**passed, **ALLOCATOR, **own, WORKER_VARIABLE: name, INSTANCE_VARIABLE: instance}


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
