"""What can happen to a child process, and what is to be done about it: the words of the Child machine.

Rules, and what each pair of state and event means: :mod:`mcp_broker.core.children`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """What a child is."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    RETIRING = "retiring"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FATAL = "fatal"


# -- events: what happened --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """Somebody wants the child up (again)."""


@dataclass(frozen=True, slots=True)
class Unwanted:
    """Nobody wants the child any more."""


@dataclass(frozen=True, slots=True)
class Retire:
    """Nobody wants the child any more, once it has done what it was given."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """The process exists."""


@dataclass(frozen=True, slots=True)
class SpawnFailed:
    """There is no process.

    Args:
        reason: one sentence for people.
        jitter: a random number of [0, 1).
        shortage: the machine had nothing left; another start may find something.
        hopeless: another attempt would end the same way (a level of isolation that this machine does not have).
    """

    reason: str
    jitter: float = 0.0
    shortage: bool = False
    hopeless: bool = False


@dataclass(frozen=True, slots=True)
class BecameReady:
    """The process can take work."""


@dataclass(frozen=True, slots=True)
class CalledUp:
    """A process that was ready as a spare is to become ready for work."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker will never take this process's registration."""

    reason: str


@dataclass(frozen=True, slots=True)
class Died:
    """The process is gone and reaped.

    Args:
        reason: the cause, one sentence for people.
        hopeless: another start would end the same way (an import error).
        charged: it died during a call, which answers for it.
        jitter: a random number of [0, 1).
        rest_s: until it is started again, at least; whoever takes its place goes first.
    """

    reason: str
    hopeless: bool = False
    charged: bool = False
    jitter: float = 0.0
    rest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StartTimedOut:
    """It is alive but did not become ready in time."""


@dataclass(frozen=True, slots=True)
class RetireTimedOut:
    """It has not finished what it was given in time."""


@dataclass(frozen=True, slots=True)
class StopTimedOut:
    """It was told to end, and did not in time."""


@dataclass(frozen=True, slots=True)
class BackoffOver:
    """The delay before the next start is over."""


Event = (
    Wanted | Unwanted | Retire | Spawned | SpawnFailed | BecameReady | CalledUp | Refused | Died
    | StartTimedOut | RetireTimedOut | StopTimedOut | BackoffOver
)  # fmt: skip


# -- effects: what to do --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process, then report Spawned or SpawnFailed."""


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Have it given no more work, and sent away once it has none."""


@dataclass(frozen=True, slots=True)
class Signal:
    """Ask the process to end (SIGTERM)."""


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL the whole process group."""


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell whoever watches: the child is in this state now, for this reason."""

    state: State
    reason: str


Effect = Spawn | Dismiss | Signal | Kill | Announce
