"""Takes back what dead workers left, in slices between the supervisor's other work.

Several may be on their way at a time; they take turns, so that a million files of one do not hold up the others.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.supervisor.containment import contained
from mcp_broker.supervisor.reclaim.steps import STEPS, Remains, Site, Step, Tally
from mcp_broker.wire.reclaims import Reclaim, Taken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_log = logging.getLogger("mcp_broker.supervisor")

#: a look at the clock costs less than a step, and a job that never waits must still let others have a turn
_TURN_S: Final = 0.001


class Job:
    """The reclaim of one worker, on its way."""

    def __init__(self, remains: Remains, site: Site, steps: Sequence[Step], now: float) -> None:
        self.remains = remains
        self._site = site
        self._steps = deque(step for step in steps if remains.level in step.levels)
        self._begun_at = now
        self._taken: list[Taken] = []
        self._step: Step | None = None
        self._step_at = 0.0
        self._tally = Tally()
        self._work: Iterator[float] = iter(())
        #: not before this instant
        self.resume_at = now

    def go_on(self, until: float) -> bool:
        """Work until that instant, or until there is something to wait for; True when all is done."""
        while True:
            if self._step is None:
                if not self._steps:
                    return True
                self._begin(self._steps.popleft())
            now = time.monotonic()
            if now >= self._step_at + self._step.within_s:  # type: ignore[union-attr]
                self._give_up()
                continue
            if now >= until:
                return False
            try:
                wait_s = next(self._work)
            except StopIteration:
                self._end()
            except Exception as error:  # noqa: BLE001 (a bug in one step must not keep the others from their work)
                _log.exception("reclaim of %s: a step failed", self.remains.worker_id)
                self._tally.missed(f"{type(error).__name__}: {error}")
                self._end()
            else:
                if wait_s:
                    self.resume_at = time.monotonic() + wait_s
                    return False

    def _begin(self, step: Step) -> None:
        self._step, self._step_at, self._tally = step, time.monotonic(), Tally()
        self._work = step.work(self.remains, self._site, self._tally)

    def _give_up(self) -> None:
        assert self._step is not None  # noqa: S101 (the caller's condition)
        with contained(f"reclaim of {self.remains.worker_id}"):
            self._work.close()  # type: ignore[attr-defined]
        self._tally.missed(f"not finished within {self._step.within_s:g} s")
        self._end()

    def _end(self) -> None:
        assert self._step is not None  # noqa: S101 (the caller's condition)
        took_ms = round((time.monotonic() - self._step_at) * 1000, 2)
        tally = self._tally
        self._taken.append(
            Taken(
                step=self._step.name,
                count=tally.count,
                bytes=tally.bytes,
                ms=took_ms,
                left=tuple(tally.left),
            )
        )
        self._step = None

    def record(self) -> Reclaim:
        """Return what was done, once all is done."""
        remains = self.remains
        return Reclaim(
            worker_id=remains.worker_id,
            pool=remains.pool,
            pid=remains.pid,
            level=remains.level,
            steps=tuple(self._taken),
            ms=round((time.monotonic() - self._begun_at) * 1000, 2),
            wall_at=time.time(),
        )


class Reclaimer:
    """The reclaims of one supervisor.

    Args:
        on_record: told of each that is finished.
    """

    def __init__(
        self, site: Site, on_record: Callable[[Reclaim], None], steps: Sequence[Step] = STEPS
    ) -> None:
        self._site = site
        self._on_record = on_record
        self._steps = steps
        self._jobs: deque[Job] = deque()

    def begin(self, remains: Remains) -> None:
        """Take back what this worker left, from the next turn on."""
        self._jobs.append(Job(remains, self._site, self._steps, time.monotonic()))

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`turn` has something to do."""
        return min((job.resume_at for job in self._jobs), default=None)

    def turn(self, slice_s: float = limits.RECLAIM_SLICE_S) -> None:
        """Work for up to so many seconds on whatever does not wait."""
        now = time.monotonic()
        until = now + slice_s
        while now < until:
            job = next((job for job in self._jobs if job.resume_at <= now), None)
            if job is None:
                return
            self._jobs.remove(job)
            is_done = True
            with contained(f"reclaim of {job.remains.worker_id}"):
                is_done = job.go_on(min(until, now + _TURN_S))
            if is_done:
                with contained(f"telling of the reclaim of {job.remains.worker_id}"):
                    self._finished(job)
            else:
                self._jobs.append(job)
            now = time.monotonic()

    def finish(self, within_s: float = limits.RECLAIM_STOP_S) -> None:
        """Work until all is done or the time is over: only when nothing else is to be done."""
        until = time.monotonic() + within_s
        while self._jobs and time.monotonic() < until:
            self.turn()
            due = self.deadline()
            if due is not None:
                time.sleep(max(0.0, min(due, until) - time.monotonic()))

    def _finished(self, job: Job) -> None:
        record = job.record()
        for taken in record.steps:
            if taken.left:
                _log.warning(
                    "worker %s left %s that could not be taken back: %s",
                    record.worker_id,
                    taken.step,
                    "; ".join(taken.left),
                )
        self._on_record(record)
