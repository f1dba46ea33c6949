"""The worker's connection to its broker: one DEALER socket a connection, its monitor, and the wake-up pipe."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

from mcp_broker import ids, limits

if TYPE_CHECKING:
    from mcp_broker.wire.node import WorkerBoot

#: the broker's heartbeats are ours (docs/protocol.md); libzmq's find a half-open TCP connection under them
_ZMTP_HEARTBEAT_MS: Final = 2000
#: how long a full send queue may stay full before the connection counts as gone
_STUCK_S: Final = 1.5
_GONE: Final = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


# plain integers: an operator on pyzmq's enums costs as much as a small system call
_DONTWAIT: Final = int(zmq.DONTWAIT)
_POLLIN: Final = int(zmq.POLLIN)


class LinkLost(Exception):  # noqa: N818 (an event, not a fault)
    """The connection is gone; open a new one."""


class Link:
    """A connection that is opened anew, with a new routing id, whenever it is lost.

    libzmq does not reconnect by itself: a message that it kept would reach a new broker before REGISTER.

    Args:
        boot: address and keys.
        wake_fd: readable when a wait must end.
    """

    def __init__(self, boot: WorkerBoot, wake_fd: int) -> None:
        self._boot = boot
        self.wake_fd = wake_fd
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()

    def open(self) -> None:
        """Begin to connect; :meth:`wait` and :meth:`send` find out how that goes."""
        self.close()
        boot = self._boot
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, b"\x01" + secrets.token_bytes(ids.ROUTING_ID_BYTES - 1))
        socket.setsockopt(zmq.CURVE_SERVERKEY, z85.encode(boot.server_public))
        socket.setsockopt(zmq.CURVE_PUBLICKEY, z85.encode(boot.public))
        socket.setsockopt(zmq.CURVE_SECRETKEY, z85.encode(boot.secret))
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, limits.HANDSHAKE_MS)
        socket.setsockopt(zmq.HEARTBEAT_IVL, _ZMTP_HEARTBEAT_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, limits.FRAME_BYTES_MAX)
        socket.setsockopt(zmq.SNDHWM, limits.SOCKET_HWM)
        socket.setsockopt(zmq.RCVHWM, limits.SOCKET_HWM)
        self._monitor = socket.get_monitor_socket(_GONE)
        socket.connect(boot.endpoint)
        self._socket = socket
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self.wake_fd, zmq.POLLIN)

    @property
    def is_open(self) -> bool:
        """Tell whether there is a connection, or the beginning of one."""
        return self._socket is not None

    @property
    def fds(self) -> tuple[int, int]:
        """The sockets' edge-triggered file descriptors; after each one, look at :meth:`is_readable`."""
        return self._opened().fileno(), self._opened_monitor().fileno()

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message, a wake-up, or the end of the time; True if there is a message.

        Raises:
            LinkLost: the connection is gone.
        """
        socket = self._opened()
        ready = dict(self._poller.poll(max(0, int(timeout_s * 1000 + 0.999))))
        if self.wake_fd in ready:
            self.drain_wake()
        if self._monitor in ready and socket not in ready:
            raise LinkLost
        return socket in ready

    def wait_closed(self, timeout_s: float) -> None:
        """Wait without a connection, for a wake-up or the end of the time."""
        poller = zmq.Poller()
        poller.register(self.wake_fd, zmq.POLLIN)
        if poller.poll(int(timeout_s * 1000 + 0.999)):
            self.drain_wake()

    def drain_wake(self) -> None:
        """Empty the wake-up pipe."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_fd, 4096)

    def is_readable(self) -> bool:
        """Tell whether a message waits."""
        return _has_input(self._opened())

    def is_lost(self) -> bool:
        """Tell whether the monitor saw the end of the connection."""
        return self._monitor is None or _has_input(self._monitor)

    def receive(self) -> list[bytes]:
        """Return the message that waits, as frames."""
        socket = self._opened()
        # Frame.more costs a tenth of getsockopt(RCVMORE)
        frame = socket.recv(_DONTWAIT, copy=False)
        frames = [frame.bytes]
        while frame.more:
            frame = socket.recv(_DONTWAIT, copy=False)
            frames.append(frame.bytes)
        return frames

    def send(self, frames: list[bytes]) -> None:
        """Hand a message to libzmq.

        Raises:
            LinkLost: there is no connection, or it takes nothing.
        """
        socket = self._opened()
        give_up_at = time.monotonic() + _STUCK_S
        while True:
            try:
                if len(frames) == 1:
                    socket.send(frames[0], _DONTWAIT)
                else:
                    socket.send_multipart(frames, _DONTWAIT)
                return
            except zmq.Again:
                # a handshake under way, or a full queue
                left_s = give_up_at - time.monotonic()
                if left_s <= 0 or self.is_lost():
                    raise LinkLost from None
                socket.poll(min(50, int(left_s * 1000) + 1), zmq.POLLOUT)
            except zmq.ZMQError as error:
                raise LinkLost from error

    def close(self, linger_ms: int = 0) -> None:
        """Close the connection; ``linger_ms`` is for what was sent last."""
        if self._socket is not None:
            self._socket.disable_monitor()
            if self._monitor is not None:
                self._monitor.close(0)
            self._socket.close(linger_ms)
        self._socket = self._monitor = None

    def end(self, linger_ms: int) -> None:
        """Close for good."""
        self.close(linger_ms)
        self._context.term()

    def _opened(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            raise LinkLost
        return self._socket

    def _opened_monitor(self) -> zmq.Socket[bytes]:
        if self._monitor is None:
            raise LinkLost
        return self._monitor


def _has_input(socket: zmq.Socket[bytes]) -> bool:
    events = socket.getsockopt(zmq.EVENTS)
    return bool(int(events) & _POLLIN)
