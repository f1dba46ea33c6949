"""A deadline wheel: adding and removing cost a dictionary access each, and nothing is kept of what ended.

A heap is as fast, but remembers finished entries until their time; at 10,000 calls a second with 30 s to live
that is 300,000 dead entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

T = TypeVar("T")

#: Slots a second: an entry is found at most 1/32 s after its instant.
SLOTS_A_SECOND: Final = 32


class Slot(dict[bytes, T]):
    """The entries that are due at one time, by key."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


class Wheel(Generic[T]):
    """Entries by the slot of time in which they are due.

    Whoever adds many entries for one instant asks for its slot once, and puts them in; whoever takes the last one
    out says so with :meth:`drop`.
    """

    __slots__ = ("_done", "_slots")

    def __init__(self, now: float) -> None:
        self._slots: dict[int, Slot[T]] = {}
        #: every slot up to and including this one was emptied
        self._done = int(now * SLOTS_A_SECOND)

    def slot(self, at: float) -> Slot[T]:
        """Return where an entry for this instant belongs; something must be put in at once."""
        number = int(at * SLOTS_A_SECOND) + 1
        if number <= self._done:
            number = self._done + 1
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = Slot(number)
        return slot

    def drop(self, slot: Slot[T]) -> None:
        """Forget a slot that has become empty; harmless if it has passed."""
        self._slots.pop(slot.number, None)

    def deadline(self) -> float | None:
        """Return when to look again: the next slot's end while there is any entry at all.

        Not the first entry's own instant: finding that would cost more, each turn, than 32 looks a second.
        """
        return (self._done + 1) / SLOTS_A_SECOND if self._slots else None

    def due(self, now: float) -> Iterator[T]:
        """Yield and forget every entry whose slot has passed. Entries may be taken out meanwhile."""
        current = int(now * SLOTS_A_SECOND)
        if current <= self._done:
            return
        if current - self._done > len(self._slots):
            passed = sorted(number for number in self._slots if number <= current)
        else:
            passed = [number for number in range(self._done + 1, current + 1) if number in self._slots]
        self._done = current
        for number in passed:
            slot = self._slots.pop(number, None)
            while slot:
                yield slot.popitem()[1]
