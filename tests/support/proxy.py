"""A TCP proxy with faults: it cuts connections, or keeps them and forwards nothing. Needs only the standard library."""

from __future__ import annotations

import selectors
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

CHUNK_BYTES = 256 * 1024


class TcpProxy:
    """Forwards connections to ``target`` ("tcp://HOST:PORT" or (host, port)).

    ``cut`` ends all connections of the moment at once; new ones are taken. ``stall`` makes the path half-open:
    both ends stay connected, nothing is forwarded any more, and new connections are taken and stall too, unless
    ``only_existing``. ``resume`` forwards again, first what waited, also over stalled connections.
    """

    def __init__(self, target: str | tuple[str, int]) -> None:
        if isinstance(target, str):
            host, _, port = target.removeprefix("tcp://").rpartition(":")
            target = (host, int(port))
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._peer: dict[socket.socket, socket.socket] = {}
        self._stalled: set[socket.socket] = set()
        self._stall_new = False
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._running = False
        #: connections taken so far
        self.accepted = 0

    @property
    def port(self) -> int:
        """The port to connect to, on 127.0.0.1."""
        return int(self._listener.getsockname()[1])

    @property
    def endpoint(self) -> str:
        """The address to connect to, for ZeroMQ."""
        return f"tcp://127.0.0.1:{self.port}"

    def start(self) -> TcpProxy:
        """Begin to forward."""
        self._running = True
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread.start()
        return self

    def cut(self) -> None:
        """End all connections."""
        with self._lock:
            for end in list(self._peer):
                self._shut(end)
        self._wake()

    def stall(self, *, only_existing: bool = False) -> None:
        """Forward nothing any more, and keep the connections."""
        with self._lock:
            self._stalled |= set(self._peer)
            self._stall_new = not only_existing
            for end in self._stalled:
                self._watch(end, on=False)
        self._wake()

    def resume(self) -> None:
        """Forward again."""
        with self._lock:
            self._stall_new = False
            for end in self._stalled:
                self._watch(end, on=True)
            self._stalled.clear()
        self._wake()

    def stop(self) -> None:
        """End all connections and the proxy."""
        self._running = False
        self._wake()
        self._thread.join(5)
        with self._lock:
            for end in list(self._peer):
                end.close()
            self._peer.clear()
        for thing in (self._listener, self._wake_read, self._wake_write, self._selector):
            thing.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wake(self) -> None:
        self._wake_write.send(b"w")

    def _run(self) -> None:
        while self._running:
            for key, _ in self._selector.select(1):
                with self._lock:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._wake_read:
                        self._wake_read.recv(64)
                    elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._peer:
                        self._forward(key.fileobj)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        self.accepted += 1
        try:
            far = socket.create_connection(self._target, timeout=2)
        except OSError:
            near.close()
            return
        far.settimeout(5)
        near.settimeout(5)
        self._peer[near], self._peer[far] = far, near
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._stall_new:
                self._stalled.add(end)
            else:
                self._watch(end, on=True)

    def _forward(self, end: socket.socket) -> None:
        if end in self._stalled:
            return
        try:
            data = end.recv(CHUNK_BYTES)
            if data:
                self._peer[end].sendall(data)
                return
        except OSError:
            pass
        self._shut(end)

    def _watch(self, end: socket.socket, *, on: bool) -> None:
        known = end in self._selector.get_map()
        if on and not known:
            self._selector.register(end, selectors.EVENT_READ)
        elif known and not on:
            self._selector.unregister(end)

    def _shut(self, end: socket.socket) -> None:
        other = self._peer.pop(end, None)
        if other is None:
            return
        self._peer.pop(other, None)
        for one in (end, other):
            self._watch(one, on=False)
            self._stalled.discard(one)
            one.close()
