"""Outcomes of calls without a result."""

from __future__ import annotations

from typing import Final

from mcp_broker import limits
from mcp_broker.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    ResourceExhausted,
)
from mcp_broker.wire import messages, payload

#: Codes of the errors that a tool may raise itself, to be precise; any other is TOOL_FAILED. Authors are told by
#: :func:`mcp_broker.worker.tool`, and have the classes from there.
RAISABLE: Final = frozenset(
    cls.code
    for cls in (InvalidArgument, NotFound, PayloadTooLarge, ResourceExhausted, Cancelled, DeadlineExceeded)
)


def fault(
    call_id: bytes,
    code: str,
    message: str,
    details: dict[str, object] | None = None,
    *,
    usage: messages.Usage | None = None,
    retryable: bool = False,
) -> messages.Outcome:
    """Make the outcome of a call without a result, cut to what a message may hold."""
    packed = payload.pack(details) if details else messages.EMPTY_DETAILS
    if len(packed) > limits.DETAILS_BYTES_MAX:
        packed = payload.pack({"truncated": True})
    if len(message) > limits.TEXT_CHARS_MAX:
        message = message[: limits.TEXT_CHARS_MAX - 1] + "…"
    return messages.Outcome(call_id, code, None, usage, messages.Fault(message, retryable, packed))
