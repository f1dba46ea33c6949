"""Workers forked from a zygote where their pool lets them, and started in the ordinary way where not, or when it is away."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.supervisor.launch import Launcher
from mcp_broker.supervisor.launch.local import LocalLauncher, environment
from mcp_broker.supervisor.launch.zygote import Delivery, Zygote
from mcp_broker.supervisor.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcp_broker.supervisor.launch import BrokerOrder, Ground, WorkerOrder
    from mcp_broker.supervisor.poller import Poller
    from mcp_broker.supervisor.process import Exit

#: levels whose walls a process puts up around itself; the others' workers are born inside them
_FORKED: Final = frozenset({"process", "restricted"})


class ForkingLauncher(Launcher):
    """Has one zygote for each interpreter and environment that a pool names.

    Args:
        local: starts what is not forked.
        zygote: the zygote's program, after the interpreter.
    """

    def __init__(
        self,
        local: LocalLauncher | None = None,
        zygote: Sequence[str] = ("-m", "mcp_broker.worker.zygote"),
    ) -> None:
        self._local = local or LocalLauncher()
        self._program = tuple(zygote)
        self._ground: Ground | None = None
        self._zygotes: dict[tuple[str, tuple[tuple[str, str], ...]], Zygote] = {}
        #: no longer for use, and not gone yet
        self._leaving: list[Zygote] = []
        self._named = 0

    def open(self, ground: Ground) -> None:
        """Begin; the first order of a pool brings up its zygote."""
        self._ground = ground

    def launch_worker(self, order: WorkerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Have a worker forked, or start it."""
        pool = order.pool
        if self._ground is None or pool.start != "zygote" or order.confinement.level not in _FORKED:
            return self._local.launch_worker(order, poller, on_exit)
        process = Process.unborn(order.worker_id, poller=poller, on_exit=on_exit)
        if self._zygote(self._ground, order).deliver(Delivery(process, order)):
            return process
        process.discard()
        return self._local.launch_worker(order, poller, on_exit)

    def launch_broker(self, order: BrokerOrder, poller: Poller, on_exit: Callable[[Exit], None]) -> Process:
        """Start the broker."""
        return self._local.launch_broker(order, poller, on_exit)

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`expire` has something to do."""
        due = [zygote.deadline() for zygote in self._all]
        return min((one for one in due if one is not None), default=None)

    def expire(self, now: float) -> None:
        """Do what is due."""
        for zygote in self._all:
            zygote.expire(now)
        self._leaving = [zygote for zygote in self._leaving if zygote.process is not None]

    def alive(self) -> dict[int, str]:
        """Return the zygotes' processes, and the workers that were ordered."""
        processes = [zygote.process for zygote in self._all]
        alive = {process.pid: process.name for process in processes if process is not None}
        ordered = [name for zygote in self._all for name in zygote.ordered]
        return alive | {-number: name for number, name in enumerate(ordered, start=1)}

    def stop(self) -> None:
        """End all zygotes."""
        for zygote in self._zygotes.values():
            zygote.stop()
        self._leaving += self._zygotes.values()
        self._zygotes.clear()
        self._ground = None

    @property
    def _all(self) -> list[Zygote]:
        return [*self._zygotes.values(), *self._leaving]

    def _zygote(self, ground: Ground, order: WorkerOrder) -> Zygote:
        # what is imported may depend on any variable
        python = order.pool.python or sys.executable
        key = (python, tuple(sorted(order.pool.env.items())))
        if key not in self._zygotes:
            self._make_room()
            self._named += 1

            def env(name: str) -> dict[str, str]:
                padded = name.ljust(limits.WORKER_ID_CHARS_MAX)
                return {**environment(padded, ground.instance, ground.run_dir), **dict(key[1])}

            self._zygotes[key] = Zygote(
                ground,
                # no pool's name has a hyphen, so no worker has this one
                f"zygote-{self._named}",
                [python, "-P", *self._program],
                env,
                self._local.execute,
            )
        return self._zygotes[key]

    def _make_room(self) -> None:
        """A configuration that changes over and over must not keep a zygote for each of its forms."""
        idle = [key for key, zygote in self._zygotes.items() if zygote.is_idle]
        if len(self._zygotes) >= limits.ZYGOTES_MAX and idle:
            oldest = min(idle, key=lambda key: self._zygotes[key].used_at)
            zygote = self._zygotes.pop(oldest)
            zygote.stop()
            self._leaving.append(zygote)
