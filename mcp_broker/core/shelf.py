"""A shelf: what is kept for a time and within bounds, and whose it is.

Past a bound, whoever has the most loses its oldest: nobody's things vanish for what others put there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.timers import Timers

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class Place(Slim):
    """One thing that is kept."""

    item: Any
    principal: str
    size: int
    until: float


class Portion(Slim):
    """What one principal has on a shelf: the keys, the oldest first, and the bytes of it all."""

    keys: dict[Any, None]
    bytes: int = 0


class Shelf(Generic[K, T]):
    """Things by key, the oldest first.

    A timer cannot be cancelled, and whatever it knows lives until it runs: so there is one, and it knows no thing.

    Args:
        ttl_s: how long a thing is kept, seconds.
        dropped: told of each thing that goes by itself: its time is over, or there was no room.

    Attributes:
        bytes: the size of all that is kept.
    """

    def __init__(self, timers: Timers, ttl_s: float, dropped: Callable[[T], None] = lambda _: None) -> None:
        self.bytes = 0
        self._timers = timers
        self._ttl_s = ttl_s
        self._dropped = dropped
        self._places: OrderedDict[K, Place] = OrderedDict()
        #: by principal; none is empty
        self._portions: dict[str, Portion] = {}
        self._is_timed = False

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[K]:
        return iter(self._places)

    def values(self) -> Iterator[T]:
        """Yield the things, the oldest first."""
        return (place.item for place in self._places.values())

    def get(self, key: K) -> T | None:
        """Return a thing, which stays."""
        place = self._places.get(key)
        return None if place is None else place.item

    def put(self, key: K, item: T, principal: str, size: int, now: float) -> None:
        """Keep a thing of so many bytes, in place of one with the same key."""
        self.take(key)
        self._places[key] = Place(item, principal, size, now + self._ttl_s)
        self.bytes += size
        portion = self._portions.get(principal)
        if portion is None:
            portion = self._portions[principal] = Portion({})
        portion.keys[key] = None
        portion.bytes += size
        if not self._is_timed:
            self._is_timed = True
            self._timers.add(now + self._ttl_s, self._expire, None)

    def take(self, key: K) -> T | None:
        """Take a thing out; None: it is not here."""
        place = self._places.pop(key, None)
        if place is None:
            return None
        self.bytes -= place.size
        portion = self._portions[place.principal]
        del portion.keys[key]
        portion.bytes -= place.size
        if not portion.keys:
            del self._portions[place.principal]
        item: T = place.item
        return item

    def trim(self, count: int, size: int) -> None:
        """Drop things until there are at most so many, with at most so many bytes."""
        while len(self._places) > count:
            self._drop(max(self._portions.values(), key=lambda portion: len(portion.keys)))
        while self.bytes > size:
            self._drop(max(self._portions.values(), key=lambda portion: portion.bytes))

    def _drop(self, portion: Portion) -> None:
        item = self.take(next(iter(portion.keys)))
        if item is not None:
            self._dropped(item)

    def _expire(self, _: None, now: float) -> None:
        self._is_timed = False
        while self._places:
            key, place = next(iter(self._places.items()))
            if place.until > now:
                self._is_timed = True
                self._timers.add(place.until, self._expire, None)
                return
            self.take(key)
            self._dropped(place.item)
