"""Parts of streams that went to a client and may have been lost on the way.

A part is kept until its caller's credit covers it: a limit L says that the caller has all parts below L less the
stream's window. So at most a window of each stream is kept, and a session that resumes gets them again.

Source: docs/protocol.md, "Streams".
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core.calls import fault
from mcp_broker.core.outbox import Big
from mcp_broker.wire import messages

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.wire.messages import Part


class KeptParts:
    """The parts of one session's streams that its client has not confirmed.

    Attributes:
        by_call: call id -> entries in the order of their index; also of calls that have ended, until their
            outcome is acknowledged.
        size: bytes of all payloads kept.
    """

    __slots__ = ("by_call", "size")

    def __init__(self) -> None:
        self.by_call: dict[bytes, deque[Part | Big]] = {}
        self.size = 0

    def keep(self, entry: Part | Big) -> None:
        """Keep a part that is about to be sent.

        Over a bound, the stream forgets its oldest: a resume then shows its client a gap, which ends it with a
        typed error, and costs no other stream anything.
        """
        call_id = part_of(entry).call_id
        kept = self.by_call.get(call_id)
        if kept is None:
            kept = self.by_call[call_id] = deque()
        kept.append(entry)
        self.size += _size(entry)
        while kept and (self.size > limits.STREAM_KEPT_BYTES_MAX or len(kept) > limits.STREAM_WINDOW_MAX):
            self.size -= _size(kept.popleft())

    def cover(self, call_id: bytes, below: int) -> None:
        """Forget the parts with an index below this: the caller has them."""
        kept = self.by_call.get(call_id)
        while kept and part_of(kept[0]).index < below:
            self.size -= _size(kept.popleft())

    def forget(self, call_id: bytes) -> None:
        """Forget a call: its outcome has arrived, and with it all that came before."""
        for entry in self.by_call.pop(call_id, ()):
            self.size -= _size(entry)

    def clear(self) -> None:
        """Forget everything: nobody will ask."""
        self.by_call.clear()
        self.size = 0


def part_of(entry: Part | Big) -> Part:
    """Return the part of an entry, wherever its payload is."""
    part: Part = entry.item if isinstance(entry, Big) else entry  # type: ignore[assignment]
    return part


def _size(entry: Part | Big) -> int:
    if isinstance(entry, Big):
        return len(entry.body)
    return len(entry.body) if entry.body is not None else 0


def counted(call: Call, outcome: messages.Outcome) -> messages.Outcome:
    """Return what a stream's end comes to whose worker counts its parts differently."""
    if outcome.parts:
        text = f"the tool sent {outcome.parts} parts, of which {call.parts} reached the broker"
        return fault(call.call_id, "BROKER_LOST", text, {"parts": call.parts, "sent": outcome.parts})
    # a worker of before that field: they came in order, and nothing says that one is missing
    return messages.Outcome(
        outcome.call_id,
        outcome.code,
        outcome.body,
        outcome.usage,
        outcome.fault,
        call.parts,
        outcome.encoding,
    )
