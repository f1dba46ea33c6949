"""Signals that end a running call: raised in the tool's own code, and nowhere else.

The supervisor writes the seq that it means into the shared page and sends SIGUSR1; SIGTERM means whatever runs, and
then the end of the worker. Only between :meth:`Interrupts.arm` and :meth:`Interrupts.disarm` does a handler raise:
raised in our own code, it would lose a message that was read or an outcome that was made.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from mcp_broker.wire.marks import Marks


#: signals that a worker handles, and a fork of it does not
HANDLED: Final = (signal.SIGUSR1, signal.SIGTERM)


class CallInterrupted(BaseException):
    """The running call was cancelled, or its time is over; no ``except Exception`` of a tool stops it."""


class Interrupts:
    """What runs now, and who may be interrupted.

    Args:
        marks: the pages shared with the supervisor.
        wake_fd: a handler writes one byte here, so that a wait in C ends.

    Attributes:
        armed: the seq whose tool code is on the stack; 0: none.
        asked: the seq that a signal meant while no tool code was on the stack; 0: none.
        started: writes down that a call starts, before any of its code runs.
        rested: writes down that nothing runs, before a wait for more.
        stopping: SIGTERM came.
        raised: the seq in whose tool code a handler raised last; C code may turn that into an error of its own.
        elsewhere: asked for a seq whose tool code is not on the stack (a waiting task).
    """

    __slots__ = (
        "_wake_fd",
        "armed",
        "asked",
        "elsewhere",
        "marks",
        "raised",
        "rested",
        "started",
        "stopping",
    )

    def __init__(self, marks: Marks, wake_fd: int) -> None:
        self.marks = marks
        self.started = marks.start
        self.rested = marks.rest
        self._wake_fd = wake_fd
        self.armed = 0
        self.asked = 0
        self.raised = 0
        self.stopping = False
        self.elsewhere: Callable[[int], None] | None = None

    def install(self) -> None:
        """Take over the worker's signals."""
        signal.signal(signal.SIGUSR1, self._on_interrupt)
        signal.signal(signal.SIGTERM, self._on_terminate)
        # Ctrl-C in the supervisor's terminal is the supervisor's to handle
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def relinquish(self) -> None:
        """Leave signals to their defaults, in a process that was forked off; what a tool does with one stays."""
        for number in HANDLED:
            if signal.getsignal(number) in {self._on_interrupt, self._on_terminate}:
                signal.signal(number, signal.SIG_DFL)
        self.armed = 0

    def forget(self) -> None:
        """Drop what signals asked for on an earlier connection."""
        self.asked = self.raised = 0

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Run our own code in the middle of a tool's: what interrupts the call meanwhile raises at the end.

        Raises:
            CallInterrupted: the call was interrupted.
        """
        seq, self.armed = self.armed, 0
        try:
            yield
        finally:
            self.armed = seq
        if seq and (self.asked == seq or self.stopping):
            self._raise()

    def _on_interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        seq = self.marks.interrupt_seq
        if seq and seq == self.armed:
            self._raise()
        self.asked = seq
        self._wake()
        if self.elsewhere is not None:
            self.elsewhere(seq)

    def _on_terminate(self, _signal: int, _frame: FrameType | None) -> None:
        self.stopping = True
        self._wake()
        if self.armed:
            self._raise()

    def _raise(self) -> NoReturn:
        self.raised, self.armed = self.armed, 0
        raise CallInterrupted

    def _wake(self) -> None:
        # a full pipe holds wake-ups enough
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_fd, b"\0")
