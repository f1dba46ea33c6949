"""The supervisor's end of the socketpair to its broker: length-prefixed node messages, never blocking.

Source: docs/protocol.md, "Node link".
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.errors import WireError
from mcp_broker.supervisor import poller as polling
from mcp_broker.wire import codec
from mcp_broker.wire.framing import FrameReader, frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.supervisor.poller import Poller
    from mcp_broker.wire.node import FromSupervisor, ToSupervisor

_READ_BYTES: Final = 256 * 1024
#: A broker that takes nothing while this much waits for it is stuck.
_BACKLOG_BYTES_MAX: Final = 2 * limits.NODE_BYTES_MAX


class Link:
    """One end of a socketpair.

    Args:
        end: our end; it becomes non-blocking and belongs to the link.
        poller: what waits on it.
        on_message: called with each message.
        on_lost: called once, with the reason, when the link can no longer be used.
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
        self._unsent = bytearray()
        self.is_open = True
        poller.add(end.fileno(), self._serve)

    def send(self, message: FromSupervisor) -> None:
        """Send now what the socket takes, and the rest when it takes more. A closed link drops it."""
        if not self.is_open:
            return
        self._unsent += frame(codec.encode(message))
        if len(self._unsent) > _BACKLOG_BYTES_MAX:
            self._lose("it takes no messages")
            return
        self._flush()

    def close(self) -> None:
        """Close our end, which the other one sees as end of file."""
        if self.is_open:
            self.is_open = False
            self._poller.remove(self._socket.fileno())
            self._socket.close()

    def _lose(self, reason: str) -> None:
        self.close()
        self._on_lost(reason)

    def _serve(self, events: int) -> None:
        if events & polling.WRITE:
            self._flush()
        if events & polling.READ:
            self._receive()

    def _flush(self) -> None:
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(f"its link broke: {error.strerror}")
            return
        waits = polling.READ | (polling.WRITE if self._unsent else 0)
        self._poller.change(self._socket.fileno(), waits)

    def _receive(self) -> None:
        try:
            chunk = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(f"its link broke: {error.strerror}")
            return
        if not chunk:
            self._lose("it closed its link")
            return
        try:
            for body in self._reader.feed(chunk):
                if self.is_open:
                    self._on_message(codec.to_supervisor.decode(body))
        except WireError as error:
            self._lose(f"it sent what is no message: {error}")
