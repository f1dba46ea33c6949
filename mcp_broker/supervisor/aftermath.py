"""What follows deaths: strays are swept, and what the dead left is taken back, between the supervisor's other work."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Final

from mcp_broker import proctable
from mcp_broker.supervisor import cgroups, reclaim
from mcp_broker.supervisor.containment import contained
from mcp_broker.wire import node

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from mcp_broker.supervisor.lessor import Lessor
    from mcp_broker.supervisor.poller import Poller
    from mcp_broker.wire.reclaims import Reclaim

_log = logging.getLogger("mcp_broker.supervisor")

#: between two looks for strays that were killed but are not gone
_SWEEP_S: Final = 0.01
_SWEEPS_MAX: Final = 200


class Aftermath:
    """Keeps the node clean. From its making on, this process adopts the orphans below it.

    Args:
        folders: the state directory, where records are kept, and that of what runs.
        instance: names this state directory's processes, groups and shared memory.
        lessor: has the leased ports.
        alive: returns our own live children: pid -> name.
        tell: tells the broker.

    Raises:
        SupervisionError: the kernel cannot let us adopt orphans.
    """

    def __init__(
        self,
        folders: tuple[Path, Path],
        instance: str,
        lessor: Lessor,
        alive: Callable[[], Mapping[int, str]],
        tell: Callable[[node.FromSupervisor], None],
    ) -> None:
        state_dir, self.run_dir = folders
        self._instance = instance
        self._tell = tell
        self.lessor = lessor
        self.alive = alive
        self.bystanders = proctable.children(os.getpid())
        reclaim.become_subreaper()
        self.groups = cgroups.open_groups(instance)
        if self.groups is not None:
            reclaim.record_groups(self.run_dir, self.groups)
        self._reclaimer = reclaim.Reclaimer(self, self._reclaimed)
        self._history = reclaim.Reclaims(state_dir)
        self._sweeps_left = 0

    @property
    def records(self) -> tuple[Reclaim, ...]:
        """What was taken back lately, newest first."""
        return self._history.recent

    def known(self) -> dict[int, str]:
        """Return our own children that are no strays: pid -> name."""
        return {**dict.fromkeys(self.bystanders, ""), **self.alive()}

    # -- what happens --------------------------------------------------------------------------------

    def spawned(self, worker_id: str, pid: int) -> None:
        """Put a worker into a control group of its own, where there are any: so nothing of it can be lost."""
        if self.groups is None:
            return
        group = self.groups.of(worker_id)
        try:
            group.make()
            group.add(pid)
        except OSError as error:
            # it is gone already, or the hierarchy is full: strays are found without
            _log.debug("no control group for %s: %s", worker_id, error)

    def take_back(self, remains: reclaim.Remains) -> None:
        """Take back what a dead worker left, from the end of this turn on."""
        self._reclaimer.begin(remains)

    def strayed(self) -> None:
        """Look for processes that lost their parent, at the end of this turn."""
        self._sweeps_left = _SWEEPS_MAX

    def look(self) -> None:
        """Look once at what nobody tells us: adopted orphans are zombies until somebody does, and who is connected."""
        self.lessor.sample()
        self._sweeps_left = max(self._sweeps_left, 1)

    def release_ports(self, worker_id: str) -> list[int]:
        """Take back the ports that a worker had leased."""
        return self.lessor.owner_died(worker_id)

    # -- the work ------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`turn` has something to do."""
        again = time.monotonic() + _SWEEP_S if self._sweeps_left else None
        dues = (self._reclaimer.deadline(), self.lessor.deadline(), again)
        return min((at for at in dues if at is not None), default=None)

    def turn(self) -> None:
        """Do a little."""
        with contained("ending leases of ports"):
            self.lessor.expire(time.monotonic())
        # before strays in general are swept: what it kills, it counts as its worker's
        self._reclaimer.turn()
        if self._sweeps_left:
            self._sweeps_left = self._sweeps_left - 1 if self._sweep() else 0

    def end(self, poller: Poller) -> None:
        """Leave nothing behind: everybody was killed."""
        for _ in range(_SWEEPS_MAX):
            poller.turn(0.0)
            self._reclaimer.turn()
            left = True
            with contained("sweeping strays"):
                left = bool(self._sweep())
            if not left:
                break
            time.sleep(_SWEEP_S)
        self._reclaimer.finish()
        with contained("closing leased ports"):
            self.lessor.close()
        reclaim.remove_leftovers(self.run_dir, self._instance)

    def _sweep(self) -> reclaim.Swept:
        top = None if self.groups is None else self.groups.top.path
        return reclaim.sweep(self.alive(), self.bystanders, top)

    def _reclaimed(self, record: Reclaim) -> None:
        self._history.add(record)
        self._tell(node.Reclaimed(record))
