r"""A backlog: what waits for a pool, and who is served next.

Rules
    A higher class is served before a lower one. What has waited ``age_s`` in its class goes on waiting in the next
    higher one, so that no flood above keeps it waiting for ever.
    Inside a class, principals are served by weighted deficit round robin: a turn gives a principal as much as its
    weight, and a call takes its cost. A principal that has taken more than it had sits out its next turns.
    Inside a principal: first come, first served.
    A *gate* bounds how many calls of one tool workers hold. Calls behind a closed gate wait and hold up nobody else;
    the places of a gate go to the principals in turns of their own, so that none of them has to wait for one who
    finds something else to do at each turn.
    What is queued again (its worker died before it started it) was served once: it comes before all others.

::

    again: o o                                     served first
    class 0 ring: [alice] [bob]                    a flow a principal; only those that could be served now
    class 1 ring: [bob] [carol]     gate t1: [carol] [bob]     whose turn it is when a worker lets go of a t1
    class 2 ring: -                 order: o o o o             by age

Every operation takes constant time, or time in the number of gates that one principal waits for. Entries are opaque.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, Final, Generic, TypeVar

from mcp_broker import limits
from mcp_broker.wire.structs import Slim

T = TypeVar("T")

#: classes, 0 served first
CLASSES: Final = 3


class Gate:
    """How many calls of one tool workers may hold at a time.

    Attributes:
        limit: at most so many.
        held: so many are, ended ones included until their worker lets go.
        waiting: calls behind it, in one backlog.
    """

    __slots__ = ("held", "limit", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.waiting = 0


class Entry(Slim):
    """One thing that waits."""

    key: bytes
    item: Any
    gate: Gate | None
    #: what it takes of its principal's turn
    cost: int
    #: in its class since then
    since: float
    #: counts entries, to tell which of two came first
    number: int
    flow: Flow | None = None


class Lane:
    """What one principal has waiting behind one gate."""

    __slots__ = ("entries", "flow", "left")

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        #: places that it may still take in its turn at the gate; 0: its turn has not begun
        self.left = 0


class Flow:
    """What one principal has waiting in one class.

    Attributes:
        free: entries without a gate.
        lanes: the others; none of them is empty.
        deficit: what is left of its turn; below 0: what it took too much.
        in_ring: it has a place in the ring of its class.
    """

    __slots__ = ("deficit", "free", "in_ring", "lanes", "principal", "weight")

    def __init__(self, principal: str, weight: int) -> None:
        self.principal = principal
        self.weight = weight
        self.free: OrderedDict[bytes, Entry] = OrderedDict()
        self.lanes: dict[Gate, Lane] = {}
        self.deficit = 0
        self.in_ring = False


class Level:
    """One class.

    Attributes:
        flows: by principal; those with entries, and emptied ones whose place in the ring has not come up yet.
        ring: flows in the order of their turns: all that could be served now, and some that could not.
        gates: gate -> its lanes, whose turn it is first. While a gate is open, the flow of its first lane is in the ring.
        order: all entries, the oldest first.
    """

    __slots__ = ("flows", "gates", "order", "ring")

    def __init__(self) -> None:
        self.flows: dict[str, Flow] = {}
        self.ring: deque[Flow] = deque()
        self.gates: dict[Gate, deque[Lane]] = {}
        self.order: OrderedDict[bytes, Entry] = OrderedDict()

    def add(self, entry: Entry, principal: str, weight: int) -> None:
        """Let an entry wait behind all that its principal has here."""
        flow = self.flows.get(principal)
        if flow is None:
            flow = self.flows[principal] = Flow(principal, weight)
        else:
            flow.weight = weight
        entry.flow = flow
        self.order[entry.key] = entry
        gate = entry.gate
        if gate is None:
            flow.free[entry.key] = entry
            self._join(flow)
            return
        lane = flow.lanes.get(gate)
        if lane is None:
            lane = flow.lanes[gate] = Lane(flow)
            self.gates.setdefault(gate, deque()).append(lane)
        lane.entries[entry.key] = entry
        self.wake(gate)

    def wake(self, gate: Gate) -> None:
        """Give the flow whose turn it is at a gate a place in the ring, if the gate is open."""
        lanes = self.gates.get(gate)
        if lanes and gate.held < gate.limit:
            self._join(lanes[0].flow)

    def _join(self, flow: Flow) -> None:
        if not flow.in_ring:
            flow.in_ring = True
            self.ring.append(flow)

    def discard(self, entry: Entry, flow: Flow) -> None:
        """Take an entry out, wherever it waits."""
        key, gate = entry.key, entry.gate
        del self.order[key]
        if gate is None:
            del flow.free[key]
        else:
            lane = flow.lanes[gate]
            del lane.entries[key]
            if not lane.entries:
                del flow.lanes[gate]
                lanes = self.gates[gate]
                lanes.remove(lane)
                if lanes:
                    self.wake(gate)
                else:
                    del self.gates[gate]
        if not flow.in_ring and not flow.free and not flow.lanes:
            del self.flows[flow.principal]

    def next(self) -> Entry | None:
        """Take out the entry to be served now, its place at its gate taken; None: none can be."""
        ring = self.ring
        while ring:
            flow = ring[0]
            free = flow.free
            entry = self._choose(flow) if flow.lanes else next(iter(free.values())) if free else None
            if entry is None:
                # emptied, or behind closed gates: it comes back by wake()
                ring.popleft()
                flow.in_ring = False
                if not flow.lanes:
                    del self.flows[flow.principal]
                continue
            if flow.deficit <= 0:
                flow.deficit += flow.weight
                if flow.deficit <= 0:
                    ring.rotate(-1)
                    continue
            flow.deficit -= entry.cost
            if flow.lanes:
                self._pass(flow, entry)
            self.discard(entry, flow)
            if flow.deficit <= 0:
                ring.rotate(-1)
            elif not flow.free and not flow.lanes:
                # whoever has nothing waiting saves nothing up, and may not begin again at the head
                flow.deficit = 0
                ring.rotate(-1)
            return entry
        return None

    def _choose(self, flow: Flow) -> Entry | None:
        """Return the first come of a flow's entries that can be served."""
        best = next(iter(flow.free.values())) if flow.free else None
        for gate, lane in flow.lanes.items():
            if gate.held < gate.limit and self.gates[gate][0] is lane:
                entry = next(iter(lane.entries.values()))
                if best is None or entry.number < best.number:
                    best = entry
        return best

    def _pass(self, flow: Flow, served: Entry) -> None:
        """Move on the turns at the gates where this flow was first: it took a place, or had something older to do."""
        for gate, lane in flow.lanes.items():
            lanes = self.gates[gate]
            if lanes[0] is not lane or gate.held >= gate.limit:
                continue
            if gate is served.gate:
                gate.held += 1
                lane.left = (lane.left or flow.weight) - 1
            else:
                lane.left = 0
            if not lane.left:
                lanes.rotate(-1)
            self.wake(gate)


