"""What goes wrong when: decided by a seed, before anything starts.

A plan is a list of faults. Which process a fault hits is drawn when it comes, by the fault's own number: the same seed
asks the same of whoever is there then.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass
from typing import Final

#: nothing goes wrong before, so that all are connected and load is under way
QUIET_S: Final = 1.0
#: stops and shortages end after this long
STOP_S_MAX: Final = 2.0


class Kind(enum.Enum):
    """What goes wrong."""

    WORKER_KILL = "worker killed"
    WORKER_STOP = "worker stopped"
    BROKER_KILL = "broker killed"
    BROKER_STOP = "broker stopped"
    SUPERVISOR_KILL = "supervisor killed"
    SUPERVISOR_STOP = "supervisor stopped"
    FULL_SCRATCH = "scratch full"
    BROKER_FILES = "broker out of descriptors"
    SUPERVISOR_FILES = "supervisor out of descriptors"


#: how often each comes, and how long the plan leaves alone afterwards, seconds: what follows a broker's death is its
#: restart back-off, which grows when deaths follow each other
WEIGHTS: Final = {
    Kind.WORKER_KILL: (10, 0.5),
    Kind.WORKER_STOP: (4, 0.3),
    Kind.BROKER_KILL: (3, 2.0),
    Kind.BROKER_STOP: (2, 0.5),
    Kind.SUPERVISOR_KILL: (1, 1.0),
    Kind.SUPERVISOR_STOP: (2, 0.5),
    Kind.FULL_SCRATCH: (3, 0.3),
    Kind.BROKER_FILES: (1, 0.5),
    Kind.SUPERVISOR_FILES: (1, 0.5),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Args:
        number: of this plan, from 0.
        lasts_s: of stops and shortages; 0 for kills.
        pause_s: until the next one, from the recovery on.
        draw: a random number of [0, 1): picks the victim.
    """

    number: int
    kind: Kind
    lasts_s: float
    pause_s: float
    draw: float


_LASTING: Final = frozenset(
    (Kind.WORKER_STOP, Kind.BROKER_STOP, Kind.SUPERVISOR_STOP, Kind.BROKER_FILES, Kind.SUPERVISOR_FILES)
)


class Plan:
    """Faults without end, by a seed; each kind comes once before any is drawn."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._first = list(Kind)
        self._chance.shuffle(self._first)
        self._count = 0

    def next(self) -> Fault:
        """Return the next fault."""
        chance = self._chance
        if self._first:
            kind = self._first.pop()
        else:
            weights = [weight for weight, _ in WEIGHTS.values()]
            (kind,) = chance.choices(list(WEIGHTS), weights)
        lasts_s = chance.uniform(0.1, STOP_S_MAX) if kind in _LASTING else 0.0
        pause_s = WEIGHTS[kind][1] * chance.uniform(0.5, 1.5)
        fault = Fault(self._count, kind, lasts_s, pause_s, chance.random())
        self._count += 1
        return fault
