"""A client: the real session, and around it what its link does, without sockets.

Mirrors ``mcp_broker/client/link.py``; the session is used by the methods that the link uses.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from mcp_broker.client.session import ClientSession, State
from mcp_broker.wire import codec, payload
from tests.sim.agenda import Alarm
from tests.sim.network import Door
from tests.sim.work import OWN, Plan, Record

if TYPE_CHECKING:
    from mcp_broker.client.session import Ended, PendingCall
    from mcp_broker.wire.messages import Message
    from tests.sim.network import Packet, Wire
    from tests.sim.world import World

_LIVE: Final = frozenset({State.WAITING, State.OPEN})


class Client:
    """One client's process.

    Attributes:
        open: its calls that have no outcome yet.
        troubled_until: until then, something other than the machines may have kept an outcome from it.
        stalls_s: how long it has stood still, all together, planned time included.
    """

    door = Door.CLIENTS

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.key = f"key-{name}"
        self.session = ClientSession(world.rng.randbytes(8), name)
        self.wire: Wire | None = None
        self.open: dict[bytes, Record] = {}
        self.troubled_until = 0.0
        self.stalled_until = 0.0
        self.stalls_s = 0.0
        self.is_gone = False
        self._inbox: deque[Packet] = deque()
        #: its own word ends calls now, not the broker's
        self._is_expiring = False
        self._alarm = Alarm(world.agenda, self.wake)

    # -- what its program does -----------------------------------------------------------------------

    def submit(self, tool: str, timeout_s: float, plan: Plan, *, is_streamed: bool) -> Record | None:
        """Make a call, if the window has room and its process does not stand still."""
        now = self.world.agenda.now
        if not self.session.has_room or now < self.stalled_until:
            return None
        arguments = plan.pack() if tool != OWN else payload.pack({})
        pending = self.session.submit(tool, timeout_s, arguments, now, streamed=is_streamed)
        record = Record(
            self, pending, plan, tool, is_streamed, now, self.world.supervisor.epoch, self.stalls_s
        )  # fmt: skip
        self.open[pending.call_id] = record
        self.world.records[pending.call_id] = record
        self.world.note(self.name, "submits", pending.call_id, tool, plan.does, f"timeout={timeout_s:g}")
        self._alarm.sooner(now)
        return record

    def cancel(self, record: Record) -> None:
        """Cancel a call, if its process does not stand still."""
        if self.world.agenda.now < self.stalled_until:
            return
        self.world.note(self.name, "cancels", record.call_id)
        record.was_cancelled = True
        self.session.cancel(record.pending)
        self._settle()
        self._alarm.sooner(self.world.agenda.now)

    def close(self) -> None:
        """Say goodbye and be gone."""
        self.world.note(self.name, "closes")
        session, wire = self.session, self.wire
        for record in self.open.values():
            record.was_cancelled = True
        session.close()
        if wire is not None:
            for message, body in session.outgoing(0.0):
                wire.say((codec.encode(message), body))
            wire.close()
        self._settle()
        self._leave()

    def kill(self) -> None:
        """Be gone at once; what it sent may arrive in part."""
        self.world.note(self.name, "is killed")
        if self.wire is not None:
            self.wire.close(kept=self.world.rng.randrange(3))
        self._leave()

    def _leave(self) -> None:
        self.is_gone = True
        self._alarm.clear()

    def stall(self, until: float) -> None:
        """Stand still."""
        begins = max(self.stalled_until, self.world.agenda.now)
        self.stalls_s += max(0.0, until - begins)
        self.stalled_until = max(self.stalled_until, until)

    def trouble(self, seconds: float) -> None:
        """Remember that for so long it cannot count on anybody."""
        self.troubled_until = max(self.troubled_until, self.world.agenda.now + seconds)

    # -- the network ---------------------------------------------------------------------------------

    def wire_up(self, wire: Wire) -> None:
        """The connection stands."""
        self._stir(wire)

    def wire_down(self, wire: Wire) -> None:
        """The connection has ended."""
        self._stir(wire)

    def hear(self, wire: Wire, packet: Packet) -> None:
        """A message waits."""
        if wire is self.wire:
            self._inbox.append(packet)
            self._stir(wire)

    def _stir(self, wire: Wire) -> None:
        if wire is self.wire and not self.is_gone:
            self.wake()

    # -- serving -------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Serve until nothing is left to do now."""
        agenda = self.world.agenda
        if self.is_gone:
            return
        if agenda.now < self.stalled_until:
            self._alarm.set(self.stalled_until)
            return
        while self._serve(agenda.now):
            self._settle()
        self._settle()
        if self.session.state is not State.OPEN:
            self.troubled_until = max(self.troubled_until, agenda.now)
        self._alarm.set(self.session.deadline())

    def _serve(self, now: float) -> bool:
        session = self.session
        if session.has_outgoing:
            if not session.book.in_flight and self._receive(now):
                return True
            self._flush(now)
        if self._receive(now):
            return True
        if now >= session.deadline():
            self._is_expiring = True
            session.expire(now)
            self._settle()
            self._is_expiring = False
        if session.state is not State.OPEN:
            self._follow(now)
        return session.has_outgoing and self.wire is not None

    def _flush(self, now: float) -> None:
        wire = self.wire
        if wire is None or self.session.state not in _LIVE:
            return
        out = self.session.outgoing(now)
        for at, (message, body) in enumerate(out):
            self.world.note(self.name, "->", message)
            if not wire.say((codec.encode(message), body)):
                unsent: list[Message] = [message for message, _ in out[at:]]
                self.session.disconnected("the connection was cut", unsent)
                return

    def _receive(self, now: float) -> bool:
        session, wire = self.session, self.wire
        if wire is None or session.state not in _LIVE:
            return False
        book = session.book
        while True:
            if not self._inbox:
                if not wire.is_up:
                    session.disconnected("the connection was cut")
                return False
            envelope, body = self._inbox.popleft()
            message = codec.to_client.decode(envelope)
            self.world.note(self.name, "<-", message)
            session.receive(message, body, now)
            if book.ended or book.arrived or book.progressed:
                return True
            if session.state is not State.OPEN:
                return False

    def _follow(self, now: float) -> None:
        session, wire = self.session, self.wire
        if session.state is State.OPENING and wire is not None and wire.is_up:
            session.connected(now)
        if session.state is State.DISCONNECTED:
            if wire is not None:
                self.world.note(self.name, "has no connection:", session.why_lost)
                wire.close(kept=0)
                self.wire = None
                self._inbox.clear()
            if session.dial_at is None:
                session.back_off(now, self.world.rng.random())
            if session.is_needed and session.dial_at is not None and now >= session.dial_at:
                session.dial(now)
                self.wire = self.world.network.dial(self)

    def _settle(self) -> None:
        """Tell the program what has come of its calls."""
        book = self.session.book
        arrived, book.arrived = book.arrived, []
        for pending, part in arrived:
            self.open[pending.call_id].parts.append(part)
            self.world.agenda.after(self.world.rng.random() * 0.02, lambda taken=pending: self._take(taken))  # type: ignore[misc]
        book.progressed = {}
        ended, book.ended = book.ended, []
        for end in ended:
            self._ended(end)

    def _take(self, pending: PendingCall) -> None:
        if not self.is_gone:
            self.session.took(pending)
            if self.session.has_outgoing:
                self._alarm.sooner(self.world.agenda.now)

    def _ended(self, end: Ended) -> None:
        record = self.world.records[end.pending.call_id]
        code = "OK" if end.error is None else end.error.code
        self.world.note(self.name, "has", end.pending.call_id, code)
        self.world.invariants.ended(record, end, code, by_itself=self._is_expiring)
        record.code = code
        del self.open[record.call_id]
