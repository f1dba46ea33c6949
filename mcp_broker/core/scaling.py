"""How many workers a pool should have, between two bounds, by what is asked of it.

Rules
    It grows when a call that comes now would wait longer than ``grow_wait_s``, and all workers that it has are ready: a
    worker that is still starting has not had its chance. It grows in proportion to the wait, at most twofold at a time.
    It shrinks by one when for ``shrink_after_s`` nothing has waited, and one worker fewer would never have been busy for
    more than :data:`BUSY_SHARE` of its time; the next one goes soon after, if that is so for it too.
    Growing starts that time anew, so that a burst that comes back finds its workers: callers wait for a pool that is too
    small, and only memory for one that is too large.

Pure: the clock is an argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

#: of the workers that are left, so much may be busy in the mean for one to go: more would make calls wait again
BUSY_SHARE: Final = 0.7
#: a pool that has been shrinking goes on after this share of the time that it took to begin
_STEP_SHARE: Final = 0.2
#: over what the busy workers are counted, seconds: looks at instants say nothing of pools with short calls
_MEAN_S: Final = 2.0
#: so few busy workers are none
_NONE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between what, and how fast.

    Args:
        least: workers, however little there is to do.
        most: workers, however much there is.
        grow_wait_s: a wait for a worker that is too long.
        shrink_after_s: how long nothing may have waited before a worker goes.
    """

    least: int
    most: int
    grow_wait_s: float
    shrink_after_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a pool.

    Args:
        waiting: calls without a worker.
        wait_s: how long one that comes now is expected to wait; 0: more workers would not help.
        ready: workers that can take calls.
        busy: of them, those that have any.
    """

    waiting: int = 0
    wait_s: float = 0.0
    ready: int = 0
    busy: int = 0


class Scaler:
    """Decides for one pool.

    Args:
        now: seconds, of any clock that does not go back.
    """

    def __init__(self, bounds: Bounds, now: float) -> None:
        self.bounds = bounds
        self._load = Load()
        self._at = now
        #: of the busy workers, over the last while
        self._mean = 0.0
        #: one worker fewer would have done since then
        self._calm_since = now

    def observe(self, load: Load, now: float) -> None:
        """Take what is asked now; it counts until something else is."""
        self._advance(now)
        self._load = load
        if load.waiting:
            self._calm_since = now

    def decide(self, size: int, now: float) -> int:
        """Return how many workers there should be.

        Args:
            size: how many are wanted at present, ready or not.
        """
        self._advance(now)
        bounds, load = self.bounds, self._load
        wanted = min(max(size, bounds.least), bounds.most)
        if wanted != size:
            return wanted
        if size < bounds.most and load.waiting and (not size or self._is_too_slow(size)):
            self._calm_since = now
            share = load.wait_s / bounds.grow_wait_s if bounds.grow_wait_s else math.inf
            more = size if share >= 2 else max(1, math.ceil(size * (share - 1)))  # noqa: PLR2004 (twofold at most)
            return min(bounds.most, size + max(1, more))
        calm_s = now - self._calm_since
        if load.waiting or self._mean > max(_NONE, BUSY_SHARE * (size - 1)):
            self._calm_since = now
            return size
        if size <= bounds.least or calm_s < bounds.shrink_after_s:
            return size
        self._calm_since = now - bounds.shrink_after_s * (1 - _STEP_SHARE)
        return size - 1

    def _is_too_slow(self, size: int) -> bool:
        return self._load.ready >= size and self._load.wait_s > self.bounds.grow_wait_s

    def _advance(self, now: float) -> None:
        """Let the time count that has passed with what was asked last."""
        spent_s, self._at = now - self._at, now
        if spent_s > 0:
            self._mean += (self._load.busy - self._mean) * (1 - math.exp(-spent_s / _MEAN_S))
