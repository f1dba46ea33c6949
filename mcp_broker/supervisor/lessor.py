"""Lends listening sockets to workers: bound here and handed over, so that no port is ever lost between look and bind.

The supervisor keeps a descriptor of each. By it a port stops listening when its lease ends, and comes back when the worker
is dead. Whoever has a copy may make it listen again, so the descriptor of an ended lease is kept for as long as its worker
has one, and looked at: a worker that listens without a lease is killed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.core.ports import Effect, Ports, PortState, Release
from mcp_broker.errors import PortDenied, PortError, PortUnavailable
from mcp_broker.supervisor import connections, gauge, socket_filter
from mcp_broker.wire.ports import PortReport
from mcp_broker.wire.tether import Leased, LeasePort, LeaseRefused, ReturnPort

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.config import PortsTable
    from mcp_broker.supervisor.connections import Connection
    from mcp_broker.supervisor.life import Life
    from mcp_broker.supervisor.tether import Handlers

_log = logging.getLogger("mcp_broker.supervisor")

#: connections of a port that are told apart from one look to the next
_KNOWN_MAX: Final = 4096
#: sockets of ended leases that one worker may add between two looks; how many copies it has is bounded by its own descriptors
_ENDED_MAX: Final = 256


@dataclass(slots=True)
class Traffic:
    """What was seen of a port's connections, since it was lent."""

    since_wall: float = 0.0
    live: dict[bytes, Connection] = field(default_factory=dict)
    connections: int = 0
    #: of those that ended
    sent: int = 0
    received: int = 0
    last_wall: float = 0.0

    def see(self, now: dict[bytes, Connection], wall: float) -> None:
        """Take what is connected now."""
        if now != self.live:
            self.last_wall = wall
        self.connections += len(now.keys() - self.live.keys())
        for peer in self.live.keys() - now.keys():
            self.sent += self.live[peer].sent
            self.received += self.live[peer].received
        self.live = now


@dataclass(frozen=True, slots=True)
class Ended:
    """A lease that has ended, of a worker that lives and may have a copy of the socket."""

    life: Life
    number: int
    listener: socket.socket


