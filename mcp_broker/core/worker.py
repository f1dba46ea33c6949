r"""A worker as the broker sees it: one record from its admission to its settled death.

::

    ADMITTED --REGISTER--> REGISTERED --READY--> READY --RETIRE--> RETIRING --DRAIN--> DRAINING
        \__________________________________ DIED ___________________________________/
                                     v
                                   DYING --SETTLED--> GONE

A retiring worker gets no new calls; DRAIN follows once it holds none and its outcomes have arrived, or had time to. That it is to
retire outlives its connection (``is_retiring``): on a new one RETIRE follows READY at once.

Idle, busy and saturated are derived from ``held`` and ``depth``. Source: docs/protocol.md, "Worker sessions".
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core import outbox
from mcp_broker.core.client_session import Verdict
from mcp_broker.core.receipts import Receipts
from mcp_broker.wire import codec, messages

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.pool import Pool
    from mcp_broker.wire.node import Certificate


class WorkerState(IntEnum):
    """How far a worker's life has come."""

    ADMITTED = 0
    REGISTERED = 1
    READY = 2
    RETIRING = 3
    DRAINING = 4
    DYING = 5
    GONE = 6


class WorkerEvent(IntEnum):
    """What can happen to a worker."""

    REGISTER = 0
    READY = 1
    OUTCOMES = 2
    PARTIAL = 3
    HEARTBEAT = 4
    GOODBYE = 5
    UNREACHABLE = 6
    DRAIN = 7
    DIED = 8
    SETTLED = 9
    RETIRE = 10


_T: Final = Verdict.TAKE
_R: Final = Verdict.REFUSE
_I: Final = Verdict.IGNORE
_B: Final = Verdict.BUG
_A, _G, _Y, _E, _D, _X, _N = WorkerState

# fmt: off
#: state -> event -> (next state, verdict). REGISTER in a later state is a worker that opened a new connection.
#: UNREACHABLE and GOODBYE return it to ADMITTED: its process lives until its node says otherwise.
WORKER_TABLE: Final[tuple[tuple[tuple[WorkerState, Verdict], ...], ...]] = (
    # REGISTER  READY     OUTCOMES  PARTIAL   HEARTBEAT GOODBYE   UNREACHABLE DRAIN   DIED      SETTLED   RETIRE
    ((_G, _T), (_A, _R), (_A, _R), (_A, _R), (_A, _R), (_A, _I), (_A, _I), (_A, _I), (_X, _T), (_A, _B), (_A, _I)),  # ADMITTED
    ((_G, _T), (_Y, _T), (_G, _R), (_G, _R), (_G, _T), (_A, _T), (_A, _T), (_D, _T), (_X, _T), (_G, _B), (_G, _I)),  # REGISTERED
    ((_G, _T), (_Y, _T), (_Y, _T), (_Y, _T), (_Y, _T), (_A, _T), (_A, _T), (_D, _T), (_X, _T), (_Y, _B), (_E, _T)),  # READY
    ((_G, _T), (_E, _T), (_E, _T), (_E, _T), (_E, _T), (_A, _T), (_A, _T), (_D, _T), (_X, _T), (_E, _B), (_E, _I)),  # RETIRING
    ((_G, _T), (_D, _I), (_D, _T), (_D, _T), (_D, _T), (_A, _T), (_A, _T), (_D, _I), (_X, _T), (_D, _B), (_D, _I)),  # DRAINING
    ((_X, _R), (_X, _I), (_X, _T), (_X, _T), (_X, _I), (_X, _I), (_X, _I), (_X, _I), (_X, _I), (_N, _T), (_X, _I)),  # DYING
    ((_N, _R), (_N, _R), (_N, _R), (_N, _R), (_N, _R), (_N, _I), (_N, _I), (_N, _I), (_N, _I), (_N, _B), (_N, _I)),  # GONE
)
# fmt: on

EVENT_OF_KIND: Final[dict[type, WorkerEvent]] = {
    messages.Register: WorkerEvent.REGISTER,
    messages.Ready: WorkerEvent.READY,
    messages.Outcomes: WorkerEvent.OUTCOMES,
    messages.Partial: WorkerEvent.PARTIAL,
    messages.Progresses: WorkerEvent.PARTIAL,
    messages.Credit: WorkerEvent.PARTIAL,
    messages.Heartbeat: WorkerEvent.HEARTBEAT,
    messages.Goodbye: WorkerEvent.GOODBYE,
    messages.Hooked: WorkerEvent.HEARTBEAT,
}

#: What a worker may say of a call; anything else is a worker that lies, and becomes INTERNAL.
WORKER_CODES: Final = frozenset(
    {
        messages.OK, "INVALID_ARGUMENT", "TOOL_FAILED", "CANCELLED", "DEADLINE_EXCEEDED", "PAYLOAD_TOO_LARGE",
        "RESOURCE_EXHAUSTED", "INTERNAL", "NOT_FOUND",
    }
)  # fmt: skip


