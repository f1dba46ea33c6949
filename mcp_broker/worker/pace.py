"""How many calls a worker asks the broker to keep here: enough to hide the round trip, and no more.

A worker of short tools that runs dry waits for the broker between any two calls; one of long tools that holds many
keeps them from its idle neighbours.
"""

from __future__ import annotations

import math
from typing import Final

from mcp_broker import limits

#: above this mean service time a waiting call gains nothing from being here already, seconds
LONG_S: Final = 0.002
#: weight of the newest call in the mean
_WEIGHT: Final = 1 / 16


class Pace:
    """The depth of one worker.

    Args:
        concurrency: calls that run at a time.

    Attributes:
        mean_s: moving mean of the service time, 0 before the first call.
    """

    __slots__ = ("_announced", "_concurrency", "mean_s")

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._announced = 0
        self.mean_s = 0.0

    def served(self, spent_ns: int, count: int) -> None:
        """Count some calls, and the time that they took together."""
        if not count:
            return
        service_s = spent_ns * 1e-9 / count
        mean = self.mean_s
        self.mean_s = mean + (service_s - mean) * (1 - (1 - _WEIGHT) ** count) if mean else service_s

    def depth(self) -> int:
        """Return what suits the calls of late."""
        if not 0 < self.mean_s <= LONG_S:
            # long, or not known yet: the first call tells, and until then nothing is kept from idle neighbours
            return self._concurrency
        wanted = math.ceil(limits.WORKER_QUEUE_TARGET_S / self.mean_s)
        return min(max(wanted, self._concurrency + 1), limits.WORKER_DEPTH_MAX)

    def has_changed(self) -> bool:
        """Tell whether the depth is worth announcing: twice what the broker knows, or half, or just what can run."""
        wanted, known = self.depth(), self._announced
        if wanted == known or not known:
            return False
        return wanted >= 2 * known or 2 * wanted <= known or wanted == self._concurrency

    def announce(self) -> int:
        """Return the depth, and remember that the broker knows it."""
        self._announced = self.depth()
        return self._announced
