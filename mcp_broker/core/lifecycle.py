r"""A tool's life: where it is, what may happen to it there, and what becomes of its calls meanwhile.

::

                 READY                   UPDATE              DONE, FAIL
    REGISTERED --------> ACTIVE -------------------> UPDATING ----------> ACTIVE
      |    |            |  ^  |  \ \
      |    START        |  |  |   \ `--STOP--> STOPPING --DONE--> STOPPED --START--> STARTING --DONE--> STARTED
      |    v            |  |  |    `--PAUSE--> PAUSING --DONE--> PAUSED --RESUME--> RESUMING --DONE--> ACTIVE
      | STARTING ...    |  |  `-----RECOVER--> RECOVERING --DONE--> ACTIVE
      |       DEACTIVATE|  |ACTIVATE                `--FAIL--> ERROR --RECOVER--> RECOVERING
      |                 v  |
      |               INACTIVE
      `--UNREGISTER (also from ACTIVE, STOPPED, INACTIVE, ERROR, RECOVERING)--> UNREGISTERED --REGISTER--> REGISTERED

Rules
    A state changes only by :data:`LIFECYCLE`; each cell is written. An event that has no cell is a typed error that names
    what could be done instead, and changes nothing.
    What a state does to calls is :data:`TREATMENT`. A tool that waits for its hooks, or for a step of recovery, is never
    stuck: whoever waits has a deadline, after which FAIL is said.
    Which of its pool's workers live is not a tool's state: calls of an ACTIVE tool wait for a worker as before.
    REGISTERED leads to RECOVERING, too: for a tool to which an earlier broker had given a worker of its own.
    The history is bounded, and tells failures too.

Source: docs/recovery.md, "A tool's life".
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Final

from mcp_broker import limits
from mcp_broker.errors import InvalidTransition
from mcp_broker.wire.structs import Slim


class State(IntEnum):
    """Where a tool is."""

    #: known, and no worker of it has been ready yet
    REGISTERED = 0
    #: its start hooks run
    STARTING = 1
    #: they have run; it takes calls with the next event
    STARTED = 2
    ACTIVE = 3
    #: no call is given out any more; those that run end
    PAUSING = 4
    PAUSED = 5
    #: its resume hooks run
    RESUMING = 6
    #: another version is being made ready, this one serves meanwhile
    UPDATING = 7
    #: nothing is taken any more; calls that run end, then its stop hooks run
    STOPPING = 8
    STOPPED = 9
    #: an operator wants no new calls; workers and what runs are left alone
    INACTIVE = 10
    #: a hook or a step of recovery failed
    ERROR = 11
    #: a step of recovery is under way
    RECOVERING = 12
    #: taken out, by recovery or by an operator; only an operator brings it back
    UNREGISTERED = 13


class Event(IntEnum):
    """What can happen to a tool."""

    REGISTER = 0
    #: a worker that serves it is ready
    READY = 1
    ACTIVATE = 2
    DEACTIVATE = 3
    START = 4
    STOP = 5
    PAUSE = 6
    RESUME = 7
    UPDATE = 8
    RECOVER = 9
    #: what was under way is done
    DONE = 10
    #: what was under way failed
    FAIL = 11
    UNREGISTER = 12


class Treatment(IntEnum):
    """What becomes of a tool's calls."""

    #: taken and given to workers
    ACCEPT = 0
    #: taken; they wait for the state to change, until their deadline
    WAIT = 1
    #: UNAVAILABLE at once, new ones; what waits goes on
    REFUSE = 2
    #: UNAVAILABLE at once, new ones and those that wait
    END = 3


(
    _REG, _STARTING, _STARTED, _ACTIVE, _PAUSING, _PAUSED, _RESUMING, _UPDATING, _STOPPING, _STOPPED, _INACTIVE, _ERROR,
    _RECOVERING, _GONE,
) = State  # fmt: skip
_NO: Final = None

