"""The virtual clock: what is to happen, in the order of its instant, and nothing between."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

Action = Callable[[], None]

#: so many things at one instant are somebody who waits for nothing
_AT_ONCE_MAX = 20_000


class TimeStandsStillError(AssertionError):
    """Something wakes up again and again, and never lets time pass."""


class Agenda:
    """Runs actions at their instants; those of one instant in the order in which they were added."""

    def __init__(self, now: float) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Action | Alarm]] = []
        self._count = 0
        self._at_once = 0

    def at(self, instant: float, what: Action | Alarm) -> None:
        """Let something happen at an instant; one that has passed means now."""
        self._count += 1
        heapq.heappush(self._heap, (instant, self._count, what))

    def after(self, seconds: float, action: Action) -> None:
        """Let something happen later."""
        self.at(self.now + seconds, action)

    def step(self) -> None:
        """Turn the clock to the next thing that happens, and let it."""
        while True:
            instant, _, what = heapq.heappop(self._heap)
            if isinstance(what, Alarm):
                if what.instant != instant:
                    # set to another time since
                    continue
                what.instant = math.inf
                what = what.action
            if instant > self.now:
                self.now, self._at_once = instant, 0
            self._at_once += 1
            if self._at_once > _AT_ONCE_MAX:
                raise TimeStandsStillError(f"{_AT_ONCE_MAX} things have happened at {self.now}")
            what()
            return


class Alarm:
    """One action that is due at one instant at most, and may be set anew."""

    __slots__ = ("_agenda", "action", "instant")

    def __init__(self, agenda: Agenda, action: Action) -> None:
        self._agenda = agenda
        self.action = action
        self.instant = math.inf

    def set(self, instant: float) -> None:
        """Ring at this instant, and at no other."""
        instant = max(instant, self._agenda.now)
        if instant != self.instant:
            self.instant = instant
            if instant < math.inf:
                self._agenda.at(instant, self)

    def sooner(self, instant: float) -> None:
        """Ring at this instant unless it rings before that anyway."""
        if instant < self.instant:
            self.set(instant)

    def clear(self) -> None:
        """Do not ring."""
        self.instant = math.inf
