"""What a worker uses against what it may: four levels, entered at once and left with some slack.

Rules
    1. A level is entered at its share of a limit (80, 95, 100 %) and left 5 % of the limit below it, so that what sways
       about a threshold does not flap. EXCEEDED is never left: that worker is killed.
    2. Memory, descriptors, sockets and processes count above what the worker held when it was ready.
    3. CPU counts for the call that runs: it begins anew with each call, and a worker that rests uses none. That it rests is its
       own word, which any tool can give in its name: it is believed once for each call, then as long as it uses little.
    4. A count may reach its limit: the share is taken of the first number that is too many.

::

              LOW       CALM      HIGH      CLOSE     TIGHT     OVER
    share      < 75 %    < 80 %    < 90 %    < 95 %    < 100 %
    NORMAL    .         .         WARNING   WARNING   THROTTLE  EXCEEDED
    WARNING   NORMAL    .         .         .         THROTTLE  EXCEEDED
    THROTTLE  NORMAL    WARNING   WARNING   .         .         EXCEEDED
    EXCEEDED  .         .         .         .         .         .

Deliberately absent: where samples come from, clocks, killing.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Final

from mcp_broker import limits


class Level(IntEnum):
    """How close a worker is to a limit."""

    NORMAL = 0
    WARNING = 1
    THROTTLE = 2
    EXCEEDED = 3


class Band(IntEnum):
    """Which part of a limit is used."""

    LOW = 0
    CALM = 1
    HIGH = 2
    CLOSE = 3
    TIGHT = 4
    OVER = 5


#: the first share of each band after LOW
_EDGES: Final = (
    limits.WARNING_SHARE - limits.RELIEF_SHARE,
    limits.WARNING_SHARE,
    limits.THROTTLE_SHARE - limits.RELIEF_SHARE,
    limits.THROTTLE_SHARE,
    1.0,
)
_N, _W, _T, _E = Level
#: level -> band -> next level
TABLE: Final[tuple[tuple[Level, ...], ...]] = (
    # LOW CALM HIGH CLOSE TIGHT OVER
    (_N, _N, _W, _W, _T, _E),  # NORMAL
    (_N, _W, _W, _W, _T, _E),  # WARNING
    (_N, _W, _W, _T, _T, _E),  # THROTTLE
    (_E, _E, _E, _E, _E, _E),  # EXCEEDED
)


def band(share: float) -> Band:
    """Return the band of a share."""
    return Band(sum(share >= edge for edge in _EDGES))


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a worker may use; names and units are those of ``[pools.NAME.limits]``."""

    memory_mb: float = limits.MEMORY_MB
    cpu_s: float = limits.CPU_S
    open_files: float = limits.OPEN_FILES
    connections: float = limits.CONNECTIONS
    processes: float = limits.PROCESSES
    scratch_mb: float = limits.SCRATCH_MB


def asked(wanted: Mapping[str, float], fixed: Container[str], asks: Mapping[str, float]) -> dict[str, float]:
    """Return a worker's limits: the usual ones, or what its tools ask for if that is more.

    Args:
        wanted: by name, as configured or usual.
        fixed: names of those that the operator has configured; no tool changes them.
        asks: by name; the most of all its tools.
    """
    more = {limit: value for limit, value in asks.items() if limit not in fixed}
    return {limit: max(value, more.get(limit, 0.0)) for limit, value in wanted.items()}


LIMITS: Final = tuple(field.name for field in fields(Bounds))
#: numbers of things: the limit itself may be reached
COUNTS: Final = frozenset({"open_files", "connections", "processes"})
#: kept from call to call, so counted above what there was when the worker was ready
_ABOVE_READY: Final = frozenset({"memory_mb", *COUNTS})


