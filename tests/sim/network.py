"""Connections between peers and the broker: each keeps its order, and none keeps what was on the way when it broke.

A broken connection is noticed by either end in its own time, or late. Until then what is sent into it is lost.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from tests.sim.agenda import Agenda
    from tests.sim.broker import Broker
    from tests.sim.chronicle import Chronicle

#: an envelope and its second frame, if any
Packet = tuple[bytes, bytes | None]

#: TCP and CURVE
_HANDSHAKES: Final = 3
#: how late an end may notice that its connection broke: when it was reset, and when it only went silent (seconds)
_RESET_S: Final = 0.02
_SILENT_S: Final = 3.0


class Door(Enum):
    """The broker's two sockets."""

    CLIENTS = "clients"
    WORKERS = "workers"


class Peer(Protocol):
    """Who may have a connection to the broker."""

    name: str
    key: str
    door: Door

    def wire_up(self, wire: Wire) -> None:
        """The connection stands."""

    def wire_down(self, wire: Wire) -> None:
        """The end of the connection was noticed here."""

    def hear(self, wire: Wire, packet: Packet) -> None:
        """A message has arrived, and waits to be read."""


class Lane:
    """One direction of a connection: first in, first out."""

    __slots__ = ("_arrival", "_wire", "deliver", "queue")

    def __init__(self, wire: Wire, deliver: Callable[[Wire, Packet], None]) -> None:
        self._wire = wire
        self.deliver = deliver
        self.queue: deque[Packet] = deque()
        self._arrival = 0.0

    def put(self, packet: Packet) -> None:
        """Send a message on its way."""
        network = self._wire.network
        network.chronicle.sent(packet[0])
        self.queue.append(packet)
        arrival = network.agenda.now + network.latency_s * (0.5 + network.rng.random())
        self._arrival = max(self._arrival, arrival, self._wire.frozen_until)
        network.agenda.at(self._arrival, self._arrive)

    def _arrive(self) -> None:
        wire = self._wire
        if not self.queue:
            # lost on the way
            return
        if wire.network.agenda.now < wire.frozen_until:
            wire.network.agenda.at(wire.frozen_until, self._arrive)
            return
        self.deliver(wire, self.queue.popleft())


class Wire:
    """One connection of one peer.

    Attributes:
        is_up: it stands, as far as the peer's end knows.
        is_cut: nothing that is sent arrives any more.
        is_dead_for_broker: the broker's socket has noticed the end: it cannot be sent to.
        frozen_until: nothing arrives before; what was sent waits.
    """

    def __init__(self, network: Network, peer: Peer, routing_id: bytes) -> None:
        self.network = network
        self.peer = peer
        self.routing_id = routing_id
        self.user_id = peer.key
        self.broker: Broker | None = None
        self.is_up = self.is_cut = self.is_dead_for_broker = False
        self.frozen_until = 0.0
        self.to_broker: Lane | None = None
        self.to_peer: Lane | None = None

    def open(self, broker: Broker) -> None:
        """Both ends stand."""
        self.broker = broker
        self.to_broker = Lane(self, broker.hear)
        self.to_peer = Lane(self, self.peer.hear)
        self.is_up = True
        broker.wires[self.routing_id] = self
        self.peer.wire_up(self)

    def say(self, packet: Packet) -> bool:
        """Send to the broker; False if this end knows that nobody is there."""
        if not self.is_up or self.to_broker is None:
            return False
        if not self.is_cut:
            self.to_broker.put(packet)
        return True

    def tell(self, packet: Packet) -> None:
        """Send to the peer."""
        if not self.is_cut and self.to_peer is not None:
            self.to_peer.put(packet)

    def cut(self, *, is_silent: bool = False) -> None:
        """Break it: what is on the way is lost, and both ends notice in their own time."""
        if self.is_cut:
            return
        network = self.network
        network.chronicle.note(network.agenda.now, self.peer.name, "cut", "silently" if is_silent else "")
        self._end(0, 0)
        most_s = _SILENT_S if is_silent else _RESET_S
        network.agenda.after(network.rng.random() * most_s, self._peer_notices)
        network.agenda.after(network.rng.random() * most_s, self._broker_notices)

    def close(self, kept: int | None = None) -> None:
        """Close the peer's end; ``kept`` messages that it sent arrive all the same (None: all)."""
        self.is_up = False
        self._end(kept, 0)
        self.network.agenda.after(self.network.rng.random() * _RESET_S, self._broker_notices)

    def hang_up(self, kept: int | None = None) -> None:
        """Close the broker's end; ``kept`` messages that it sent arrive all the same (None: all)."""
        self._end(0, kept)
        self.is_dead_for_broker = True
        self.network.agenda.after(
            self.network.latency_s * 2 + self.network.rng.random() * _RESET_S, self._peer_notices
        )

    def _end(self, up: int | None, down: int | None) -> None:
        self.is_cut = True
        for lane, kept in ((self.to_broker, up), (self.to_peer, down)):
            if lane is not None and kept is not None:
                while len(lane.queue) > kept:
                    lane.queue.pop()

    def _peer_notices(self) -> None:
        if self.is_up:
            self.is_up = False
            self.peer.wire_down(self)

    def _broker_notices(self) -> None:
        self.is_dead_for_broker = True
        if self.broker is not None:
            self.broker.wires.pop(self.routing_id, None)


class Network:
    """All connections, and the attempts to make one.

    Args:
        latency_s: mean time of a message on its way.
    """

    def __init__(self, agenda: Agenda, rng: Random, chronicle: Chronicle, latency_s: float) -> None:
        self.agenda = agenda
        self.rng = rng
        self.chronicle = chronicle
        self.latency_s = latency_s
        self.broker: Broker | None = None
        #: no attempt succeeds before: the way to the broker is closed
        self.closed_until = 0.0
        #: attempts that wait in the listening sockets' backlog
        self._knocking: list[Wire] = []

    def dial(self, peer: Peer) -> Wire:
        """Begin a connection, under a routing id that nobody had before."""
        wire = Wire(self, peer, self.rng.randbytes(16))
        self.agenda.after(self.latency_s * _HANDSHAKES * (0.5 + self.rng.random()), lambda: self._knock(wire))
        return wire

    def serve(self, broker: Broker) -> None:
        """A broker listens: it finds who knocked meanwhile."""
        self.broker = broker
        knocking, self._knocking = self._knocking, []
        for wire in knocking:
            self._knock(wire)

    def leave(self, broker: Broker, kept: int | None) -> None:
        """A broker listens no more, and its connections end."""
        if self.broker is broker:
            self.broker = None
        for wire in list(broker.wires.values()):
            wire.hang_up(kept)
        broker.wires.clear()

    def _knock(self, wire: Wire) -> None:
        if wire.is_cut:
            # given up meanwhile
            return
        broker, now = self.broker, self.agenda.now
        if broker is None:
            self._knocking.append(wire)
        elif now < max(self.closed_until, broker.stalled_until):
            self.agenda.at(max(self.closed_until, broker.stalled_until), lambda: self._knock(wire))
        elif broker.admits(wire.peer):
            wire.open(broker)
        # else the handshake is never answered
