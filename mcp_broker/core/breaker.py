r"""A circuit breaker: whether a tool fails so often that asking it does more harm than saying no at once.

::

    CLOSED --half of 20 calls or more failed, and not those of one principal only--> OPEN
      ^                                                                              |  ^
      |                                                              its time is over|  |the trial failed
      |                                                              and a call asks |  |(twice the time)
      +------------------------- the trial succeeded ---------------------- HALF_OPEN --+

Rules
    A tool has a breaker from its first failure on; while none fails, nothing is counted and nothing is asked.
    One principal cannot open it: without the one that has most failures, half of the others' calls must have failed too,
    and at least one. Where only one principal calls a tool, its breaker never opens: that caller harms itself only, and
    what its calls do to the process is the recovery ladder's to answer (:mod:`~mcp_broker.core.recovery`).
    While it is open, one call at a time is let through once its time is over, the *trial*. A principal whose trial failed
    may try again only after twice that time, so that one cannot keep a tool closed that works for the others.

What counts is :data:`COUNTS`, by outcome code: what the caller did wrong, took back, or was never given to a worker, counts
neither way.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final

from mcp_broker import limits
from mcp_broker.errors import InvalidTransition


class State(IntEnum):
    """Whether calls are let through."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class Event(IntEnum):
    """What can happen to a breaker."""

    #: a call wants to be let through
    ASKED = 0
    SUCCEEDED = 1
    FAILED = 2
    #: a call that was let through came to nothing that says anything
    ABANDONED = 3


#: outcome code -> it is the tool's failure (True), its success (False), or says nothing of it (None)
COUNTS: Final[dict[str, bool | None]] = {
    "OK": False,
    "TOOL_FAILED": True,
    "DEADLINE_EXCEEDED": True,
    "WORKER_LOST": True,
    "RESOURCE_EXHAUSTED": True,
    "POISONED": True,
    "INTERNAL": True,
    "INVALID_ARGUMENT": None,
    "NOT_FOUND": None,
    "UNAUTHENTICATED": None,
    "FORBIDDEN": None,
    "OVERLOADED": None,
    "RATE_LIMITED": None,
    "PAYLOAD_TOO_LARGE": None,
    "CANCELLED": None,
    "BROKER_LOST": None,
    "UNAVAILABLE": None,
    "UNSUPPORTED_VERSION": None,
}

#: what one cell of the table does: call id, principal, now
Cell = Callable[["Breaker", bytes, str, float], float]

#: what the principals beyond :data:`limits.BREAKER_PRINCIPALS_MAX` count as; no principal has this name
_OTHERS: Final = ""


class Tally:
    """Calls and failures by principal over the last window: half windows, the older of which is forgotten whole.

    Attributes:
        calls, failures: of all principals.
    """

    __slots__ = ("_before", "_began_at", "_now", "calls", "failures")

    def __init__(self, now: float) -> None:
        #: principal -> [calls, failures]
        self._now: dict[str, list[int]] = {}
        self._before: dict[str, list[int]] = {}
        self._began_at = now
        self.calls = self.failures = 0

    def count(self, principal: str, now: float, *, failed: bool) -> None:
        """Count one call."""
        self.turn(now)
        counted = self._now.get(principal)
        if counted is None:
            if len(self._now) >= limits.BREAKER_PRINCIPALS_MAX:
                principal = _OTHERS
            counted = self._now.setdefault(principal, [0, 0])
        counted[0] += 1
        counted[1] += failed
        self.calls += 1
        self.failures += failed

    def turn(self, now: float) -> None:
        """Forget what is too long ago."""
        half_s = limits.BREAKER_WINDOW_S / 2
        halves = int((now - self._began_at) / half_s)
        if halves <= 0:
            return
        self._began_at += halves * half_s
        self._before, self._now = (self._now if halves == 1 else {}), {}
        self.calls = sum(calls for calls, _ in self._before.values())
        self.failures = sum(failures for _, failures in self._before.values())

    def worst(self) -> tuple[int, int]:
        """Return calls and failures of the principal with most failures."""
        sums: dict[str, list[int]] = {}
        for part in (self._before, self._now):
            for principal, (calls, failures) in part.items():
                counted = sums.setdefault(principal, [0, 0])
                counted[0] += calls
                counted[1] += failures
        calls, failures = max(sums.values(), key=lambda counted: counted[1], default=[0, 0])
        return calls, failures

    @property
    def is_bad(self) -> bool:
        """Tell whether a tool that did so should not be asked for a while."""
        share = limits.BREAKER_SHARE
        if self.calls < limits.BREAKER_CALLS_MIN or self.failures < share * self.calls:
            return False
        calls, failures = self.worst()
        others, others_failed = self.calls - calls, self.failures - failures
        return others_failed > 0 and others_failed >= share * others


