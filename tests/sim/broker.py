"""One life of the broker's process: the real machine, and around it what its loop does, without sockets.

Mirrors ``mcp_broker/broker/loop.py``; the machine is used by the methods that the loop uses.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core.client_sessions import error as error_message
from mcp_broker.core.routing import Routing
from mcp_broker.wire import codec, messages, node
from tests.core.support import FakeGrant
from tests.sim.agenda import Alarm
from tests.sim.network import Door

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.sim.network import Packet, Peer, Wire
    from tests.sim.world import World

#: a turn takes up to this long, seconds; what arrives meanwhile waits for the next
_TURN_S: Final = 0.0003

NAME: Final = "broker"


class Broker:
    """A broker that serves until it is killed, or drained.

    Attributes:
        wires: connections that its sockets have, by routing id.
        stalled_until: it does nothing before.
    """

    def __init__(self, world: World, epoch: int) -> None:
        self.world = world
        self.epoch = epoch
        self.machine = Routing(epoch, world.agenda.now, world.rng.randbytes)
        self.wires: dict[bytes, Wire] = {}
        self.admitted: set[str] = set()
        self.stalled_until = 0.0
        self.is_serving = self.is_dead = False
        self.turned_at = world.agenda.now
        self._busy_until = 0.0
        self._inbox: dict[Door, dict[Wire, deque[Packet]]] = {Door.CLIENTS: {}, Door.WORKERS: {}}
        self._from_supervisor: deque[bytes] = deque()
        self._alarm = Alarm(world.agenda, self.turn)

    # -- what comes in ------------------------------------------------------------------------------

    def admits(self, peer: Peer) -> bool:
        """Tell whether ZAP takes this peer's key."""
        return peer.door is Door.CLIENTS or peer.key in self.admitted

    def hear(self, wire: Wire, packet: Packet) -> None:
        """Have a message wait for the next turn."""
        if self.is_dead:
            return
        queues = self._inbox[wire.peer.door]
        if wire not in queues:
            queues[wire] = deque()
        queues[wire].append(packet)
        self._alarm.sooner(max(self._busy_until, self.stalled_until))

    def hear_supervisor(self, packed: bytes) -> None:
        """Have a message of the supervisor wait for the next turn."""
        if not self.is_dead:
            self._from_supervisor.append(packed)
            self._alarm.sooner(max(self._busy_until, self.stalled_until))

    def serve(self) -> None:
        """Read what the supervisor sent first, then open the doors."""
        self.is_serving = True
        self._take_from_supervisor()
        self.world.supervisor.hear_broker(self, codec.encode(node.Serving(1)))
        self.world.network.serve(self)
        self.turn()

    def stir(self) -> None:
        """Take a turn soon: somebody changed something by hand."""
        self._alarm.sooner(max(self._busy_until, self.stalled_until))

    def stall(self, until: float) -> None:
        """Stand still."""
        self.stalled_until = max(self.stalled_until, until)

    def end(self, *, kept: int | None) -> None:
        """Be gone."""
        self.is_dead = True
        self._alarm.clear()
        self.world.network.leave(self, kept)

    # -- one turn -------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Do what the loop does each time round."""
        world, machine = self.world, self.machine
        now = world.agenda.now
        if self.is_dead or not self.is_serving:
            return
        if now < self.stalled_until:
            self._alarm.set(self.stalled_until)
            return
        has_client_news = bool(self._inbox[Door.CLIENTS])
        if self._inbox[Door.WORKERS]:
            self._drain(Door.WORKERS, self._worker_message)
            if has_client_news:
                self.flush()
        if has_client_news:
            self._drain(Door.CLIENTS, self._client_message)
        self._take_from_supervisor()
        machine.expire(now)
        self.flush()
        self.turned_at = now
        if machine.drained:
            world.supervisor.broker_exits(self)
            return
        world.invariants.turned(self)
        self._busy_until = now + world.rng.random() * _TURN_S
        self._alarm.set(max(self._busy_until, machine.deadline()))
        if self._inbox[Door.CLIENTS] or self._inbox[Door.WORKERS]:
            self._alarm.sooner(self._busy_until)

    def _drain(self, door: Door, take: Callable[[Wire, Packet], None]) -> None:
        """Take up to a turn's bound of messages: in order from each peer, in any order among them."""
        queues, rng = self._inbox[door], self.world.rng
        for _ in range(limits.TURN_MESSAGES_MAX):
            if not queues:
                return
            wire = next(iter(queues)) if len(queues) == 1 else rng.choice(list(queues))
            packet = queues[wire].popleft()
            if not queues[wire]:
                del queues[wire]
            take(wire, packet)

    def _take_from_supervisor(self) -> None:
        while self._from_supervisor:
            message = codec.from_supervisor.decode(self._from_supervisor.popleft())
            self.world.note(NAME, "<- supervisor", message)
            if isinstance(message, node.Admit):
                self.admitted.update(worker.thumbprint for worker in message.workers)
            elif isinstance(message, node.Died):
                self.admitted.discard(f"key-{message.certificate.worker_id}")
            self.machine.from_node(message, self.world.agenda.now)

    def _client_message(self, wire: Wire, packet: Packet) -> None:
        now, clients = self.world.agenda.now, self.machine.clients
        envelope, body = packet
        message = codec.from_client.decode(envelope)
        self.world.note(NAME, f"<- {wire.peer.name}", message)
        if isinstance(message, messages.Hello):
            grant = FakeGrant(principal=message.token)
            assert clients.hello(wire.routing_id, wire.user_id, message, grant, now) is not None
            return
        assert not isinstance(message, messages.Renew), "no client of the simulation renews its token"
        if not clients.message(wire.routing_id, wire.user_id, message, body, now):
            self._refuse(wire)

    def _worker_message(self, wire: Wire, packet: Packet) -> None:
        envelope, body = packet
        message = codec.from_worker.decode(envelope)
        self.world.note(NAME, f"<- {wire.peer.name}", message)
        if not self.machine.workers.message(
            wire.routing_id, wire.user_id, message, body, self.world.agenda.now
        ):
            self._refuse(wire)

    def _refuse(self, wire: Wire) -> None:
        text = "this connection has no session"
        message = error_message("UNAUTHENTICATED", text, fatal=True, epoch=self.epoch)
        wire.tell((codec.encode(message), None))

    # -- what goes out ----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Send every outbox."""
        machine = self.machine
        self._tell_supervisor()
        while machine.clients.dirty or machine.workers.dirty:
            workers, machine.workers.dirty[:] = machine.workers.dirty[:], []
            for worker in workers:
                for packed in worker.take_outbox(machine.epoch):
                    if worker.routing_id and not self._send(worker.routing_id, packed):
                        machine.workers.unreachable(worker.routing_id)
            clients, machine.clients.dirty[:] = machine.clients.dirty[:], []
            for session in clients:
                if machine.clients.open.get(session.routing_id) is not session:
                    # lost: its outbox waits for a client that resumes
                    session.dirty = False
                    continue
                for packed in session.take_outbox(machine.epoch):
                    if not self._send(session.routing_id, packed):
                        machine.clients.unreachable(session.routing_id, self.world.agenda.now)
        self._tell_supervisor()

    def _tell_supervisor(self) -> None:
        to_node, self.machine.to_node[:] = self.machine.to_node[:], []
        for message in to_node:
            self.world.note(NAME, "-> supervisor", message)
            self.world.supervisor.hear_broker(self, codec.encode(message))

    def _send(self, routing_id: bytes, packed: Any) -> bool:
        wire = self.wires.get(routing_id)
        if wire is None or wire.is_dead_for_broker:
            return False
        wire.tell(packed)
        return True
