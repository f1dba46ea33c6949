"""The supervisor's end of a worker's tether: a socketpair whose end of file means that the other one is gone.

The worker may run anybody's code, so what arrives is bounded in size, in kinds and in number. Whoever breaks a bound is
not argued with: the owner is told, and ends the worker. Descriptors are sent, never taken: the kernel closes those that
arrive with a packet that is read without room for them.

Source: docs/protocol.md, "Tether".
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.core.bucket import Bucket, Rate
from mcp_broker.errors import WireError
from mcp_broker.wire import codec, tether

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, TypeAlias

    from mcp_broker.supervisor.poller import Poller
    from mcp_broker.wire.tether import TetherMessage

    #: message type -> who takes messages of it
    Handlers: TypeAlias = Mapping[type[TetherMessage], Callable[[Any], None]]

_RATE: Final = Rate(limits.TETHER_MESSAGES_PER_S, limits.TETHER_MESSAGES_BURST)


def new_ends() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new tether, closed when a program is started: whoever is to inherit one is handed it."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Tether:
    """One worker's.

    Args:
        end: our end; it becomes non-blocking and belongs to the tether.
        handlers: a type of message without one may not be sent.
        on_violation: told once, with what the worker did that none of ours does; nothing is read from it after that.
        decoder: of what the worker may say.
    """

    def __init__(
        self,
        end: socket.socket,
        poller: Poller,
        handlers: Handlers,
        on_violation: Callable[[str], None],
        decoder: codec.Decoder[TetherMessage] = tether.from_worker,
    ) -> None:
        end.setblocking(False)
        self._socket = end
        self._poller = poller
        self._handlers = handlers
        self._on_violation = on_violation
        self._decode = decoder.decode
        self._bucket = Bucket(_RATE)
        self._is_open = self._is_heard = True
        poller.add(end.fileno(), self._serve)

    def send(self, message: TetherMessage, fd: int | None = None) -> None:
        """Send a message, and perhaps a copy of a descriptor; one that is gone hears nothing."""
        if not self._is_open:
            return
        packet = codec.encode(message)
        try:
            if fd is None:
                self._socket.send(packet)
            else:
                socket.send_fds(self._socket, [packet], [fd])
        except BlockingIOError:
            self._violate("it takes nothing from its tether")
        except OSError:
            # its end is reported by its pidfd
            self._unhear()

    def drain(self) -> None:
        """Take all that the worker has said so far; however fast it goes on, its rate ends that."""
        while self._is_heard and self._receive():
            pass

    def close(self) -> None:
        """Let go of our end."""
        if self._is_open:
            self._unhear()
            self._is_open = False
            self._socket.close()

    def _unhear(self) -> None:
        if self._is_heard:
            self._is_heard = False
            self._poller.remove(self._socket.fileno())

    def _violate(self, what: str) -> None:
        if self._is_heard:
            self._unhear()
            self._on_violation(what)

    def _serve(self, _events: int) -> None:
        """Take one packet a turn; whoever sends many waits for his turn like everybody."""
        self._receive()

    def _receive(self) -> bool:
        """Take one packet; False when there is none."""
        try:
            packet = self._socket.recv(limits.TETHER_BYTES_MAX + 1)
        except BlockingIOError:
            return False
        except OSError:
            packet = b""
        if not packet:
            # gone, or it closed its end, which harms nobody but itself
            self._unhear()
            return False
        self._take(packet)
        return True

    def _take(self, packet: bytes) -> None:
        now = time.monotonic()
        if self._bucket.wait_s(now):
            self._violate(
                f"it sent more than {_RATE.burst} messages, and {_RATE.per_s:g} more a second, on its tether"
            )
            return
        self._bucket.take(now)
        try:
            message = self._decode(packet)
        except WireError as error:
            self._violate(f"what it sent on its tether is no message: {error}")
            return
        handler = self._handlers.get(type(message))
        if handler is None:
            self._violate(f"it said {message.__struct_config__.tag} on its tether, which is not its to say")
            return
        handler(message)
