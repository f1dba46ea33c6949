"""A client's unfinished calls: each ends exactly once, whatever the broker says or leaves unsaid.

::

    submit()            batches()                 outcome, or an end of our own before it was ever sent
    --------> [QUEUED] -----------> [SENT] ---------------------------------------------> [ENDED]
                 ^  put back, resume  |  an end of our own: cancel, deadline, gap            ^
                 '--------------------+------------------------> [ABANDONED] ----------------'
                                                                   outcome, or its time is over

An ABANDONED call has ended for its caller, and keeps its place in the window until the broker has answered too.

Source: docs/protocol.md, "Life of a call" and "Streams".
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from mcp_broker import errors, ids, limits
from mcp_broker.client.session.pending import (
    Ended,
    PendingCall,
    Stage,
    Wishes,
    no_such_time,
    read,
    read_outcome,
)
from mcp_broker.client.session.uploads import Uploads
from mcp_broker.wire import messages
from mcp_broker.wire.messages import Call, Message, Outcome, Part, Progress
from mcp_broker.wire.structs import replaced

#: a message and its body frame
Packed = tuple[Message, bytes | None]
T = TypeVar("T")

#: the client ends a call itself this long after its deadline, when the broker says nothing
GRACE_S: Final = 0.5
#: a call that waited longer than this is packed again, with what is left of its time
FRESH_S: Final = 0.002


_QUEUED, _SENT, _ABANDONED, _ENDED = Stage.QUEUED, Stage.SENT, Stage.ABANDONED, Stage.ENDED


class CallBook:
    """The calls of one client.

    Args:
        prefix: 8 random bytes, the first part of every call id.

    Attributes:
        progressed: call id -> its newest progress since the shell last took this map, as (call, fraction, text).
        arrived: streamed parts since the shell last took this list, as (call, part).
        calls: all and only calls whose stage is not ENDED, in order of submission.
        cancels: calls that the broker is to cancel.
        credits: call id to the new limit that the broker is to hear of.
        due: no call needs :meth:`expire` before this instant.
        ended: calls that ended since the shell last took this list, in order.
        in_flight: how many calls are SENT or ABANDONED.
        late: outcomes of calls that had ended here before.
        stream_window: a stream's first limit.
    """

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self._counter = 0
        self.calls: dict[bytes, PendingCall] = {}
        #: all QUEUED calls, and some that are not any more
        self.queue: deque[PendingCall] = deque()
        self.in_flight = 0
        self.cancels: list[bytes] = []
        self.credits: dict[bytes, int] = {}
        self.ended: list[Ended] = []
        self.arrived: list[tuple[PendingCall, Any]] = []
        self.progressed: dict[bytes, tuple[PendingCall, float | None, str]] = {}
        self.uploads = Uploads(self.calls)
        self.due = math.inf
        self.late = 0
        self.stream_window: int = limits.STREAM_WINDOW_MAX

    # -- the caller's side ------------------------------------------------------------------------------

    def submit(
        self,
        tool: str,
        timeout_s: float,
        arguments: bytes,
        now: float,
        waiter: Any,  # noqa: ANN401 (opaque)
        *,
        streamed: bool,
        wishes: Wishes | None = None,
    ) -> PendingCall:
        """Take a call.

        Raises:
            PayloadTooLarge: more than a message can carry (the caller's fault).
            InvalidArgument: no such time-out or tool name can exist (the caller's fault).
        """
        size = len(arguments)
        if size > limits.BODY_BYTES_MAX:
            raise errors.PayloadTooLarge(
                f"the arguments of {tool} take {size:,} bytes; the limit is {limits.BODY_BYTES_MAX:,}. Send less, or "
                "give a file or an iterator of bytes where the tool takes a ByteStream",
                {"limit_bytes": limits.BODY_BYTES_MAX, "bytes": size},
            )
        if not 0 < timeout_s <= limits.CALL_TIMEOUT_S_MAX:
            raise no_such_time("timeout_s", timeout_s)
        if not 0 < len(tool) <= limits.TOOL_NAME_CHARS_MAX:
            raise errors.InvalidArgument(f"a tool's name has 1 to {limits.TOOL_NAME_CHARS_MAX} characters")
        self._counter += 1
        call_id = ids.call_id(self._prefix, self._counter)
        timeout_ms = math.ceil(timeout_s * 1000)
        extra = None
        if wishes is not None:
            extra = wishes.extra()
            call_id = ids.CallId(wishes.attach_to) if wishes.attach_to else call_id
            if call_id in self.calls:
                raise errors.InvalidArgument("this client waits for that call already")
        deadline = now + timeout_ms * 0.001
        if size <= limits.INLINE_BYTES_MAX:
            call, body = Call(call_id, tool, timeout_ms, arguments, extra), None
        else:
            call, body = Call(call_id, tool, timeout_ms, None, extra), arguments
        pending = PendingCall(call, call_id, body, now, deadline, waiter, streamed)
        if wishes is not None:
            pending.on_progress, pending.upload = wishes.on_progress, wishes.upload
        self.calls[call_id] = pending
        self.queue.append(pending)
        self.due = min(self.due, deadline)
        return pending

    def abandon(self, pending: PendingCall, code: str, text: str) -> bool:
        """End a call here, and at the broker if that may have it; False if it had ended before."""
        if pending.stage is _ABANDONED or pending.stage is _ENDED:
            return False
        if not pending.sends:
            self._fail(pending, code, text)
            return True
        self._say(pending, code, text)
        self._move(pending, _ABANDONED)
        self.cancels.append(pending.call_id)
        self.due = min(self.due, pending.deadline + GRACE_S)
        return True

    def spoil(self, pending: PendingCall, error: Exception) -> None:
        """End a call whose argument cannot be read, as its caller's source says."""
        text = f"cancelled, since its argument could not be read: {type(error).__name__}: {error}"
        if self.abandon(pending, "CANCELLED", text) and self.ended[-1].error is not None:
            self.ended[-1].error.__cause__ = error

    def took(self, pending: PendingCall) -> None:
        """A part was taken: more may come."""
        if pending.took(self.stream_window):
            self.credits[pending.call_id] = pending.limit

    # -- to the broker ------------------------------------------------------------------------------------

    def requests(self, epoch: int) -> list[Packed]:
        """Return what is to be said about calls that the broker has, and forget it."""
        out: list[Packed] = [(messages.Cancel(epoch, tuple(run)), None) for run in _runs(self.cancels)]
        self.cancels = []
        for run in _runs(list(self.credits.items())):
            items = tuple(messages.StreamCredit(call_id, limit) for call_id, limit in run)
            out.append((messages.Credit(epoch, items), None))
        self.credits = {}
        return out + self.uploads.requests(epoch)

    def batches(self, epoch: int, ack: int, room: int, now: float) -> Iterator[Packed]:
        """Yield CALLS for the queued calls that fit ``room`` places of the window, and count them as sent."""
        queue = self.queue
        while queue and room > 0:
            batch: list[Call] = []
            size, most, body = 0, min(limits.BATCH_MAX, room), None
            while queue and len(batch) < most:
                pending = queue[0]
                if pending.stage is not _QUEUED or (pending.sends and now >= pending.deadline):
                    # the latter has ended at the broker that had it, and must not run again at another; its outcome
                    # may still come
                    queue.popleft()
                    continue
                call = pending.call
                if call.arguments is None:
                    if batch:
                        break
                    body, most = pending.body, 1
                else:
                    size += len(call.arguments)
                    if size > limits.BATCH_BYTES_MAX and batch:
                        break
                queue.popleft()
                if pending.sends or now - pending.submitted_at > FRESH_S:
                    call = _later(pending, now)
                pending.stage = _SENT
                pending.sends += 1
                batch.append(call)
            if batch:
                room -= len(batch)
                self.in_flight += len(batch)
                yield messages.Calls(epoch, ack, tuple(batch)), body

    def put_back(self, unsent: Sequence[Message]) -> None:
        """Undo :meth:`batches` for messages that no socket took."""
        for message in reversed(unsent):
            for call in reversed(message.calls) if isinstance(message, messages.Calls) else ():
                pending = self.calls.get(call.call_id)
                if pending is None:
                    continue
                pending.sends -= 1
                if pending.stage is _SENT:
                    self._move(pending, _QUEUED)
                    self.queue.appendleft(pending)
                elif not pending.sends:
                    self._move(pending, _ENDED)

    def resume(self, *, elsewhere: bool = False) -> None:
        """Say again, over a new connection, what the old one may have lost.

        Args:
            elsewhere: to another broker, which knows what became of calls, but has no parts of streams.
        """
        self.cancels, self.credits = [], {}
        again = []
        for pending in list(self.calls.values()):
            if pending.stage is _ABANDONED:
                self.cancels.append(pending.call_id)
                # the broker may never have had it, and is then silent about it
                self._move(pending, _ENDED)
            elif pending.stage is _SENT and elsewhere and pending.is_streaming:
                self._fail(pending, "BROKER_LOST", "the broker was replaced in the middle of the stream")
            elif pending.stage is _SENT:
                self._move(pending, _QUEUED)
                again.append(pending)
                if pending.limit:
                    # the broker sends again the parts that this does not cover
                    self.credits[pending.call_id] = pending.limit
        self.queue.extendleft(reversed(again))
        self.uploads.resume()

    # -- from the broker ----------------------------------------------------------------------------------

    def outcomes(self, outcomes: Iterable[Outcome], body: bytes | memoryview | None) -> None:
        """Take outcomes that were not had before."""
        calls, ended = self.calls, self.ended
        for outcome in outcomes:
            pending = calls.pop(outcome.call_id, None)
            if pending is None:
                self.late += 1
                continue
            if not pending.sends:
                # about a call that no broker had
                self.late += 1
                calls[pending.call_id] = pending
                continue
            stage = pending.stage
            pending.stage = _ENDED
            if stage is not _QUEUED:
                self.in_flight -= 1
            if stage is _ABANDONED:
                continue
            if outcome.parts and outcome.parts > pending.next_index:
                text = f"{outcome.parts - pending.next_index} parts of the stream were lost on the way"
                self._say(pending, "BROKER_LOST", text)
            else:
                ended.append(read_outcome(pending, outcome, body))

    def parts(self, parts: Iterable[Part], body: bytes | memoryview | None) -> None:
        """Take parts of streams; a gap ends its call."""
        for part in parts:
            pending = self.calls.get(part.call_id)
            if pending is None or not pending.sends or pending.stage is _ABANDONED:
                continue
            if part.index < pending.next_index:
                # it came again after a resume
                continue
            if part.index > pending.next_index:
                self.abandon(pending, "BROKER_LOST", "parts of the stream were lost on the way")
                continue
            if part.index >= (pending.limit or self.stream_window):
                self.abandon(pending, "INTERNAL", "the tool sent more parts than it had credit for")
                continue
            packed = part.body if part.body is not None else body
            pending.part_bytes = 0 if packed is None else len(packed)
            try:
                value = read(packed, part.encoding)
            except (errors.MalformedFrame, errors.PayloadTooLarge) as error:
                code = error.code if isinstance(error, errors.CallError) else "INTERNAL"
                self.abandon(pending, code, f"a part of the stream cannot be read: {error}")
                continue
            pending.next_index += 1
            if pending.streamed:
                self.arrived.append((pending, value))
                continue
            if pending.collected is None:
                pending.collected = []
            pending.collected.append(value)
            self.took(pending)

    def progress(self, progress: Iterable[Progress]) -> None:
        """Take how far calls have come, where anybody asked."""
        for one in progress:
            pending = self.calls.get(one.call_id)
            if pending is not None and pending.on_progress is not None and pending.stage is not _ABANDONED:
                self.progressed[one.call_id] = pending, one.fraction, one.message

    # -- ends of our own ----------------------------------------------------------------------------------

    def end_sent(self, why: str) -> None:
        """The broker knows none of these calls any more."""
        self.cancels, self.credits = [], {}
        for pending in list(self.calls.values()):
            if pending.sends:
                self._fail(pending, "BROKER_LOST", why)

    def end_all(self, code: str, text: str, details: dict[str, Any] | None = None) -> None:
        """Nothing will come of any call any more."""
        for pending in list(self.calls.values()):
            self._fail(pending, code, text, details)
        self.queue.clear()

    def expire(self, now: float, why_unsent: str | None) -> None:
        """End the calls whose time is over and of which the broker says nothing.

        Args:
            why_unsent: why there is no session with a broker, if there is none.
        """
        due = math.inf
        for pending in list(self.calls.values()):
            at = pending.deadline + GRACE_S if pending.sends else pending.deadline
            if now < at:
                due = min(due, at)
            elif pending.sends or why_unsent is None:
                text = f"{pending.call.tool} had no outcome within its time, and the broker said nothing"
                self._fail(pending, "DEADLINE_EXCEEDED", text, {"which": "timeout"})
            else:
                text = f"the call could not be handed to a broker within its time: {why_unsent}"
                self._fail(pending, "BROKER_LOST", text, retryable=True)
        self.due = due

    def _fail(
        self,
        pending: PendingCall,
        code: str,
        text: str,
        details: dict[str, Any] | None = None,
        *,
        retryable: bool | None = None,
    ) -> None:
        if pending.stage is not _ABANDONED:
            self._say(pending, code, text, details, retryable=retryable)
        self._move(pending, _ENDED)

    def _say(
        self,
        pending: PendingCall,
        code: str,
        text: str,
        details: dict[str, Any] | None = None,
        *,
        retryable: bool | None = None,
    ) -> None:
        error = errors.call_error(code, text, dict(details or {}), retryable=retryable)
        error.call_id, error.tool = pending.call_id, pending.call.tool
        self.ended.append(Ended(pending, None, error, None))

    def _move(self, pending: PendingCall, stage: Stage) -> None:
        self.in_flight += (stage in _FLYING) - (pending.stage in _FLYING)
        pending.stage = stage
        if stage is _ENDED:
            del self.calls[pending.call_id]


def _later(pending: PendingCall, now: float) -> Call:
    """Pack a call anew: with what is left of its time, and a mark if it may have run."""
    call = pending.call
    left_ms = max(1, math.ceil((pending.deadline - now) * 1000))
    extra = replaced(call.extra or messages.CallExtra(), again=True) if pending.sends else call.extra
    return Call(call.call_id, call.tool, left_ms, call.arguments, extra)


_FLYING: Final = frozenset({_SENT, _ABANDONED})


def _runs(items: list[T]) -> Iterator[list[T]]:
    for start in range(0, len(items), limits.BATCH_MAX):
        yield items[start : start + limits.BATCH_MAX]