@dataclass(frozen=True, slots=True)
class Sample:
    """What a worker and all below it held or had used at an instant; None: not looked at this time.

    Args:
        cpu_s: since the worker started.
    """

    memory_mb: float
    cpu_s: float
    processes: float = 0
    open_files: float | None = None
    connections: float | None = None
    scratch_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The limit of which most is used."""

    level: Level
    limit: str
    value: float
    used: float
    share: float


_NOTHING: Final = Reading(Level.NORMAL, "", 0.0, 0.0, 0.0)


class Rest:
    """Whether a worker rests: by its word, and by what it uses."""

    def __init__(self, now: float) -> None:
        self._cpu_s, self._at = 0.0, now
        #: the call after which it rested
        self._seq = -1

    def observe(self, cpu_s: float, seq: int, now: float, *, is_resting: bool) -> bool:
        """Return whether it rests.

        Args:
            cpu_s: used since it started.
            seq: of the call that it started last.
            is_resting: by its word, that call has ended.
        """
        used_s, passed_s = cpu_s - self._cpu_s, now - self._at
        self._cpu_s, self._at = cpu_s, now
        if not is_resting:
            return False
        if seq != self._seq:
            # what was used since the last look was this call's, or of others before it
            self._seq = seq
            return True
        return used_s <= limits.RESTING_CORES_MAX * passed_s


class Meter:
    """One life of a worker against its bounds.

    Args:
        ready: what it held when it was ready, before its first call.

    Attributes:
        bounds: may be replaced at any time.
        reading: as of the last sample.
        used: limit -> how much, in the unit of its name.
        peaks: limit -> the most that was used.
        calls: how many it has started.
    """

    def __init__(self, bounds: Bounds, ready: Sample) -> None:
        self.bounds = bounds
        self.reading = _NOTHING
        self.used = dict.fromkeys(LIMITS, 0.0)
        self.peaks = dict.fromkeys(LIMITS, 0.0)
        self.calls = 0
        self._levels = dict.fromkeys(LIMITS, Level.NORMAL)
        self._ready = ready
        self._seq = 0
        self._was_resting = True
        self._cpu_before = ready.cpu_s

    def observe(self, sample: Sample, seq: int, *, is_resting: bool) -> bool:
        """Take a sample.

        Args:
            seq: of the call that the worker started last.
            is_resting: that call has ended, and no other runs.

        Returns:
            Whether the level, or the limit that it is of, has changed.
        """
        self._turn_to(sample, seq, is_resting=is_resting)
        used = self.used
        for limit in LIMITS:
            value = getattr(sample, limit)
            if limit == "cpu_s":
                used[limit] = 0.0 if is_resting else max(0.0, value - self._cpu_before)
            elif value is not None:
                above = getattr(self._ready, limit) if limit in _ABOVE_READY else None
                used[limit] = max(0.0, value - (above or 0.0))
        before, self.reading = self.reading, self._read()
        return (before.level, before.limit) != (self.reading.level, self.reading.limit) and (
            before.level is not Level.NORMAL or self.reading.level is not Level.NORMAL
        )

    @property
    def ready_mb(self) -> float:
        """Memory that it held when it was ready."""
        return self._ready.memory_mb

    def _turn_to(self, sample: Sample, seq: int, *, is_resting: bool) -> None:
        """Begin to count for another call, if one has started."""
        if seq != self._seq:
            # a new connection numbers its calls anew
            started = seq - self._seq if seq > self._seq else seq
            self.calls += started
            # all that was used since the worker rested is this call's, unless others ran in between
            if not (self._was_resting and started == 1):
                self._cpu_before = sample.cpu_s
            self._seq = seq
        if is_resting:
            self._cpu_before = sample.cpu_s
        self._was_resting = is_resting

    def _read(self) -> Reading:
        worst = _NOTHING
        for limit in LIMITS:
            used, value = self.used[limit], getattr(self.bounds, limit)
            share = used / (value + 1 if limit in COUNTS else value)
            level = self._levels[limit] = TABLE[self._levels[limit]][band(share)]
            self.peaks[limit] = max(self.peaks[limit], used)
            if (level, share) > (worst.level, worst.share):
                worst = Reading(level, limit, value, used, share)
        return worst
