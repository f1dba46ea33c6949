"""Which outcomes of a worker have arrived at their callers, so that the worker may forget them.

A worker keeps an outcome until the broker says that it is done with it, and the broker is done with it when the
caller's client has acknowledged it, or nobody is left to. Counting is by message, not by outcome: one Receipt for
each OUTCOMES message of a worker, and a note of it in each session that a share of it went to.

A client that is idle, or does not want to, acknowledges nothing for long. Its outcomes hold up the count of all that came
after them no further than the worker itself keeps them.
"""

from __future__ import annotations

from collections import deque

from mcp_broker import limits
from mcp_broker.wire.structs import Slim


class Receipt(Slim):
    """One message of outcomes: the number of its last one, and how many have yet to arrive."""

    last: int
    left: int = 0


class Receipts:
    """The receipts of one connection of a worker, oldest first.

    Attributes:
        done: outcomes up to this number need not be kept any more.
    """

    __slots__ = ("_open", "done")

    def __init__(self) -> None:
        self._open: deque[Receipt] = deque()
        self.done = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, receipt: Receipt) -> None:
        """Take the receipt of the next message, its shares counted."""
        waiting = self._open
        waiting.append(receipt)
        while receipt.last - waiting[0].last >= limits.HELD_MAX:
            # its worker has let it go by itself, since it kept all that came after it too
            self.done = waiting.popleft().last

    def advance(self) -> int:
        """Return :attr:`done`, after a look at what has arrived."""
        waiting = self._open
        while waiting and waiting[0].left <= 0:
            self.done = waiting.popleft().last
        return self.done


class Share(Slim):
    """A session's part of a receipt: when its outcomes up to ``number`` have arrived, so have ``count`` of it."""

    number: int
    receipt: Receipt
    count: int
