"""What messages are made of: field types with their bounds, items (arrays on the wire), and records (maps).

Fields are only ever appended, with defaults. Read them through :mod:`mcp_broker.wire.messages`.
Source: docs/protocol.md, "Messages".
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from mcp_broker import ids, limits

CallIdField = Annotated[bytes, Meta(min_length=ids.CALL_ID_BYTES, max_length=ids.CALL_ID_BYTES)]
SessionIdField = Annotated[bytes, Meta(min_length=ids.SESSION_ID_BYTES, max_length=ids.SESSION_ID_BYTES)]
ToolNameField = Annotated[str, Meta(min_length=1, max_length=limits.TOOL_NAME_CHARS_MAX)]
ShortText = Annotated[str, Meta(max_length=256)]
Text = Annotated[str, Meta(max_length=limits.TEXT_CHARS_MAX)]
Token = Annotated[str, Meta(max_length=limits.TOKEN_BYTES_MAX)]
Inline = Annotated[bytes, Meta(max_length=limits.INLINE_BYTES_MAX)]
Details = Annotated[bytes, Meta(max_length=limits.DETAILS_BYTES_MAX)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Epoch = Annotated[int, Meta(ge=0, le=2**53)]
TimeoutMs = Annotated[int, Meta(ge=1, le=int(limits.CALL_TIMEOUT_S_MAX * 1000))]
IdempotencyKey = Annotated[str, Meta(min_length=1, max_length=limits.IDEMPOTENCY_KEY_CHARS_MAX)]
Labels = Annotated[tuple[ShortText, ...], Meta(max_length=limits.CAPABILITIES_MAX)]
Schema = Annotated[str, Meta(max_length=limits.SCHEMA_BYTES_MAX)]
Depth = Annotated[int, Meta(ge=0, le=limits.WORKER_DEPTH_MAX)]


class Item(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A part of a message; an array on the wire."""


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A map on the wire; unknown keys are ignored."""


class Priority(IntEnum):
    """How soon a waiting call is served; it changes nothing while workers are free."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


class CallExtra(Record, kw_only=True, frozen=True):
    """What only some calls carry."""

    #: W3C trace context, handed to the tool unchanged
    traceparent: ShortText | None = None
    #: sent before, over a connection or to a broker that is gone, and no outcome came: it may have run
    again: bool = False
    #: calls of one principal and tool with the same key are one execution
    idempotency_key: IdempotencyKey | None = None
    #: it goes on when its session ends
    detach: bool = False
    #: no new call: the detached call with this id, or its outcome, is to be this session's
    attach: bool = False
    #: the call ends when its worker says nothing of it for so long; None: only its timeout counts
    idle_timeout_ms: TimeoutMs | None = None
    #: how the arguments are encoded; None: as they are
    encoding: ShortText | None = None
    #: a :class:`Priority`
    priority: Annotated[int, Meta(ge=0, le=2)] = 1
    #: the argument that comes in chunks, and is not among the arguments
    upload: ShortText | None = None

    @property
    def is_special(self) -> bool:
        """Tell whether the broker has more to do for the call than to have it run."""
        return (
            self.again
            or self.detach
            or self.attach
            or self.idempotency_key is not None
            or self.idle_timeout_ms is not None
            or self.upload is not None
        )


class Call(Item, frozen=True):
    """A call as its client submits it; ``arguments`` is a msgpack map, or None when it is the second frame."""

    call_id: CallIdField
    tool: ToolNameField
    timeout_ms: TimeoutMs
    arguments: Inline | None
    extra: CallExtra | None = None


class Usage(Item, frozen=True):
    """What an execution cost, from the worker's own clock and rusage."""

    #: wall clock of the worker at the end, milliseconds since 1970
    finished_wall_ms: Count
    execution_us: Count
    cpu_us: Count
    #: the worker's peak resident set so far, KiB
    max_rss_kib: Count


class Fault(Item, frozen=True):
    """Why there is no result; ``details`` is a msgpack map."""

    message: Text
    retryable: bool
    details: Details


class Outcome(Item, frozen=True):
    """The one final answer of a call.

    ``code`` is "OK" or an error code. With "OK", ``body`` is the msgpack result, or None when it is the
    second frame; else ``fault`` says why.
    """

    call_id: CallIdField
    code: ShortText
    body: Inline | None = None
    usage: Usage | None = None
    fault: Fault | None = None
    #: with "OK": how many parts went before it
    parts: Count = 0
    #: how the body is encoded; None: as it is
    encoding: ShortText | None = None


