"""One call of a client, and how it ends."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import errors, ids, limits
from mcp_broker.wire import encoding, payload
from mcp_broker.wire.messages import CallExtra, Priority
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.client.session.uploads import Upload
    from mcp_broker.wire.messages import Call, Outcome, Usage


class Stage(Enum):
    """Where a call is; see the drawing in :mod:`~mcp_broker.client.session.calls`."""

    QUEUED = "queued"
    SENT = "sent"
    ABANDONED = "abandoned"
    ENDED = "ended"


class PendingCall(Slim):
    """One call between its submission and its outcome.

    Attributes:
        body: the arguments, if they take the second frame.
        collected: the parts of its result so far, where nobody takes them one by one.
        deadline: instant, on the shell's clock in seconds, at which the broker ends it.
        limit: parts with an index below it may come; 0 as long as it is the session's first limit.
        next_index: the part that must come next.
        part_bytes: the size of the latest part.
        sends: how often it may have reached a broker.
        streamed: somebody takes its parts one by one.
        taken: parts that its caller has taken.
        waiter: whom the shell tells; opaque here.
        on_progress: whom the shell tells how far it has come; opaque here, None: nobody.
        upload: the argument that is sent in chunks, if one is.
    """

    call: Call
    call_id: bytes
    body: bytes | None
    submitted_at: float
    deadline: float
    waiter: Any
    streamed: bool
    stage: Stage = Stage.QUEUED
    sends: int = 0
    next_index: int = 0
    limit: int = 0
    taken: int = 0
    part_bytes: int = 0
    collected: list[Any] | None = None
    on_progress: Any = None
    upload: Upload | None = None

    def took(self, most: int) -> bool:
        """Count a part as taken; tell whether the limit has risen by half a window, and the broker is to hear of it.

        A whole window of large parts would be more bytes than it takes to hide the round trip, and those would only be
        in the way of other calls.

        Args:
            most: the window of small parts.
        """
        self.taken += 1
        window = most
        if self.part_bytes * most > limits.STREAM_AHEAD_BYTES:
            window = min(most, max(2, limits.STREAM_AHEAD_BYTES // self.part_bytes))
        limit = self.taken + window
        if not self.sends or limit - (self.limit or most) < max(1, window // 2):
            return False
        self.limit = limit
        return True

    @property
    def is_streaming(self) -> bool:
        """Tell whether another broker could not go on with it."""
        has_begun = self.upload is not None and self.upload.limit > 0
        return self.streamed or self.next_index > 0 or has_begun

    @property
    def has_ended(self) -> bool:
        """Tell whether its caller has its end."""
        return self.stage is Stage.ABANDONED or self.stage is Stage.ENDED


class Wishes(Slim):
    """What only some calls ask for: first what callers may, then what only the client itself does.

    Attributes:
        idle_timeout_s: how long the worker may say nothing of the call; None: as long as it likes.
        on_progress: as in :class:`PendingCall`.
        idempotency_key: calls with the same key are one execution.
        detach: the call goes on without its client.
        priority: how soon it is served while it waits.
        attach_to: no new call: the detached one with this id.
        encoding: how the arguments are encoded; None: as they are.
        upload, upload_name: the argument that is sent in chunks.
    """

    idle_timeout_s: float | None = None
    on_progress: Any = None
    idempotency_key: str | None = None
    detach: bool = False
    priority: int = Priority.NORMAL
    attach_to: bytes | None = None
    encoding: str | None = None
    upload: Upload | None = None
    upload_name: str | None = None

    def extra(self) -> CallExtra | None:
        """Return what the broker is to hear of it.

        Raises:
            InvalidArgument: there can be no such time-out, key, id or priority (the caller's fault).
        """
        idle_ms = None
        if self.idle_timeout_s is not None:
            if not 0 < self.idle_timeout_s <= limits.CALL_TIMEOUT_S_MAX:
                raise no_such_time("idle_timeout_s", self.idle_timeout_s)
            idle_ms = math.ceil(self.idle_timeout_s * 1000)
        key = self.idempotency_key
        if key is not None and not 0 < len(key) <= limits.IDEMPOTENCY_KEY_CHARS_MAX:
            raise errors.InvalidArgument(
                f"an idempotency_key has 1 to {limits.IDEMPOTENCY_KEY_CHARS_MAX} characters"
            )
        if self.upload_name is not None and (key is not None or self.detach):
            raise errors.InvalidArgument(
                "a call that is given a file or an iterator can be neither detached nor have an idempotency_key"
            )
        attach = self.attach_to is not None
        if attach and len(self.attach_to or b"") != ids.CALL_ID_BYTES:
            raise errors.InvalidArgument(f"a call id has {ids.CALL_ID_BYTES} bytes")
        if self.priority not in _PRIORITIES:
            raise errors.InvalidArgument(
                f"a priority is 0 (high), 1 (normal) or 2 (low), not {self.priority!r}"
            )
        extra = CallExtra(
            idle_timeout_ms=idle_ms,
            idempotency_key=key,
            detach=bool(self.detach),
            attach=attach,
            encoding=self.encoding,
            priority=int(self.priority),
            upload=self.upload_name,
        )
        return None if extra == _PLAIN else extra


_PRIORITIES: Final = frozenset(Priority)
_PLAIN: Final = CallExtra()


def shrunk(packed: bytes, wishes: Wishes | None) -> tuple[bytes, Wishes | None]:
    """Compress arguments of COMPRESS_BYTES_MIN or more where that pays, and wish that the tool expands them."""
    if wishes is not None and wishes.idempotency_key is not None:
        # the broker compares the bytes, and those that another client compresses may be others
        return packed, wishes
    smaller = encoding.shrink(packed) if len(packed) <= limits.BODY_BYTES_MAX else None
    if smaller is None:
        return packed, wishes
    wishes = wishes or Wishes()
    wishes.encoding = encoding.ZSTD
    return smaller, wishes


def no_such_time(name: str, timeout_s: float) -> errors.InvalidArgument:
    """Make the error of a time-out that cannot be."""
    return errors.InvalidArgument(f"{name} is {timeout_s}; it must be above 0 and at most a day")


class Ended(Slim):
    """The end of a call: ``error``, or else ``value``."""

    pending: PendingCall
    value: Any
    error: errors.CallError | None
    usage: Usage | None


def read_outcome(pending: PendingCall, outcome: Outcome, body: bytes | memoryview | None) -> Ended:
    """Turn an outcome into a value or an exception."""
    error: errors.CallError
    if outcome.code == "OK":
        try:
            value = read(outcome.body if outcome.body is not None else body, outcome.encoding)
        except errors.MalformedFrame as malformed:
            error = errors.Internal(f"the result cannot be read: {malformed}")
        except errors.PayloadTooLarge as too_large:
            error = too_large
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


def read(packed: bytes | memoryview | None, encoded: str | None) -> Any:  # noqa: ANN401 (any payload)
    """Unpack a result or a part.

    Raises:
        MalformedFrame, PayloadTooLarge: it cannot be (the worker's fault).
    """
    if packed is None:
        packed = b""
    return payload.unpack(packed if encoded is None else encoding.expand(packed, encoded))


def read_details(packed: bytes) -> dict[str, Any]:
    """Unpack an error's details; ones that cannot be read are worth less than the error itself."""
    try:
        return payload.unpack_map(packed)
    except errors.MalformedFrame:
        return {}


def again(error: errors.BrokerError) -> errors.BrokerError:
    """Make an exception of the same kind, since one exception object holds one traceback."""
    return type(error)(error.message, dict(error.details), retryable=error.retryable)
