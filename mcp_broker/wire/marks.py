"""The page that a worker shares with its supervisor, so that a death can say what had started.

Two unsigned 64-bit integers in native order: at 0, written by the worker before each call, the ``seq`` of the
call that it starts (a call starts in the order of its seq); at 8, written by the supervisor before it signals,
the ``seq`` that the signal is meant for, so that it never hits the next call. An aligned 8-byte store is atomic
on every machine that we run on. From 16 on a ring of the ids of the calls that it started last, each at the place of
its seq, written before the seq is: by them another broker knows what had started. Behind the ring, written by the
worker before it waits with nothing to run, the ``seq`` that it had started last: while the two are the same, it rests.

Behind the page, in the same file, is room for the stacks that the worker writes when it is asked to (SIGUSR2).
"""

from __future__ import annotations

from typing import Final

from mcp_broker import ids

MARKS_BYTES: Final = 4096
#: of the file: the page, and the room for stacks
FILE_BYTES: Final = MARKS_BYTES + 64 * 1024
_ID_BYTES: Final = ids.CALL_ID_BYTES
_RING_AT: Final = 16
#: ids that the ring holds
RING: Final = 240
_REST_AT: Final = _RING_AT + RING * _ID_BYTES


class Marks:
    """A view of the page; ``buffer`` is writable and at least MARKS_BYTES long (an mmap)."""

    __slots__ = ("_rest", "_ring", "_words")

    def __init__(self, buffer: memoryview) -> None:
        self._words = buffer[:_RING_AT].cast("Q")
        self._ring = buffer[_RING_AT:_REST_AT]
        self._rest = buffer[_REST_AT : _REST_AT + 8].cast("Q")

    @property
    def started_seq(self) -> int:
        """The last call that the worker started; 0 before its first."""
        return self._words[0]

    def start(self, seq: int, call_id: bytes) -> None:
        """Write down that a call starts."""
        at = seq % RING * _ID_BYTES
        self._ring[at : at + _ID_BYTES] = call_id
        self._words[0] = seq

    def rest(self) -> None:
        """Write down that nothing runs."""
        self._rest[0] = self._words[0]

    @property
    def is_resting(self) -> bool:
        """Nothing runs: what was started last has ended."""
        return self._rest[0] == self._words[0]

    def started_calls(self) -> tuple[bytes, ...]:
        """Return the ids of the calls that started last, the newest last; some never were (their place is old)."""
        last = self._words[0]
        places = (seq % RING * _ID_BYTES for seq in range(max(1, last - RING + 1), last + 1))
        found = (bytes(self._ring[at : at + _ID_BYTES]) for at in places)
        return tuple(call_id for call_id in found if any(call_id))

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
        self._ring.release()
        self._rest.release()
