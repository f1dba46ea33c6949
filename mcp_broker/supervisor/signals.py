"""Signals of the supervisor as descriptors: the handler does nothing, its number arrives in the loop."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mcp_broker.supervisor.poller import Poller


def has_terminal() -> bool:
    """Tell whether this process has a controlling terminal; one that was hung up is none."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def ends_with_terminal() -> bool:
    """Tell whether this process is to end when its terminal is closed: it has one, and was not started by nohup."""
    return has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


class Signals:
    """Takes over some signals until it is closed. Main thread only.

    Args:
        numbers: which; also those that our parent had us ignore, as a shell does for background jobs.
        on_signal: called in the loop, once for each that came.
    """

    def __init__(self, numbers: Sequence[int], poller: Poller, on_signal: Callable[[int], None]) -> None:
        self._numbers = frozenset(numbers)
        self._on_signal = on_signal
        self._poller = poller
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        poller.add(self._reader.fileno(), self._hear)
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda _number, _frame: None) for number in numbers}

    def _hear(self, _events: int) -> None:
        for number in self._reader.recv(64):
            if number in self._numbers:
                self._on_signal(number)

    def close(self) -> None:
        """Give the signals back."""
        signal.set_wakeup_fd(self._wakeup_fd)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._poller.remove(self._reader.fileno())
        self._reader.close()
        self._writer.close()
