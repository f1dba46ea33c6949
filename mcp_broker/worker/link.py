"""The worker's connection to its broker, and the wake-up pipe."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

from mcp_broker import transport
from mcp_broker.transport import POLLIN, POLLOUT, Connection

if TYPE_CHECKING:
    from mcp_broker.wire.node import WorkerBoot

#: the broker's heartbeats are ours (docs/protocol.md); libzmq's find a half-open TCP connection under them
_HEARTBEAT_MS: Final = (2000, 2000)
#: how long a connection may take to stand before a message counts as not to be sent
_STUCK_S: Final = 1.5
#: how often to look whether an attempt to connect has failed; success is told by the fd
_OPENING_TICK_S: Final = 0.02


class LinkLost(Exception):  # noqa: N818 (an event, not a fault)
    """The connection is gone; open a new one."""


class Link:
    """A connection that is opened anew, with a new routing id, whenever it is lost.

    Args:
        boot: address and keys.
        wake_fd: readable when a wait must end.
    """

    def __init__(self, boot: WorkerBoot, wake_fd: int) -> None:
        self._boot = boot
        self.wake_fd = wake_fd
        self._context = transport.new_context()
        self._connection: Connection | None = None
        #: the handshake is through
        self._stands = False
        self._poller = select.poll()

    def open(self) -> None:
        """Begin to connect; :meth:`wait` and :meth:`send` find out how that goes."""
        self.close()
        boot = self._boot
        connection = self._connection = Connection(
            self._context,
            boot.endpoint,
            server_key=z85.encode(boot.server_public),
            public_key=z85.encode(boot.public),
            secret_key=z85.encode(boot.secret),
            heartbeat_ms=_HEARTBEAT_MS,
        )
        self._stands = False
        self._poller = select.poll()
        self._poller.register(connection.fd, select.POLLIN)
        self._poller.register(self.wake_fd, select.POLLIN)

    @property
    def is_open(self) -> bool:
        """Tell whether there is a connection, or the beginning of one."""
        return self._connection is not None

    @property
    def fd(self) -> int:
        """The socket's edge-triggered file descriptor: it tells of news, :meth:`is_readable` of what is."""
        return self._opened().fd

    def tick_s(self, timeout_s: float) -> float:
        """Return how long to wait at most before looking again."""
        return timeout_s if self._stands else min(timeout_s, _OPENING_TICK_S)

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message, a wake-up, or the end of the time; True if there is a message.

        Raises:
            LinkLost: the connection is gone.
        """
        if self.is_readable():
            return True
        for fd, _ in self._poller.poll(self.tick_s(timeout_s) * 1000 + 1):
            if fd == self.wake_fd:
                self.drain_wake()
        return self.is_readable()

    def wait_closed(self, timeout_s: float | None) -> None:
        """Wait without a connection, for a wake-up or the end of the time (None: for ever)."""
        if select.select([self.wake_fd], [], [], timeout_s)[0]:
            self.drain_wake()

    def drain_wake(self) -> None:
        """Empty the wake-up pipe."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_fd, 4096)

    def is_readable(self) -> bool:
        """Tell whether a message waits.

        Raises:
            LinkLost: none does, and the connection is gone.
        """
        connection = self._opened()
        events = connection.events()
        if events & POLLIN:
            return True
        if events & POLLOUT:
            if not self._stands:
                self._stands = True
                connection.opened()
        elif self._stands or connection.failure() is not None:
            raise LinkLost
        return False

    def receive(self) -> tuple[bytes, memoryview | None]:
        """Return the message that waits: its envelope and its second frame."""
        return self._opened().take()

    def send(self, envelope: bytes, body: bytes | None) -> None:
        """Hand a message to libzmq.

        Raises:
            LinkLost: there is no connection, or it takes nothing.
        """
        connection = self._opened()
        give_up_at = 0.0
        while True:
            try:
                connection.send(envelope, body)
                return
            except zmq.Again:
                now = time.monotonic()
                give_up_at = give_up_at or now + _STUCK_S
                if self._stands or now >= give_up_at or connection.failure() is not None:
                    raise LinkLost from None
                connection.wait_writable(_OPENING_TICK_S)
            except zmq.ZMQError as error:
                raise LinkLost from error

    def close(self, linger_ms: int = 0) -> None:
        """Close the connection; ``linger_ms`` is for what was sent last."""
        if self._connection is not None:
            self._connection.close(linger_ms)
        self._connection = None

    def end(self, linger_ms: int) -> None:
        """Close for good."""
        self.close(linger_ms)
        self._context.term()

    def _opened(self) -> Connection:
        if self._connection is None:
            raise LinkLost
        return self._connection
