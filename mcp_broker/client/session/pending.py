"""One call of a client, and how it ends."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from mcp_broker import errors
from mcp_broker.wire import messages, payload

if TYPE_CHECKING:
    from mcp_broker.wire.messages import Call, Outcome, Usage


class Stage(Enum):
    """Where a call is; see the drawing in :mod:`~mcp_broker.client.session.calls`."""

    QUEUED = "queued"
    SENT = "sent"
    ABANDONED = "abandoned"
    ENDED = "ended"


class PendingCall:
    """One call between its submission and its outcome.

    Attributes:
        body: the arguments, if they take the second frame.
        collected: the parts of its result so far, where nobody takes them one by one.
        deadline: instant, on the shell's clock in seconds, at which the broker ends it.
        limit: parts with an index below it may come; 0 as long as it is the session's first limit.
        next_index: the part that must come next.
        sends: how often it may have reached a broker.
        streamed: somebody takes its parts one by one.
        taken: parts that its caller has taken.
        waiter: whom the shell tells; opaque here.
    """

    __slots__ = (
        "body", "call", "call_id", "collected", "deadline", "limit", "next_index", "sends", "stage", "streamed",
        "submitted_at", "taken", "waiter",
    )  # fmt: skip

    def __init__(self, call: Call, body: bytes | None, now: float, waiter: Any, *, streamed: bool) -> None:  # noqa: ANN401
        self.call = call
        self.call_id = call.call_id
        self.body = body
        self.submitted_at = now
        self.deadline = now + call.timeout_ms / 1000
        self.stage = Stage.QUEUED
        self.sends = 0
        self.streamed = streamed
        self.waiter = waiter
        self.next_index = 0
        self.limit = 0
        self.taken = 0
        self.collected: list[Any] | None = None


class Ended:
    """The end of a call: ``error``, or else ``value``."""

    __slots__ = ("error", "pending", "usage", "value")

    def __init__(
        self,
        pending: PendingCall,
        value: Any,  # noqa: ANN401 (any payload)
        error: errors.CallError | None,
        usage: Usage | None,
    ) -> None:
        self.pending = pending
        self.value = value
        self.error = error
        self.usage = usage


def read_outcome(pending: PendingCall, outcome: Outcome, body: bytes | None) -> Ended:
    """Turn an outcome into a value or an exception."""
    error: errors.CallError
    if outcome.code == messages.OK:
        packed = outcome.body if outcome.body is not None else body
        try:
            value = payload.unpack(packed if packed is not None else b"")
        except errors.MalformedFrame as malformed:
            error = errors.Internal(f"the result cannot be read: {malformed}")
        else:
            if pending.collected is not None:
                value = pending.collected
            return Ended(pending, value, None, outcome.usage)
    elif outcome.fault is None:
        error = errors.call_error(outcome.code, f"the call ended with {outcome.code}, and nothing says why")
    else:
        fault = outcome.fault
        error = errors.call_error(
            outcome.code, fault.message, read_details(fault.details), retryable=fault.retryable
        )
    error.call_id, error.tool = pending.call_id, pending.call.tool
    return Ended(pending, None, error, outcome.usage)


def read_details(packed: bytes) -> dict[str, Any]:
    """Unpack an error's details; ones that cannot be read are worth less than the error itself."""
    try:
        return payload.unpack_map(packed)
    except errors.MalformedFrame:
        return {}
