"""Lends listening sockets to workers: bound here and handed over, so that no port is ever lost between look and bind.

The supervisor keeps a descriptor of each. By it a port stops listening when its lease ends, whatever its worker does, and
comes back when the worker is dead.
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
from mcp_broker.supervisor import connections, sieve
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
            number = self._lend(life.worker_id, wish)
        except PortError as error:
            life.tether.send(LeaseRefused(wish.number, error.code, error.message))
            return
        life.tether.send(Leased(wish.number, self._host, number), self._sockets[number].fileno())

    def _lend(self, worker_id: str, wish: LeasePort) -> int:
        ttl_s = None if wish.ttl_ms is None else wish.ttl_ms / 1000
        while True:
            now = time.monotonic()
            number = self._ports.lease(worker_id, now, wanted=wish.port, ttl_s=ttl_s)
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
            sieve.attach(listener, self._networks)
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
        for listener in self._sockets.values():
            listener.close()
        self._sockets.clear()

    def _perform(self, effects: list[Effect]) -> None:
        if effects:
            self._on_change()
        for effect in effects:
            listener = self._sockets[effect.number]
            # closing our descriptor alone would leave a worker's copy listening
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            if isinstance(effect, Release):
                listener.close()
                del self._sockets[effect.number], self._traffic[effect.number]

    # -- what is told --------------------------------------------------------------------------------

    def sample(self) -> None:
        """Look at who is connected."""
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
