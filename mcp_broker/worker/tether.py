"""The worker's end of its tether to the supervisor: orders come in, requests go out, and its end is the worker's.

Source: docs/protocol.md, "Tether".
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, NamedTuple

from mcp_broker import limits
from mcp_broker.wire import codec, tether
from mcp_broker.wire.tether import Answer, Leased, Request, ReturnPort, TetherMessage

if TYPE_CHECKING:
    from collections.abc import Callable

_FD_BYTES: Final = array.array("i").itemsize


class Received(NamedTuple):
    """An answer, and the descriptor that came with it: from now on the caller's to close."""

    message: TetherMessage
    fd: int | None


class Tether:
    """Ends the process when the supervisor is gone; any thread may send.

    Args:
        fd: our end, inherited; it belongs to the tether.
        decoder: of what the supervisor may say.
    """

    def __init__(
        self,
        fd: int,
        decoder: codec.Decoder[TetherMessage] = tether.to_worker,
    ) -> None:
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._decode = decoder.decode
        self._lock = threading.Lock()
        self._orders: dict[type[TetherMessage], Callable[[], None]] = {}
        self._requests: dict[int, Future[Received]] = {}
        self._number = 0

    def watch(self) -> None:
        """Begin to listen. After everything that a thread must inherit, such as what confines the process."""
        threading.Thread(target=self._listen, name="tether", daemon=True).start()

    def on(self, kind: type[TetherMessage], callback: Callable[[], None]) -> None:
        """Call back, in the tether's own thread, whenever an order of this kind comes; before :meth:`watch`."""
        self._orders[kind] = callback

    def say(self, message: TetherMessage) -> None:
        """Send a message."""
        self._socket.send(codec.encode(message))

    def ask(self, request: Callable[[int], Request], timeout_s: float) -> Received:
        """Send a request and wait for its answer.

        Args:
            request: makes it, with the number that is free.

        Raises:
            TimeoutError: no answer came in time; one that comes later is let go of, with all that it lent.
        """
        future: Future[Received] = Future()
        with self._lock:
            self._number += 1
            number = self._number
            self._requests[number] = future
        try:
            self.say(request(number))
            return future.result(timeout_s)
        except BaseException:  # also an interrupt of the call that asks
            with self._lock:
                is_answered = self._requests.pop(number, None) is None
            if is_answered:
                self._let_go(*future.result())
            raise

    def _listen(self) -> None:
        # a process whose GIL is held by C code is ended by the death signal instead
        try:
            while packet := self._receive():
                self._take(*packet)
        finally:
            os._exit(0)

    def _receive(self) -> tuple[TetherMessage, int | None] | None:
        """Wait for one packet; None at the end of the tether."""
        try:
            packet, ancillary, _flags, _address = self._socket.recvmsg(
                limits.TETHER_BYTES_MAX, socket.CMSG_SPACE(_FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:  # gone, with words of ours unread
            return None
        if not packet:
            return None
        fds = array.array("i")
        for _level, _kind, data in ancillary:
            fds.frombytes(data)
        return self._decode(packet), (fds[0] if fds else None)

    def _take(self, message: TetherMessage, fd: int | None) -> None:
        if not isinstance(message, Answer):
            _close(fd)
            self._orders.get(type(message), _nothing)()
            return
        with self._lock:
            future = self._requests.pop(message.number, None)
            if future is not None:
                future.set_result(Received(message, fd))
        if future is None:
            self._let_go(message, fd)

    def _let_go(self, message: TetherMessage, fd: int | None) -> None:
        """Drop an answer that nobody waits for any more: what it lent would be this worker's for as long as it lives."""
        _close(fd)
        if isinstance(message, Leased):
            # after the socket is closed: who listens without a lease is killed
            with contextlib.suppress(OSError):
                self.say(ReturnPort(message.port))


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)


def _nothing() -> None:
    """Do nothing about an order that means nothing to this worker."""
