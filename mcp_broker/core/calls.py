r"""The call machine: from acceptance to its one outcome.

Rules
    A call that was accepted leaves this table exactly once, through :meth:`Ledger.finish`.
    A call's state changes only by :data:`CALL_TABLE`; each cell is written and visited by a test.

::

    (accepted) -> QUEUED <-> IN_FLIGHT -> ENDED
                     \____________________^

An ENDED call may still occupy its worker (deadline or cancel came first); the worker's own record of it
(:attr:`~mcp_broker.core.worker.Worker.held`) says so. "Late", "orphaned" and "abandoned" are derived.

Source: docs/protocol.md, "Life of a call".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core.wheel import Slot, Wheel
from mcp_broker.errors import CALL_ERRORS, InvalidTransition
from mcp_broker.wire import messages, payload
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.client_session import ClientSession
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.worker import Worker
    from mcp_broker.wire.node import Certificate


class CallState(IntEnum):
    """Where an accepted call is."""

    QUEUED = 0
    IN_FLIGHT = 1
    ENDED = 2


class CallEvent(IntEnum):
    """What can happen to an accepted call."""

    DISPATCHED = 0
    REQUEUED = 1
    FINISHED = 2


_BUG: Final = None

#: state -> event -> next state; None is a cell that only our own bug reaches
CALL_TABLE: Final[tuple[tuple[CallState | None, ...], ...]] = (
    # DISPATCHED            REQUEUED           FINISHED
    (CallState.IN_FLIGHT, _BUG, CallState.ENDED),  # QUEUED
    (_BUG, CallState.QUEUED, CallState.ENDED),  # IN_FLIGHT
    (_BUG, _BUG, _BUG),  # ENDED
)


_QUEUED, _IN_FLIGHT, _ENDED = CallState


class Call(Slim):
    """One accepted call.

    Attributes:
        body: the second frame, if the arguments came in one (opaque to the machine).
        deadline: instant at which its caller gets DEADLINE_EXCEEDED, whatever else is true.
        slot: where the ledger finds it at that instant.
        seq: its number at :attr:`worker`; 0 while queued.
        attempts: dispatches so far.
        killers: the certificates of workers that died while they ran it.
        record: its idempotency key's, if it has one.
        limit: parts with an index below it may come, as the worker knows.
        wanted: the same, as the caller has said.
        parts: parts of a streamed result forwarded so far.
        idle: its time-out of silence, if it has one.
        upload: what came of the argument that comes in chunks, if one does.
        expected_bytes: its share of what its session may have to read, where its tool's results are large.
    """

    call_id: bytes
    arguments: bytes | None
    extra: messages.CallExtra | None
    body: Body | None
    session: ClientSession
    tool: Tool
    deadline: float
    slot: Slot[Call]
    state: CallState = _QUEUED
    worker: Worker | None = None
    seq: int = 0
    attempts: int = 0
    killers: tuple[Certificate, ...] = ()
    record: Any = None
    parts: int = 0
    limit: int = limits.STREAM_WINDOW_MAX
    wanted: int = limits.STREAM_WINDOW_MAX
    idle: Idle | None = None
    upload: Upload | None = None
    expected_bytes: int = 0

    def step(self, event: CallEvent) -> None:
        """Move by the table.

        Raises:
            InvalidTransition: our bug.
        """
        after = CALL_TABLE[self.state][event]
        if after is None:
            raise InvalidTransition(f"call {self.call_id.hex()}: {event.name} in state {self.state.name}")
        self.state = after

    @property
    def may_run_again(self) -> bool:
        """Tell whether nothing came of it, or went into it, that cannot come a second time."""
        return not self.parts and (self.upload is None or not self.upload.limit)

    def packed_arguments(self) -> bytes:
        """Return the arguments' payload, wherever it came."""
        if self.arguments is not None:
            return self.arguments
        return bytes(self.body) if self.body is not None else b""

    def bytes_held(self) -> int:
        """Return the size of the arguments, in bytes."""
        if self.arguments is not None:
            return len(self.arguments)
        return len(self.body) if self.body is not None else 0


class Idle(Slim):
    """How long a call's worker may say nothing of it.

    Attributes:
        touched_at: when the call was given to its worker, or that last sent a part or progress.
        slot: where the ledger finds the call when it may be due.
    """

    timeout_s: float
    touched_at: float
    slot: Slot[Call]


class Upload(Slim):
    """How far an argument that comes in chunks has come.

    Attributes:
        limit: chunks with an index below it may come; 0: its worker has not begun to read.
        chunks: how many went on to the worker.
        is_whole: the last one did.
    """

    limit: int = 0
    chunks: int = 0
    is_whole: bool = False


def fault(
    call_id: bytes,
    code: str,
    message: str,
    details: dict[str, Any] | None = None,
    *,
    retryable: bool | None = None,
    usage: messages.Usage | None = None,
) -> messages.Outcome:
    """Make the outcome of a call that has no result.

    Args:
        code: one of :data:`mcp_broker.errors.CALL_ERRORS`.
        details: structured, msgpack-able.
        retryable: where this instance knows better than its code.
    """
    if retryable is None:
        retryable = CALL_ERRORS[code].retryable_by_default
    packed = payload.pack(details) if details else messages.EMPTY_DETAILS
    if len(packed) > limits.DETAILS_BYTES_MAX:
        packed = payload.pack({"truncated": True})
    return messages.Outcome(
        call_id, code, None, usage, messages.Fault(message[: limits.TEXT_CHARS_MAX], retryable, packed)
    )


