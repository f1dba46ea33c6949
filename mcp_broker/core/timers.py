"""Rare timers: a heap of (instant, what to do). Calls have their own wheel."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Timers:
    """Timers are never cancelled: each looks, when it runs, whether it still matters."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, at: float, action: Callable[[T, float], None], subject: T) -> None:
        """Run ``action(subject, now)`` at ``at`` or soon after."""
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, action, subject))

    def deadline(self) -> float | None:
        """Return the first timer's instant."""
        return self._heap[0][0] if self._heap else None

    def run(self, now: float) -> None:
        """Run what is due; what that adds for now or earlier runs too."""
        while self._heap and self._heap[0][0] <= now:
            _, _, action, subject = heapq.heappop(self._heap)
            action(subject, now)
