"""Every message of the client and worker sockets, as values that are legal when they exist.

A message is one msgpack array ``[kind, epoch, fields...]``; its items (calls, outcomes, parts) are
arrays too. Fields are only ever appended, with defaults, so that an older peer ignores what it does
not know and a newer one does without. Records that people read (tool definitions, limits) are maps.

Fields, types, bounds and answers: docs/protocol.md, "Messages".
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from mcp_broker import limits
from mcp_broker.wire.items import (
    Call,
    Caller,
    CallExtra,
    CallIdField,
    Chunk,
    Count,
    Depth,
    Details,
    Dispatch,
    Epoch,
    Fault,
    GrantedLimits,
    Held,
    Labels,
    Outcome,
    Part,
    Priority,
    Progress,
    SessionIdField,
    ShortText,
    StreamCredit,
    Text,
    Token,
    ToolDefinition,
    ToolNameField,
    Usage,
)

PROTOCOL: Final = "MCPB"
MAJOR: Final = 1
MINOR: Final = 0
OK: Final = "OK"


# -- messages -----------------------------------------------------------------------------------


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One frame; the kind is the tag."""


class Hello(Message, tag="HELLO", frozen=True):
    """Client: open or resume a session. The first three fields never change, in any version."""

    epoch: Epoch
    protocol: ShortText
    majors: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=16)]
    token: Token
    #: resume this session, for the same key only
    session_id: SessionIdField | None = None
    capabilities: Labels = ()
    #: name and version of the client's software, for people
    agent: ShortText = ""
    #: outcomes of the session received so far
    ack: Count = 0


class Register(Message, tag="REGISTER", frozen=True):
    """Worker: open a session and offer tools, all or none."""

    epoch: Epoch
    protocol: ShortText
    majors: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=16)]
    tools: Annotated[tuple[ToolDefinition, ...], Meta(max_length=limits.TOOLS_PER_WORKER_MAX)]
    capabilities: Labels = ()
    agent: ShortText = ""
    #: the number of the last call that it was given in its life; the next one's is above it
    seq: Count = 0
    #: what it holds from earlier connections; whatever else it was given, it has never started
    held: Annotated[tuple[Held, ...], Meta(max_length=limits.HELD_MAX + limits.WORKER_DEPTH_MAX)] = ()
    #: tool -> what else is to be known of it: events for which it has hooks that may be asked for, and "recover" where an
    #: exception that it raises counts like a fault of its process
    traits: Annotated[dict[ToolNameField, Labels], Meta(max_length=limits.TOOLS_PER_WORKER_MAX)] = {}
    #: for so long yet, calls may be sent again whose outcomes it let go: their time is not over
    let_go_ms: Count = 0


class Welcome(Message, tag="WELCOME", frozen=True):
    """Broker: the session is open."""

    epoch: Epoch
    version: tuple[Count, Count]
    session_id: SessionIdField
    #: the session that HELLO named goes on; else its calls are unknown here
    resumed: bool
    #: the client's principal, or the worker's id
    name: ShortText
    granted: GrantedLimits
    capabilities: Labels = ()
    #: brokers with the same lineage follow each other under one supervisor, and know of each other's calls
    lineage: ShortText = ""


class Renew(Message, tag="RENEW", frozen=True):
    """Client: a new token for the same key."""

    epoch: Epoch
    token: Token


class Renewed(Message, tag="RENEWED", frozen=True):
    """Broker: the new token counts from now."""

    epoch: Epoch
    token_ms: Count


class Goodbye(Message, tag="GOODBYE", frozen=True):
    """Either side: the session ends here and now."""

    epoch: Epoch
    reason: ShortText = ""


class Calls(Message, tag="CALLS", frozen=True):
    """Client: calls to accept."""

    epoch: Epoch
    #: outcomes of the session received so far
    ack: Count
    calls: Annotated[tuple[Call, ...], Meta(min_length=1, max_length=limits.BATCH_MAX)]


class Dispatches(Message, tag="DISPATCH", frozen=True):
    """Broker: calls for a worker."""

    epoch: Epoch
    #: outcomes of this worker received so far
    ack: Count
    calls: Annotated[tuple[Dispatch, ...], Meta(min_length=1, max_length=limits.BATCH_MAX)]