class Backlog(Generic[T]):
    """All that waits for one pool.

    Args:
        age_s: how long an entry waits in a class before it counts as one of the next higher, seconds.

    Attributes:
        count: how many entries wait.
    """

    __slots__ = ("_again", "_age_s", "_free", "_gates", "_levels", "_number", "count")

    def __init__(self, age_s: float = limits.PRIORITY_AGE_S) -> None:
        self._age_s = age_s
        self._levels = tuple(Level() for _ in range(CLASSES))
        self._again: OrderedDict[bytes, Entry] = OrderedDict()
        self._gates: set[Gate] = set()
        self._number = 0
        #: entries without a gate
        self._free = 0
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[bytes]:
        """Yield the keys; class by class, in the order of arrival there."""
        yield from self._again
        for level in self._levels:
            yield from level.order

    def __contains__(self, key: object) -> bool:
        return key in self._again or any(key in level.order for level in self._levels)

    def values(self) -> Iterator[T]:
        """Yield what waits; class by class, in the order of arrival there."""
        for waiting in (self._again, *(level.order for level in self._levels)):
            for entry in waiting.values():
                yield entry.item

    @property
    def is_ready(self) -> bool:
        """Tell whether :meth:`take` would return anything."""
        return self._free > 0 or any(gate.waiting and gate.held < gate.limit for gate in self._gates)

    def add(  # noqa: PLR0917 (names at every call would cost as much as the rest)
        self,
        key: bytes,
        item: T,
        now: float,
        principal: str,
        weight: int = 1,
        level: int = 0,
        gate: Gate | None = None,
        cost: int = 1,
    ) -> None:
        """Let something wait; its key must be new.

        Args:
            weight: of its principal, at least 1; the latest one counts for all that it has waiting.
            level: its class.
            gate: the one that it has to pass.
            cost: what it takes of its principal's turn, at least 1.
        """
        self._levels[level].add(self._entry(key, item, now, gate, cost), principal, weight)

    def requeue(self, key: bytes, item: T, gate: Gate | None = None) -> None:
        """Let something wait that was served before: before all others, also before those queued again earlier."""
        self._again[key] = self._entry(key, item, 0.0, gate, 1)
        self._again.move_to_end(key, last=False)

    def _entry(self, key: bytes, item: T, now: float, gate: Gate | None, cost: int) -> Entry:
        self.count += 1
        self._number += 1
        if gate is None:
            self._free += 1
        else:
            gate.waiting += 1
            self._gates.add(gate)
        return Entry(key, item, gate, cost, now, self._number)

    def remove(self, key: bytes) -> T | None:
        """Take something out that is not to be served; None: it does not wait here."""
        entry = self._again.pop(key, None)
        if entry is None:
            for level in self._levels:
                entry = level.order.get(key)
                if entry is not None and entry.flow is not None:
                    level.discard(entry, entry.flow)
                    break
            else:
                return None
        self._left(entry)
        item: T = entry.item
        return item

    def _left(self, entry: Entry) -> None:
        self.count -= 1
        gate = entry.gate
        if gate is None:
            self._free -= 1
            return
        gate.waiting -= 1
        if not gate.waiting:
            self._gates.discard(gate)

    def take(self, most: int, now: float) -> list[T]:
        """Take out what is served now, up to ``most``; each takes a place at its gate until :meth:`release`."""
        taken: list[T] = []
        if self._again:
            self._take_again(taken, most)
        self._promote(most, now)
        for level in self._levels:
            while len(taken) < most:
                entry = level.next()
                if entry is None:
                    break
                self._left(entry)
                taken.append(entry.item)
        return taken

    def _take_again(self, taken: list[T], most: int) -> None:
        able = (
            entry
            for entry in self._again.values()
            if entry.gate is None or entry.gate.held < entry.gate.limit
        )
        for entry in list(itertools.islice(able, most)):
            gate = entry.gate
            if gate is not None:
                if gate.held >= gate.limit:
                    continue
                gate.held += 1
            del self._again[entry.key]
            self._left(entry)
            taken.append(entry.item)

    def _promote(self, most: int, now: float) -> None:
        """Move up what has waited long enough: as many as are served, which is all that can matter."""
        for above, level in itertools.pairwise(self._levels):
            order = level.order
            for _ in range(most):
                entry = next(iter(order.values()), None)
                if entry is None or entry.flow is None or now - entry.since < self._age_s:
                    break
                flow = entry.flow
                level.discard(entry, flow)
                self._number += 1
                entry.since, entry.number = now, self._number
                above.add(entry, flow.principal, flow.weight)

    def release(self, gate: Gate) -> None:
        """A worker let go of a call that had passed this gate."""
        gate.held -= 1
        if gate.waiting:
            for level in self._levels:
                level.wake(gate)
