"""Outcomes of calls without a result."""

from __future__ import annotations

import contextlib
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
    message: object,
    details: dict[str, object] | None = None,
    *,
    usage: messages.Usage | None = None,
    retryable: bool = False,
) -> messages.Outcome:
    """Make the outcome of a call without a result, cut to what a message may hold.

    Whatever a tool made of message and details can be sent afterwards; details that cannot are left out.
    """
    packed = messages.EMPTY_DETAILS
    if details:
        try:
            packed = payload.pack(details)
            payload.unpack_map(packed)
        except BaseException:  # they are the tool's, and may be anything
            packed = messages.EMPTY_DETAILS
    if len(packed) > limits.DETAILS_BYTES_MAX:
        packed = payload.pack({"truncated": True})
    text = shown(message)
    if len(text) > limits.TEXT_CHARS_MAX:
        text = text[: limits.TEXT_CHARS_MAX - 1] + "…"
    return messages.Outcome(call_id, code, None, usage, messages.Fault(text, retryable, packed))


def shown(value: object) -> str:
    """Return the text of anything, with what UTF-8 cannot carry written out; it never raises."""
    try:
        text = value if type(value) is str else str(value)
        # a subclass of str may have methods of its own
        return str.encode(text, "utf-8", "backslashreplace").decode()
    except BaseException:  # also SystemExit: it is the tool's code that makes the text
        return "(its text cannot be shown)"


def raised(call_id: bytes, error: CallError, usage: messages.Usage | None) -> messages.Outcome:
    """Make the outcome of an error that a tool may raise itself.

    A subclass need not have called our ``__init__``.
    """
    return fault(
        call_id,
        error.code,
        getattr(error, "message", error),
        getattr(error, "details", None),
        usage=usage,
        retryable=getattr(error, "retryable", False) is True,
    )


def untold(call_id: bytes, error: BaseException, usage: messages.Usage | None) -> messages.Outcome:
    """Make the outcome of a call whose error makes trouble when it is looked at: only its type is told."""
    name = shown(type(error).__name__)
    text = f"{name} (what else there is to say of it cannot be told)"
    return fault(call_id, "TOOL_FAILED", text, {"type": name}, usage=usage)


def describe(error: BaseException, tool: Tool[..., Any]) -> tuple[str, dict[str, Any]]:
    """Say what a tool raised and where in its author's code.

    Returns:
        The sentence, and details {type, message, file, line, traceback}.
    """
    name, text = type(error).__name__, shown(error)
    details: dict[str, Any] = {"type": name, "message": text[: limits.TEXT_CHARS_MAX]}
    own = tool.code.co_filename
    place = _place(error.__traceback__, own)
    if place is not None:
        details["file"], details["line"] = place
        # the first frames are ours
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != own and trace.tb_next is not None:
            trace = trace.tb_next
        # a SyntaxError of the tool's own making may hold what no traceback is written of
        with contextlib.suppress(Exception):
            lines = "".join(traceback.format_exception(type(error), error, trace, limit=-20))
            details["traceback"] = shown(lines[-TRACEBACK_CHARS:])
    elif isinstance(error, CallError):
        details |= {
            key: shown(value) if isinstance(value, str) else value for key, value in error.details.items()
        }
    return (f"{name}: {text}" if text else name), details


def _place(trace: TracebackType | None, own: str) -> tuple[str, int] | None:
    """Return file and line of the last frame of the tool's own module."""
    place: tuple[str, int] | None = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == own:
            place = own, trace.tb_lineno
        trace = trace.tb_next
    return place
