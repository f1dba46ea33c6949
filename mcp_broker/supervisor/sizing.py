"""How many workers a pool wants: as its table says, as an operator says, or as the demand says between the table's bounds.

And which of them it does without first when it wants fewer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_broker.core.children import State
from mcp_broker.core.scaling import Bounds, Load, Scaler

if TYPE_CHECKING:
    from mcp_broker.config import PoolTable
    from mcp_broker.supervisor.slot import Slot
    from mcp_broker.wire import node

#: whom a smaller pool does without first
_DISPENSABLE: Final = (
    *(State.FATAL, State.STOPPED, State.BACKOFF, State.STOPPING),
    *(State.RETIRING, State.STARTING, State.RUNNING),
)


class Sizing:
    """The size of one pool.

    Attributes:
        size: how many workers are wanted.
    """

    def __init__(self, table: PoolTable, now: float) -> None:
        self.size = 0
        self.follow(table, now)

    def follow(self, table: PoolTable, now: float) -> None:
        """Do as a table says, with as many workers as there are if that may be: reading it again does not end a burst."""
        bounds = Bounds(table.min, table.max or table.min, table.grow_wait_s, table.shrink_after_s)
        self._scaler = Scaler(bounds, now)
        self._is_adaptive = bounds.most > bounds.least
        self.size = min(max(self.size, bounds.least), bounds.most)

    def fix(self, size: int) -> None:
        """Do as an operator says, until a table is followed again."""
        self.size, self._is_adaptive = size, False

    def observe(self, demand: node.PoolDemand, now: float) -> None:
        """Take the broker's word on what is asked of the pool."""
        self._scaler.observe(Load(demand.waiting, demand.wait_s, demand.ready, demand.busy), now)

    def adapt(self, now: float) -> bool:
        """Grow or shrink as far as the demand says; tell whether the size is another one."""
        before = self.size
        if self._is_adaptive:
            self.size = self._scaler.decide(before, now)
        return self.size != before


def worth(slot: Slot) -> tuple[int, int]:
    """Return what a smaller pool keeps: the larger."""
    return slot.edition, _DISPENSABLE.index(slot.child.state)