#: entries whose message tells the worker what arrived
_ACKNOWLEDGING: Final = frozenset({messages.Dispatch, outbox.Big, messages.Ack})


class Worker:
    """One admitted worker.

    Attributes:
        held: the calls that occupy it, by id, in the order of their seq; ended ones too, until it says so.
        announced: how many it takes at a time, by its own word.
        depth: how many it is given at a time: none while its node says that it is close to a limit.
        is_throttled: that is so.
        seq: the number of its last dispatch.
        received: outcomes that came over its connection.
        receipts: which of them have arrived at their callers.
        rests_since: when it was first seen to hold no call, of those where it is to go.
        told: up to which number it was told that they have.
        is_silent: it was admitted by an earlier broker and has not told yet what it holds.
        is_retiring: it is to get no more calls, and to go when it holds none, however often it registers.
        certificate: how it died, once it has.
        edition: of its pool, that it runs.
    """

    __slots__ = (
        "_dirty_list",
        "announced",
        "certificate",
        "depth",
        "dirty",
        "edition",
        "held",
        "is_retiring",
        "is_silent",
        "is_throttled",
        "outbox",
        "pool",
        "receipts",
        "received",
        "rests_since",
        "routing_id",
        "seq",
        "served",
        "session_id",
        "state",
        "thumbprint",
        "told",
        "worker_id",
    )  # fmt: skip

    def __init__(
        self, worker_id: str, thumbprint: str, pool: Pool, dirty_list: list[Worker], edition: int = 0
    ) -> None:
        self.edition = edition
        self.worker_id = worker_id
        self.thumbprint = thumbprint
        self.pool = pool
        self.state = WorkerState.ADMITTED
        self.routing_id = b""
        self.session_id = b""
        self.held: dict[bytes, Call] = {}
        self.announced = self.depth = 0
        self.is_throttled = False
        self.seq = 0
        self.is_silent = self.is_retiring = False
        self.connected(0)
        self.served = 0
        self.certificate: Certificate | None = None
        self.outbox: list[Any] = []
        self.dirty = False
        self._dirty_list = dirty_list

    def connected(self, seq: int) -> None:
        """Begin to count on a new connection; ``seq``: the number of the last call that it was given."""
        self.seq = max(self.seq, seq)
        self.received = self.told = 0
        self.rests_since = math.inf
        self.receipts = Receipts()

    def announce(self, depth: int) -> None:
        """Take its word for how many it takes at a time."""
        self.announced = depth
        self.depth = 0 if self.is_throttled else depth

    def throttle(self, *, on: bool) -> None:
        """Give it no more calls, or again as many as it takes; what it holds it goes on holding."""
        self.is_throttled = on
        self.announce(self.announced)

    @property
    def is_registered(self) -> bool:
        """Tell whether its tools are known."""
        return WorkerState.REGISTERED <= self.state <= WorkerState.DRAINING

    def is_free(self, now: float) -> bool:
        """Tell whether it holds no call, and its outcomes have arrived at their callers, or had the time for that.

        A client that is idle may say nothing until its next call; its session keeps what it was sent.
        """
        if self.held or self.is_silent:
            self.rests_since = math.inf
            return False
        self.rests_since = min(self.rests_since, now)
        return self.receipts.advance() == self.received or now - self.rests_since >= limits.ARRIVE_S

    def mark_dirty(self) -> None:
        """Have the shell look at the outbox at the end of this turn."""
        if not self.dirty:
            self.dirty = True
            self._dirty_list.append(self)

    def send(self, entry: Any) -> None:  # noqa: ANN401 (a message, a Dispatch or a Big)
        """Queue an entry for the end of this turn."""
        self.outbox.append(entry)
        self.mark_dirty()

    def take_outbox(self, epoch: int) -> list[outbox.Packed]:
        """Return the turn's messages, packed."""
        entries, self.outbox = self.outbox, []
        self.dirty = False
        packed: list[outbox.Packed] = []
        done = self.receipts.advance()
        for kind, run in outbox.runs(entries):
            first = run[0]
            if kind is messages.Dispatch:
                self._pack(epoch, run, packed)
            elif kind is outbox.Whole:
                packed.append((codec.encode(first.item), first.body))
            elif kind is outbox.Big:
                message = messages.Dispatches(epoch, done, (first.item,))
                packed.append((codec.encode(message), first.body))
            elif kind is messages.StreamCredit:
                packed.append((codec.encode(messages.Credit(epoch, tuple(run))), None))
            else:
                packed.append((codec.encode(first), None))
            if kind in _ACKNOWLEDGING:
                self.told = done
        return packed

    def _pack(self, epoch: int, run: list[messages.Dispatch], packed: list[outbox.Packed]) -> None:
        done = self.receipts.done
        envelope = codec.encode(messages.Dispatches(epoch, done, tuple(run)))
        if len(envelope) <= limits.ENVELOPE_BYTES_MAX:
            packed.append((envelope, None))
            return
        parts = (messages.Dispatches(epoch, done, tuple(part)) for part in outbox.split(run))
        packed.extend((codec.encode(part), None) for part in parts)
