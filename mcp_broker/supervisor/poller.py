"""Waiting on many descriptors in one thread; who registered is called when his is ready."""

from __future__ import annotations

import math
import select
from collections.abc import Callable

#: a hang-up or an error is news for the reader, who finds out what it is by reading
READ = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
WRITE = select.EPOLLOUT


def is_readable(fd: int, timeout_s: float) -> bool:
    """Wait for one descriptor, of whatever number (select() takes none above 1023); tell whether it has something."""
    waiter = select.poll()
    waiter.register(fd, select.POLLIN)
    return bool(waiter.poll(math.ceil(max(0.0, timeout_s) * 1000)))


class Poller:
    """An epoll with callbacks.

    Args:
        on_failure: told what a callback raised, and that it was one; without it that comes out of :meth:`turn`.
    """

    def __init__(self, on_failure: Callable[[str, Exception], None] | None = None) -> None:
        self._epoll = select.epoll()  # close-on-exec by itself
        self._on_failure = on_failure
        #: descriptor -> its registration, which is no other's: a number that was closed is soon another descriptor's
        self._waiting: dict[int, tuple[Callable[[int], None]]] = {}

    def add(self, fd: int, callback: Callable[[int], None], events: int = READ) -> None:
        """Call ``callback`` with the ready events whenever ``fd`` has some."""
        self._epoll.register(fd, events)
        self._waiting[fd] = (callback,)

    def change(self, fd: int, events: int) -> None:
        """Wait for other events on a registered descriptor."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget a descriptor; its owner closes it afterwards, never before."""
        if self._waiting.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def turn(self, timeout_s: float | None) -> None:
        """Wait for up to ``timeout_s`` (None: for ever) and call whoever has something."""
        # rounded up by epoll itself; a negative timeout means for ever
        ready = self._epoll.poll(-1.0 if timeout_s is None else max(0.0, timeout_s))
        for fd, events, waiting in [(fd, events, self._waiting.get(fd)) for fd, events in ready]:
            # an earlier callback of this turn may have removed it, and another descriptor may have its number by now
            if waiting is None or self._waiting.get(fd) is not waiting:
                continue
            try:
                waiting[0](events)
            except Exception as error:
                if self._on_failure is None:
                    raise
                self._on_failure("what followed an event", error)

    def close(self) -> None:
        """Let go of the epoll."""
        self._waiting.clear()
        self._epoll.close()