class Part(Item, frozen=True):
    """The ``index``-th part (from 0) of a streamed result."""

    call_id: CallIdField
    index: Count
    body: Inline | None
    #: how the body is encoded; None: as it is
    encoding: ShortText | None = None


class Chunk(Item, frozen=True):
    """The ``index``-th chunk (from 0) of an argument; ``data`` is not a payload, or None when it is the second frame."""

    call_id: CallIdField
    index: Count
    data: Inline | None
    #: nothing comes after it
    last: bool = False


class Progress(Item, frozen=True):
    """How far a call has come, for people; only the newest of a call counts."""

    call_id: CallIdField
    #: what is done of the whole; None where nobody knows
    fraction: Annotated[float, Meta(ge=0, le=1)] | None
    message: ShortText = ""


class StreamCredit(Item, frozen=True):
    """The caller takes parts with an index below ``limit``."""

    call_id: CallIdField
    limit: Count


class Dispatch(Item, frozen=True):
    """A call as the broker hands it to a worker."""

    #: counts the calls given to this worker from 1; the worker marks it started
    seq: Count
    call_id: CallIdField
    tool: ToolNameField
    #: what is left of the caller's timeout
    timeout_ms: TimeoutMs
    arguments: Inline | None
    #: a packed :class:`Caller`, made once a session
    caller: msgspec.Raw
    extra: CallExtra | None = None


class Caller(Item, frozen=True):
    """Who calls, as verified by the broker. A tool gets this, never the token."""

    principal: ShortText
    clearance: Annotated[int, Meta(ge=0, le=10)]
    scopes: tuple[ShortText, ...]
    admin: bool = False
    #: what results and parts may be encoded with
    encodings: Labels = ()


class Held(Item, frozen=True):
    """A call that a worker runs, or has finished and not been told that its outcome arrived at its caller."""

    call_id: CallIdField
    #: its number at this worker; 0: it has finished
    seq: Count
    #: whose call it is
    principal: ShortText
    #: of a detached call, its tool: somebody may ask for it who knows its id only
    tool: ShortText = ""
    #: of a detached call that runs, what is left of its time
    left_ms: Count = 0


class ToolDefinition(Record, kw_only=True, frozen=True):
    """What a worker offers under one name."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*\Z",
            max_length=limits.TOOL_NAME_CHARS_MAX,
        ),
    ]
    #: semantic version
    version: Annotated[str, Meta(pattern=r"^\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?\Z", max_length=64)]
    description: Text = ""
    #: JSON Schema texts of the arguments (an object) and of the result or of one part
    parameters: Schema = "{}"
    returns: Schema = "{}"
    capabilities: Annotated[Labels, Meta(min_length=1)]
    tags: Labels = ()
    category: ShortText = ""
    #: clearance that a caller needs
    level: Annotated[int, Meta(ge=0, le=10)] = 0
    idempotent: bool = False
    streaming: bool = False
    #: the call's timeout where the caller names none
    timeout_s: Annotated[float, Meta(gt=0, le=limits.CALL_TIMEOUT_S_MAX)] = limits.CALL_TIMEOUT_S
    #: calls of it that the workers of its pool may hold at a time, all together
    concurrency_max: Annotated[int, Meta(ge=1, le=limits.CONCURRENCY_MAX)] | None = None
    #: calls of it a second, all callers together, in the long run and at once
    rate_per_s: Annotated[float, Meta(gt=0, le=limits.RATE_MAX)] | None = None
    burst: Annotated[int, Meta(ge=1, le=limits.RATE_MAX)] | None = None


class GrantedLimits(Record, kw_only=True, frozen=True):
    """What the broker grants a session."""

    #: unfinished calls (client) or calls held (worker)
    window: Count
    heartbeat_ms: Count
    envelope_bytes: Count = limits.ENVELOPE_BYTES_MAX
    body_bytes: Count = limits.BODY_BYTES_MAX
    batch: Count = limits.BATCH_MAX
    stream_window: Count = limits.STREAM_WINDOW_MAX
    #: until the token expires; 0 for a worker
    token_ms: Count = 0
    upload_window: Count = limits.UPLOAD_WINDOW_MAX
