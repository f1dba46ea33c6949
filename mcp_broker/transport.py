"""ZeroMQ as all of ours use it: the context of a process, and a connection to a broker.

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
import struct
from typing import Final

import zmq

from mcp_broker import ids, limits

Context = zmq.Context[zmq.Socket[bytes]]

# plain integers: an operator on pyzmq's enums costs as much as a small system call
POLLIN: Final = int(zmq.POLLIN)
POLLOUT: Final = int(zmq.POLLOUT)
DONTWAIT: Final = int(zmq.DONTWAIT)
MORE: Final = int(zmq.SNDMORE | zmq.DONTWAIT)


def new_context() -> Context:
    """Make a process's only context.

    libzmq's I/O thread is scheduled as a batch thread: woken by a send, it does not take the core from the thread
    that sends, which is about to sleep anyway. That saves two context switches a message when cores are scarce
    (a quarter of the broker's CPU a call at 64 in flight on two cores), and costs nothing measurable when they
    are not. Source: sched(7), SCHED_BATCH; docs/adr/0004-io-threads-do-not-preempt.md.
    """
    context: Context = zmq.Context(io_threads=1)
    context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_BATCH)
    return context


_EVENTS: Final = int(zmq.EVENTS)


def has_input(socket: zmq.Socket[bytes]) -> bool:
    """Tell whether a message waits; asking also lets libzmq take notice of what happened. 1 us."""
    return bool(socket.getsockopt(_EVENTS) & POLLIN)  # type: ignore[operator]


#: the ZAP status of a key that will never be taken
ZAP_REFUSED: Final = 400

#: a monitor's first frame: event and value. zmq.utils.monitor, which reads the same, imports asyncio. See zmq_socket_monitor(3).
_MONITORED: Final = struct.Struct("=HI")

_FAILURES: Final = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Connection:
    """A DEALER from its connect to its close, with a fresh random routing id. Not thread-safe.

    Args:
        endpoint: "tcp://HOST:PORT" or "ipc://PATH".
        server_key, public_key, secret_key: CURVE keys, Z85.
        heartbeat_ms: ZMTP's interval and time-out, which find half-open TCP; liveness is the protocol's business.

    Raises:
        zmq.ZMQError: there is no such endpoint.
    """

    def __init__(
        self,
        context: Context,
        endpoint: str,
        *,
        server_key: bytes,
        public_key: bytes,
        secret_key: bytes,
        heartbeat_ms: tuple[int, int],
    ) -> None:
        self.endpoint = endpoint
        socket = self._socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public_key)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret_key)
        # a first byte of 0 is libzmq's own
        first = bytes([1 + secrets.randbelow(255)])
        socket.setsockopt(zmq.ROUTING_ID, first + secrets.token_bytes(ids.ROUTING_ID_BYTES - 1))
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, limits.HANDSHAKE_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, limits.FRAME_BYTES_MAX)
        socket.setsockopt(zmq.HEARTBEAT_IVL, heartbeat_ms[0])
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, heartbeat_ms[1])
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
        return self._socket.getsockopt(_EVENTS)  # type: ignore[return-value]

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
            event, value = _MONITORED.unpack(self._monitor.recv_multipart()[0])
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return "the broker refused this key", value >= ZAP_REFUSED
            if event == zmq.EVENT_CLOSED:
                return "connection refused", False
            return "the broker ended the handshake (another broker's key, or one that is starting)", False
        return None

    def take(self) -> tuple[bytes, memoryview | None]:
        """Receive one message, of which ``events`` has told.

        Returns:
            The envelope and the body; frames beyond two are dropped.
        """
        # Frame.more costs nothing, RCVMORE a system call's worth
        frame = self._socket.recv(DONTWAIT, copy=False)
        if not frame.more:
            return frame.bytes, None
        body = self._socket.recv(DONTWAIT, copy=False)
        more = body.more
        while more:
            more = self._socket.recv(DONTWAIT, copy=False).more
        # unpacked from where it lies: its values are copies anyway
        return frame.bytes, body.buffer

    def send(self, envelope: bytes, body: bytes | None) -> None:
        """Send one message.

        Raises:
            zmq.Again: there is no connection (or one that has not read for thousands of messages).
        """
        if body is None:
            self._socket.send(envelope, DONTWAIT)
        else:
            self._socket.send(envelope, MORE)
            # a body is above pyzmq's own threshold for sharing instead of copying
            self._socket.send(body, DONTWAIT)

    def wait_writable(self, timeout_s: float) -> None:
        """Wait until a message can be sent, or the time is over."""
        self._socket.poll(int(timeout_s * 1000) + 1, POLLOUT)

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what was sent has ``linger_ms`` to leave, in the background."""
        self.opened()
        self._socket.close(linger_ms)
