"""One pool: its slots, which come and go, and what they amount to.

A slot is one of three:

- a *member* counts: there are as many as the pool's size says;
- a *successor* starts up to take a member's place; once it is ready, the member retires;
- one that *leaves* was retired: it finishes its calls, ends, and is forgotten.

An *edition* is one form of the pool's table. Workers of an earlier one are replaced a few at a time (a roll), or all at
once when the broker says that a later one serves other tools. Each edition has a record of deaths of its own, so that
a broken one cannot take down the workers that are left of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_broker.core.children import Refused, Retire, State, Unwanted, Wanted
from mcp_broker.core.restart import Restarts
from mcp_broker.supervisor.slot import Slot
from mcp_broker.wire import node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_broker.config import PoolTable
    from mcp_broker.core.restart import Policy
    from mcp_broker.supervisor.slot import Ground
    from mcp_broker.wire.messages import ToolDefinition

#: of the members, so many are replaced at a time in a roll: each costs a process more meanwhile
_ROLL_SHARE: Final = 4
#: whom a smaller pool does without first
_DISPENSABLE: Final = (
    State.FATAL,
    State.STOPPED,
    State.BACKOFF,
    State.STOPPING,
    State.STARTING,
    State.RUNNING,
)


@dataclass(frozen=True, slots=True)
class Times:
    """How long the processes of a pool may take, at most, seconds.

    Args:
        start_s: from spawned to ready.
        retire_s: from being retired to being told to end.
    """

    start_s: float
    retire_s: float


@dataclass(slots=True)
class Succession:
    """A slot that takes a member's place once it is ready."""

    member: Slot
    successor: Slot


