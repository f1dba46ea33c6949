"""Leased ports: which numbers there are, who has which, and until when. The sockets are the shell's.

::

                  lease              bound               expire, shut
    AVAILABLE ----------> RESERVED ----------> ACTIVE ----------------> DRAINING
      ^    ^                 |                   | give back, owner died    | drained, give back, owner died
      |    |                 | refused           v                          v
      |    +--- reopen --- CLOSED         AVAILABLE (CLOSED once all is shut)
      +----- owner died ---- RESERVED

A port is CLOSED when it must not be given out: the configuration reserves it, somebody else has it (until it is tried
again), or the supervisor stops. A DRAINING one takes no new connections; those that it has go on until its owner gives
it back, dies, or the time for them is over.

Deliberately absent: sockets, clocks, what a worker may do (the shell asks its pool's table).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from mcp_broker import limits
from mcp_broker.errors import InvalidTransition, PortInvalid, PortsExhausted, PortUnavailable


class PortState(Enum):
    """What a port is."""

    AVAILABLE = "available"
    RESERVED = "reserved"
    ACTIVE = "active"
    DRAINING = "draining"
    CLOSED = "closed"


class PortEvent(Enum):
    """What happens to a port."""

    #: somebody is to have it
    LEASE = "lease"
    #: it is bound, and its owner has the socket
    BOUND = "bound"
    #: it cannot be bound
    REFUSED = "refused"
    #: its owner does not want it any more
    GIVE_BACK = "give_back"
    #: its owner's process is gone
    OWNER_DIED = "owner_died"
    #: the lease's time is over
    EXPIRE = "expire"
    #: the time for its last connections is over
    DRAINED = "drained"
    #: it may be tried again
    REOPEN = "reopen"
    #: no leases any more
    SHUT = "shut"


_S, _E = PortState, PortEvent

#: state -> event -> the state after it; None cannot happen, whatever workers do
PORT_TABLE: Final[Mapping[PortState, Mapping[PortEvent, PortState | None]]] = {
    _S.AVAILABLE: {
        _E.LEASE: _S.RESERVED,
        _E.BOUND: None,
        _E.REFUSED: None,
        _E.GIVE_BACK: None,
        _E.OWNER_DIED: None,
        _E.EXPIRE: None,
        _E.DRAINED: None,
        _E.REOPEN: None,
        _E.SHUT: _S.CLOSED,
    },
    _S.RESERVED: {
        _E.LEASE: None,
        _E.BOUND: _S.ACTIVE,
        _E.REFUSED: _S.CLOSED,
        _E.GIVE_BACK: None,
        _E.OWNER_DIED: _S.AVAILABLE,
        _E.EXPIRE: None,
        _E.DRAINED: None,
        _E.REOPEN: None,
        _E.SHUT: _S.CLOSED,
    },
    _S.ACTIVE: {
        _E.LEASE: None,
        _E.BOUND: None,
        _E.REFUSED: None,
        _E.GIVE_BACK: _S.AVAILABLE,
        _E.OWNER_DIED: _S.AVAILABLE,
        _E.EXPIRE: _S.DRAINING,
        _E.DRAINED: None,
        _E.REOPEN: None,
        _E.SHUT: _S.DRAINING,
    },
    _S.DRAINING: {
        _E.LEASE: None,
        _E.BOUND: None,
        _E.REFUSED: None,
        _E.GIVE_BACK: _S.AVAILABLE,
        _E.OWNER_DIED: _S.AVAILABLE,
        _E.EXPIRE: None,
        _E.DRAINED: _S.AVAILABLE,
        _E.REOPEN: None,
        _E.SHUT: _S.DRAINING,
    },
    _S.CLOSED: {
        _E.LEASE: None,
        _E.BOUND: None,
        _E.REFUSED: None,
        _E.GIVE_BACK: None,
        _E.OWNER_DIED: None,
        _E.EXPIRE: None,
        _E.DRAINED: None,
        _E.REOPEN: _S.AVAILABLE,
        _E.SHUT: _S.CLOSED,
    },
}


@dataclass(slots=True)
class Port:
    """One number of the range.

    Args:
        reason: why it is closed, "" otherwise.
        owner: the worker that has it, "" when nobody has.
        due: when something happens to it by itself: the lease ends, the drain is over, it is tried again.
    """

    number: int
    state: PortState = PortState.AVAILABLE
    reason: str = ""
    owner: str = ""
    due: float | None = None

    def step(self, event: PortEvent) -> None:
        """Go to the next state.

        Raises:
            InvalidTransition: our shell reported what cannot happen.
        """
        after = PORT_TABLE[self.state][event]
        if after is None:
            raise InvalidTransition(f"port {self.number}: {event.name} in state {self.state.name}")
        self.state = after
        self.due = None
        if after in {PortState.AVAILABLE, PortState.CLOSED}:
            self.owner, self.reason = "", ""


@dataclass(frozen=True, slots=True)
class StopListening:
    """Take no new connections there; the socket stays."""

    number: int


@dataclass(frozen=True, slots=True)
class Release:
    """Let go of the socket; its connections end with their owner's descriptors."""

    number: int


Effect = StopListening | Release


