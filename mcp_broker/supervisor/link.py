"""The supervisor's end of the socketpair to its broker: length-prefixed node messages, never blocking.

Source: docs/protocol.md, "Node link".
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.errors import WireError
from mcp_broker.supervisor import poller as polling
from mcp_broker.supervisor.containment import contained
from mcp_broker.wire import codec
from mcp_broker.wire.framing import FrameReader, frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.supervisor.poller import Poller
    from mcp_broker.wire.node import FromSupervisor, ToSupervisor

_READ_BYTES: Final = 256 * 1024
#: A broker that takes nothing while this much waits for it is stuck.
_BACKLOG_BYTES_MAX: Final = 2 * limits.NODE_BYTES_MAX


class _Unsent:
    """Bytes that wait to be sent, and the descriptor that goes with the first of them."""

    __slots__ = ("data", "descriptor")

    def __init__(self, data: bytes, descriptor: int | None) -> None:
        self.data = bytearray(data)
        self.descriptor = descriptor

    def send(self, through: socket.socket) -> None:
        """Send what goes now.

        Raises:
            OSError: nothing does.
        """
        if self.descriptor is None:
            sent = through.send(self.data)
        else:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.descriptor]))
            sent = through.sendmsg([self.data], [rights])
            self.close()
        del self.data[:sent]

    def close(self) -> None:
        """Let go of the descriptor."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Link:
    """One end of a socketpair.

    Args:
        end: our end; it becomes non-blocking and belongs to the link.
        poller: what waits on it.
        on_message: called with each message; one that it fails at costs no other.
        on_lost: called once, with the reason, when nothing can be sent any more. What the other end had said before may
            still come, until :meth:`close`.
    """

    def __init__(
        self,
        end: socket.socket,
        poller: Poller,
        on_message: Callable[[ToSupervisor], None],
        on_lost: Callable[[str], None],
    ) -> None:
        end.setblocking(False)
        self._socket = end
        self._poller = poller
        self._on_message = on_message
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._unsent: deque[_Unsent] = deque()
        self._unsent_bytes = 0
        self.is_open = True
        self._is_lost = False
        #: the other end takes nothing more; what it had sent before is still to be read
        self._is_deaf = False
        poller.add(end.fileno(), self._serve)

    def send(self, message: FromSupervisor, descriptor: int | None = None) -> None:
        """Send now what the socket takes, and the rest when it takes more. A closed or broken link drops it.

        Args:
            descriptor: a copy of it travels with the message.
        """
        if not self.is_open or self._is_deaf:
            return
        framed = frame(codec.encode(message))
        self._unsent_bytes += len(framed)
        if descriptor is None and self._unsent and self._unsent[-1].descriptor is None:
            self._unsent[-1].data += framed
        else:
            copy = None if descriptor is None else os.dup(descriptor)
            self._unsent.append(_Unsent(framed, copy))
        if self._unsent_bytes > _BACKLOG_BYTES_MAX:
            # whoever sends is in the middle of something: its last words are read when it is their turn, or by drain()
            self._deafen()
            self._tell_lost("it takes no messages")
            return
        self._flush()

    def drain(self) -> None:
        """Take what the other end, which is dead, had sent before."""
        while self.is_open and self._receive():
            pass

    def close(self) -> None:
        """Close our end, which the other one sees as end of file."""
        if self.is_open:
            self.is_open = False
            self._poller.remove(self._socket.fileno())
            self._socket.close()
            self._drop_unsent()

    def _drop_unsent(self) -> None:
        for unsent in self._unsent:
            unsent.close()
        self._unsent.clear()
        self._unsent_bytes = 0

    def _deafen(self) -> None:
        """Send nothing more."""
        self._is_deaf = True
        self._drop_unsent()
        self._poller.change(self._socket.fileno(), polling.READ)

    def _lose(self, reason: str) -> None:
        self.close()
        self._tell_lost(reason)

    def _tell_lost(self, reason: str) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._on_lost(reason)

    def _serve(self, events: int) -> None:
        if events & polling.WRITE:
            self._flush()
        if events & polling.READ:
            self._receive()

    def _flush(self) -> None:
        try:
            while self._unsent:
                first = self._unsent[0]
                before = len(first.data)
                first.send(self._socket)
                self._unsent_bytes -= before - len(first.data)
                if not first.data:
                    self._unsent.popleft()
        except BlockingIOError:
            pass
        except OSError:
            # it is gone, and its last words are in front of the end of file that is read next
            self._deafen()
            return
        waits = polling.READ | (polling.WRITE if self._unsent else 0)
        self._poller.change(self._socket.fileno(), waits)

    def _receive(self) -> bool:
        """Take one chunk; False when there is none."""
        try:
            chunk = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lose(f"its link broke: {error.strerror}")
            return False
        if not chunk:
            self._lose("it closed its link")
            return False
        try:
            for body in self._reader.feed(chunk):
                if self.is_open:
                    message = codec.to_supervisor.decode(body)
                    with contained("what the broker had said"):
                        self._on_message(message)
        except WireError as error:
            self._lose(f"it sent what is no message: {error}")
        return True