class Outcomes(Message, tag="OUTCOMES", frozen=True):
    """Worker to broker, broker to client: outcomes.

    ``first`` is the running number, from 1 and per session, of the first outcome of the list.
    """

    epoch: Epoch
    first: Count
    outcomes: Annotated[tuple[Outcome, ...], Meta(min_length=1, max_length=limits.BATCH_MAX)]


class Ack(Message, tag="ACK", frozen=True):
    """Receiver of outcomes: ``count`` outcomes of this session arrived."""

    epoch: Epoch
    count: Count


class Partial(Message, tag="PARTIAL", frozen=True):
    """Worker to broker, broker to client: parts of streams."""

    epoch: Epoch
    parts: Annotated[tuple[Part, ...], Meta(min_length=1, max_length=limits.BATCH_MAX)]


class Progresses(Message, tag="PROGRESS", frozen=True):
    """Worker to broker, broker to client: how far calls have come."""

    epoch: Epoch
    progress: Annotated[tuple[Progress, ...], Meta(min_length=1, max_length=limits.BATCH_MAX)]


class Chunks(Message, tag="CHUNKS", frozen=True):
    """Client to broker, broker to worker: chunks of arguments."""

    epoch: Epoch
    chunks: Annotated[tuple[Chunk, ...], Meta(min_length=1, max_length=limits.BATCH_MAX)]


class Credit(Message, tag="CREDIT", frozen=True):
    """From the caller's side: more room for parts; from the worker's: for chunks."""

    epoch: Epoch
    credits: Annotated[tuple[StreamCredit, ...], Meta(min_length=1, max_length=limits.BATCH_MAX)]


class Cancel(Message, tag="CANCEL", frozen=True):
    """Client to broker, broker to worker: end these calls."""

    epoch: Epoch
    call_ids: Annotated[tuple[CallIdField, ...], Meta(min_length=1, max_length=limits.BATCH_MAX)]


class Ready(Message, tag="READY", frozen=True):
    """Worker: hold up to ``depth`` calls here at a time, from now on."""

    epoch: Epoch
    depth: Depth


class Drain(Message, tag="DRAIN", frozen=True):
    """Broker: no more calls will come; finish what you hold, then say GOODBYE."""

    epoch: Epoch


class Hook(Message, tag="HOOK", frozen=True):
    """Broker: run the hooks of a tool for an event, between two calls."""

    epoch: Epoch
    #: the answer says the same number
    order: Count
    event: ShortText
    tool: ToolNameField


class Hooked(Message, tag="HOOKED", frozen=True):
    """Worker: the hooks have run; ``error``: what the first one that failed raised."""

    epoch: Epoch
    order: Count
    error: Text = ""


class Heartbeat(Message, tag="HEARTBEAT", frozen=True):
    """Either side: alive."""

    epoch: Epoch


class Error(Message, tag="ERROR", frozen=True):
    """Broker: a message could not be served; with ``fatal`` the session is over.

    ``details`` is a msgpack map.
    """

    epoch: Epoch
    code: ShortText
    message: Text
    details: Details
    fatal: bool


#: One table a socket and direction: what may come in there, and nothing else.
FromClient = Hello | Renew | Goodbye | Calls | Cancel | Ack | Credit | Chunks | Heartbeat
ToClient = Welcome | Renewed | Goodbye | Outcomes | Partial | Progresses | Credit | Heartbeat | Error
FromWorker = Register | Ready | Goodbye | Outcomes | Partial | Progresses | Credit | Heartbeat | Hooked
ToWorker = Welcome | Goodbye | Dispatches | Cancel | Ack | Credit | Chunks | Drain | Heartbeat | Error | Hook

AnyMessage = (
    Hello | Renew | Goodbye | Calls | Cancel | Ack | Credit | Heartbeat | Welcome | Renewed | Outcomes
    | Partial | Progresses | Chunks | Error | Register | Ready | Dispatches | Drain | Hook | Hooked
)  # fmt: skip

EMPTY_DETAILS: Final = b"\x80"


def kind_of(message: Any) -> str:  # noqa: ANN401 (any Message class or value)
    """Return the wire name of a message's kind."""
    return str(message.__struct_config__.tag)