class Ports:
    """The ports of one node.

    Args:
        first, last: of the range, both included.
        reserved: numbers in it that are never given out.
        per_worker: leases that one worker may have at a time.
    """

    def __init__(
        self,
        first: int,
        last: int,
        reserved: Iterable[int] = (),
        *,
        per_worker: int = limits.PORTS_PER_WORKER,
    ) -> None:
        self._per_worker = per_worker
        self._ports = {number: Port(number) for number in range(first, last + 1)}
        self._is_shut = False
        #: where the next search begins: what was given back lately is given out late
        self._next = first
        for number in reserved:
            if number in self._ports:
                self._close(self._ports[number], "reserved by the configuration")

    @property
    def listed(self) -> list[Port]:
        """Those of which there is something to tell: all but the available ones."""
        return [port for port in self._ports.values() if port.state is not PortState.AVAILABLE]

    def lease(self, owner: str, now: float, *, wanted: int = 0, ttl_s: float | None = None) -> int:
        """Reserve a port for a worker; the shell binds it, and says :meth:`bound` or :meth:`refused`.

        Args:
            wanted: its number; 0: any.
            ttl_s: for how long; None: until it is given back or the worker ends.

        Raises:
            PortInvalid: no such port is in the range (the tool author's fault).
            PortUnavailable: somebody has it, or nobody may.
            PortsExhausted: this worker has all that it may have, or none is left.
        """
        if wanted and wanted not in self._ports:
            first, last = min(self._ports), max(self._ports)
            raise PortInvalid(
                f"port {wanted} cannot be leased: the range is {first} to {last}",
                {"port": wanted, "min": first, "max": last},
            )
        if sum(port.owner == owner for port in self._ports.values()) >= self._per_worker:
            raise PortsExhausted(
                f"this worker has {self._per_worker} ports already, which is all that it may have; give one back first",
                {"which": "worker", "limit": self._per_worker},
            )
        port = self._ports[wanted] if wanted else self._any()
        if port.state is not PortState.AVAILABLE:
            whose = f": {port.reason}" if port.reason else ""
            raise PortUnavailable(
                f"port {port.number} is {port.state.value}{whose}",
                {"port": port.number, "state": port.state.value},
            )
        port.step(PortEvent.LEASE)
        port.owner = owner
        port.due = None if ttl_s is None else now + ttl_s
        return port.number

    def _any(self) -> Port:
        numbers = [*range(self._next, max(self._ports) + 1), *range(min(self._ports), self._next)]
        for number in numbers:
            if self._ports[number].state is PortState.AVAILABLE:
                self._next = number + 1
                return self._ports[number]
        why = (
            "the supervisor is stopping"
            if self._is_shut
            else f"all {len(self._ports)} of the range are in use"
        )
        raise PortsExhausted(
            f"no port is left: {why}; widen [ports] min and max, or try again later", {"which": "range"}
        )

    def bound(self, number: int) -> None:
        """The port is bound and handed to its owner."""
        port = self._ports[number]
        due = port.due
        port.step(PortEvent.BOUND)
        port.due = due

    def refused(self, number: int, reason: str, now: float) -> None:
        """The port cannot be bound: somebody else has it. It is tried again some time later."""
        port = self._ports[number]
        port.step(PortEvent.REFUSED)
        port.reason, port.due = reason, now + limits.PORT_RETRY_S

    def give_back(self, number: int, owner: str) -> list[Effect]:
        """Take a port back from its owner; of a port that is not this worker's it means nothing."""
        port = self._ports.get(number)
        if port is None or port.owner != owner or port.state not in {PortState.ACTIVE, PortState.DRAINING}:
            return []
        return self._freed(port, PortEvent.GIVE_BACK)

    def owner_died(self, owner: str) -> list[Effect]:
        """Take back all that a worker had."""
        effects = []
        for port in self._ports.values():
            if port.owner == owner:
                effects += self._freed(port, PortEvent.OWNER_DIED)
        return effects

    def shut(self, now: float) -> list[Effect]:
        """Give no more leases; those that there are take no new connections."""
        self._is_shut = True
        effects: list[Effect] = []
        for port in self._ports.values():
            reason, was = port.reason, port.state
            port.step(PortEvent.SHUT)
            if port.state is PortState.DRAINING and was is PortState.ACTIVE:
                port.due = now + limits.PORT_DRAIN_S
                effects.append(StopListening(port.number))
            elif port.state is PortState.CLOSED:
                port.reason = reason or "the supervisor is stopping"
        return effects

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`expire` has something to do."""
        return min((port.due for port in self._ports.values() if port.due is not None), default=None)

    def expire(self, now: float) -> list[Effect]:
        """Do what is due; too early is harmless."""
        effects: list[Effect] = []
        for port in self._ports.values():
            if port.due is None or now < port.due:
                continue
            if port.state is PortState.ACTIVE:
                port.step(PortEvent.EXPIRE)
                port.due = now + limits.PORT_DRAIN_S
                effects.append(StopListening(port.number))
            elif port.state is PortState.DRAINING:
                effects += self._freed(port, PortEvent.DRAINED)
            elif port.state is PortState.CLOSED and not self._is_shut:
                port.step(PortEvent.REOPEN)
            else:
                port.due = None
        return effects

    def _freed(self, port: Port, event: PortEvent) -> list[Effect]:
        was = port.state
        port.step(event)
        if self._is_shut:
            self._close(port, "the supervisor is stopping")
        return [] if was is PortState.RESERVED else [Release(port.number)]

    @staticmethod
    def _close(port: Port, reason: str) -> None:
        port.step(PortEvent.SHUT)
        port.reason = reason
