"""A port of the host that a tool may serve at, for as long as it needs it: lent by the supervisor, with its socket."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from mcp_broker import limits
from mcp_broker.core.bucket import Bucket, Rate
from mcp_broker.errors import PORT_ERRORS, PortError
from mcp_broker.wire.tether import Leased, LeasePort, LeaseRefused, ReturnPort
from mcp_broker.worker import forks

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from mcp_broker.worker.tether import Tether

_MS: Final = 1000
#: each lease is two messages, and the supervisor ends a worker that sends more than it may: half of that is for others
_RATE: Final = Rate(limits.TETHER_MESSAGES_PER_S / 4, limits.TETHER_MESSAGES_BURST // 4)


class LeasedPort:
    """A listening socket and its address. Leaving its `with` block gives the port back.

    Attributes:
        host: the address that it is bound to.
        port: its number.
        socket: listens already; blocking.
    """

    def __init__(
        self, host: str, port: int, listener: socket.socket, give_back: Callable[[int], None]
    ) -> None:
        self.host = host
        self.port = port
        self.socket = listener
        self._give_back = give_back
        self._is_open = True

    def close(self) -> None:
        """Give the port back; it stops listening."""
        if self._is_open:
            self._is_open = False
            self.socket.close()
            self._give_back(self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class Lender:
    """Asks the supervisor for ports.

    Args:
        tether: to it.
        clock: monotonic seconds.
        sleep: lets so many seconds pass.
    """

    def __init__(
        self,
        tether: Tether,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._tether = tether
        self._clock = clock
        self._sleep = sleep
        self._bucket = Bucket(_RATE)
        self._lock = threading.Lock()

    def lease(self, port: int, ttl_s: float | None) -> LeasedPort:
        """Lease a port. Who asks again and again waits for its turn.

        Raises:
            PortError: one of its kinds says why not.
        """

        def wish(number: int) -> LeasePort:
            return LeasePort(number, port, None if ttl_s is None else max(1, int(ttl_s * _MS)))

        if forks.is_fork:
            raise PortError(
                "a port is leased in the process that the tool was called in; this one was forked off it"
            )
        self._wait()
        try:
            answer, fd = self._tether.ask(wish, limits.PORT_WAIT_S)
        except TimeoutError:
            raise PortError("the supervisor did not answer in time") from None
        if isinstance(answer, LeaseRefused):
            raise PORT_ERRORS.get(answer.code, PortError)(answer.message)
        if not isinstance(answer, Leased):
            raise PortError("the supervisor's answer is none to a wish for a port")
        if fd is None:
            # it would stay leased, and nobody could serve at it
            self._returned(answer.port)
            raise PortError("the port's socket could not be taken: too many files are open here")
        listener = socket.socket(fileno=fd)
        listener.setblocking(True)
        return LeasedPort(answer.host, answer.port, listener, self._returned)

    def _wait(self) -> None:
        """Wait until the supervisor takes another request."""
        while True:
            with self._lock:
                now = self._clock()
                wait_s = self._bucket.wait_s(now)
                if not wait_s:
                    self._bucket.take(now)
                    return
            self._sleep(wait_s)

    def _returned(self, port: int) -> None:
        self._tether.say(ReturnPort(port))
