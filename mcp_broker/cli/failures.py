"""From an exception to an exit code and one to three lines: the only place that decides either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import errors
from mcp_broker.cli import output

if TYPE_CHECKING:
    from mcp_broker.cli.settings import Settings

DONE: Final = 0
FAILED: Final = 1
SYNTAX: Final = 2
REFUSED: Final = 3
NOT_REACHABLE: Final = 4
DEADLINE: Final = 5
INTERRUPTED: Final = 130

#: The most specific class counts. BROKER_LOST is 1, not 4: that call may have run, so trying again is not free.
EXIT_CODES: Final[dict[type[BaseException], int]] = {
    errors.CredentialError: REFUSED,
    errors.Unauthenticated: REFUSED,
    errors.Forbidden: REFUSED,
    errors.NotReachable: NOT_REACHABLE,
    errors.DeadlineExceeded: DEADLINE,
    errors.BrokerError: FAILED,
    KeyboardInterrupt: INTERRUPTED,
}

#: What to do next, where the one who raised it did not say: a command and what it is good for. ``{tool}`` and
#: ``{call_id}`` are filled in.
HINTS: Final[dict[str, tuple[str, str]]] = {
    "NOT_FOUND": ("tools", "what you may call"),
    "INVALID_ARGUMENT": ("tools {tool}", "its arguments and an example call"),
    "FORBIDDEN": ("credentials issue NAME --allow {tool}", "makes a profile that may"),
    "UNAUTHENTICATED": (
        "credentials issue NAME --allow PATTERN",
        "makes a new profile; start renews the default one",
    ),
    "NOT_REACHABLE": ("start", ""),
    "DEADLINE_EXCEEDED": ("call {tool} … --timeout SECONDS", "gives it more time"),
    "WORKER_LOST": ("why {call_id}", ""),
    "POISONED": ("why {call_id}", ""),
    "RESOURCE_EXHAUSTED": ("why {call_id}", "then raise the limit, and reload"),
    "UNAVAILABLE": ("status", "which pool is down, and why"),
    "OVERLOADED": ("status", "what it is busy with"),
    "BROKER_LOST": ("status", "whether the broker is back; nobody knows whether the call ran"),
    "INTERNAL": ("doctor", "and --debug shows a traceback"),
}

#: Longest line of a tool's standard error that goes into a message.
_STDERR_CHARS: Final = 160


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed command, as its user sees it."""

    exit_code: int
    code: str
    message: str
    #: at most one line between the message and the hint
    more: str = ""
    hint: str = ""
    retryable: bool = False
    details: dict[str, Any] | None = None

    def lines(self) -> list[str]:
        """What happened, why, what to do: one to three lines for standard error."""
        lines = [f"error: {self.code}: {self.message}" if self.code else f"error: {self.message}"]
        if self.more:
            lines.append(f"  {self.more}")
        if self.hint:
            lines.append(f"  next: {self.hint}")
        return lines

    def document(self) -> dict[str, Any]:
        """Return the same as data, for ``--json``."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "hint": self.hint or None,
                "retryable": self.retryable,
                "details": self.details or {},
            }
        }


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of the most specific known class; anything unknown failed."""
    for cls in type(error).__mro__:
        if cls in EXIT_CODES:
            return EXIT_CODES[cls]
    return FAILED


def explain(error: BaseException, chosen: Settings) -> Failure:
    """Turn any exception into what its user needs to know; ``chosen`` completes the commands to copy."""
    if isinstance(error, errors.BrokerError):
        return _of_broker_error(error, chosen)
    if isinstance(error, KeyboardInterrupt):
        return Failure(INTERRUPTED, "INTERRUPTED", "interrupted")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Failure(FAILED, "OS", f"{where}{error.strerror or error}")
    return Failure(
        FAILED,
        "INTERNAL",
        f"{type(error).__name__}: {_one_line(str(error))}",
        hint="this is a bug of mcp-broker; the same command with --debug shows where",
    )


def show(failure: Failure, *, as_json: bool) -> None:
    """Print it: the message on standard error, with ``as_json`` also the document on standard output."""
    if as_json:
        output.line(output.dumps(failure.document(), pretty=False))
    for line in failure.lines():
        output.note(line)


def _of_broker_error(error: errors.BrokerError, chosen: Settings) -> Failure:
    call_id = getattr(error, "call_id", None)
    details = dict(error.details)
    if call_id:
        details.setdefault("call_id", call_id.hex())
    given = _one_line(error.hint or "")
    message = _message(error)
    return Failure(
        exit_code_of(error),
        error.code,
        message.removesuffix(f"; {given}") if given else message,
        more=_more(error, call_id),
        hint=_completed(given, chosen) or _next(error, call_id, chosen),
        retryable=error.retryable,
        details=details,
    )


def _completed(hint: str, chosen: Settings) -> str:
    """Return a hint; one that is a bare command, by who does not know where its reader is, leads to the same broker."""
    program, _, command = hint.partition(" ")
    return chosen.again(command) if program == "mcp-broker" and command.isalpha() else hint


def _next(error: errors.BrokerError, call_id: bytes | None, chosen: Settings) -> str:
    """Return the command of :data:`HINTS`, complete, with its use as a comment that a shell ignores."""
    command, use = HINTS.get(error.code, ("", ""))
    if not command:
        return ""
    tool = getattr(error, "tool", None) or "NAME"
    line = chosen.again(command.format(tool=tool, call_id=call_id.hex() if call_id else ""))
    return f"{line}  # {use}" if use else line


def _message(error: errors.BrokerError) -> str:
    message = _one_line(error.message)
    guesses = error.details.get("did_you_mean")
    if isinstance(guesses, list) and guesses and str(guesses[0]) not in message:
        message += f"; did you mean {' or '.join(str(guess) for guess in guesses[:3])}?"
    faults = error.details.get("faults")
    if isinstance(faults, list):
        unnamed = [fault for fault in faults if isinstance(fault, dict) and _unnamed(fault, message)]
        message = "; ".join([message, *(_fault(fault) for fault in unnamed)])
    return message


def _unnamed(fault: dict[str, Any], message: str) -> bool:
    name = str(fault.get("path") or "").strip("/").partition("/")[0]
    return name not in message if name else False


def _fault(fault: dict[str, Any]) -> str:
    return str(fault.get("message") or f"{fault.get('path')}: expected {fault.get('expected')}")


def _more(error: errors.BrokerError, call_id: bytes | None) -> str:
    details = error.details
    certificate = details.get("certificate")
    if isinstance(certificate, dict):
        return _of_certificate(certificate, call_id, error.message)
    if isinstance(error, errors.ToolFailed) and details.get("file"):
        return f"at {details['file']}:{details.get('line', '?')}"
    signature = details.get("signature")
    if isinstance(signature, str) and signature not in error.message:
        return f"signature: {_one_line(signature)}"
    return ""


def _of_certificate(certificate: dict[str, Any], call_id: bytes | None, told: str) -> str:
    parts = [f"call {call_id.hex()}"] if call_id else []
    parts += [
        f"worker {certificate.get('worker_id', '?')} (pid {certificate.get('pid', '?')})",
    ]
    cause = str(certificate.get("cause") or "cause unknown")
    parts += [cause] if cause not in told else []
    stderr = str(certificate.get("stderr") or "").strip()
    if stderr:
        parts.append(f"last stderr: {stderr.splitlines()[-1][:_STDERR_CHARS]}")
    return _one_line("; ".join(parts))


def _one_line(text: str) -> str:
    return " ".join(text.split())
