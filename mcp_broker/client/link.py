"""A session and its connection of the moment: what the two clients share.

Not thread-safe, and never blocks: a client calls :meth:`Link.serve` whenever the fd is readable, something was
submitted, or :meth:`Link.wait_s` is over. The fd is edge-triggered by nature (libzmq signals news, not a
state), so ``serve`` returns True as long as it must be called again before anybody may wait for the fd.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import zmq

from mcp_broker import errors
from mcp_broker.auth.places import find_profile
from mcp_broker.auth.profile import load_profile
from mcp_broker.client import connection as connections
from mcp_broker.client.session import ClientSession, State
from mcp_broker.transport import POLLIN, POLLOUT
from mcp_broker.wire import codec

if TYPE_CHECKING:
    from mcp_broker.auth.profile import Profile
    from mcp_broker.transport import Connection

#: how often to look whether a connection attempt has failed; success is told by the fd
OPENING_TICK_S: Final = 0.02
#: nobody sleeps longer without a look at the clock; the broker's heartbeats come as often
WAIT_MAX_S: Final = 0.25

_LIVE: Final = frozenset({State.WAITING, State.OPEN})
_jitter: Final = random.SystemRandom()


class Link:
    """One client's session, connected when it needs to be.

    Args:
        profile: as read.
        path: where it was read from; read again before each reconnection, since the broker may have moved or the
            token been renewed. None: the profile never changes.
    """

    def __init__(self, profile: Profile, path: Path | None = None) -> None:
        self.profile = profile
        self._path = path
        self.session = ClientSession(secrets.token_bytes(8), profile.token, _agent())
        self.connection: Connection | None = None
        #: messages that were none
        self.malformed = 0
        #: where the last attempt went
        self._endpoint: str | None = None

    @classmethod
    def of(cls, profile: str | os.PathLike[str] | Profile | None) -> Link:
        """Make a link from a profile, its path, or from nothing: MCP_BROKER_PROFILE, then the default one.

        Raises:
            NotReachable: there is no profile.
            CredentialError: it cannot be used.
        """
        if profile is None or isinstance(profile, str | os.PathLike):
            path = find_profile(os.fspath(profile) if profile is not None else None, os.environ)
            return cls(load_profile(path), path)
        return cls(profile)

    # -- serving ---------------------------------------------------------------------------------------------

    def serve(self, now: float) -> bool:
        """Send, receive, and do what is due.

        Returns:
            True if there may be more to do at once; the caller settles what ended and calls again.
        """
        session = self.session
        if session.has_outgoing:
            # after a pause, hear first: a GOODBYE or the end of the connection may lie there since long, and a call
            # sent into it would be lost
            if not session.book.in_flight and self._receive(now):
                return True
            self.flush(now)
        if self._receive(now):
            return True
        if now >= session.deadline():
            session.expire(now)
        if session.state is not State.OPEN:
            self._follow(now)
        return session.has_outgoing and self.connection is not None

    def flush(self, now: float) -> None:
        """Send what waits, if there is a connection."""
        connection = self.connection
        if connection is None or self.session.state not in _LIVE:
            return
        out = self.session.outgoing(now)
        for at, (message, body) in enumerate(out):
            try:
                connection.send(codec.encode(message), body)
            except zmq.Again:
                unsent = [message for message, _ in out[at:]]
                self.session.disconnected("the connection was cut", unsent)
                return

    def _receive(self, now: float) -> bool:
        connection, session = self.connection, self.session
        if connection is None or session.state not in _LIVE:
            return False
        book = session.book
        while True:
            events = connection.events()
            if not events & POLLIN:
                if not events & POLLOUT:
                    session.disconnected("the connection was cut")
                return False
            envelope, body = connection.take()
            try:
                message = codec.to_client.decode(envelope)
            except errors.WireError:
                # a later broker's kind, or a bug; either way not worth more than itself
                self.malformed += 1
                continue
            session.receive(message, body, now)
            if book.ended or book.arrived or book.progressed or book.uploads.raised:
                return True
            if session.state is not State.OPEN:
                return False

    def _follow(self, now: float) -> None:
        """Make the connection what the session's state says."""
        session = self.session
        if session.state is State.OPENING and self.connection is not None:
            self._progress(self.connection, now)
        if session.state in {State.DISCONNECTED, State.REFUSED, State.CLOSED} and self.connection is not None:
            self.connection.close()
            self.connection = None
        if session.state is State.DISCONNECTED:
            if session.dial_at is None:
                session.back_off(now, _jitter.random())
            if session.is_needed and session.dial_at is not None and now >= session.dial_at:
                self.dial(now)

    def _progress(self, connection: Connection, now: float) -> None:
        if connection.events() & POLLOUT:
            connection.opened()
            self.session.connected(now)
        elif (failure := connection.failure()) is not None:
            why, is_final = failure
            if is_final:
                self.session.refuse(
                    errors.CredentialError(
                        f"{why} at {connection.endpoint}", {"endpoint": connection.endpoint}
                    )
                )
            else:
                self.session.disconnected(f"{why} at {connection.endpoint}")

    def dial(self, now: float) -> None:
        """Open a connection: where there was one last, or after a failure at the profile's next endpoint."""
        if self._endpoint is not None and self._path is not None:
            # one that cannot be read now is no reason to drop the one we have
            with contextlib.suppress(errors.BrokerError, OSError):
                self.profile = load_profile(self._path)
            self.session.token = self.profile.token
        endpoint = self._endpoint = self._next_endpoint()
        self.session.places = len(self.profile.endpoints)
        self.session.dial(now)
        try:
            self.connection = connections.connect(endpoint, self.profile)
        except zmq.ZMQError as error:
            self.session.disconnected(f"{error} at {endpoint}")

    def _next_endpoint(self) -> str:
        endpoints, last = self.profile.endpoints, self._endpoint
        if last is None or last not in endpoints:
            return endpoints[0]
        # no attempt since the last WELCOME has failed: that way led to a broker
        failed = self.session.attempts > 0
        return endpoints[(endpoints.index(last) + failed) % len(endpoints)]

    def wait_s(self, now: float) -> float:
        """Return for how long nothing is due, in seconds, at most WAIT_MAX_S."""
        most = OPENING_TICK_S if self.session.state is State.OPENING else WAIT_MAX_S
        return min(most, max(0.0, self.session.deadline() - now))

    # -- beginning and end ------------------------------------------------------------------------------------

    def unreachable(self, timeout_s: float) -> errors.NotReachable:
        """Make the error of a broker that did not answer within ``timeout_s``."""
        tried = ", ".join(self.profile.endpoints)
        hint = "start one with `mcp-broker start`"
        return errors.NotReachable(
            f"no broker answered at {tried} within {timeout_s:g} s ({self.session.why_lost}); {hint}",
            {"endpoints": list(self.profile.endpoints), "why": self.session.why_lost, "hint": hint},
        )

    def close(self) -> None:
        """Say GOODBYE, if there is anybody to say it to, and let go of the socket."""
        session, connection = self.session, self.connection
        session.close()
        self.connection = None
        if connection is None:
            return
        for message, body in session.outgoing(0.0):
            try:
                connection.send(codec.encode(message), body)
            except zmq.Again:
                break
        connection.close(connections.LINGER_MS)


def _agent() -> str:
    try:
        return f"mcp-broker-python/{version('mcp-broker')}"
    except PackageNotFoundError:
        return "mcp-broker-python"
