"""Limits that follow measured use: a line through the last hour says what comes.

Rules
    1. Use is kept as the highest of each ten seconds, over the last hour.
    2. At most every five minutes the limit becomes what the line says for five minutes from now, and a fifth more.
    3. It never leaves [base, most], and never falls below what was used within the hour: a burst that was fine is fine
       again.

Pure: time is an argument. Deliberately absent: seasons, which an hour does not show.
"""

from __future__ import annotations

from collections import deque

from mcp_broker import limits


class Adaptive:
    """One limit.

    Args:
        base: what it is without any use, and at least.
        most: what it is at most.

    Attributes:
        value: what it is now.
    """

    def __init__(self, base: float, most: float) -> None:
        self.value = base
        self._base = base
        self._most = max(base, most)
        #: (start of its ten seconds, highest use), the oldest first
        self._history: deque[tuple[float, float]] = deque()
        self._adjusted_at: float | None = None

    def observe(self, used: float, now: float) -> bool:
        """Take a measured use; return whether the limit has changed."""
        history = self._history
        at = now - now % limits.ADAPT_STEP_S
        if history and history[-1][0] >= at:
            history[-1] = history[-1][0], max(used, history[-1][1])
        else:
            history.append((at, used))
        while history[0][0] <= now - limits.ADAPT_WINDOW_S:
            history.popleft()
        if self._adjusted_at is None:
            # one sample is no pattern
            self._adjusted_at = now
        if now - self._adjusted_at < limits.ADAPT_EVERY_S:
            return False
        self._adjusted_at = now
        before = self.value
        wanted = max(self.predicted(now) * (1.0 + limits.ADAPT_HEADROOM_SHARE), self.highest)
        self.value = min(max(wanted, self._base), self._most)
        return self.value != before

    @property
    def highest(self) -> float:
        """The highest use within the window."""
        return max((used for _, used in self._history), default=0.0)

    @property
    def average(self) -> float:
        """The mean use within the window."""
        return sum(used for _, used in self._history) / len(self._history) if self._history else 0.0

    @property
    def trend(self) -> float:
        """The slope of the line of least squares, per second; 0 while there is no line."""
        count = len(self._history)
        mean_at = sum(at for at, _ in self._history) / count if count else 0.0
        spread = sum((at - mean_at) ** 2 for at, _ in self._history)
        if not spread:
            return 0.0
        mean = self.average
        return sum((at - mean_at) * (used - mean) for at, used in self._history) / spread

    def predicted(self, now: float) -> float:
        """Return what the line says for the end of the time that is looked ahead."""
        count = len(self._history)
        if not count:
            return 0.0
        mean_at = sum(at for at, _ in self._history) / count
        return self.average + self.trend * (now + limits.ADAPT_AHEAD_S - mean_at)
