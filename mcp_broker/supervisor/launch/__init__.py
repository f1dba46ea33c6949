"""Where processes are placed. Local spawning is one way; the seam keeps engines and isolation out of the loop.

A launcher only starts processes. Whether and when one starts again is for :mod:`mcp_broker.core.children`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from mcp_broker.wire.confinement import Confinement

if TYPE_CHECKING:
    from mcp_broker.config import PoolTable
    from mcp_broker.supervisor.poller import Poller
    from mcp_broker.supervisor.process import Exit, Process


_UNCONFINED: Final = Confinement()


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """One worker to start.

    Args:
        boot: the packed WorkerBoot record; it holds the secret key, so it goes by descriptor only.
        pass_fds: further descriptors that the worker inherits under the numbers that the record names.
        tether_fd: the worker's end of its tether.
        scratch: its private folder, which exists: working directory, HOME and TMPDIR.
        confinement: its level, and what makes it up.
    """

    worker_id: str
    instance: str
    pool: PoolTable
    boot: bytes
    pass_fds: Sequence[int]
    tether_fd: int
    scratch: Path
    confinement: Confinement = _UNCONFINED


@dataclass(frozen=True, slots=True)
class BrokerOrder:
    """The broker to start.

    Args:
        link_fd: its end of the socketpair; the boot record comes through it.
        pass_fds: the listening sockets.
        scratch: its working directory.
    """

    name: str
    instance: str
    link_fd: int
    pass_fds: Sequence[int]
    scratch: Path


class Ground(Protocol):
    """What a launcher with processes of its own stands on: the supervisor, as far as it sees it."""

    poller: Poller
    run_dir: Path
    instance: str

    def strayed(self) -> None:
        """Processes may have lost their parent."""


class Launcher(Protocol):
    """Starts processes and hands them over; raises SupervisionError when it cannot.

    One that keeps processes of its own for this is opened before the first start, served in every turn of the loop, and
    stopped after the last.
    """

    def launch_worker(self, order: WorkerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Start a worker process, or begin to: ``when_born`` of what is returned tells."""

    def launch_broker(self, order: BrokerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Start the broker process."""

    def open(self, ground: Ground) -> None:
        """Begin."""
        del ground

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`expire` has something to do."""
        return None

    def expire(self, now: float) -> None:
        """Do what is due; called every turn."""
        del now

    def alive(self) -> dict[int, str]:
        """Return who has a right to live besides workers and broker: pid -> name.

        These are the launcher's own processes, and workers that may have been forked but are not known yet: each under
        a negative number of its own. Who finds a process that names itself so has not found a stray.
        """
        return {}

    def stop(self) -> None:
        """End them; whoever is unborn is abandoned."""
        return
