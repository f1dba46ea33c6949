"""The page that a worker shares with its supervisor, so that a death can say what had started.

Two unsigned 64-bit integers in native order: at 0, written by the worker before each call, the ``seq`` of the
call that it starts (a call starts in the order of its seq); at 8, written by the supervisor before it signals,
the ``seq`` that the signal is meant for, so that it never hits the next call. An aligned 8-byte store is atomic
on every machine that we run on.
"""

from __future__ import annotations

from typing import Final

MARKS_BYTES: Final = 4096


class Marks:
    """A view of the page; ``buffer`` is writable and at least MARKS_BYTES long (an mmap)."""

    __slots__ = ("_words",)

    def __init__(self, buffer: memoryview) -> None:
        self._words = buffer[:16].cast("Q")

    @property
    def started_seq(self) -> int:
        """The last call that the worker started; 0 before its first."""
        return self._words[0]

    def start(self, seq: int) -> None:
        """Write down that a call starts."""
        self._words[0] = seq

    @property
    def interrupt_seq(self) -> int:
        """The call that the supervisor's latest signal is meant for; 0 before the first."""
        return self._words[1]

    @interrupt_seq.setter
    def interrupt_seq(self, seq: int) -> None:
        self._words[1] = seq

    def release(self) -> None:
        """Let go of the buffer, so that its mmap can close."""
        self._words.release()
