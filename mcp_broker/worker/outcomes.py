"""Outcomes of calls without a result."""

from __future__ import annotations

from mcp_broker import limits
from mcp_broker.wire import messages, payload


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
