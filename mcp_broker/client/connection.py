"""One TCP connection to a broker, in its own DEALER with its own random routing id.

libzmq never reconnects for us (docs/protocol.md, "Client sessions", 3): with ZMQ_RECONNECT_IVL = -1 it drops the
pipe of a connection that ends, and POLLOUT leaves ZMQ_EVENTS at once (measured: 0.1 ms after the FIN, in the
same wake-up of the fd). With ZMQ_IMMEDIATE = 1 POLLOUT does not appear before TCP, CURVE and ZAP are through. So
POLLOUT *is* the connection, and the hot path, which reads ZMQ_EVENTS anyway, needs no socket monitor. A monitor
runs only while connecting, since a refused port and a refused key are silent otherwise (IMMEDIATE = 0 even shows a
refused port as writable for ever).

What TCP does not tell (a half-open connection) is left to the session's rule of silence while calls are in flight,
and to ZMTP heartbeats while none are.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from mcp_broker import ids, limits

if TYPE_CHECKING:
    from mcp_broker.auth.profile import Profile

#: a large frame on a slow link must not look like silence: 1 MiB in 15 s is 70 kB/s
HEARTBEAT_IVL_MS: Final = 5_000
HEARTBEAT_TIMEOUT_MS: Final = 15_000
#: time for a GOODBYE to leave
LINGER_MS: Final = 200
#: the ZAP status of a key that will never be taken
ZAP_REFUSED: Final = 400

_FAILURES: Final = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_context: zmq.Context[zmq.Socket[bytes]] | None = None
#: contexts of parent processes: never used again, and never destroyed, since their threads are not here
_inherited: list[zmq.Context[zmq.Socket[bytes]]] = []
#: how many forks lie between this process and the one that first imported this module
generation = 0


def _after_fork() -> None:
    global _context, generation  # noqa: PLW0603 (one Context a process is the point)
    generation += 1
    if _context is not None:
        _inherited.append(_context)
        _context = None


os.register_at_fork(after_in_child=_after_fork)


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return this process's only ZeroMQ context."""
    global _context  # noqa: PLW0603
    if _context is None:
        _context = zmq.Context()
    return _context


# plain integers: an operator on pyzmq's enums costs as much as a small system call
POLLIN: Final = int(zmq.POLLIN)
POLLOUT: Final = int(zmq.POLLOUT)
_DONTWAIT: Final = int(zmq.DONTWAIT)
_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)


class Connection:
    """A socket from its connect to its close. Not thread-safe.

    Args:
        endpoint: "tcp://HOST:PORT" or "ipc://PATH".
    """

    def __init__(self, endpoint: str, profile: Profile) -> None:
        self.endpoint = endpoint
        socket = self._socket = context().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.CURVE_SERVERKEY, profile.server_key)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, profile.keys.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, profile.keys.secret)
        # a first byte of 0 is libzmq's own
        first = bytes([1 + secrets.randbelow(255)])
        socket.setsockopt(zmq.ROUTING_ID, first + secrets.token_bytes(ids.ROUTING_ID_BYTES - 1))
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, limits.HANDSHAKE_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, limits.FRAME_BYTES_MAX)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_IVL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        socket.setsockopt(zmq.SNDHWM, limits.SOCKET_HWM)
        socket.setsockopt(zmq.RCVHWM, limits.SOCKET_HWM)
        self._monitor: zmq.Socket[bytes] | None = socket.get_monitor_socket(_FAILURES)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError:
            self.close()
            raise
        self.fd = int(socket.getsockopt(zmq.FD))

    def events(self) -> int:
        """Return ZMQ_EVENTS; asking also lets libzmq take notice of what happened. 1.2 us."""
        return self._socket.getsockopt(zmq.EVENTS)  # type: ignore[return-value]

    def opened(self) -> None:
        """The connection stands: nothing more to learn from the monitor."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            self._socket.disable_monitor()
            monitor.close(0)

    def failure(self) -> tuple[str, bool] | None:
        """Say why the connection could not be made, as far as it is known by now.

        Returns:
            The reason, and whether the broker refused the key; None while there is hope.
        """
        while self._monitor is not None and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return "the broker refused this key", event["value"] >= ZAP_REFUSED
            if event["event"] == zmq.EVENT_CLOSED:
                return "connection refused", False
            return "the broker ended the handshake (another broker's key, or one that is starting)", False
        return None

    def take(self) -> tuple[bytes, bytes | None]:
        """Receive one message, of which ``events`` has told.

        Returns:
            The envelope and the body; frames beyond two are dropped.
        """
        # Frame.more costs nothing, RCVMORE a system call's worth
        frame = self._socket.recv(_DONTWAIT, copy=False)
        if not frame.more:
            return frame.bytes, None
        body = self._socket.recv(_DONTWAIT, copy=False)
        more = body.more
        while more:
            more = self._socket.recv(_DONTWAIT, copy=False).more
        return frame.bytes, body.bytes

    def send(self, envelope: bytes, body: bytes | None) -> None:
        """Send one message.

        Raises:
            zmq.Again: there is no connection (or one that has not read for thousands of messages).
        """
        if body is None:
            self._socket.send(envelope, _DONTWAIT)
        else:
            self._socket.send(envelope, _MORE)
            # a body is above pyzmq's own threshold for sharing instead of copying
            self._socket.send(body, _DONTWAIT, copy=False)

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what was sent has ``linger_ms`` to leave, in the background."""
        self.opened()
        self._socket.close(linger_ms)
