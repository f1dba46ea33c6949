"""How many calls workers may hold at a time, all pools together, and which pool's turn it is when there is room."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcp_broker.core.pool import Pool


class Ceiling:
    """The bound of a whole broker; mostly there is none.

    Attributes:
        limit: None: as many as workers take.
    """

    def __init__(self, pools: dict[str, Pool]) -> None:
        self.limit: int | None = None
        self._pools = pools
        #: pool -> when it had its last turn, counted
        self._turns: dict[str, int] = {}
        self._count = 0

    def room(self) -> int:
        """Return how many more calls may be given to workers; calls that have ended count until their worker lets go."""
        if self.limit is None:
            raise ValueError("there is no limit")
        held = sum(len(worker.held) for pool in self._pools.values() for worker in pool.workers.values())
        return self.limit - held

    def waiting(self) -> list[Pool]:
        """Return the pools whose calls wait, whose last turn is longest ago first."""
        waiting = [pool for pool in self._pools.values() if pool.backlog.count]
        return sorted(waiting, key=lambda pool: self._turns.get(pool.name, 0))

    def served(self, pool: Pool) -> None:
        """Take note of a turn."""
        self._count += 1
        self._turns[pool.name] = self._count
