"""One pool: its slots, which come and go.

A slot is one of four:

- a *member* counts: there are as many as the pool's size says;
- a *spare* is warm (its tools are imported) and idle: it takes the place of a member of its edition that dies, at once,
  and what was the member starts again as a spare;
- a *successor* starts up to take a member's place; once it is ready, the member retires;
- one that *leaves* was retired: it finishes its calls, ends, and is forgotten.

An *edition* is one form of the pool's table. Workers of an earlier one are replaced a few at a time (a roll), or all at
once when the broker says that a later one serves other tools. Each edition has a record of deaths of its own, so that
a broken one cannot take down the workers that are left of the one before. A member that dies starts again as it was: only
a successor that is ready takes its place, unless it cannot come back.

A pool *closes* when an operator wants none of it: the broker takes no more calls for it, says when none waits, and then
the members retire.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_broker.core.children import Refused, State, Unwanted, Wanted
from mcp_broker.core.restart import Restarts
from mcp_broker.supervisor import standing
from mcp_broker.supervisor.containment import contained
from mcp_broker.supervisor.sizing import Sizing, worth
from mcp_broker.supervisor.slot import Slot

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_broker.config import PoolTable
    from mcp_broker.core.restart import Policy
    from mcp_broker.supervisor.ground import Ground
    from mcp_broker.supervisor.slot import Times
    from mcp_broker.wire import node
    from mcp_broker.wire.messages import ToolDefinition

#: of the members, so many are replaced at a time in a roll: each costs a process more meanwhile
_ROLL_SHARE: Final = 4
_OUTDATED: Final = "one of the present configuration has taken its place"


@dataclass(slots=True)
class Succession:
    """A slot that takes a member's place once it is ready."""

    member: Slot
    successor: Slot
    why: str


