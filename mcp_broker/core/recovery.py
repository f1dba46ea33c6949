r"""The recovery ladder: what is done about a tool that fails, one step stronger each time.

::

    RETRY       the next call simply runs; an idempotent call that opted in runs again itself
    RESET       the workers' `reset` hooks run; a module without any is restarted instead
    RESTART     other processes in place of those that serve it; after a crash that has happened already
    ISOLATE     a worker of its own, which runs one call at a time; the module's other tools stay where they are
    UNREGISTER  it takes no calls until an operator enables it again

**What climbs.** A failure of the tool's *code in its process*: it crashed, was killed because it did not stop at its deadline,
exceeded a limit, said what the protocol does not allow, or was killed for what it may not do. An exception that a tool
raises is its answer, and climbs only where its author says so (``recover=True``) or where the breaker opened over it. A
SIGKILL that nobody here sent (an operator, another program) is nobody's fault that could be proved: it is noted, and
climbs nothing. A call that stopped when it was told to, at its deadline or when its caller cancelled it, is no failure.

**Which step.** The first failure gets the first step of its class (:data:`FIRST`), later ones more:

====================  =====================================================================
failures before it    at least
====================  =====================================================================
none                  the first step of its class
1 in a row            RESET
2 in a row            RESTART
3 or more in a row    ISOLATE; UNREGISTER when it is isolated already and others saw it fail
5 within an hour      ISOLATE, with this one
====================  =====================================================================

In a row: no call of the tool succeeded between. *Monotone*: no step is weaker than the one before, until the position decays,
one step for each :data:`limits.LADDER_QUIET_S` without a failure.
UNREGISTER by number needs failures of two principals, so that nobody takes a tool from everybody else by calls that break it; a
fatal class needs one. What a process has lost by its death is not reset: after a death no step is below RESTART.

**Success.** A step has succeeded when the next call (or the breaker's trial) does, and failed when the next failure comes
first. Until then it is open, and counts for nothing.

**Penalty.** From the second failure in a row on, calls of the tool wait before it is tried again: doubling, with jitter,
at most :data:`limits.PENALTY_S_MAX`.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, IntEnum
from typing import Any, Final

from mcp_broker import limits
from mcp_broker.wire.structs import Slim


class Cause(Enum):
    """What went wrong."""

    EXCEPTION = "exception"
    BREAKER = "breaker"
    TIMEOUT = "timeout"
    LIMIT = "limit"
    CRASH = "crash"
    KILLED = "killed"
    PROBE = "failed probe"
    PROTOCOL = "protocol violation"
    SECURITY = "security violation"


class Class(Enum):
    """What kind of fault that is."""

    #: may not come again
    TRANSIENT = "transient"
    #: the process may hold what makes it fail
    STATE = "state"
    #: the process is gone, or cannot be trusted
    STRUCTURAL = "structural"
    #: it harms its neighbours
    ISOLATION = "isolation"
    FATAL = "fatal"


class Step(IntEnum):
    """What is done about it, the weakest first."""

    RETRY = 0
    RESET = 1
    RESTART = 2
    ISOLATE = 3
    UNREGISTER = 4


CLASSES: Final[dict[Cause, Class]] = {
    Cause.EXCEPTION: Class.TRANSIENT,
    Cause.KILLED: Class.TRANSIENT,
    Cause.BREAKER: Class.TRANSIENT,
    Cause.PROBE: Class.STATE,
    Cause.LIMIT: Class.STATE,
    Cause.TIMEOUT: Class.STRUCTURAL,
    Cause.CRASH: Class.STRUCTURAL,
    Cause.PROTOCOL: Class.ISOLATION,
    Cause.SECURITY: Class.FATAL,
}

FIRST: Final[dict[Class, Step]] = {
    Class.TRANSIENT: Step.RETRY,
    Class.STATE: Step.RESET,
    Class.STRUCTURAL: Step.RESTART,
    Class.ISOLATION: Step.ISOLATE,
    Class.FATAL: Step.UNREGISTER,
}

#: what is not the process's own fault goes no further than that: its breaker keeps callers away from a tool that only raises
CEILING: Final[dict[Cause, Step]] = {
    Cause.EXCEPTION: Step.RESTART,
    Cause.BREAKER: Step.RESTART,
    Cause.PROBE: Step.RESTART,
}

#: causes that prove nothing against the tool: noted, and no step follows from their number
NOTED_ONLY: Final = frozenset({Cause.KILLED})


class Failure(Slim):
    """One failure, as it is remembered.

    Attributes:
        at: instant of the machine's clock.
        principal: whose call it was.
        text: one sentence.
        resources: what the process had used, where that is known.
    """

    at: float
    cause: Cause
    principal: str
    text: str
    resources: dict[str, Any] | None = None


class Attempt(Slim):
    """One step of recovery.

    Attributes:
        succeeded: None while neither a success nor a failure has come after it.
        duration_s: from the failure to what decided.
        error: why the step itself could not be done; "" else.
    """

    at: float
    step: Step
    failure: Failure
    succeeded: bool | None = None
    duration_s: float | None = None
    error: str = ""


class Ladder:
    """One tool's position, and how it came there. It has one from its first failure on.

    Attributes:
        position: the strongest step that counts, or None at the bottom.
        in_a_row: failures since the last success.
        failures, attempts: the latest, the oldest first.
        tried, recovered: attempts that were decided, and those that succeeded, in its life.
    """

    __slots__ = (
        "_failed_at",
        "_quiet_since",
        "attempts",
        "failures",
        "in_a_row",
        "position",
        "principals",
        "recovered",
        "tried",
    )

    def __init__(self) -> None:
        self.position: Step | None = None
        self.in_a_row = 0
        self.failures: deque[Failure] = deque(maxlen=limits.FAILURES_KEPT)
        self.attempts: deque[Attempt] = deque(maxlen=limits.STEPS_KEPT)
        #: instants of the failures that count for the hour; more of them than matter are not kept
        self._failed_at: deque[float] = deque(maxlen=limits.ISOLATE_FAILURES)
        #: whose calls failed since the last success, two of them at most
        self.principals: set[str] = set()
        self.tried = self.recovered = 0
        self._quiet_since = 0.0

    def failed(self, failure: Failure, *, died: bool, isolated: bool) -> Attempt | None:
        """Take a failure; return the step that follows, or None if there is none to take.

        Args:
            died: the process is gone.
            isolated: the tool has a worker of its own.
        """
        now, cause = failure.at, failure.cause
        self.decay(now)
        self.failures.append(failure)
        self._decide(now, succeeded=False)
        if cause in NOTED_ONLY:
            return None
        step = self._step(failure, died=died, isolated=isolated)
        self.position = step
        self._quiet_since = now
        attempt = Attempt(now, step, failure)
        self.attempts.append(attempt)
        return attempt

    def _step(self, failure: Failure, *, died: bool, isolated: bool) -> Step:
        before = self.in_a_row
        self.in_a_row += 1
        self._failed_at.append(failure.at)
        if len(self.principals) < limits.UNREGISTER_PRINCIPALS:
            self.principals.add(failure.principal)
        first = FIRST[CLASSES[failure.cause]]
        if first is Step.UNREGISTER:
            return first
        step = Step(
            max(
                first,
                Step.RESTART if died else first,
                min(before, limits.ISOLATE_IN_A_ROW),
                Step.ISOLATE if self._is_often(failure.at) else first,
                first if self.position is None else self.position,
            )
        )
        ceiling = CEILING.get(failure.cause)
        if ceiling is not None:
            return min(step, ceiling if self.position is None else max(ceiling, self.position))
        if step is Step.ISOLATE and isolated and before >= limits.ISOLATE_IN_A_ROW:
            others_saw_it = len(self.principals) >= limits.UNREGISTER_PRINCIPALS
            step = Step.UNREGISTER if others_saw_it else Step.ISOLATE
        return step

    def _is_often(self, now: float) -> bool:
        failed_at = self._failed_at
        return len(failed_at) == limits.ISOLATE_FAILURES and now - failed_at[0] <= limits.ISOLATE_WINDOW_S

    def succeeded(self, now: float) -> bool:
        """Take a call's success; tell whether a step of recovery had been waiting for one."""
        self.in_a_row = 0
        self.principals.clear()
        return self._decide(now, succeeded=True)

    def _decide(self, now: float, *, succeeded: bool) -> bool:
        attempt = self.attempts[-1] if self.attempts else None
        if attempt is None or attempt.succeeded is not None:
            return False
        attempt.succeeded = succeeded
        attempt.duration_s = round(now - attempt.at, 6)
        self.tried += 1
        self.recovered += succeeded
        return True

    @property
    def is_open(self) -> bool:
        """Tell whether a step waits for the call that shows whether it helped."""
        return bool(self.attempts) and self.attempts[-1].succeeded is None

    def decay(self, now: float) -> bool:
        """Step down for each quiet time that has passed since the last failure; tell whether it did."""
        moved = False
        while self.position is not None and now - self._quiet_since >= limits.LADDER_QUIET_S:
            self._quiet_since += limits.LADDER_QUIET_S
            self.position = Step(self.position - 1) if self.position else None
            moved = True
        return moved

    def forgive(self) -> None:
        """Begin at the bottom, because an operator says so; what happened stays on record."""
        self.position, self.in_a_row = None, 0
        self.principals.clear()
        self._failed_at.clear()

    def penalty_s(self, jitter: float) -> float:
        """Return how long calls wait before the tool is tried again; ``jitter``: a random number of [0, 1)."""
        again = self.in_a_row - 1
        if again <= 0:
            return 0.0
        grown_s: float = min(limits.PENALTY_S * 2 ** min(again - 1, 16), limits.PENALTY_S_MAX)
        return grown_s * (1 - jitter / 2)

    @property
    def success_rate(self) -> float | None:
        """Return the share of decided attempts that succeeded; None: none was decided."""
        return self.recovered / self.tried if self.tried else None
