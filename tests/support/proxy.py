"""A TCP proxy that cuts connections, or stops forwarding and keeps them open (a half-open peer)."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class TcpProxy:
    """Forwards 127.0.0.1:port to a target, until told otherwise.

    Args:
        target: (host, port) to forward to.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._is_closed = False
        self.accepted = 0
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Close every connection that there is; new ones are forwarded."""
        with self._lock:
            for end in list(self._pairs):
                self._drop(end)

    def stall(self) -> None:
        """Keep what connections there are, but forward nothing on them any more; new ones are forwarded."""
        with self._lock:
            for end in list(self._pairs):
                self._selector.unregister(end)
            self._stalled = dict(self._pairs)
            self._pairs.clear()

    def close(self) -> None:
        self._is_closed = True
        self._waker.send(b"x")
        self._thread.join(5)
        for end in [*self._pairs, *getattr(self, "_stalled", {}), self._listener, self._waker, self._woken]:
            end.close()
        self._selector.close()

    def _serve(self) -> None:
        while not self._is_closed:
            for key, _ in self._selector.select(1.0):
                end = key.fileobj
                if end is self._listener:
                    self._accept()
                elif isinstance(end, socket.socket) and end is not self._woken:
                    with self._lock:
                        self._forward(end)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._target, 5)
        except OSError:
            near.close()
            return
        self.accepted += 1
        with self._lock:
            for one, other in ((near, far), (far, near)):
                one.settimeout(5)
                self._pairs[one] = other
                self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, end: socket.socket) -> None:
        other = self._pairs.get(end)
        if other is None:
            return
        try:
            data = end.recv(1 << 16)
            if data:
                other.sendall(data)
                return
        except OSError:
            pass
        self._drop(end)

    def _drop(self, end: socket.socket) -> None:
        other = self._pairs.pop(end, None)
        for one in (end, other):
            if one is not None:
                self._pairs.pop(one, None)
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(one)
                one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()