class Lessor:
    """The ports of one node.

    Args:
        on_change: told when a report would be different now.
    """

    def __init__(self, table: PortsTable, on_change: Callable[[], None] = lambda: None) -> None:
        self._on_change = on_change
        self._host = table.host
        self._networks = tuple(ipaddress.ip_network(text) for text in table.allow)
        self._ports = Ports(table.min, table.max, table.reserved, per_worker=table.per_worker)
        self._sockets: dict[int, socket.socket] = {}
        self._traffic: dict[int, Traffic] = {}
        #: who has a port
        self._lives: dict[int, Life] = {}
        #: worker -> its leases that have ended
        self._ended: dict[str, list[Ended]] = {}

    def handlers(self, life: Life) -> Handlers:
        """Return who takes the wishes of a worker."""
        return {
            LeasePort: lambda wish: self._lease(life, wish),
            ReturnPort: lambda wish: self._perform(self._ports.give_back(wish.port, life.worker_id)),
        }

    # -- what workers want ---------------------------------------------------------------------------

    def _lease(self, life: Life, wish: LeasePort) -> None:
        """Answer a worker's wish for a port."""
        assert life.tether is not None  # noqa: S101 (by which the wish came)
        try:
            self._check_network("full" if life.cell is None else life.cell.confinement.network)
            number = self._lend(life, wish)
        except PortError as error:
            life.tether.send(LeaseRefused(wish.number, error.code, error.message))
            return
        life.tether.send(Leased(wish.number, self._host, number), self._sockets[number].fileno())

    def _lend(self, life: Life, wish: LeasePort) -> int:
        ttl_s = None if wish.ttl_ms is None else wish.ttl_ms / 1000
        while True:
            now = time.monotonic()
            number = self._ports.lease(life.worker_id, now, wanted=wish.port, ttl_s=ttl_s)
            try:
                listener = self._bound(number)
            except PortDenied as error:
                self._ports.refused(number, error.message, now)
                raise
            except OSError as error:
                self._ports.refused(number, f"it cannot be bound: {error.strerror}", now)
                if wish.port:
                    raise PortUnavailable(
                        f"port {number} cannot be bound: {error.strerror}", {"port": number}
                    ) from error
                continue
            self._ports.bound(number)
            self._sockets[number] = listener
            self._lives[number] = life
            self._traffic[number] = Traffic(since_wall=time.time())
            self._on_change()
            return number

    def _check_network(self, network: str) -> None:
        if network == "none":
            raise PortDenied(
                "its pool has no network (network = 'none'), so it may lease no port; set network in its table"
            )
        if network == "loopback" and not ipaddress.ip_address(self._host).is_loopback:
            raise PortDenied(
                f"its pool has network = 'loopback', and leased ports are bound to {self._host} ([ports] host)"
            )

    def _bound(self, number: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._networks:
                # before it listens: nobody slips in
                self._guard(listener)
            listener.bind((self._host, number))
            listener.listen(limits.PORT_BACKLOG)
        except (OSError, PortDenied):
            listener.close()
            raise
        return listener

    def _guard(self, listener: socket.socket) -> None:
        try:
            socket_filter.attach(listener, self._networks)
        except OSError as error:
            # a kernel without, or one that does not let ordinary users: rather no port than one for everybody
            raise PortDenied(
                f"[ports] allow cannot be enforced here, so no port is lent: the kernel refuses a socket filter"
                f" ({error.strerror}); remove allow, or start as root"
            ) from error

    # -- what else happens -----------------------------------------------------------------------------

    def owner_died(self, worker_id: str) -> list[int]:
        """Take back all that a dead worker had; return the numbers."""
        effects = self._ports.owner_died(worker_id)
        self._perform(effects)
        for one in self._ended.pop(worker_id, ()):
            one.listener.close()
        return [effect.number for effect in effects]

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`expire` has something to do."""
        return self._ports.deadline()

    def expire(self, now: float) -> None:
        """Do what is due."""
        self._perform(self._ports.expire(now))

    def drain(self) -> None:
        """Give no more leases; those that there are take no new connections."""
        self._perform(self._ports.shut(time.monotonic()))

    def close(self) -> None:
        """Let go of everything."""
        self.drain()
        ended = [one.listener for kept in self._ended.values() for one in kept]
        for listener in (*self._sockets.values(), *ended):
            listener.close()
        self._sockets.clear()
        self._ended.clear()

    def _perform(self, effects: list[Effect]) -> None:
        if effects:
            self._on_change()
        for effect in effects:
            listener = self._sockets[effect.number]
            # closing our descriptor alone would leave a worker's copy listening
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            if isinstance(effect, Release):
                self._keep(self._lives.pop(effect.number), effect.number, listener)
                del self._sockets[effect.number], self._traffic[effect.number]

    # -- leases that have ended ------------------------------------------------------------------------

    def _keep(self, life: Life, number: int, listener: socket.socket) -> None:
        """Keep the socket of a lease that has ended while its worker may have a copy."""
        ended = self._ended.setdefault(life.worker_id, [])
        ended.append(Ended(life, number, listener))
        if len(ended) % _ENDED_MAX == 0:
            self._look_at_ended(life.worker_id)

    def _look_at_ended(self, worker_id: str) -> None:
        """Kill a worker that listens without a lease; let go of what it has no copy of."""
        ended = self._ended[worker_id]
        for one in ended:
            # at once, whatever comes of the worker
            if _silence(one.listener):
                one.life.violate(f"it listened on port {one.number}, whose lease had ended")
        copies = _sockets_of(ended[0].life) if ended else set()
        if copies is None:
            return
        kept = [one for one in ended if f"socket:[{os.fstat(one.listener.fileno()).st_ino}]" in copies]
        for one in ended:
            if one not in kept:
                one.listener.close()
        if kept:
            self._ended[worker_id] = kept
        else:
            del self._ended[worker_id]

    # -- what is told --------------------------------------------------------------------------------

    def sample(self) -> None:
        """Look at who is connected, and that nobody listens whose lease has ended."""
        for worker_id in list(self._ended):
            self._look_at_ended(worker_id)
        for port in self._ports.listed:
            if port.state is PortState.DRAINING and port.number in self._sockets:
                _silence(self._sockets[port.number])
        if not self._sockets:
            return
        try:
            found = connections.established(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        except OSError as error:
            _log.debug("no figures of leased ports: %s", os.strerror(error.errno or 0))
            return
        by_port: dict[int, dict[bytes, Connection]] = {number: {} for number in self._sockets}
        for connection in found:
            seen = by_port.get(connection.port)
            if seen is not None and len(seen) < _KNOWN_MAX:
                seen[connection.peer] = connection
        wall = time.time()
        for number, now in by_port.items():
            self._traffic[number].see(now, wall)

    def report(self) -> tuple[PortReport, ...]:
        """Return every port that is not simply available."""
        return tuple(
            PortReport(
                port=port.number,
                state=port.state.value,
                host=self._host,
                owner=port.owner,
                reason=port.reason,
                since_wall=traffic.since_wall,
                listening=port.state is PortState.ACTIVE,
                connections=len(traffic.live),
                connections_total=traffic.connections,
                bytes_out=traffic.sent + sum(one.sent for one in traffic.live.values()),
                bytes_in=traffic.received + sum(one.received for one in traffic.live.values()),
                last_wall=traffic.last_wall,
            )
            for port in self._ports.listed
            for traffic in (self._traffic.get(port.number, _NONE),)
        )


_NONE: Final = Traffic()


def _silence(listener: socket.socket) -> bool:
    """Stop a socket that listens again; False if it does not."""
    if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    return True


def _sockets_of(life: Life) -> set[str] | None:
    """Return the sockets that a worker and all below it have, as /proc names them; None if nobody can tell."""
    if life.process is None:
        return None
    known = () if life.metered is None else life.metered.gauge.pids
    pids = gauge.tree(life.process.main_pid, known)
    return {link for pid in pids for _, link in gauge.descriptors(pid) if link.startswith("socket:")}