class Breaker:
    """One tool's breaker, from its first failure on.

    Attributes:
        state: whether calls are let through.
        trial: id of the call that tries whether the tool works again, or None.
        until: OPEN only: when the first call may try.
        openings: how often it opened without a quiet window between.
    """

    __slots__ = (
        "_failed_trier",
        "_open_s",
        "_trier",
        "closed_at",
        "openings",
        "state",
        "tally",
        "trial",
        "until",
    )

    def __init__(self, now: float) -> None:
        self.state = State.CLOSED
        self.tally = Tally(now)
        self.trial: bytes | None = None
        self.until = 0.0
        self.openings = 0
        self.closed_at = now
        self._open_s = 0.0
        self._trier = self._failed_trier = ""

    def handle(self, event: Event, call_id: bytes, principal: str, now: float) -> float:
        """Take one event about a call.

        Returns:
            For ASKED: 0, or in how many seconds it is worth asking again; else 0.
        """
        return self.TABLE[self.state][event](self, call_id, principal, now)

    def is_quiet(self, now: float) -> bool:
        """Tell whether nothing has failed for a window, so that it may be forgotten."""
        self.tally.turn(now)
        return (
            self.state is State.CLOSED
            and not self.tally.failures
            and now - self.closed_at >= limits.BREAKER_WINDOW_S
        )

    def _trip(self, now: float) -> None:
        self.openings += 1
        self._open_s = min(limits.BREAKER_OPEN_S * 2 ** min(self.openings - 1, 16), limits.BREAKER_OPEN_S_MAX)
        self.until = now + self._open_s
        self.state = State.OPEN
        self.trial = None

    # -- cells -------------------------------------------------------------------------------------

    def _let_in(self, call_id: bytes, principal: str, now: float) -> float:  # noqa: ARG002 (the shape of a cell)
        return 0.0

    def _count_success(self, call_id: bytes, principal: str, now: float) -> float:
        del call_id
        self.tally.count(principal, now, failed=False)
        return 0.0

    def _count_failure(self, call_id: bytes, principal: str, now: float) -> float:
        del call_id
        if self.tally.failures == 0 and now - self.closed_at >= limits.BREAKER_WINDOW_S:
            self.openings = 0
        self.tally.count(principal, now, failed=True)
        if self.tally.is_bad:
            self._failed_trier = ""
            self._trip(now)
        return 0.0

    def _nothing(self, call_id: bytes, principal: str, now: float) -> float:  # noqa: ARG002 (the shape of a cell)
        """Of calls that were let through before it opened, nobody learns anything new."""
        return 0.0

    def _ask_open(self, call_id: bytes, principal: str, now: float) -> float:
        until = self.until + (self._open_s if principal == self._failed_trier else 0.0)
        if now < until:
            return until - now
        self.state = State.HALF_OPEN
        self.trial, self._trier = call_id, principal
        return 0.0

    def _ask_half(self, call_id: bytes, principal: str, now: float) -> float:
        if self.trial is not None:
            return limits.BREAKER_TRIAL_S
        # the last trial came to nothing
        self.state = State.OPEN
        return self._ask_open(call_id, principal, now)

    def _succeed_half(self, call_id: bytes, principal: str, now: float) -> float:
        del principal
        if call_id == self.trial:
            self.state = State.CLOSED
            self.trial, self._failed_trier = None, ""
            self.closed_at = now
            self.tally = Tally(now)
        return 0.0

    def _fail_half(self, call_id: bytes, principal: str, now: float) -> float:
        del principal
        if call_id == self.trial:
            self._failed_trier = self._trier
            self._trip(now)
        return 0.0

    def _abandon_half(self, call_id: bytes, principal: str, now: float) -> float:
        del principal, now
        if call_id == self.trial:
            self.trial = None
        return 0.0

    #: state -> event -> what happens
    TABLE: Final[tuple[tuple[Cell, ...], ...]] = (
        # ASKED    SUCCEEDED         FAILED           ABANDONED
        (_let_in, _count_success, _count_failure, _nothing),  # CLOSED
        (_ask_open, _nothing, _nothing, _nothing),  # OPEN
        (_ask_half, _succeed_half, _fail_half, _abandon_half),  # HALF_OPEN
    )


def event_of(code: str) -> Event:
    """Return what the end of a call that was at a worker says of its tool.

    Raises:
        InvalidTransition: the code is not in the table (our bug: a test holds it complete).
    """
    if code not in COUNTS:
        raise InvalidTransition(f"nobody has said what the outcome {code} says of a tool")
    counts = COUNTS[code]
    if counts is None:
        return Event.ABANDONED
    return Event.FAILED if counts else Event.SUCCEEDED
