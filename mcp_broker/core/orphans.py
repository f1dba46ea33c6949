"""What workers hold, running or ended, that no client of this broker has asked for."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.receipts import Receipt
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.worker import Worker
    from mcp_broker.wire import messages


class Orphan(Slim):
    """A call that a worker holds and no client of this broker has asked for."""

    worker: Worker
    call_id: bytes
    #: its number at that worker; 0: finished
    seq: int
    principal: str
    outcome: messages.Outcome | None = None
    body: Body | None = None
    size: int = 0
    receipt: Receipt | None = None
    #: when it is let go, if nobody has asked for it
    ends: float = math.inf
    #: whose it is, if it is detached
    tool: Tool | None = None
    #: nobody asked for it in time: it is being stopped
    is_unwanted: bool = False


class Orphans(dict[tuple[str, bytes], Orphan]):
    """All orphans, by family of pools, which no worker can say of itself, and call id.

    Attributes:
        kept_bytes: worker -> bytes of outcomes that are kept for whoever asks for its orphans.
        owners: (family, principal) -> how many orphans there are.
    """

    def __init__(self) -> None:
        self.kept_bytes: Counter[Worker] = Counter()
        self.owners: Counter[tuple[str, str]] = Counter()

    def detached(self, principal: str, call_id: bytes) -> Orphan | None:
        """Return a principal's detached call; None also if workers of several families say that it is theirs."""
        found = [
            orphan
            for family in {family for family, _ in self.owners}
            if (orphan := self.get((family, call_id))) is not None
            and orphan.principal == principal
            and orphan.tool is not None
            and not orphan.is_unwanted
        ]
        return found[0] if len(found) == 1 else None

    def of(self, worker: Worker) -> list[Orphan]:
        """Return what a worker holds."""
        return [orphan for orphan in self.values() if orphan.worker is worker]

    def add(self, orphan: Orphan) -> None:
        """Take one in; there must be none with its key."""
        family = orphan.worker.pool.family
        self[family, orphan.call_id] = orphan
        self.owners[family, orphan.principal] += 1

    def remove(self, orphan: Orphan) -> bool:
        """Take one out; return whether it was the last one of its principal in that family of pools."""
        worker = orphan.worker
        owner = worker.pool.family, orphan.principal
        del self[worker.pool.family, orphan.call_id]
        self.kept_bytes[worker] -= orphan.size
        if not self.kept_bytes[worker]:
            del self.kept_bytes[worker]
        self.owners[owner] -= 1
        if self.owners[owner]:
            return False
        del self.owners[owner]
        return True
