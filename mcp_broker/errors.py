"""Every error that the project raises, in one tree.

::

    BrokerError                     code, retryable, details; str() is the sentence for people
    +- ConfigError                  the operator's fault, found before anything starts
    +- WireError                    the bytes are wrong (the peer's fault, costs that peer only)
    |  +- MalformedFrame            not a message of this protocol
    |  +- UnknownKind               well-formed, but a kind that this socket does not take
    +- CredentialError              a key, token or profile file cannot be used (exit code 3)
    +- NotReachable                 no broker answers, or there is no profile (exit code 4)
    +- ClientClosed                 a client was used after its end (the caller's fault)
    +- WrongProcess                 a client was used in a process that was forked from its own (the caller's fault)
    +- SupervisionError             a process could not be started or stopped
    +- PortError                a port cannot be leased
    |  +- PortUnavailable, PortsExhausted, PortInvalid, PortDenied
    +- InvalidTransition            our bug: a machine was driven into a cell that cannot happen
    +- CallError                    the outcome of a call, as its caller sees it
       +- one class a code of :data:`CALL_ERRORS`

Three questions choose a class: whose fault, may it be tried again, does the connection survive.
The codes are the protocol's (docs/protocol.md, "Errors"); a test proves the two lists equal.
"""

from __future__ import annotations

from concurrent.futures import CancelledError as FutureCancelledError
from typing import Any, ClassVar


