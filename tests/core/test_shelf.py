"""What is kept for a time: its bounds, its end, and that nothing else keeps it."""

from __future__ import annotations

import weakref

from mcp_broker.core.shelf import Shelf
from mcp_broker.core.timers import Timers

TTL_S = 60.0


class Thing:
    """Something whose end can be seen."""

    def __init__(self, name: str) -> None:
        self.name = name


def shelf() -> tuple[Shelf[str, Thing], Timers, list[str]]:
    timers = Timers()
    dropped: list[str] = []
    return Shelf(timers, TTL_S, lambda thing: dropped.append(thing.name)), timers, dropped


def test_what_was_dropped_or_taken_is_kept_by_nothing() -> None:
    kept, timers, _ = shelf()
    ends = []
    for number in range(100):
        thing = Thing(f"{number}")
        ends.append(weakref.ref(thing))
        kept.put(thing.name, thing, "ada", 10, float(number))
        del thing
        kept.trim(50, 10_000)
    kept.take("99")
    assert [end() is None for end in ends] == [True] * 50 + [False] * 49 + [True]
    assert len(timers) == 1


def test_things_go_when_their_time_is_over_and_not_before() -> None:
    kept, timers, dropped = shelf()
    for number in range(3):
        kept.put(f"{number}", Thing(f"{number}"), "ada", 10, float(number))
    timers.run(TTL_S + 0.9)
    assert dropped == ["0"]
    assert timers.deadline() == TTL_S + 1
    kept.take("1")
    timers.run(TTL_S + 1)
    assert list(kept) == ["2"]
    timers.run(TTL_S + 2)
    assert dropped == ["0", "2"]
    assert (len(kept), kept.bytes, len(timers)) == (0, 0, 0)
    kept.put("again", Thing("again"), "ada", 10, 100.0)
    timers.run(100.0 + TTL_S)
    assert dropped == ["0", "2", "again"]


def test_thing_in_place_of_another_counts_once() -> None:
    kept, _, dropped = shelf()
    for _ in range(100):
        kept.put("same", Thing("same"), "ada", 10, 0.0)
    assert (len(kept), kept.bytes, dropped) == (1, 10, [])
    kept.put("same", Thing("same"), "bob", 7, 0.0)
    assert kept.bytes == 7
    kept.trim(0, 0)
    assert (kept.bytes, dropped) == (0, ["same"])


def test_whoever_has_the_most_loses_its_oldest() -> None:
    kept, _, dropped = shelf()
    for number in range(3):
        kept.put(f"many {number}", Thing(f"many {number}"), "many", 1, 0.0)
    kept.put("large", Thing("large"), "large", 100, 0.0)
    for name in ("ada", "bob"):
        kept.put(name, Thing(name), name, 20, 0.0)
    kept.trim(5, 1000)
    assert dropped == ["many 0"]
    kept.trim(5, 60)
    assert dropped == ["many 0", "large"]
    assert list(kept) == ["many 1", "many 2", "ada", "bob"]
