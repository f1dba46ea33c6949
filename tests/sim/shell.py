"""A worker's process: its session, its connection, how it hears signals, and how it ends.

Mirrors ``mcp_broker/worker/shell.py``; the session is used by the methods that that uses.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.wire import codec, messages
from mcp_broker.wire.marks import MARKS_BYTES, Marks
from mcp_broker.worker.session import Session, State
from tests.sim.agenda import Alarm
from tests.sim.network import Door
from tests.sim.work import definitions, traits

if TYPE_CHECKING:
    from tests.sim.job import Job
    from tests.sim.network import Packet, Wire
    from tests.sim.world import World

#: waits between attempts to reach the broker, and how long a connection may take to come up, seconds
_BACKOFF_S: Final = (0.05, 1.0)
OPENING_S: Final = 1.0


class Shell:
    """One life of one worker process, except for what it runs.

    Attributes:
        marks: the page that it shares with its supervisor.
        depth_most: the largest depth that it has announced on this connection.
        last_seq: of the last call that it was given.
    """

    door = Door.WORKERS

    def __init__(self, world: World, worker_id: str, pool: str, concurrency: int, edition: int) -> None:
        self.world = world
        self.name = worker_id
        self.key = f"key-{worker_id}"
        self.pool = pool
        self.concurrency = concurrency
        home = pool.partition("~")[0]
        self.session = Session(definitions(home, edition), concurrency, "sim", traits(home))
        self.wire: Wire | None = None
        self.marks = Marks(memoryview(bytearray(MARKS_BYTES)))
        self.stalled_until = 0.0
        self.is_dead = self._is_stopping = False
        self.jobs: list[Job] = []
        self.depth_most = 0
        self.last_seq = 0
        self._inbox: deque[Packet] = deque()
        self._is_up = False
        self._opened_at = self._retry_at = 0.0
        self._backoff_s = _BACKOFF_S[0]
        self._asked = 0
        self._alarm = Alarm(world.agenda, self.wake)

    def wake(self) -> None:
        """Do what can be done now."""
        raise NotImplementedError

    # -- life and death ------------------------------------------------------------------------------

    def boot(self) -> None:
        """The process is up, its tools are imported."""
        self._is_up = True
        self.wake()

    def die(self, how: str) -> None:
        """End at once; what it sent may arrive in part."""
        if self.is_dead:
            return
        self.world.note(self.name, "dies:", how)
        self._leave(self.world.rng.randrange(4), how)

    def _exit(self, code: int) -> None:
        """End in good order."""
        self.session.goodbye("drained" if self.session.state is State.DRAINING else "stopped")
        self._send()
        self.world.note(self.name, "exits with", code)
        self._leave(None, f"exit {code}")

    def _leave(self, kept: int | None, how: str) -> None:
        self.is_dead = True
        self._alarm.clear()
        for job in self.jobs:
            job.alarm.clear()
        if self.wire is not None:
            self.wire.close(kept)
        self.world.supervisor.worker_ends(self, how)

    def _is_gone(self) -> bool:
        """Tell whether it has ended meanwhile."""
        return self.is_dead

    def stall(self, until: float) -> None:
        """Stand still."""
        self.stalled_until = max(self.stalled_until, until)

    # -- the network ---------------------------------------------------------------------------------

    def wire_up(self, wire: Wire) -> None:
        """The connection stands."""
        if wire is self.wire and not self.is_dead:
            self.wake()

    def wire_down(self, wire: Wire) -> None:
        """The connection has ended."""
        if wire is self.wire and not self.is_dead:
            self.wake()

    def hear(self, wire: Wire, packet: Packet) -> None:
        """A message waits."""
        if wire is self.wire and not self.is_dead:
            self._inbox.append(packet)
            self.wake()

    # -- the connection -------------------------------------------------------------------------------

    def _connect(self, now: float) -> bool:
        if self.wire is not None and (
            self.session.state is State.CLOSED
            or (now >= self.session.silent_at() and not self._inbox)
            or (not self.wire.is_up and not self.wire.is_cut and now >= self._opened_at + OPENING_S)
        ):
            self._lose()
        if self.wire is None:
            if now < self._retry_at:
                return False
            self.wire = self.world.network.dial(self)
            self._opened_at = now
            self.session.opened(now)
            self.depth_most = 0
        return True

    def _has_lost_wire(self) -> bool:
        return self.wire is not None and self.wire.is_cut and not self.wire.is_up

    def _lose(self) -> None:
        """Drop the connection; the next one comes after a pause."""
        world = self.world
        world.note(self.name, "drops its connection")
        self.session.lost()
        if self.wire is not None:
            self.wire.close(kept=0)
            self.wire = None
        self._inbox.clear()
        self._retry_at = world.agenda.now + self._backoff_s * (0.5 + world.rng.random() / 2)
        self._backoff_s = min(self._backoff_s * 2, _BACKOFF_S[1])

    def _take(self, now: float, *, hurries: bool = True) -> None:
        """Read the messages that wait, up to a turn's bound; a lone call is answered first."""
        session = self.session
        held = len(session.inbox)
        for _ in range(limits.TURN_MESSAGES_MAX):
            is_new = session.state is State.REGISTERING
            before = len(session.inbox)
            envelope, body = self._inbox.popleft()
            session.receive(envelope, body, now)
            self.world.invariants.dispatched(self, list(islice(session.inbox, before, None)))
            if is_new and session.state is not State.REGISTERING:
                self._backoff_s = _BACKOFF_S[0]
                self._asked = 0
                if session.state is State.REFUSED:
                    self.world.note(self.name, "was refused:", session.refusal)
                    self._leave(None, "exit 1")
                    return
            if (hurries and not held and len(session.inbox) == 1) or not self._inbox:
                return

    def _send(self) -> None:
        wire, outgoing = self.wire, self.session.outgoing
        if wire is None or not outgoing:
            return
        if not wire.is_up:
            if wire.is_cut:
                self._lose()
            return
        for packet in outgoing:
            if packet[0][2:7] == b"READY":
                ready = codec.from_worker.decode(packet[0])
                assert isinstance(ready, messages.Ready)
                self.depth_most = max(self.depth_most, ready.depth)
            wire.say(packet)
        outgoing.clear()

    def _has_ended(self) -> bool:
        if self._is_stopping:
            return not self.session.running
        draining = self.session.state is State.DRAINING
        return draining and not self.session.inbox and not self.session.running
