"""Outcomes of calls without a result."""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.errors import (
    CallError,
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    ResourceExhausted,
)
from mcp_broker.wire import messages, payload

if TYPE_CHECKING:
    from mcp_broker.worker.tool import Tool

TRACEBACK_CHARS: Final = 4000

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


def describe(error: BaseException, tool: Tool[..., Any]) -> tuple[str, dict[str, Any]]:
    """Say what a tool raised and where in its author's code.

    Returns:
        The sentence, and details {type, message, file, line, traceback}.
    """
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be shown)"
    details: dict[str, Any] = {"type": name, "message": text[: limits.TEXT_CHARS_MAX]}
    own = tool.function.__code__.co_filename
    place = _place(error.__traceback__, own)
    if place is not None:
        details["file"], details["line"] = place
        # the first frames are ours
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != own and trace.tb_next is not None:
            trace = trace.tb_next
        shown = "".join(traceback.format_exception(type(error), error, trace, limit=-20))
        details["traceback"] = shown[-TRACEBACK_CHARS:]
    elif isinstance(error, CallError):
        details |= error.details
    return (f"{name}: {text}" if text else name), details


def _place(trace: TracebackType | None, own: str) -> tuple[str, int] | None:
    """Return file and line of the last frame of the tool's own module."""
    place: tuple[str, int] | None = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == own:
            place = own, trace.tb_lineno
        trace = trace.tb_next
    return place
