"""A worker: what its loop does with the calls that it is given, without sockets, signals or tools.

Mirrors ``mcp_broker/worker/loop.py`` (one call at a time: nothing is read while a tool runs) and ``tasks.py`` (several
at a time).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_broker.wire import payload
from mcp_broker.worker.outcomes import fault
from tests.sim.job import Job
from tests.sim.shell import OPENING_S, Shell
from tests.sim.work import Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.wire import messages
    from tests.sim.world import World

#: a finished outcome waits at most about this long for company before the next call starts, seconds
_FLUSH_S: Final = 1e-4
#: calls that took longer than this together may have been overtaken, seconds
_LATE_S: Final = 0.001
_FOREVER_S: Final = 1e6


class Worker(Shell):
    """One life of one worker process."""

    def __init__(self, world: World, worker_id: str, pool: str, concurrency: int, edition: int) -> None:
        super().__init__(world, worker_id, pool, concurrency, edition)
        #: one call at a time: when the oldest outcome that is not flushed was finished, and what was measured
        self._oldest_at: float | None = None
        self._turn_began = 0.0
        self._turn_count = 0
        self._is_late = False
        self._means: dict[str, float] = {}

    # -- signals ---------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Hear the signal that raises in the tool whose call is meant."""
        if self._puts_off(self.interrupt) or self.is_dead:
            return
        seq = self.marks.interrupt_seq
        for job in self.jobs:
            if job.seq == seq and job.plan.does != "stubborn" and (self.concurrency > 1 or not job.awaits):
                self._finish(job, job.cancelled())
                return
        self._asked = seq
        self.wake()

    def terminate(self) -> None:
        """Hear SIGTERM: whatever runs ends, and then the worker."""
        if self._puts_off(self.terminate) or self.is_dead:
            return
        self._is_stopping = True
        for job in list(self.jobs):
            if job.plan.does != "stubborn" and not self._is_gone():
                if self._is_neighbour(job):
                    self._lose_call(job)
                else:
                    self._finish(job, job.cancelled())
        if not self._is_gone():
            self.wake()

    def _is_neighbour(self, job: Job) -> bool:
        """Tell whether nobody wants the end of this call, which runs beside others."""
        is_asked = job.pending.dispatch.call_id in self.session.cancelled
        return self.concurrency > 1 and not is_asked and self.world.agenda.now < job.pending.deadline

    def _lose_call(self, job: Job) -> None:
        """Say nothing of a call that ends with its worker."""
        self._drop(job)
        self.session.running.pop(job.pending.dispatch.call_id, None)

    def _puts_off(self, handler: Callable[[], None]) -> bool:
        """Put a signal off while the process stands still."""
        until = self.stalled_until
        if self.world.agenda.now >= until:
            return False
        self.world.agenda.at(until, handler)
        return True

    # -- the loop -------------------------------------------------------------------------------------

    @property
    def _is_busy(self) -> bool:
        """A tool has the only thread."""
        return self.concurrency == 1 and any(not job.awaits for job in self.jobs)

    def wake(self) -> None:
        """Do what can be done now."""
        now = self.world.agenda.now
        if self.is_dead or not self._is_up or self._is_busy:
            return
        if now < self.stalled_until:
            self._alarm.set(self.stalled_until)
            return
        if self._has_ended():
            self._exit(0)
            return
        if not self._connect(now):
            self._alarm.set(self._retry_at)
            return
        self._send()
        if self._inbox:
            self._take(now, hurries=not self._is_late)
            self._is_late = False
            if self._is_gone():
                return
        elif self._has_lost_wire():
            self._lose()
        if self.session.orders and (self.concurrency > 1 or not (self.jobs or self.session.inbox)):
            self._obey()
        if self.concurrency > 1:
            self._serve_many()
        elif self.jobs:
            self.progress(self.jobs[0])
        elif self.session.inbox and not self._is_stopping:
            self._turn_began, self._turn_count = now, 0
            self._begin()
        if self._is_gone() or self._is_busy:
            return
        self._sleep(now)

    def _obey(self) -> None:
        """Run hooks, some of which fail."""
        orders = self.session.orders
        while orders:
            fails = self.world.rng.random() < 0.2
            self.session.hooked(orders.popleft(), "OSError: no such thing" if fails else "")
        self._alarm.sooner(self.world.agenda.now)

    def _sleep(self, now: float) -> None:
        """Have the alarm wake it when the loop's own wait would end."""
        self._send()
        if self._has_ended() or self._inbox:
            self._alarm.set(now)
        elif self.wire is None:
            self._alarm.set(self._retry_at)
        elif not self.wire.is_up:
            self._alarm.set(self._opened_at + OPENING_S)
        else:
            self._alarm.set(self.session.silent_at())

    def _lose(self) -> None:
        super()._lose()
        self._oldest_at = None

    # -- one call at a time -----------------------------------------------------------------------------

    def _begin(self) -> None:
        """Start the next call; answer the ones before it first, unless both are short."""
        session, now = self.session, self.world.agenda.now
        mean_s = self._means.get(session.inbox[0].dispatch.tool, 0.0)
        if self._oldest_at is not None and (not 0 < mean_s <= _FLUSH_S or now - self._oldest_at > _FLUSH_S):
            self._measure()
            session.flush()
            self._send()
            if self._inbox:
                self._take(now)
            if self._is_gone():
                return
            if not session.inbox:
                self._end_turn()
                return
        self._start()

    def _end_turn(self) -> None:
        self._is_late = self.world.agenda.now - self._turn_began > _LATE_S
        self._measure()
        self.session.flush()
        self._send()

    def _measure(self) -> None:
        now = self.world.agenda.now
        self.session.pace.served(int((now - self._turn_began) * 1e9), self._turn_count)
        self._turn_began, self._turn_count, self._oldest_at = now, 0, None

    # -- several at a time --------------------------------------------------------------------------------

    def _serve_many(self) -> None:
        session = self.session
        for job in list(self.jobs):
            if job.pending.dispatch.call_id in session.cancelled:
                self._finish(job, job.cancelled())
            elif job.awaits:
                self.progress(job)
        while session.inbox and len(self.jobs) < self.concurrency and not self._is_stopping:
            self._start()
        if not self._is_gone():
            session.flush()
            self._send()

    # -- calls ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the next call: it is marked before any of its code runs."""
        world, pending = self.world, self.session.start()
        dispatch = pending.dispatch
        begin = self.marks.start if self.concurrency == 1 else self.marks.start_beside
        begin(dispatch.seq, dispatch.call_id)
        if dispatch.extra is not None and dispatch.extra.detach:
            self.marks.spare(dispatch.seq, pending.deadline)
        job = Job(self, pending, Plan.unpack(pending.arguments))
        self.jobs.append(job)
        if world.agenda.now >= pending.deadline:
            text = "the time of the call was over before it could start"
            self._finish(job, fault(dispatch.call_id, "DEADLINE_EXCEEDED", text))
            return
        world.note(self.name, "runs", dispatch.seq, dispatch.call_id, dispatch.tool, job.plan.does)
        world.invariants.executed(dispatch.call_id)
        if job.is_stream and self.concurrency == 1:
            self.session.flush()
        forever = job.plan.is_endless
        job.alarm.set(world.agenda.now + (_FOREVER_S if forever else job.plan.spent_s))

    def progress(self, job: Job) -> None:
        """Some time of a call's tool has passed, or its caller may take more parts."""
        now = self.world.agenda.now
        if self.is_dead or job not in self.jobs:
            return
        if now < self.stalled_until:
            job.alarm.set(self.stalled_until)
            return
        if not job.is_stream:
            self._finish(job, *job.result())
            return
        if self._is_unwanted(job):
            self._finish(job, job.cancelled())
            return
        if job.part is None:
            if job.index == job.plan.parts:
                self._finish(job, *job.result())
                return
            job.part = payload.pack(job.index)
        if not self.session.may_send(job.pending, job.index):
            was_waiting, job.awaits = job.awaits, True
            job.alarm.set(job.pending.deadline)
            if not was_waiting:
                # nothing runs now: what the broker said meanwhile can be read
                self._alarm.sooner(now)
            return
        job.awaits = False
        if self.session.part(job.pending, job.index, job.part):
            job.index += 1
            job.part = None
            self._send()
        job.alarm.set(now + job.plan.spent_s)

    def _is_unwanted(self, job: Job) -> bool:
        return (
            job.pending.life != self.session.life
            or job.pending.dispatch.call_id in self.session.cancelled
            or self._asked == job.seq
            or self._is_stopping
            or self.world.agenda.now >= job.pending.deadline
        )

    def _finish(self, job: Job, outcome: messages.Outcome, body: bytes | None = None) -> None:
        """A call has come to its end; the next one follows."""
        session, now = self.session, self.world.agenda.now
        if job.plan.does == "crash" and outcome.code in {"OK", "TOOL_FAILED"}:
            self.die("crash")
            return
        self._drop(job)
        self.marks.end(job.pending.dispatch.call_id)
        session.finish(job.pending, outcome, body)
        if self.concurrency > 1:
            session.pace.served(int((now - job.started_at) * 1e9), 1)
            self._alarm.sooner(now)
            return
        tool, spent_s = job.pending.dispatch.tool, now - job.started_at
        mean_s = self._means.get(tool, 0.0)
        self._means[tool] = (mean_s * 7 + spent_s) / 8 if mean_s else spent_s
        self._turn_count += 1
        if self._oldest_at is None:
            self._oldest_at = now
        if session.inbox and not self._is_stopping:
            self._begin()
        else:
            self._end_turn()
        self._alarm.sooner(now)

    def _drop(self, job: Job) -> None:
        job.alarm.clear()
        if job in self.jobs:
            self.jobs.remove(job)
