"""The broker's end of the socketpair to its supervisor."""

from __future__ import annotations

import array
import socket
from collections import deque
from typing import Final

from mcp_broker.errors import MalformedFrame
from mcp_broker.wire import codec, node
from mcp_broker.wire.framing import FrameReader, frame

_READ_BYTES: Final = 256 * 1024
#: the kernel ends a read after the bytes that came with descriptors, and our supervisor sends one at a time
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(array.array("i").itemsize)


class SupervisorGone(Exception):  # noqa: N818 (a fact, not a fault)
    """The supervisor closed its end, or died: the broker ends with it."""


class NodeLink:
    """Reads without blocking; writes with a short bound, since the supervisor always reads."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._reader = FrameReader()
        self._unsent = bytearray()
        #: those that came with messages, in their order, and were not asked for yet
        self._descriptors: deque[int] = deque()

    def fileno(self) -> int:
        """Return the fd to poll."""
        return self._socket.fileno()

    def receive(self) -> list[node.FromSupervisor]:
        """Return the messages that are there.

        Raises:
            SupervisorGone: end of file.
        """
        try:
            received, ancillary, _, _ = self._socket.recvmsg(
                _READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return []
        except OSError as error:
            raise SupervisorGone from error
        if not received:
            raise SupervisorGone
        for _, _, data in ancillary:
            self._descriptors.extend(array.array("i", data))
        return [codec.from_supervisor.decode(body) for body in self._reader.feed(received)]

    def next_descriptor(self) -> int:
        """Return the descriptor that came with the earliest message that carries one, and was not taken yet.

        Raises:
            LookupError: there is none.
        """
        return self._descriptors.popleft()

    def wait_for_boot(self, timeout_s: float) -> tuple[node.Boot, list[node.FromSupervisor]]:
        """Block until BOOT and all that is said with it is there, which a REPORT ends; returns both.

        Whoever served before would take calls of tools that an operator had disabled under an earlier broker.

        Raises:
            SupervisorGone: nobody is there.
            MalformedFrame: something else came first.
        """
        self._socket.settimeout(timeout_s)
        try:
            messages: list[node.FromSupervisor] = []
            while not any(isinstance(message, node.Report) for message in messages):
                messages += self.receive()
        finally:
            self._socket.setblocking(False)
        first, *rest = messages
        if not isinstance(first, node.Boot):
            raise MalformedFrame(f"the supervisor said {type(first).__name__} before BOOT")
        return first, rest

    def close(self) -> None:
        """Close our end; the supervisor takes it for our death."""
        self._socket.close()

    def send(self, message: node.NodeMessage) -> None:
        """Queue a message and send what goes."""
        self._unsent += frame(codec.encode(message))
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as it goes now."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise SupervisorGone from error
            del self._unsent[:sent]
