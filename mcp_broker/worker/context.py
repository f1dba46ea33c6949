"""What a tool may know and use besides its arguments: a parameter annotated :class:`ToolContext` gets it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.errors import Cancelled, DeadlineExceeded, PortInvalid

if TYPE_CHECKING:
    from mcp_broker.worker.leases import LeasedPort


@dataclass(frozen=True, slots=True)
class ToolCaller:
    """Who calls, as the broker verified it. A tool never sees a token."""

    principal: str
    #: 0 to 10; at least the tool's level
    clearance: int
    #: name patterns that the caller may call, ``text.*``
    scopes: tuple[str, ...]
    admin: bool = False


#: a direct call, without a broker, has no caller
NOBODY = ToolCaller(principal="", clearance=0, scopes=())

#: takes a fraction and a text
Report = Callable[[float | None, str], object]
#: a progress text is cut to so many characters
_TEXT_CHARS = 256
_PORT_MAX = 65_535


class ToolLogger(logging.LoggerAdapter[logging.Logger]):
    """Logs as any logger does, and says with each record which call it is about; `extra` may say more."""

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[object, MutableMapping[str, Any]]:
        """Add the call to what a record says."""
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


@dataclass(slots=True)
class ToolContext:
    """One call, as its tool sees it. Everything has a default, so that a test can call a tool directly.

    Args:
        call_id: the call's id, 32 hexadecimal digits.
        tool: the tool's name.
        caller: who calls.
        deadline: when the call's time is over, on :func:`time.monotonic`'s clock, seconds; None: never.
        options: `options` of the pool, from the configuration.
        secrets: name -> content, as the operator named them in the configuration; never in the environment.
        scratch: a private writable folder of this worker; it goes with the worker.
        traceparent: the caller's W3C trace context, to hand on.
        report: where :meth:`progress` goes; a test may collect it here.
    """

    call_id: str = ""
    tool: str = ""
    caller: ToolCaller = NOBODY
    deadline: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    scratch: Path = Path()
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    traceparent: str | None = None
    #: the caller wants no outcome any more
    cancelled: bool = False
    report: Report | None = field(default=None, repr=False)
    #: where :meth:`lease_port` gets a port from
    lend: Callable[[int, float | None], LeasedPort] | None = field(default=None, repr=False)
    _report_at: float = field(default=0.0, init=False, repr=False, compare=False)

    def lease_port(self, port: int = 0, *, ttl_s: float | None = None) -> LeasedPort:
        """Lease a port of the host to serve at, as a listening socket; give it back by leaving its `with` block.

        It goes back by itself when the worker ends. A call's end does not end it: a tool may serve on between calls.

        Args:
            port: a certain one of the configured range; 0: any that is free.
            ttl_s: for how long at most; afterwards it takes no new connections.

        Raises:
            PortDenied: the pool's network or level forbids it.
            PortsExhausted: this worker has all that it may have, or none is left.
            PortUnavailable: somebody else has it.
            PortInvalid: it is not in the range, or there is no supervisor that could lend one.
        """
        if not 0 <= port <= _PORT_MAX:
            raise PortInvalid(f"{port} is no port; ports are 1 to {_PORT_MAX}, and 0 means any")
        if self.lend is None:
            raise PortInvalid("this call has no supervisor that could lend a port")
        return self.lend(port, ttl_s)

    @property
    def logger(self) -> ToolLogger:
        """The log of this call: operators read it (docs/operating.md), not the caller; it names tool and call."""
        name = f"mcp_broker.tool.{self.tool}" if self.tool else "mcp_broker.tool"
        return ToolLogger(logging.getLogger(name), {"tool": self.tool, "call_id": self.call_id})

    def remaining_s(self) -> float | None:
        """Seconds until the call's time is over (0 when it is), or None when it has no limit."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - time.monotonic())

    def progress(self, fraction: float | None = None, message: str = "") -> None:
        """Tell the caller how far this call has come, and that it is not stuck (its idle time-out begins anew).

        At most every 50 ms one goes out; what comes sooner is dropped, so that it may be called in every turn of a
        loop. Call it from the thread that the tool was called in; from others it reaches the caller only where the
        tool is asynchronous.

        Args:
            fraction: what is done of the whole, 0 to 1; None: nobody knows.
            message: for people, one line of up to 256 characters.

        Raises:
            ValueError: no such fraction can be (the tool author's fault).
        """
        if fraction is not None and not 0 <= fraction <= 1:
            raise ValueError(f"progress is a fraction from 0 to 1, not {fraction!r}")
        report = self.report
        if report is None:
            return
        now = time.monotonic()
        if now < self._report_at:
            return
        self._report_at = now + limits.PROGRESS_S
        report(None if fraction is None else float(fraction), str(message)[:_TEXT_CHARS])

    def check_cancelled(self) -> None:
        """Stop here if nobody waits for the outcome: for loops in threads, which no signal reaches.

        Raises:
            DeadlineExceeded: the call's time is over. Let it pass.
            Cancelled: the call was cancelled. Let it pass.
        """
        # the deadline first: at that instant the broker cancels too, and the cause is the one to tell
        if self.remaining_s() == 0.0:
            raise DeadlineExceeded("the call's time is over")
        if self.cancelled:
            raise Cancelled("the call was cancelled")
