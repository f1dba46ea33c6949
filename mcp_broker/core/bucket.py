"""Token buckets: so many calls a second in the long run, and a bounded number at once."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from mcp_broker import limits

#: instants closer than this are the same: a sum of floats must not cost a token
_TICK_S: Final = 1e-6


class Rate(NamedTuple):
    """How fast is fast enough.

    Attributes:
        per_s: calls a second in the long run, at least RATE_MIN.
        burst: calls at once after a pause, at least 1.
    """

    per_s: float
    burst: int

    @classmethod
    def of(cls, per_s: float | None, burst: int | None) -> Rate | None:
        """Return the rate that a configuration or a definition names; a burst that it leaves out is a second's calls."""
        if not per_s:
            return None
        return cls(max(per_s, limits.RATE_MIN), burst or max(1, math.ceil(per_s)))


class Bucket:
    """Holds up to ``burst`` tokens, gains ``per_s`` of them a second, and is full at first; a call takes one.

    Its state is one instant, at which it would have begun to fill from nothing: no error adds up.
    """

    __slots__ = ("_cost_s", "_empty_at", "_full_s", "rate")

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self._cost_s = 1 / rate.per_s
        self._full_s = rate.burst * self._cost_s
        self._empty_at = -math.inf

    def wait_s(self, now: float) -> float:
        """Return in how long there will be a token; 0: there is one."""
        wait_s = self._empty_at + self._cost_s - now
        return wait_s if wait_s > _TICK_S else 0.0

    def take(self, now: float) -> None:
        """Take the token that :meth:`wait_s` said was there."""
        self._empty_at = max(self._empty_at, now - self._full_s) + self._cost_s

    def is_full(self, now: float) -> bool:
        """Tell whether it is as good as a new one."""
        return self._empty_at <= now - self._full_s