class Pool:
    """Workers of one kind.

    Args:
        policy: how often they may be restarted, all together.

    Attributes:
        size: how many workers are wanted.
        edition: which form of the table new workers have.
        tools: what its workers serve, by the broker's word.
        setback: why the last roll stopped, or "".
    """

    def __init__(self, ground: Ground, name: str, table: PoolTable, policy: Policy, times: Times) -> None:
        self.name = name
        self.table = table
        self._ground = ground
        self._policy = policy
        self._times = times
        self._restarts = Restarts(policy)
        #: restarts of earlier editions
        self._restarted = 0
        self.edition = 1
        self.size = table.min
        self.members: list[Slot] = []
        self.leaving: list[Slot] = []
        self._successions: list[Succession] = []
        self.tools: tuple[ToolDefinition, ...] = ()
        self.setback = ""

    @property
    def slots(self) -> list[Slot]:
        """Every slot, whatever it is."""
        return [*self.members, *(one.successor for one in self._successions), *self.leaving]

    @property
    def tool_names(self) -> tuple[str, ...]:
        """What its workers serve."""
        return tuple(tool.name for tool in self.tools)

    # -- orders --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Want every worker up; slots that were given up start afresh."""
        for slot in self.members:
            slot.tell(Wanted())
        self._fit()

    def stop(self) -> None:
        """Want every slot down."""
        for slot in self.slots:
            slot.tell(Unwanted())

    def scale(self, size: int | None) -> None:
        """Want so many workers, or as many as the table says; slots that were given up start afresh."""
        self.size = self.table.min if size is None else size
        self.setback = ""
        self.start()
        self._ground.changed()

    def replace(self, member: Slot) -> bool:
        """Have another slot take a member's place: it is ready first, then the member retires.

        Returns:
            False if it has a successor already, or is no member.
        """
        if member not in self.members or any(one.member is member for one in self._successions):
            return False
        self._begin(member)
        return True

    def change(self, table: PoolTable, policy: Policy, times: Times) -> None:
        """Take another table; its size is the table's, and its workers are replaced by ones of it."""
        self._restarted += self._restarts.total
        self.table, self._policy, self._times = table, policy, times
        self._restarts = Restarts(policy)
        self.edition += 1
        self.setback = ""
        for one in list(self._successions):
            # they were to be of the edition before
            self._give_up(one)
        self.size = table.min
        self._fit()
        self._ground.changed()

    def supersede(self, edition: int) -> None:
        """Let members of earlier editions go at once: the broker gives them no more calls."""
        for slot in [slot for slot in self.members if slot.edition < edition]:
            successor = next((one.successor for one in self._successions if one.member is slot), None)
            if successor is None:
                successor = self._new_slot()
                successor.tell(Wanted())
            self._hand_over(slot, successor)
        self._fit()

    # -- how they come and go ------------------------------------------------------------------------

    def _new_slot(self) -> Slot:
        return Slot(
            self._ground,
            self.name,
            self.table,
            self._restarts,
            start_s=self._times.start_s,
            retire_s=self._times.retire_s,
            edition=self.edition,
        )

    def _fit(self) -> None:
        """Have as many members as the size says."""
        while len(self.members) < self.size:
            slot = self._new_slot()
            self.members.append(slot)
            slot.tell(Wanted())
        while len(self.members) > self.size:
            # of two alike, the younger: the older one has its caches warm
            self._retire(min(reversed(self.members), key=_worth))

    def _retire(self, member: Slot) -> None:
        for one in [one for one in self._successions if one.member is member]:
            self._give_up(one)
        self.members.remove(member)
        self.leaving.append(member)
        member.tell(Retire())

    def _begin(self, member: Slot) -> None:
        successor = self._new_slot()
        if member.child.state is State.RUNNING:
            self._successions.append(Succession(member, successor))
        else:
            # nothing is lost with it
            self._hand_over(member, successor)
        successor.tell(Wanted())

    def _give_up(self, succession: Succession) -> None:
        self._successions.remove(succession)
        self.leaving.append(succession.successor)
        succession.successor.tell(Unwanted())

    def _hand_over(self, member: Slot, successor: Slot) -> None:
        self._successions = [one for one in self._successions if one.member is not member]
        self.members[self.members.index(member)] = successor
        self.leaving.append(member)
        member.tell(Retire())

    def settle(self) -> None:
        """Go on with what has changed: successors that are ready or given up, rolls, slots that have left."""
        if self.leaving:
            self.leaving = [slot for slot in self.leaving if slot.child.state is not State.STOPPED]
        for one in list(self._successions):
            state = one.successor.child.state
            if state is State.RUNNING or one.member.child.state is not State.RUNNING:
                self._hand_over(one.member, one.successor)
            elif state is State.FATAL:
                self.setback = one.successor.child.reason
                self._give_up(one)
                self._ground.changed()
        if not self.setback:
            self._roll()

    def _roll(self) -> None:
        """Have members of earlier editions replaced, a few at a time."""
        outdated = [slot for slot in self.members if slot.edition < self.edition]
        room = max(1, self.size // _ROLL_SHARE) - len(self._successions)
        for slot in outdated:
            if room <= 0:
                return
            room -= self.replace(slot)

    @property
    def is_settled(self) -> bool:
        """Nothing is under way: the members are ready or given up, and of one edition, or the roll has stopped."""
        return (
            not self._successions
            and not self.leaving
            and all(slot.child.state in {State.RUNNING, State.FATAL} for slot in self.members)
            and (bool(self.setback) or all(slot.edition == self.edition for slot in self.members))
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
    def reason(self) -> str:
        """Why a slot is not as it should be, of the worst one; or why the last roll stopped."""
        for state in (State.FATAL, State.BACKOFF, State.STOPPING):
            for slot in self.members:
                if slot.child.state is state and slot.child.reason:
                    return slot.child.reason
        if self.setback:
            return f"its successors could not start, so the workers before them stay: {self.setback}"
        return ""

    @property
    def state(self) -> str:
        """One of ready, starting, degraded, failed, stopped."""
        states = [slot.child.state for slot in self.members]
        if all(state is State.RUNNING for state in states):
            return "degraded" if self.setback else "ready"
        if all(state is State.FATAL for state in states):
            return "failed"
        if State.FATAL in states or State.BACKOFF in states:
            return "degraded"
        if State.STARTING in states or any(slot.child.is_wanted for slot in self.members):
            return "starting"
        return "stopped"

    def report(self) -> node.PoolReport:
        """Return what the broker tells those who ask."""
        return node.PoolReport(
            name=self.name,
            state=self.state,
            wanted=self.size,
            workers=tuple(
                slot.life.report(slot.child.state.value)
                for slot in self.slots
                if slot.life is not None and slot.life.process is not None and slot.life.process.pid
            ),
            reason=self.reason,
            restarts=self._restarted + self._restarts.total,
            rate_per_s=self.table.rate_per_s,
            burst=self.table.burst,
        )


def _worth(slot: Slot) -> tuple[int, int]:
    """Return what a smaller pool keeps: the larger."""
    return slot.edition, _DISPENSABLE.index(slot.child.state)