#: codes of calls that ended with their worker; of the last one only some did
_DEADLY: Final = frozenset({"WORKER_LOST", "POISONED", "RESOURCE_EXHAUSTED"})


class Ended:
    """What `why` still knows of a call that failed. Successes are not kept: nobody asks why."""

    __slots__ = ("call_id", "certificate", "code", "message", "principal", "tool")

    def __init__(self, call: Call, outcome: messages.Outcome) -> None:
        self.call_id = call.call_id
        self.tool = call.tool.name
        self.principal = call.session.grant.caller.principal
        self.code = outcome.code
        self.message = outcome.fault.message[:500] if outcome.fault is not None else ""
        #: of the death that ended it. It is not read out of the outcome's details: these may be a worker's, which may have
        #: put anything there
        self.certificate = call.killers[-1] if call.killers and outcome.code in _DEADLY else None


class Ledger:
    """All accepted calls that have no outcome yet, by id and by deadline."""

    def __init__(self, now: float) -> None:
        #: all and only calls whose state is not ENDED
        self.calls: dict[bytes, Call] = {}
        self._wheel: Wheel[Call] = Wheel(now)
        #: the calls with a time-out of silence, by when they may be due
        self._silent: Wheel[Call] = Wheel(now)
        self.accepted = 0
        self.succeeded = 0
        #: code -> ends
        self.failed: dict[str, int] = {}
        #: told of the end of each call that has a record; set by who keeps the records
        self.keyed: Callable[[Call, messages.Outcome, Body | None], None] = lambda *_: None
        #: told of the end of each call that has no result; set by who looks after the tools
        self.failing: Callable[[Call, messages.Outcome], None] = lambda *_: None
        #: code -> calls that were not accepted; they leave no other trace
        self.refused: dict[str, int] = {}
        #: the latest failures, for `why`
        self.ended: deque[Ended] = deque(maxlen=limits.ENDED_CALLS_MAX)

    def __len__(self) -> int:
        return len(self.calls)

    def slot(self, deadline: float) -> Slot[Call]:
        """Return the slot for calls with this deadline; at least one of them must be accepted next."""
        return self._wheel.slot(deadline)

    def accept(self, calls: list[Call]) -> None:
        """Take calls in; from here on each ends exactly once."""
        known = self.calls
        for call in calls:
            known[call.call_id] = call.slot[call.call_id] = call
        self.accepted += len(calls)

    def finish(self, call: Call, outcome: messages.Outcome, body: Body | None = None) -> None:
        """End a call and hand its outcome to its session.

        Raises:
            InvalidTransition: it has ended before (our bug: the contract is one outcome a call).
        """
        if call.state is _ENDED:
            # the cells of FINISHED lead to ENDED from everywhere else
            call.step(CallEvent.FINISHED)
        call.state = _ENDED
        call_id = call.call_id
        del self.calls[call_id]
        slot = call.slot
        slot.pop(call_id, None)
        if not slot:
            self._wheel.drop(slot)
        if call.idle is not None:
            call.idle.slot.pop(call_id, None)
            if not call.idle.slot:
                self._silent.drop(call.idle.slot)
        if outcome.code == "OK":
            self.succeeded += 1
        else:
            self.failed[outcome.code] = self.failed.get(outcome.code, 0) + 1
            self.ended.append(Ended(call, outcome))
            self.failing(call, outcome)
        if call.expected_bytes:
            call.session.expected_bytes -= call.expected_bytes
            call.expected_bytes = 0
        call.session.deliver(outcome, body)
        if call.record is not None:
            # another call may need its arguments
            self.keyed(call, outcome, body)
        call.arguments = call.body = None

    def refuse(self, call: Call, outcome: messages.Outcome) -> None:
        """Take an acceptance back, before anything came of it: the call ends, and is counted as refused."""
        record, call.record = call.record, None
        self.finish(call, outcome)
        self.accepted -= 1
        self.ended.pop()
        self.failed[outcome.code] -= 1
        if not self.failed[outcome.code]:
            del self.failed[outcome.code]
        self.refused[outcome.code] = self.refused.get(outcome.code, 0) + 1
        if record is not None:
            call.record = record
            self.keyed(call, outcome, None)

    def deadline(self) -> float | None:
        """Return the next instant at which a call may be due."""
        at, silent_at = self._wheel.deadline(), self._silent.deadline()
        return at if silent_at is None else min(at or silent_at, silent_at)

    def due(self, now: float) -> Iterator[Call]:
        """Yield the calls whose deadline has passed; the caller finishes each."""
        return self._wheel.due(now)

    def watch(self, call: Call, timeout_ms: int, now: float) -> None:
        """Give a call a time-out of silence, before it is accepted."""
        timeout_s = timeout_ms * 0.001
        call.idle = Idle(timeout_s, now, self._silent.slot(now + timeout_s))
        call.idle.slot[call.call_id] = call

    def silent(self, now: float) -> Iterator[Call]:
        """Yield the calls whose workers were silent for too long; the caller finishes each.

        Nothing is moved when a call is touched, only when it may be due.
        """
        if self._silent.deadline() is None:
            return
        for call in self._silent.due(now):
            idle = call.idle
            if idle is None:
                continue
            # a call that waits for a worker has none that could be silent
            since = idle.touched_at if call.state is _IN_FLIGHT else now
            at = since + idle.timeout_s
            if at <= now:
                yield call
                continue
            idle.slot = self._silent.slot(at)
            idle.slot[call.call_id] = call
