"""The pages that a worker shares with its supervisor, so that a death can say what had started.

Two unsigned 64-bit integers in native order: at 0, written by the worker before each call, the ``seq`` of the
call that it starts (a call starts in the order of its seq); at 8, written by the supervisor before it signals,
the ``seq`` that the signal is meant for, so that it never hits the next call. An aligned 8-byte store is atomic
on every machine that we run on. From 16 on a ring of the ids of the calls that it started last, each at the place of
its seq, written before the seq is: by them another broker knows what had started. Behind the ring, written by the
worker before it waits with nothing to run, the ``seq`` that it had started last: while the two are the same, it rests.
Then, of a detached call, its ``seq`` and its deadline, nanoseconds of the monotonic clock: nobody need ask for it meanwhile.
A second page has places for the ids of calls that run beside each other: there a long one stays while the ring goes round.

Behind these pages, in the same file, is room for the stacks that the worker writes when it is asked to (SIGUSR2).
"""

from __future__ import annotations

from typing import Final

from mcp_broker import ids

_PAGE_BYTES: Final = 4096
MARKS_BYTES: Final = 2 * _PAGE_BYTES
#: of the file: the pages, and the room for stacks
FILE_BYTES: Final = MARKS_BYTES + 64 * 1024
_ID_BYTES: Final = ids.CALL_ID_BYTES
_RING_AT: Final = 16
#: ids that the ring holds
RING: Final = 240
_REST_AT: Final = _RING_AT + RING * _ID_BYTES
_SPARED_AT: Final = _REST_AT + 8
#: calls that run beside each other, at most
BESIDE: Final = _PAGE_BYTES // _ID_BYTES


class Marks:
    """A view of the pages; ``buffer`` is writable and at least MARKS_BYTES long (an mmap)."""

    __slots__ = ("_beside", "_free", "_places", "_rest", "_ring", "_spared", "_words")

    def __init__(self, buffer: memoryview) -> None:
        self._words = buffer[:_RING_AT].cast("Q")
        self._ring = buffer[_RING_AT:_REST_AT]
        self._rest = buffer[_REST_AT : _REST_AT + 8].cast("Q")
        self._spared = buffer[_SPARED_AT : _SPARED_AT + 16].cast("Q")
        self._beside = buffer[_PAGE_BYTES:MARKS_BYTES]
        # the worker's only: who reads need not know which places are free
        self._places: dict[bytes, int] = {}
        self._free: list[int] = []

    @property
    def started_seq(self) -> int:
        """The last call that the worker started; 0 before its first."""
        return self._words[0]

    def start(self, seq: int, call_id: bytes) -> None:
        """Write down that a call starts."""
        at = seq % RING * _ID_BYTES
        self._ring[at : at + _ID_BYTES] = call_id
        self._words[0] = seq

    def start_beside(self, seq: int, call_id: bytes) -> None:
        """Write down that a call starts beside others: more may start while it runs than the ring has places."""
        place = self._free.pop() if self._free else len(self._places)
        if place < BESIDE and call_id not in self._places:
            self._places[call_id] = place
            at = place * _ID_BYTES
            self._beside[at : at + _ID_BYTES] = call_id
        self.start(seq, call_id)

    def end(self, call_id: bytes) -> None:
        """Let another call have the place of one that has ended; until then its id stays there, which is as true."""
        place = self._places.pop(call_id, None)
        if place is not None:
            self._free.append(place)

    def spare(self, seq: int, deadline: float) -> None:
        """Write down that a call is detached, and when it ends at the latest, seconds of the monotonic clock."""
        self._spared[1] = int(deadline * 1e9)
        self._spared[0] = seq

    @property
    def spared_until(self) -> float:
        """When the detached call that runs ends at the latest, seconds of the monotonic clock; 0.0: there is none."""
        runs = self._spared[0] == self._words[0] and not self.is_resting
        return self._spared[1] * 1e-9 if runs else 0.0

    def rest(self) -> None:
        """Write down that nothing runs."""
        self._rest[0] = self._words[0]

    @property
    def is_resting(self) -> bool:
        """Nothing runs: what was started last has ended."""
        return self._rest[0] == self._words[0]

    def started_calls(self) -> tuple[bytes, ...]:
        """Return the ids of the calls that started last, the newest last, and behind them those that ran beside each other."""
        last = self._words[0]
        places = (seq % RING * _ID_BYTES for seq in range(max(1, last - RING + 1), last + 1))
        found = [bytes(self._ring[at : at + _ID_BYTES]) for at in places]
        found += (bytes(self._beside[at : at + _ID_BYTES]) for at in range(0, _PAGE_BYTES, _ID_BYTES))
        # some places are empty, and most calls stand in both
        return tuple(dict.fromkeys(call_id for call_id in reversed(found) if any(call_id)))[::-1]

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
        self._spared.release()
        self._beside.release()
