r"""The Child machine: one process that a supervisor keeps as somebody wants it.

Rules:

1. What is *wanted* (UP or DOWN) stands apart from what *is* (the state).
2. Alive is not ready: a process is STARTING until it is told ready.
3. Every wait has a deadline, and every kill an escalation: SIGTERM, then SIGKILL, then SIGKILL again.
4. Each change is announced; nobody else keeps a state of the child.
5. A boot failure that cannot heal by itself (an import error) is FATAL at once; others are counted by
   :mod:`mcp_broker.core.restart`, and too many are FATAL.

::

    STOPPED --Wanted--> STARTING --BecameReady--> RUNNING
       ^                 |    ^                      |
       |            Died |    | BackoffOver     Died |        Unwanted, Refused, StartTimedOut:
       |                 v    |                      |        STARTING, RUNNING --> STOPPING --Died--> STOPPED,
       |               BACKOFF <---------------------+                                  BACKOFF or FATAL
       +--Unwanted-- FATAL (too many deaths, or one that cannot heal; Wanted starts afresh)

    RUNNING --Retire--> RETIRING --Died--> STOPPED: it takes no new work, finishes what it has, and ends by itself;
                            \--RetireTimedOut, Unwanted--> STOPPING

Theory of operation: ``handle(event, now)`` looks the pair (state, event) up in TABLE, which holds every cell,
and returns effects; the shell performs them in order. ``deadline()`` names the next instant at which the shell
calls ``expire(now)``, which turns the time that has come into an event of the same table.

Deliberately absent: processes, signals by number, clocks, randomness, policy numbers of a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from mcp_broker import limits
from mcp_broker.core.child_events import (
    Announce,
    BackoffOver,
    BecameReady,
    CalledUp,
    Died,
    Dismiss,
    Effect,
    Event,
    Kill,
    Refused,
    Retire,
    RetireTimedOut,
    Signal,
    Spawn,
    Spawned,
    SpawnFailed,
    StartTimedOut,
    State,
    StopTimedOut,
    Unwanted,
    Wanted,
)
from mcp_broker.core.restart import GiveUp, Restarts
from mcp_broker.errors import InvalidTransition

#: A worker that is not ready by then is stuck: imports of large libraries take a few seconds.
START_S: Final = 30.0


__all__ = [
    "Announce",
    "BackoffOver",
    "BecameReady",
    "CalledUp",
    "Child",
    "Died",
    "Dismiss",
    "Effect",
    "Event",
    "Kill",
    "Refused",
    "Retire",
    "RetireTimedOut",
    "Signal",
    "Spawn",
    "SpawnFailed",
    "Spawned",
    "StartTimedOut",
    "State",
    "StopTimedOut",
    "Unwanted",
    "Wanted",
]

#: what one cell of the table does
Cell = Callable[["Child", Event, float], list[Effect]]


class Child:
    """One process slot. See the module for its rules.

    Args:
        restarts: the record of deaths, shared by the children that fail together.
        start_s: from spawned to ready, at most.
        stop_s: from SIGTERM to SIGKILL, and between further SIGKILLs.
        retire_s: from Retire to SIGTERM, at most.
    """

    def __init__(
        self,
        restarts: Restarts,
        *,
        start_s: float = START_S,
        stop_s: float = limits.STOP_S,
        retire_s: float = limits.RETIRE_S,
    ) -> None:
        self.state = State.STOPPED
        self.is_wanted = False
        #: why the state is what it is; "" when it needs no reason
        self.reason = ""
        self._restarts = restarts
        self._start_s = start_s
        self._stop_s = stop_s
        self._retire_s = retire_s
        #: set in STARTING, RETIRING, STOPPING and BACKOFF only: when the wait of that state is over
        self._deadline: float | None = None
        #: the instant of BecameReady of this life
        self._ready_at: float | None = None
        #: STOPPING only: what made us stop a child that is still wanted, and whether it may come back
        self._fault = ""
        self._is_hopeless = False

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; return what to do about it, in order.

        Raises:
            InvalidTransition: our shell reported what cannot happen in this state.
        """
        return self.TABLE[type(event)][_COLUMNS[self.state]](self, event, now)

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`expire` has something to do."""
        return self._deadline

    def expire(self, now: float) -> list[Effect]:
        """Do what is due at ``now``; too early is harmless."""
        if self._deadline is None or now < self._deadline:
            return []
        return self.handle(_TIMERS[self.state](), now)

    @property
    def is_alive(self) -> bool:
        """A process exists, or is about to."""
        return self.state in _ALIVE

    # -- the way to a state ------------------------------------------------------------------------

    def _enter(self, state: State, reason: str = "", deadline: float | None = None) -> Announce:
        self.state, self.reason, self._deadline = state, reason, deadline
        return Announce(state, reason)

    def _start(self, now: float) -> list[Effect]:
        self._ready_at, self._fault, self._is_hopeless = None, "", False
        return [self._enter(State.STARTING, deadline=now + self._start_s), Spawn()]

    def _stop(self, now: float, reason: str) -> list[Effect]:
        return [self._enter(State.STOPPING, reason, now + self._stop_s), Signal()]

    def _bury(self, now: float, death: Died) -> list[Effect]:
        """Decide what follows the end of a process that is still wanted."""
        reason = self._fault or death.reason
        if death.hopeless or self._is_hopeless:
            return [self._enter(State.FATAL, reason)]
        ready_for_s = 0.0 if self._ready_at is None else now - self._ready_at
        verdict = self._restarts.after_death(
            now, counted=not death.charged, ready_for_s=ready_for_s, jitter=death.jitter
        )
        if isinstance(verdict, GiveUp):
            return [self._enter(State.FATAL, f"{verdict.reason}; the last time: {reason}")]
        after_s = max(verdict.after_s, death.rest_s)
        if after_s <= 0:
            return self._start(now)
        # a rest is nothing that needs a reason
        return [self._enter(State.BACKOFF, reason if verdict.after_s > 0 else "", now + after_s)]

    # -- cells -------------------------------------------------------------------------------------

    def _nothing(self, event: Event, now: float) -> list[Effect]:  # noqa: ARG002 (the shape of a cell)
        return []

    def _impossible(self, event: Event, now: float) -> list[Effect]:
        raise InvalidTransition(
            f"a child in {self.state.name} was told {event!r}",
            {"state": self.state.name, "event": type(event).__name__, "now": now},
        )

    def _want_first(self, event: Event, now: float) -> list[Effect]:
        del event
        self.is_wanted = True
        return self._start(now)

    def _want_afresh(self, event: Event, now: float) -> list[Effect]:
        """An operator brings it back: the old deaths no longer count."""
        self._restarts.forget()
        return self._want_first(event, now)

    def _want_again(self, event: Event, now: float) -> list[Effect]:
        """It is on its way down; it comes back once it is gone."""
        del event, now
        self.is_wanted = True
        return []

    def _unwant_alive(self, event: Event, now: float) -> list[Effect]:
        del event
        self.is_wanted = False
        return self._stop(now, "")

    def _retire(self, event: Event, now: float) -> list[Effect]:
        del event
        self.is_wanted = False
        return [self._enter(State.RETIRING, deadline=now + self._retire_s), Dismiss()]

    def _refuse_retiring(self, event: Event, now: float) -> list[Effect]:
        """Nobody will hear of what it still does."""
        del event
        return self._stop(now, "")

    def _time_retiring_out(self, event: Event, now: float) -> list[Effect]:
        del event
        return self._stop(now, "")

    def _unwant_stopping(self, event: Event, now: float) -> list[Effect]:
        del event, now
        self.is_wanted = False
        return []

    def _unwant_dead(self, event: Event, now: float) -> list[Effect]:
        del event, now
        self.is_wanted = False
        return [self._enter(State.STOPPED)]

    def _signal_late(self, event: Event, now: float) -> list[Effect]:
        """It was unwanted before it existed: the first SIGTERM hit nothing."""
        del event, now
        return [Signal()]

    def _fail_start(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, SpawnFailed)  # noqa: S101 (TABLE says so; narrows the type)
        if event.shortage:
            after_s = self._restarts.after_shortage(event.jitter).after_s
            return [self._enter(State.BACKOFF, event.reason, now + after_s)]
        return self._bury(now, Died(event.reason, hopeless=event.hopeless, jitter=event.jitter))

    def _become_ready(self, event: Event, now: float) -> list[Effect]:
        del event
        self._ready_at = now
        return [self._enter(State.RUNNING)]

    def _call_up(self, event: Event, now: float) -> list[Effect]:
        del event
        self._ready_at = None
        return [self._enter(State.STARTING, deadline=now + self._start_s)]

    def _refuse(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, Refused)  # noqa: S101 (TABLE says so; narrows the type)
        self._fault, self._is_hopeless = event.reason, True
        return self._stop(now, event.reason)

    def _time_start_out(self, event: Event, now: float) -> list[Effect]:
        """A process that hangs in its start may not hear SIGTERM: no grace."""
        del event
        self._fault = f"was not ready after {self._start_s:g} s"
        return [self._enter(State.STOPPING, self._fault, now + self._stop_s), Kill()]

    def _time_stop_out(self, event: Event, now: float) -> list[Effect]:
        """Kill, and come back to it: a process in an uninterruptible sleep dies late."""
        del event
        self._deadline = now + self._stop_s
        return [Kill()]

    def _die(self, event: Event, now: float) -> list[Effect]:
        assert isinstance(event, Died)  # noqa: S101 (TABLE says so; narrows the type)
        return self._bury(now, event)

    def _die_stopping(self, event: Event, now: float) -> list[Effect]:
        if not self.is_wanted:
            return [self._enter(State.STOPPED)]
        if self._fault:
            death = event if isinstance(event, Died) else Died(self._fault)
            return self._bury(now, death)
        # stopped by wish, and wanted again meanwhile: no fault of its own
        return self._start(now)

    def _end_backoff(self, event: Event, now: float) -> list[Effect]:
        del event
        return self._start(now)

    # fmt: off
    #: One row an event, one column a state (in the order of State). Every cell is written: doing nothing is a
    #: decision (a broker's word about a life that is over), and what only our own bug could cause says so.
    TABLE: Final[Mapping[type[Event], tuple[Cell, ...]]] = {
        # event         STOPPED      STARTING         RUNNING        RETIRING            STOPPING          BACKOFF       FATAL
        Wanted:        (_want_first, _nothing,        _nothing,      _want_again,        _want_again,      _nothing,     _want_afresh),
        Unwanted:      (_nothing,    _unwant_alive,   _unwant_alive, _unwant_alive,      _unwant_stopping, _unwant_dead, _unwant_dead),
        Retire:        (_nothing,    _unwant_alive,   _retire,       _unwant_stopping,   _unwant_stopping, _unwant_dead, _unwant_dead),
        Spawned:       (_impossible, _nothing,        _impossible,   _impossible,        _signal_late,     _impossible,  _impossible),
        SpawnFailed:   (_impossible, _fail_start,     _impossible,   _impossible,        _die_stopping,    _impossible,  _impossible),
        BecameReady:   (_nothing,    _become_ready,   _nothing,      _nothing,           _nothing,         _nothing,     _nothing),
        CalledUp:      (_impossible, _impossible,     _call_up,      _impossible,         _impossible,      _impossible,  _impossible),
        Refused:       (_nothing,    _refuse,         _refuse,       _refuse_retiring,   _nothing,         _nothing,     _nothing),
        Died:          (_impossible, _die,            _die,          _die_stopping,      _die_stopping,    _impossible,  _impossible),
        StartTimedOut: (_impossible, _time_start_out, _impossible,   _impossible,        _impossible,      _impossible,  _impossible),
        RetireTimedOut:(_impossible, _impossible,     _impossible,   _time_retiring_out, _impossible,      _impossible,  _impossible),
        StopTimedOut:  (_impossible, _impossible,     _impossible,   _impossible,        _time_stop_out,   _impossible,  _impossible),
        BackoffOver:   (_impossible, _impossible,     _impossible,   _impossible,        _impossible,      _end_backoff, _impossible),
    }
    # fmt: on


_COLUMNS: Final[Mapping[State, int]] = {state: column for column, state in enumerate(State)}

_ALIVE: Final = frozenset((State.STARTING, State.RUNNING, State.RETIRING, State.STOPPING))

#: what the deadline of a state means when it comes
_TIMERS: Final[Mapping[State, type[StartTimedOut | RetireTimedOut | StopTimedOut | BackoffOver]]] = {
    State.STARTING: StartTimedOut,
    State.RETIRING: RetireTimedOut,
    State.STOPPING: StopTimedOut,
    State.BACKOFF: BackoffOver,
}
