"""What of refusals is worth a log line: anybody with the public key can have a million, and nobody wants to read them."""

from __future__ import annotations

import math

from mcp_broker import limits


class Refusals:
    """Of each kind the first in a period is told, and at the period's end how many more there were.

    Args:
        period_s: it begins with a refusal.

    Attributes:
        due: when :meth:`expire` has something to do; never, while nothing is refused.
    """

    def __init__(self, period_s: float = limits.REFUSALS_TOLD_S) -> None:
        self._period_s = period_s
        self._more: dict[str, int] = {}
        self.due = math.inf

    def note(self, kind: str, now: float) -> bool:
        """Take note of a refusal; tell whether it is to be logged. There are few kinds, and no peer makes another."""
        self.due = min(self.due, now + self._period_s)
        is_first = kind not in self._more
        self._more[kind] = 0 if is_first else self._more[kind] + 1
        return is_first

    def expire(self, now: float) -> dict[str, int]:
        """Return how many more there were of each kind, if a period has ended and there were any."""
        if now < self.due:
            return {}
        more = {kind: count for kind, count in self._more.items() if count}
        self._more.clear()
        self.due = math.inf
        return more
