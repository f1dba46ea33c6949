"""What the broker wants done about tools that fail: other processes, pools of one tool, and what it wants remembered."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from mcp_broker.wire import node

if TYPE_CHECKING:
    from mcp_broker.config import PoolTable
    from mcp_broker.supervisor.fleet import Fleet

_log = logging.getLogger("mcp_broker.supervisor")

#: between the name of a pool and that of a tool that has a worker of its own; no pool of a configuration has it in its name
APART: Final = "~"

Wish = node.Replace | node.Isolate | node.Standings


class Recovery:
    """Carries out steps of recovery.

    Attributes:
        standings: where the broker left tools that do not simply serve.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.standings: tuple[node.Standing, ...] = ()

    def take(self, wish: Wish) -> None:
        """Do what the broker wants; about a worker or pool that is gone it means nothing."""
        if isinstance(wish, node.Standings):
            self.standings = wish.tools
        elif isinstance(wish, node.Replace):
            if self._fleet.replace(wish.worker_id, wish.why):
                _log.info("worker %s is replaced: %s", wish.worker_id, wish.why)
        else:
            self._isolate(wish)

    def _isolate(self, wish: node.Isolate) -> None:
        name, base = f"{wish.pool}{APART}{wish.tool}", self._fleet.pools.get(wish.pool)
        if not wish.wanted:
            self._fleet.dissolve(name)
        elif base is not None:
            if name not in self._fleet.pools:
                _log.warning("the tool %s of pool %s gets a worker of its own", wish.tool, wish.pool)
            self._fleet.found(name, alone(base.table))

    def briefing(self) -> list[node.Standings]:
        """Return what a broker has to know that follows another."""
        return [node.Standings(self.standings)] if self.standings else []


def alone(table: PoolTable) -> PoolTable:
    """Return the table of a pool with one worker that runs one call at a time, and may use half of what others may."""
    bounds = table.limits
    tighter = {
        "memory_mb": max(1, bounds.memory_mb // 2),
        "cpu_s": bounds.cpu_s / 2,
        "open_files": max(1, bounds.open_files // 2),
        "connections": bounds.connections // 2,
        "processes": bounds.processes // 2,
        "adaptive": False,
    }
    one = {"min": 1, "max": 1, "spare": 0, "concurrency": 1}
    return table.model_copy(update={**one, "limits": bounds.model_copy(update=tighter)})