class Pool:
    """Workers of one kind.

    Args:
        policy: how often they may be restarted, all together.

    Attributes:
        edition: which form of the table new workers have.
        tools: what its workers serve, by the broker's word.
        setback: why the last roll stopped, or "".
        closed: why it takes no calls, or "".
    """

    def __init__(self, ground: Ground, name: str, table: PoolTable, policy: Policy, times: Times) -> None:
        self.name = name
        self._ground = ground
        self.members: list[Slot] = []
        self.spares: list[Slot] = []
        self.leaving: list[Slot] = []
        self._successions: list[Succession] = []
        self.tools: tuple[ToolDefinition, ...] = ()
        self.edition = 0
        self._sizing = Sizing(table, time.monotonic())
        #: restarts of earlier editions
        self._restarted = 0
        self._take_table(table, policy, times)

    def _take_table(self, table: PoolTable, policy: Policy, times: Times) -> None:
        self.table = table
        self._times = times
        self._restarts = Restarts(policy)
        self.edition += 1
        self.setback = ""
        self.resize(table)

    def adjust(self, policy: Policy, times: Times) -> None:
        """Take other bounds for how often its processes may die, and for how long those may take that start from now on."""
        self._restarts.policy, self._times = policy, times

    def resize(self, table: PoolTable) -> None:
        """Take what a table says of how many workers there are, and how fast they may be asked; no worker is replaced."""
        self.table = table
        self.closed = "" if max(table.min, table.max or 0) else "its configuration wants no workers (min = 0)"
        self._sizing.follow(table, time.monotonic())
        self._ground.changed()

    @property
    def size(self) -> int:
        """How many workers are wanted."""
        return self._sizing.size

    @property
    def slots(self) -> list[Slot]:
        """Every slot, whatever it is."""
        return [
            *self.members,
            *self.spares,
            *(one.successor for one in self._successions),
            *self.leaving,
        ]

    @property
    def tool_names(self) -> tuple[str, ...]:
        """What its workers serve."""
        return tuple(tool.name for tool in self.tools)

    # -- orders --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Want every worker up; slots that were given up start afresh."""
        if not (self.size or self.closed or self.tools):
            # nobody can ask for tools that no worker has told of
            self._sizing.size = 1
        for slot in (*self.members, *self.spares):
            slot.tell(Wanted())
        self._fit()

    def stop(self) -> None:
        """Want every slot down."""
        for slot in self.slots:
            slot.tell(Unwanted())

    def scale(self, size: int | None) -> None:
        """Want so many workers until told otherwise, or as many as the table says; what was given up starts afresh."""
        self.resize(self.table)
        self.setback = ""
        if size is not None:
            self._sizing.fix(size)
            self.closed = ""
        self.start()

    def close(self, reason: str) -> None:
        """Take no more calls, and have no workers once those that wait are done; what was given up does nothing more."""
        self.closed = reason
        self._ground.changed()

    def vacate(self) -> None:
        """Take the broker's word that no call waits for it any more, nor will."""
        if self.closed and self.size:
            self._sizing.size = 0
            self._fit()
            self._ground.changed()

    def replace(self, member: Slot, why: str) -> bool:
        """Have another slot take a member's place: it is ready first, then the member retires.

        Args:
            why: goes into the member's certificate, "it was of an earlier configuration".

        Returns:
            False if it has a successor already, or is no member.
        """
        if member not in self.members or any(one.member is member for one in self._successions):
            return False
        successor = self._recruit()
        if member.child.state is State.FATAL:
            # nothing is lost with it
            self._hand_over(member, successor, why)
        else:
            # also one that is just starting again: it may come up where its successor cannot
            self._successions.append(Succession(member, successor, why))
        return True

    def change(self, table: PoolTable, policy: Policy, times: Times) -> None:
        """Take another table; its size is the table's, and its workers are replaced by ones of it."""
        self._restarted += self._restarts.total
        for one in list(self._successions):
            # they were to be of the edition before
            self._give_up(one)
        self._take_table(table, policy, times)
        self._fit()

    def supersede(self, edition: int) -> None:
        """Let members of earlier editions go at once: the broker gives them no more calls."""
        for member in [slot for slot in self.members if slot.edition < edition]:
            successor = next((one.successor for one in self._successions if one.member is member), None)
            self._hand_over(member, successor or self._recruit(), _OUTDATED)

    def observe(self, demand: node.PoolDemand) -> None:
        """Take the broker's word on what is asked of it."""
        self._sizing.observe(demand, time.monotonic())

    def adapt(self, now: float) -> None:
        """Grow or shrink as far as the demand says and the table lets it."""
        if not self.closed and self._sizing.adapt(now):
            self._fit()
            self._ground.changed()

    # -- how they come and go ------------------------------------------------------------------------

    def _new_slot(self, *, is_spare: bool) -> Slot:
        slot = Slot(
            self._ground,
            self.name,
            self.table,
            self._restarts,
            self._times,
            edition=self.edition,
            is_spare=is_spare,
            on_death=self._bereaved,
        )
        slot.tell(Wanted())
        return slot

    def _warm_spare(self) -> Slot | None:
        """Return a spare that can go at once, if there is one of the present edition."""
        return next((slot for slot in self.spares if slot.is_warm and slot.edition == self.edition), None)

    def _recruit(self) -> Slot:
        """Return a slot that becomes ready as soon as may be: a warm spare, or a new one."""
        spare = self._warm_spare()
        if spare is None:
            return self._new_slot(is_spare=False)
        self.spares.remove(spare)
        spare.call_up()
        return spare

    @contained("calling up a spare")
    def _bereaved(self, slot: Slot) -> None:
        """A slot's process has died, and it has not been decided what comes next: a warm spare takes a member's place."""
        if self._ground.is_leaving or slot not in self.members or slot.child.state is not State.RUNNING:
            return
        spare = self._warm_spare()
        if spare is None or slot.edition != spare.edition:
            # one of an earlier edition starts again itself: this one may be broken, also where its spares are warm
            return
        spare.call_up()
        self.members[self.members.index(slot)] = spare
        self.spares[self.spares.index(spare)] = slot
        slot.is_spare = True
        for one in self._successions:
            if one.member is slot:
                one.member = spare

    def _fit(self) -> None:
        """Have as many members as the size says, and as many spares as the table says."""
        while len(self.members) < self.size:
            self.members.append(self._recruit())
        while len(self.members) > self.size:
            # of two alike, the younger: the older one has its caches warm
            self._retire(min(reversed(self.members), key=worth))
        wanted = 0 if self.closed else self.table.spare
        for slot in [slot for slot in self.spares if slot.edition < self.edition][::-1]:
            self._dismiss_spare(slot)
        while len(self.spares) > wanted:
            self._dismiss_spare(self.spares[-1])
        while len(self.spares) < wanted:
            self.spares.append(self._new_slot(is_spare=True))

    def _dismiss_spare(self, spare: Slot) -> None:
        """End a spare: the broker knows nothing of it, and it holds nothing."""
        self.spares.remove(spare)
        self.leaving.append(spare)
        spare.tell(Unwanted())

    def _retire(self, member: Slot) -> None:
        for one in [one for one in self._successions if one.member is member]:
            self._give_up(one)
        self.members.remove(member)
        self.leaving.append(member)
        member.retire(self.closed or "its pool needs fewer workers")

    def _give_up(self, succession: Succession) -> None:
        self._successions.remove(succession)
        self.leaving.append(succession.successor)
        succession.successor.tell(Unwanted())

    def _hand_over(self, member: Slot, successor: Slot, why: str) -> None:
        self._successions = [one for one in self._successions if one.member is not member]
        self.members[self.members.index(member)] = successor
        self.leaving.append(member)
        member.retire(why)

    def _succeed(self) -> None:
        """Have successors that are ready take their places; let go of those that were given up."""
        for one in list(self._successions):
            state = one.successor.child.state
            if state is State.FATAL:
                self.setback = one.successor.child.reason
                self._give_up(one)
                self._ground.changed()
            elif state is State.RUNNING or one.member.child.state is State.FATAL:
                # a member that died comes back: until its successor is ready, nobody knows whether that one ever will be
                if state is State.RUNNING and one.member.edition == self.edition:
                    self.setback = ""
                self._hand_over(one.member, one.successor, one.why)

    def settle(self) -> None:
        """Go on with what has changed: successors that are ready or given up, rolls, slots that have left."""
        if self.leaving:
            self.leaving = [slot for slot in self.leaving if slot.child.state is not State.STOPPED]
        if self._ground.is_leaving:
            return
        self._succeed()
        if self.closed and not any(slot.child.state is not State.FATAL for slot in self.members):
            # nobody is left who could serve what waits
            self.vacate()
        if not (self.setback or self.closed):
            self._roll()
        self._fit()

    def _roll(self) -> None:
        """Have members of earlier editions replaced, a few at a time."""
        room = max(1, self.size // _ROLL_SHARE) - len(self._successions)
        for slot in [slot for slot in self.members if slot.edition < self.edition]:
            if room <= 0:
                return
            room -= self.replace(slot, _OUTDATED)

    @property
    def is_settled(self) -> bool:
        """Nothing is under way: the members are ready or given up, and of one edition, or the roll has stopped."""
        if self._successions or self.leaving or (self.closed and self.members):
            return False
        return all(slot.child.state in {State.RUNNING, State.FATAL} for slot in self.members) and (
            bool(self.setback) or all(slot.edition == self.edition for slot in self.members)
        )

    # -- what happens --------------------------------------------------------------------------------

    def find(self, worker_id: str) -> Slot | None:
        """Return the slot whose present life has this id."""
        for slot in self.slots:
            if slot.life is not None and slot.life.worker_id == worker_id:
                return slot
        return None

    def worker_up(self, worker_id: str, tools: tuple[ToolDefinition, ...]) -> None:
        """Take the broker's word that a worker is ready; about one that is gone it means nothing."""
        slot = self.find(worker_id)
        if slot is not None:
            self.tools = tools
            slot.registered()
            if not self._ground.is_leaving:
                # what the broker, or an operator, wants of it next may come in the same turn: it is a member by then
                self._succeed()

    def worker_refused(self, worker_id: str, reason: str) -> None:
        """Take the broker's word that a worker will not become ready."""
        slot = self.find(worker_id)
        if slot is not None:
            slot.tell(Refused(reason))

    def deadlines(self) -> Iterator[float]:
        """Return the instants at which slots have something to do."""
        for slot in self.slots:
            deadline = slot.child.deadline()
            if deadline is not None:
                yield deadline

    def retiring(self) -> list[str]:
        """Return the workers that the broker is to send away."""
        return [
            slot.life.worker_id
            for slot in self.leaving
            if slot.life is not None and slot.child.state is State.RETIRING
        ]

    # -- what they amount to ---------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        """No process is left, and none will come."""
        return not any(slot.child.is_alive or slot.child.state is State.BACKOFF for slot in self.slots)

    @property
    def ready(self) -> int:
        """How many workers can take work."""
        return sum(slot.child.state is State.RUNNING for slot in self.members)

    @property
    def restarts(self) -> int:
        """How often its processes were started again."""
        return self._restarted + self._restarts.total

    @property
    def state(self) -> str:
        """See :func:`mcp_broker.supervisor.standing.state`."""
        return standing.state(self)

    @property
    def reason(self) -> str:
        """Why it is not as it should be, or ""."""
        return standing.reason(self)