#: state -> event -> next state; the same state: nothing changes and nothing is noted; None: refused
LIFECYCLE: Final[tuple[tuple[State | None, ...], ...]] = (
    # REGISTER READY ACTIVATE DEACTIVATE START STOP PAUSE RESUME UPDATE RECOVER DONE FAIL UNREGISTER
    (_REG, _ACTIVE, _ACTIVE, _INACTIVE, _STARTING, _NO, _NO, _NO, _NO, _RECOVERING, _NO, _ERROR, _GONE),  # REGISTERED
    (_STARTING, _STARTING, _NO, _NO, _STARTING, _STOPPING, _NO, _NO, _NO, _RECOVERING, _STARTED, _ERROR, _NO),  # STARTING
    (_STARTED, _STARTED, _ACTIVE, _NO, _NO, _STOPPING, _PAUSING, _NO, _NO, _RECOVERING, _ACTIVE, _ERROR, _NO),  # STARTED
    (_ACTIVE, _ACTIVE, _ACTIVE, _INACTIVE, _STARTING, _STOPPING, _PAUSING, _NO, _UPDATING, _RECOVERING, _NO, _ERROR, _GONE),  # ACTIVE
    (_PAUSING, _PAUSING, _NO, _NO, _NO, _NO, _PAUSING, _RESUMING, _NO, _NO, _PAUSED, _ERROR, _NO),  # PAUSING
    (_PAUSED, _PAUSED, _NO, _NO, _NO, _STOPPING, _PAUSED, _RESUMING, _NO, _NO, _NO, _ERROR, _NO),  # PAUSED
    (_RESUMING, _RESUMING, _NO, _NO, _NO, _NO, _NO, _RESUMING, _NO, _RECOVERING, _ACTIVE, _ERROR, _NO),  # RESUMING
    (_UPDATING, _UPDATING, _NO, _INACTIVE, _NO, _NO, _NO, _NO, _UPDATING, _RECOVERING, _ACTIVE, _ACTIVE, _NO),  # UPDATING
    (_STOPPING, _STOPPING, _NO, _NO, _NO, _STOPPING, _NO, _NO, _NO, _NO, _STOPPED, _ERROR, _NO),  # STOPPING
    (_STOPPED, _STOPPED, _NO, _INACTIVE, _STARTING, _STOPPED, _NO, _NO, _NO, _NO, _NO, _ERROR, _GONE),  # STOPPED
    (_INACTIVE, _INACTIVE, _ACTIVE, _INACTIVE, _STARTING, _NO, _NO, _NO, _NO, _NO, _NO, _ERROR, _GONE),  # INACTIVE
    (_ERROR, _ERROR, _NO, _INACTIVE, _NO, _STOPPED, _NO, _NO, _NO, _RECOVERING, _NO, _ERROR, _GONE),  # ERROR
    (_RECOVERING, _RECOVERING, _NO, _INACTIVE, _NO, _NO, _NO, _NO, _NO, _RECOVERING, _ACTIVE, _ERROR, _GONE),  # RECOVERING
    (_REG, _GONE, _NO, _NO, _NO, _NO, _NO, _NO, _NO, _NO, _NO, _NO, _GONE),  # UNREGISTERED
)  # fmt: skip

#: state -> what becomes of its calls
TREATMENT: Final[tuple[Treatment, ...]] = (
    Treatment.ACCEPT,  # REGISTERED: no worker serves it, so they wait for one
    Treatment.WAIT,  # STARTING
    Treatment.WAIT,  # STARTED
    Treatment.ACCEPT,  # ACTIVE
    Treatment.WAIT,  # PAUSING
    Treatment.WAIT,  # PAUSED
    Treatment.WAIT,  # RESUMING
    Treatment.ACCEPT,  # UPDATING
    Treatment.END,  # STOPPING
    Treatment.END,  # STOPPED
    Treatment.REFUSE,  # INACTIVE
    Treatment.END,  # ERROR
    Treatment.WAIT,  # RECOVERING
    Treatment.END,  # UNREGISTERED
)


class Change(Slim):
    """One line of a tool's history.

    Attributes:
        at: instant of the machine's clock.
        event: what happened.
        duration_s: how long the tool was in the state before.
        error: why, where something went wrong; "" else.
    """

    at: float
    event: Event
    before: State
    after: State
    duration_s: float
    error: str = ""


class Lifecycle:
    """One tool's life.

    Attributes:
        state: where it is.
        reason: why, for callers and operators; "" where the state says all.
        since: when it came there.
        history: the latest changes, the oldest first.
    """

    __slots__ = ("history", "reason", "since", "state")

    def __init__(self, now: float) -> None:
        self.state = State.REGISTERED
        self.reason = ""
        self.since = now
        self.history: deque[Change] = deque(maxlen=limits.LIFECYCLE_KEPT)

    @classmethod
    def at(cls, state: State, reason: str, now: float) -> Lifecycle:
        """Go on where an earlier broker left a tool."""
        life = cls(now)
        life.state, life.reason = state, reason
        return life

    def may(self, event: Event) -> bool:
        """Tell whether an event has a cell here."""
        return LIFECYCLE[self.state][event] is not None

    def handle(self, event: Event, now: float, *, reason: str = "", error: str = "") -> bool:
        """Take one event.

        Args:
            reason: why the tool is in its new state.
            error: what went wrong; kept in the history.

        Returns:
            Whether the state has changed.

        Raises:
            InvalidTransition: that cannot be done in this state; ``details`` name it and what can.
        """
        before = self.state
        after = LIFECYCLE[before][event]
        if after is None:
            able = [one.name.lower() for one in Event if LIFECYCLE[before][one] not in {None, before}]
            raise InvalidTransition(
                f"a tool that is {before.name.lower()} cannot {event.name.lower()}",
                {"state": before.name.lower(), "event": event.name.lower(), "possible": able},
            )
        if after is before and not error:
            return False
        self.history.append(Change(now, event, before, after, round(now - self.since, 6), error))
        self.reason = reason or error
        if after is before:
            return False
        self.state, self.since = after, now
        return True

    def note(self, error: str, now: float) -> None:
        """Keep what went wrong without anything changing."""
        self.history.append(
            Change(now, Event.FAIL, self.state, self.state, round(now - self.since, 6), error)
        )

    @property
    def treatment(self) -> Treatment:
        """What becomes of its calls now."""
        return TREATMENT[self.state]