class BrokerError(Exception):
    """The root of the tree.

    Args:
        message: what happened, why and what to do, in one or two sentences.
        details: the same as data, with only what msgpack can carry.
        retryable: overrides the class's own answer to "may the same request succeed later?".
    """

    code: ClassVar[str] = "INTERNAL"
    #: what this kind of error usually is; an instance may know better
    retryable_by_default: ClassVar[bool] = False

    def __init__(
        self, message: str, details: dict[str, Any] | None = None, *, retryable: bool | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = {} if details is None else details
        self.retryable = self.retryable_by_default if retryable is None else retryable

    @property
    def hint(self) -> str | None:
        """What to do next, if the one who raised it knew."""
        hint = self.details.get("hint")
        return hint if isinstance(hint, str) else None


class ConfigError(BrokerError):
    """The configuration cannot be used; nothing was started."""

    code = "CONFIG"


class WireError(BrokerError):
    """The bytes of a peer are wrong; it costs that peer only."""

    code = "WIRE"


class MalformedFrame(WireError):  # noqa: N818 (an outcome, named as a noun)
    """The bytes are not a message of this protocol, or break one of its bounds."""

    code = "MALFORMED_FRAME"


class UnknownKind(WireError):  # noqa: N818
    """A message whose kind this socket does not take."""

    code = "UNKNOWN_KIND"


class CredentialError(BrokerError):
    """A key, token or profile file is missing a part, too open, expired or refused."""

    code = "CREDENTIAL"


class NotReachable(BrokerError):  # noqa: N818
    """No broker answers at the address, or nothing says where one is."""

    code = "NOT_REACHABLE"
    retryable_by_default = True


class ClientClosed(BrokerError):  # noqa: N818
    """The client was closed and takes no calls; make a new one."""

    code = "CLIENT_CLOSED"


class WrongProcess(BrokerError):  # noqa: N818
    """The client belongs to the process that connected it, and this one was forked from that; make a new one."""

    code = "WRONG_PROCESS"


class SupervisionError(BrokerError):
    """A process could not be started, found or stopped."""

    code = "SUPERVISION"


class PortError(BrokerError):
    """A port cannot be leased; ``details`` say which and why."""

    code = "PORT"


class PortUnavailable(PortError):  # noqa: N818
    """Somebody has this port, or nobody may have it."""

    code = "PORT_UNAVAILABLE"
    retryable_by_default = True


class PortsExhausted(PortError):  # noqa: N818
    """None is left for this worker, or for anybody; ``details["which"]`` is "worker" or "range"."""

    code = "PORTS_EXHAUSTED"
    retryable_by_default = True


class PortInvalid(PortError):  # noqa: N818
    """No such port can be leased."""

    code = "PORT_INVALID"


class PortDenied(PortError):  # noqa: N818
    """This worker may not lease ports: its pool's network or level forbids it."""

    code = "PORT_DENIED"


#: code -> class, for those who hear of one by a message
PORT_ERRORS: dict[str, type[PortError]] = {
    cls.code: cls for cls in (PortError, PortUnavailable, PortsExhausted, PortInvalid, PortDenied)
}


class InvalidTransition(BrokerError):  # noqa: N818
    """A machine was driven where only our own bug could drive it."""

    code = "INVALID_TRANSITION"


class CallError(BrokerError):
    """A call ended without a result. ``code`` says how; see docs/protocol.md, "Errors"."""

    #: filled in by the client: which call, of which tool
    call_id: bytes | None = None
    tool: str | None = None


class InvalidArgument(CallError):  # noqa: N818
    """The arguments do not fit the tool's schema; ``details["faults"]`` lists all of them."""

    code = "INVALID_ARGUMENT"


class NotFound(CallError):  # noqa: N818
    """No such tool."""

    code = "NOT_FOUND"


class Unauthenticated(CallError):  # noqa: N818
    """The session has no valid token (none, expired, bound to another key)."""

    code = "UNAUTHENTICATED"


class Forbidden(CallError):  # noqa: N818
    """The token's scope or clearance does not cover this call."""

    code = "FORBIDDEN"


class Overloaded(CallError):  # noqa: N818
    """A queue or window is full; ``details["retry_after_s"]`` says when to come back."""

    code = "OVERLOADED"
    retryable_by_default = True


class RateLimited(CallError):  # noqa: N818
    """Too many calls in too short a time."""

    code = "RATE_LIMITED"
    retryable_by_default = True


class PayloadTooLarge(CallError):  # noqa: N818
    """Arguments or result exceed ``details["limit_bytes"]``."""

    code = "PAYLOAD_TOO_LARGE"


class ToolFailed(CallError):  # noqa: N818
    """The tool raised; ``details`` holds type, message, file and line of the author's code."""

    code = "TOOL_FAILED"


class DeadlineExceeded(CallError):  # noqa: N818
    """The call's time was over before its outcome."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(CallError, FutureCancelledError):  # noqa: N818
    """The caller, or the end of its session, cancelled the call."""

    code = "CANCELLED"


class WorkerLost(CallError):  # noqa: N818
    """The worker died while it ran this call; ``details["certificate"]`` says how."""

    code = "WORKER_LOST"


class ResourceExhausted(CallError):  # noqa: N818
    """The call exceeded ``details["limit"]``."""

    code = "RESOURCE_EXHAUSTED"


class Poisoned(CallError):  # noqa: N818
    """The call killed several workers and will not be tried again."""

    code = "POISONED"


class BrokerLost(CallError):  # noqa: N818
    """The broker went away and nobody knows this call's outcome."""

    code = "BROKER_LOST"


class Unavailable(CallError):  # noqa: N818
    """Nothing can serve the call now; ``details["reason"]`` says why."""

    code = "UNAVAILABLE"
    retryable_by_default = True


class UnsupportedVersion(CallError):  # noqa: N818
    """The peers share no protocol version; ``details["supported"]`` lists the broker's."""

    code = "UNSUPPORTED_VERSION"


class Internal(CallError):  # noqa: N818
    """A bug of ours; please report it."""

    code = "INTERNAL"


#: code -> class: the closed set of ways in which a call can fail
CALL_ERRORS: dict[str, type[CallError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        NotFound,
        Unauthenticated,
        Forbidden,
        Overloaded,
        RateLimited,
        PayloadTooLarge,
        ToolFailed,
        DeadlineExceeded,
        Cancelled,
        WorkerLost,
        ResourceExhausted,
        Poisoned,
        BrokerLost,
        Unavailable,
        UnsupportedVersion,
        Internal,
    )
}


def call_error(
    code: str, message: str, details: dict[str, Any] | None = None, *, retryable: bool | None = None
) -> CallError:
    """Make the exception of a wire code; an unknown code (a newer broker's) becomes a plain CallError."""
    cls = CALL_ERRORS.get(code)
    if cls is None:
        error = CallError(message, {"unknown_code": code, **(details or {})}, retryable=retryable)
        error.code = code  # type: ignore[misc]
        return error
    return cls(message, details, retryable=retryable)
