"""Measuring workers while they work, and what follows: warnings, throttling, kills, replacements.

Rules

1. Who runs something is looked at every 50 ms; who rests, once a second, and once when it comes to rest. Who says that it
   rests, and goes on using CPU, runs something.
2. Measuring takes a twentieth of a core at most: with many at work, each is looked at more rarely.
3. Who is over a limit writes down what it is doing, for 20 ms; then it is killed with all that it started.
4. A level is part of the report: a worker that is throttled gets no calls by the broker's hand.
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from typing import TYPE_CHECKING, Final, Protocol

from mcp_broker import limits
from mcp_broker.core.adaptive import Adaptive
from mcp_broker.core.metering import LIMITS, Bounds, Level, Meter, Rest, asked
from mcp_broker.core.recycling import Policy, Recycling
from mcp_broker.supervisor import gauge
from mcp_broker.supervisor.certificates import Exceeded
from mcp_broker.supervisor.containment import contained
from mcp_broker.supervisor.gauge import Gauge
from mcp_broker.supervisor.quota import Quotas

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mcp_broker.config import PoolTable
    from mcp_broker.supervisor.fleet import Fleet
    from mcp_broker.supervisor.life import Life
    from mcp_broker.supervisor.pool import Pool
    from mcp_broker.supervisor.slot import Slot

_log = logging.getLogger("mcp_broker.supervisor")

#: above this share of its memory a worker is worth an exact look
_NEAR: Final = limits.WARNING_SHARE - limits.RELIEF_SHARE
#: what `adaptive = true` adapts -> the most that it may become
_ADAPTED: Final[Mapping[str, float]] = {
    "memory_mb": limits.MEMORY_MB_MAX,
    "cpu_s": limits.CPU_S_MAX,
    "open_files": limits.OPEN_FILES_MAX,
    "connections": limits.CONNECTIONS_MAX,
}


class Metered:
    """What is known of one life: instruments, levels, and when to look again.

    Args:
        bounds: of its pool, now.
    """

    def __init__(self, life: Life, pid: int, bounds: Bounds, table: PoolTable, now: float) -> None:
        self.gauge = Gauge(pid, life.scratch)
        self.meter = Meter(bounds, self.gauge.ready())
        self._quotas: Quotas | None = None
        policy = Policy(table.limits.recycle_calls, table.limits.recycle_rss_mb, table.limits.recycle_age_s)
        self.recycling = Recycling(policy, random.random(), now)  # noqa: S311 (spreads replacements)
        self.was_resting = True
        self._rest = Rest(now)
        self.next_at = now
        self.files_at = self.shared_at = now
        #: set when it is to be killed: when to look whether it has said what it was doing, and when not to wait longer
        self.doomed_at: float | None = None
        self._doomed_by = 0.0
        self._written = 0

    def is_due(self, now: float, *, is_resting: bool) -> bool:
        """Tell whether to look at it now."""
        return not (is_resting and self.was_resting) or now >= self.next_at

    def observe(self, life: Life, now: float, adopted: Callable[[], list[int]], *, is_resting: bool) -> bool:
        """Look at it; return whether its level has changed."""
        instruments, meter = self.gauge, self.meter
        instruments.look(adopted)
        with_files = is_resting or now >= self.files_at
        if with_files:
            rarely = now >= self.shared_at
            if rarely:
                instruments.look_at_shared()
                self.shared_at = now + limits.METER_RESTING_S
            instruments.look_at_files(rarely=rarely)
            instruments.scratch.look()
            self.files_at = now + limits.METER_FILES_S
        sample = instruments.sample(with_files=with_files)
        if not instruments.is_exact and sample.memory_mb - meter.ready_mb >= meter.bounds.memory_mb * _NEAR:
            sample = instruments.sample(with_files=with_files, exactly=True)
        life.rss_kib, life.cpu_s = int(instruments.cost.rss_kib), instruments.cost.cpu_s
        seq = life.marks.started_seq
        self.was_resting = self._rest.observe(sample.cpu_s, seq, now, is_resting=is_resting)
        has_changed = meter.observe(sample, seq, is_resting=self.was_resting)
        # who is throttled gets calls again as soon as it has let go
        throttled = meter.reading.level >= Level.THROTTLE
        self.next_at = now + (limits.METER_IDLE_S if throttled else limits.METER_RESTING_S)
        return has_changed

    def enter(self, quotas: Quotas, worker_id: str, adopted: Callable[[], list[int]]) -> None:
        """Have the kernel hold the worker, and all that it has started, to its bounds, too."""
        self._quotas = quotas
        self.gauge.quota = quotas.enter(worker_id, lambda: self.gauge.look(adopted), self.meter.bounds)

    def close(self) -> None:
        """Let go of it; the process is gone."""
        self.gauge.close()
        if self._quotas is not None and self.gauge.quota is not None:
            self._quotas.leave(self.gauge.quota)

    def doom(self, now: float) -> None:
        """Have it killed soon."""
        self.doomed_at = now + limits.STACK_S
        self._doomed_by = now + limits.STACK_S_MAX

    def is_ripe(self, life: Life, now: float) -> bool:
        """Tell whether it is to be killed now: its stacks are written, or are not waited for any longer."""
        before, self._written = self._written, life.page.written
        if now >= self._doomed_by or self._written == before > 0:
            return True
        self.doomed_at = now + limits.STACK_S / 2
        return False

    @property
    def overrun(self) -> Exceeded | None:
        """The limit at whose wall the kernel has killed the worker, or a process of it; None if it has not."""
        quota = self.gauge.quota
        if quota is None or not quota.oom_kills:
            return None
        value = self.meter.bounds.memory_mb
        return Exceeded("memory_mb", value, max(quota.peak_mb, value))


class Allowance:
    """What the workers of one pool may use: what is configured or its tools ask for, or what follows their use."""

    def __init__(self, table: PoolTable, asks: Mapping[str, float]) -> None:
        self.table = table
        self.asks = asks
        usual = {limit: float(getattr(table.limits, limit)) for limit in LIMITS}
        wanted = asked(usual, table.limits.model_fields_set, asks)
        self.bounds = Bounds(**wanted)
        self._adaptive = {
            limit: Adaptive(wanted[limit], most) for limit, most in _ADAPTED.items() if table.limits.adaptive
        }

    def learn(self, pool: Pool, used: Mapping[str, float], now: float) -> None:
        """Take what a worker uses now; limits that change count for all workers of the pool."""
        changed = [limit for limit, one in self._adaptive.items() if one.observe(used[limit], now)]
        if not changed:
            return
        values = {limit: getattr(self.bounds, limit) for limit in LIMITS}
        self.bounds = Bounds(**values | {limit: round(self._adaptive[limit].value, 3) for limit in changed})
        for slot in pool.slots:
            metered = None if slot.life is None else slot.life.metered
            if metered is not None:
                metered.meter.bounds = self.bounds
                if metered.gauge.quota is not None:
                    metered.gauge.quota.hold_to(self.bounds)
        said = ", ".join(f"{limit} = {getattr(self.bounds, limit):g}" for limit in changed)
        _log.info("limits of pool %s follow their use: %s", pool.name, said)


class Owner(Protocol):
    """What measuring needs of the supervisor."""

    instance: str

    def changed(self) -> None:
        """Something that a report shows is different now."""

    def strayed(self) -> None:
        """Processes may have lost their parent."""

    def known(self) -> Mapping[int, str]:
        """Return our own children that are no strays: pid -> name."""


class Metering:
    """Measures the workers of a fleet.

    Args:
        owner: told what a report shows.

    Attributes:
        spent_s: of CPU, on measuring.
    """

    def __init__(self, owner: Owner, fleet: Fleet) -> None:
        self._owner = owner
        self._fleet = fleet
        self._allowances: dict[str, Allowance] = {}
        #: pool -> when its next worker may be replaced, if no successor could start
        self._retries: dict[str, float] = {}
        self._quotas = Quotas(owner.instance)
        self._next_at = 0.0
        #: when the next of those that are over a limit may be ripe
        self._doom_at = math.inf
        #: worker -> processes that have lost their parent, as of this look; None: not looked for
        self._adopted: dict[str, list[int]] | None = None
        self.spent_s = 0.0

    # -- who is measured -----------------------------------------------------------------------------

    def began(self, slot: Slot, now: float) -> None:
        """Begin with a worker that has just become ready: what it holds now is its own."""
        life = slot.life
        pool = None if life is None else self._fleet.pools.get(life.pool)
        if life is None or life.process is None or pool is None or life.metered is not None:
            return
        bounds = self._allowance(pool, slot).bounds
        metered = life.metered = Metered(life, life.process.main_pid, bounds, slot.table, now)
        # what lost its parent before now is looked for anew
        self._adopted = None
        metered.enter(self._quotas, life.worker_id, lambda: self._orphans(life))
        # the broker waits for it
        self._owner.changed()

    def _allowance(self, pool: Pool, slot: Slot) -> Allowance:
        asks = {} if slot.life is None else slot.life.asks
        known = self._allowances.get(pool.name)
        # a worker that comes brings the same tools mostly
        if known is None or known.table is not slot.table or known.asks != asks:
            known = self._allowances[pool.name] = Allowance(slot.table, asks)
        return known

    def close(self) -> None:
        """Leave nothing behind; every worker is gone."""
        self._quotas.close()

    # -- time ----------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """Return when there is something to do."""
        return min(self._next_at, self._doom_at)

    def expire(self, now: float) -> None:
        """Do what is due."""
        if now < self.deadline():
            return
        began_s = time.thread_time()
        busy = False
        self._doom_at = math.inf
        self._adopted = None
        for slot in self._fleet.slots:
            if slot.life is not None and slot.life.metered is not None:
                with contained(f"measuring {slot.life.worker_id}"):
                    busy = self._attend(slot, slot.life, slot.life.metered, now) or busy
        spent_s = time.thread_time() - began_s
        self.spent_s += spent_s
        pause_s = limits.METER_S if busy else limits.METER_IDLE_S
        self._next_at = now + max(pause_s, spent_s / limits.METER_SHARE_MAX)

    def _attend(self, slot: Slot, life: Life, metered: Metered, now: float) -> bool:
        """Do for one worker what is due; return whether it runs something."""
        if metered.doomed_at is not None:
            if now >= metered.doomed_at and metered.is_ripe(life, now):
                self._kill(slot)
            else:
                self._doom_at = min(self._doom_at, metered.doomed_at)
            return False
        is_resting = life.marks.is_resting
        if metered.is_due(now, is_resting=is_resting):
            self._look(slot, life, metered, now, is_resting=is_resting)
        return not is_resting

    def _orphans(self, life: Life) -> list[int]:
        """Return what lost its parent and says that it belongs to this life."""
        if self._adopted is None:
            # looked for once for all, and mostly not at all: a group tells better
            known = self._owner.known()
            self._adopted = {}
            for pid in gauge.children(os.getpid()):
                if pid not in known:
                    self._adopted.setdefault(gauge.of_worker(pid), []).append(pid)
        ours = self._adopted.get(life.worker_id, [])
        return ours if life.process is None else [*ours, *life.process.orphans()]

    # -- what follows ----------------------------------------------------------------------------------

    def _look(self, slot: Slot, life: Life, metered: Metered, now: float, *, is_resting: bool) -> None:
        has_changed = metered.observe(life, now, lambda: self._orphans(life), is_resting=is_resting)
        meter = metered.meter
        if has_changed:
            self._owner.changed()
            self._say(life, meter)
        pool = self._fleet.pools.get(life.pool)
        if pool is None:
            return
        self._allowance(pool, slot).learn(pool, meter.used, now)
        reading = meter.reading
        if reading.level is Level.EXCEEDED:
            slot.exceed(Exceeded(reading.limit, reading.value, reading.used))
            metered.doom(now)
            self._doom_at = min(self._doom_at, now + limits.STACK_S)
            return
        reason = metered.recycling.reason(meter, life.rss_kib / 1024, now, is_resting=is_resting)
        if reason and self.recycle(pool, slot, reason, now):
            _log.info("worker %s is replaced: %s", life.worker_id, reason)

    def recycle(self, pool: Pool, slot: Slot, reason: str, now: float) -> bool:
        """Have a worker replaced that works well; where none could come in another's place, only now and then."""
        if (pool.setback and now < self._retries.get(pool.name, 0.0)) or not pool.replace(slot, reason):
            return False
        self._retries[pool.name] = now + limits.RECYCLE_RETRY_S
        return True

    @staticmethod
    def _say(life: Life, meter: Meter) -> None:
        reading = meter.reading
        says = {
            Level.NORMAL: "is well below its limits again",
            Level.WARNING: "comes near a limit",
            Level.THROTTLE: "is close to a limit and gets no calls",
            Level.EXCEEDED: "is over a limit and is killed",
        }[reading.level]
        is_calm = reading.level is Level.NORMAL
        how = "" if is_calm else f": {reading.limit} = {reading.value:g}, used {reading.used:.1f}"
        level = logging.INFO if is_calm else logging.WARNING
        _log.log(level, "worker %s %s%s", life.worker_id, says, how)

    def _kill(self, slot: Slot) -> None:
        slot.kill()
        # what has left its group is below the supervisor then, and nobody's
        self._owner.strayed()
