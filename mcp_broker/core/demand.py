"""What pools are asked for, told to the supervisor a few times a second: how many workers a pool has is its to decide.

After a report it is told that nothing is different, too: a broker that says nothing hangs.

Derived from what the machines know anyway, at each heartbeat; the hot path counts nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker.core.worker import WorkerState
from mcp_broker.wire import node

if TYPE_CHECKING:
    from mcp_broker.core.dispatcher import Dispatcher
    from mcp_broker.core.pool import Pool


class Demands:
    """What the supervisor was told last, and what there is to tell now."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._told: dict[str, node.PoolDemand] = {}
        #: the supervisor has reported since
        self.is_due = False

    def news(self, now: float) -> list[node.NodeMessage]:
        """Return what is different since the last time."""
        demands = {pool.name: _demand(pool, now) for pool in self._dispatcher.pools.values()}
        changed = tuple(demand for name, demand in demands.items() if self._told.get(name) != demand)
        self._told = demands
        messages: list[node.NodeMessage] = [node.Demand(changed)] if changed or self.is_due else []
        self.is_due = False
        for pool in self._dispatcher.pools.values():
            if pool.closed and not pool.waiting.calls and not pool.is_vacant:
                pool.is_vacant = True
                messages.append(node.Vacant(pool.name))
        return messages


def _demand(pool: Pool, now: float) -> node.PoolDemand:
    ready = [worker for worker in pool.workers.values() if worker.state is WorkerState.READY]
    return node.PoolDemand(
        name=pool.name,
        waiting=pool.waiting.calls,
        wait_s=round(pool.wait_s(now), 2),
        busy=sum(bool(worker.held) for worker in ready),
        ready=len(ready),
    )
