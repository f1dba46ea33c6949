"""What became of calls that an earlier broker, or an earlier connection, knew of.

A client sends a call again, marked so, when it knows no outcome of it; a worker says when it registers what it still
runs and which outcomes it still keeps; the supervisor says which calls the dead had started. From the three follows
what is true of a call that is sent again:

- a worker keeps its outcome: the call ends with it;
- a worker runs it: the call is that execution;
- a dead worker had started it: it ends as WORKER_LOST, or runs again if its tool is idempotent;
- none of these, but its client had been given up, or nobody asked for its outcome in time, or a worker had
  no room to keep it: it ends as BROKER_LOST, or runs again if its tool is idempotent;
- none of these, and every worker of the pool that could hold it has spoken or died: it has never started, and runs;
- none of these yet: it is *in doubt*, and waits for the workers that have not spoken, or for its deadline. So is one with an
  idempotency key while a worker holds anything of its principal that nobody has asked for yet: that may be the call that runs for
  its key.

What workers hold and no client asks for in time is let go; a worker that does not speak in time, because it runs a
call that nobody waits for, is ended. Source: docs/protocol.md, "Worker sessions"; ADR 5.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core import failures
from mcp_broker.core.calls import Call, CallState, fault
from mcp_broker.core.orphans import Orphan, Orphans
from mcp_broker.core.pool import APART
from mcp_broker.core.worker import WorkerState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mcp_broker.core.outbox import Body
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.receipts import Receipt
    from mcp_broker.core.routing import Routing
    from mcp_broker.core.worker import Worker
    from mcp_broker.wire import messages
    from mcp_broker.wire.node import Certificate

_ENDED = CallState.ENDED


class Reconciliation:
    """Orphans, calls in doubt, and what the dead had started."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._dispatcher = routing.dispatcher
        self._ledger = routing.ledger
        self.orphans = Orphans()
        #: workers with a timer that lets go of their orphans
        self._timed: set[Worker] = set()
        #: accepted calls of which nobody can say yet whether they started
        self.doubts: dict[bytes, Call] = {}
        #: calls that workers had started when they died -> their certificate
        self._started: dict[bytes, Certificate] = {}
        #: calls whose outcomes were let go, here or by an earlier broker, oldest first: they must not run again
        self._unclaimed: dict[bytes, None] = {}
        #: family of pools -> until when a call of an earlier broker may be asked for whose outcome a worker let go
        self._gaps: dict[str, float] = {}

    # -- what workers and their node say ----------------------------------------------------------

    def expects(self, worker: Worker, now: float) -> None:
        """Wait for the word of a worker that an earlier broker admitted."""
        worker.is_silent = True
        self._routing.timers.add(now + limits.ORPHAN_S, self._unheard, worker)

    def registered(self, worker: Worker, message: messages.Register, now: float) -> None:
        """Take a worker's word about what it holds; of all else that it was given it started nothing.

        What it let go is an exception. Of calls of this broker nobody need ask a worker.
        """
        if worker.is_silent and message.let_go_ms:
            family, ends = worker.pool.family, now + message.let_go_ms * 0.001
            self._gaps[family] = max(ends, self._gaps.get(family, 0.0))
        worker.is_silent = False
        told = {one.call_id: one for one in message.held}
        again = [call for call in worker.held.values() if call.call_id not in told]
        self._dispatcher.take_back(worker, again, now)
        for call in [call for call in worker.held.values() if call.tool.is_streaming]:
            if call.state is not _ENDED:
                # its parts went by the old connection, and the worker stops it
                self._routing.end(call, _cut(call), "cancel", now)
        self._replace(worker, [one for one in told.values() if one.call_id not in worker.held], now)
        self._settle(worker.pool, now)

    def _replace(self, worker: Worker, held: list[messages.Held], now: float) -> None:
        """Have the orphans of a worker be these, as far as they can be."""
        before = self.orphans.of(worker)
        for orphan in before:
            self._remove(orphan)
        running = len(worker.held)
        ends = now + limits.ORPHAN_S
        for one in held:
            running += bool(one.seq)
            key = (worker.pool.family, one.call_id)
            if key not in self.orphans and (running <= limits.WORKER_DEPTH_MAX or not one.seq):
                tool = self._routing.detached.tool_of(worker, one)
                its_end = ends if tool is None or not one.seq else max(ends, now + one.left_ms * 0.001)
                orphan = Orphan(worker, one.call_id, one.seq, one.principal, ends=its_end, tool=tool)
                self.orphans.add(orphan)
        self.were_abandoned({orphan.call_id for orphan in before}.difference(one.call_id for one in held))
        if held and worker not in self._timed:
            self._timed.add(worker)
            self._routing.timers.add(ends, self._let_go, worker)

    def outcome(self, worker: Worker, outcome: messages.Outcome, body: Body | None, receipt: Receipt) -> bool:
        """Keep an outcome that no call of ours waits for, if its worker has told of it."""
        orphan = self.orphans.get((worker.pool.family, outcome.call_id))
        if orphan is None or orphan.worker is not worker or orphan.outcome is not None:
            return False
        call = self._asker(orphan)
        size = len(outcome.body or b"") + (len(body) if body is not None else 0)
        kept = self.orphans.kept_bytes[worker] + size
        if call is not None and call.state is _ENDED:
            # its caller has another outcome: nobody will ask for this one
            del self.doubts[outcome.call_id]
            self._forget(orphan)
        elif call is None and (orphan.is_unwanted or kept > limits.HELD_BYTES_MAX):
            self._routing.detached.inherit(orphan, *failures.checked(worker, outcome, body))
            self._forget(orphan)
        else:
            if size:
                self.orphans.kept_bytes[worker] = kept
            orphan.seq, orphan.outcome, orphan.body, orphan.size = 0, outcome, body, size
            orphan.receipt = receipt
            receipt.left += 1
            if call is not None:
                self._claim(call, orphan)
            elif orphan.tool is not None:
                # who made the call may still ask for it; later, who knows of it
                orphan.ends = self._routing.now + limits.ORPHAN_S
                self._routing.timers.add(orphan.ends, self._let_go, worker)
        return True

    def died(self, worker: Worker, now: float) -> None:
        """A worker's death is settled: what it held without an outcome had started, also where its marks forgot it."""
        gone = [orphan for orphan in self.orphans.of(worker) if orphan.outcome is None]
        if worker.certificate is not None:
            self._routing.detached.bereaved(gone, worker.certificate)
            self.had_started(worker.certificate, tuple(orphan.call_id for orphan in gone))
        for orphan in gone:
            self._remove(orphan)
        worker.is_silent = False
        self._settle(worker.pool, now)

    def is_running(self, worker: Worker, call_id: bytes, seq: int) -> bool:
        """Tell whether a worker runs this call, and nobody has asked for it."""
        orphan = self.orphans.get((worker.pool.family, call_id))
        return orphan is not None and orphan.worker is worker and orphan.seq == seq

    def may_run(self, worker: Worker, last: int) -> bool:
        """Tell whether a worker may run a call, up to this number, that somebody may yet ask for."""
        return any(0 < one.seq <= last and not one.is_unwanted for one in self.orphans.of(worker))

    def holds(self, worker: Worker) -> bool:
        """Tell whether a worker runs, or keeps an outcome of, a call that nobody has asked for yet."""
        return any(orphan.worker is worker for orphan in self.orphans.values())

    def had_started(self, certificate: Certificate, calls: tuple[bytes, ...]) -> None:
        """Remember what a dead worker had started last."""
        for call_id in calls:
            self._started[call_id] = certificate
        while len(self._started) > limits.STARTED_MAX:
            del self._started[next(iter(self._started))]

    def were_abandoned(self, call_ids: Iterable[bytes]) -> None:
        """Remember calls whose client was given up, here or by an earlier broker: workers may have forgotten that they ran."""
        for call_id in call_ids:
            self._unclaimed[call_id] = None
        while len(self._unclaimed) > limits.STARTED_MAX:
            del self._unclaimed[next(iter(self._unclaimed))]

    def is_known(self, call: Call) -> bool:
        """Tell whether a worker holds a call that its client sends again."""
        orphan = self._orphan_of(call)
        return orphan is not None and orphan.principal == call.session.grant.caller.principal

    def undoubt(self, call: Call) -> bool:
        """Let go of a call that is in doubt; False: it is not."""
        if self.doubts.pop(call.call_id, None) is None:
            return False
        self._dispatcher.release(call)
        return True

    # -- what clients say ------------------------------------------------------------------------------

    def claims(self, call: Call) -> bool:
        """Take an accepted call that was sent again; False: it is one like any other."""
        orphan = self._orphan_of(call)
        if orphan is not None:
            self._join(call, orphan)
            return True
        return self._lost(call) or self._doubt(call) or self._was_let_go(call)

    def _orphan_of(self, call: Call) -> Orphan | None:
        """Return what a worker that may have run this call holds of it."""
        pool = call.tool.pool
        return None if pool is None else self.orphans.get((pool.family, call.call_id))

    def _asker(self, orphan: Orphan) -> Call | None:
        """Return the call that waits for this orphan's outcome; it may have ended meanwhile."""
        call = self.doubts.get(orphan.call_id)
        return call if call is not None and self._orphan_of(call) is orphan else None

    def _join(self, call: Call, orphan: Orphan) -> None:
        """Decide what becomes of a call of which a worker holds something."""
        if orphan.principal != call.session.grant.caller.principal:
            # ids are no secret between a principal and itself only
            self.undoubt(call)
            text = "a call with this id is already under way"
            self._ledger.finish(call, fault(call.call_id, "INVALID_ARGUMENT", text))
        elif call.tool.is_streaming:
            # an earlier broker had its parts; what the worker still does is let go with its orphan
            self.undoubt(call)
            self._ledger.finish(call, _cut(call))
        elif orphan.outcome is not None or orphan.seq:
            self._claim(call, orphan)
        elif self.doubts.get(call.call_id) is not call:
            # finished: its outcome is on its way
            self._wait(call)

    def _doubt(self, call: Call) -> bool:
        pool = call.tool.pool
        if pool is None or not (self._is_in_doubt(pool) or self._may_follow(call, pool)):
            return False
        self._wait(call)
        return True

    def _wait(self, call: Call) -> None:
        """Let a call wait until somebody can say what became of it, if there is room to wait."""
        pool = call.tool.pool
        if pool is None:
            return
        if self._dispatcher.budget.refusal(call, pool) is not None:
            # to be told OVERLOADED would mean that it has not started
            text = (
                f"whether {call.tool.name} has started is not known yet, and no more calls may wait for that; look at what "
                "it would have done before it is called again"
            )
            self._ledger.finish(call, fault(call.call_id, "BROKER_LOST", text, {"tool": call.tool.name}))
            return
        self.doubts[call.call_id] = call
        pool.doubt(call)

    def _may_follow(self, call: Call, pool: Pool) -> bool:
        """Tell whether a worker may hold the call that runs for the key of this one: an earlier broker knew."""
        return (
            call.record is not None
            and self.orphans.owners[pool.family, call.session.grant.caller.principal] > 0
        )

    def _is_in_doubt(self, pool: Pool) -> bool:
        complete = self._routing.workers.admission_complete
        kin = (other for other in self._dispatcher.pools.values() if other.family == pool.family)
        return not complete or any(worker.is_silent for one in kin for worker in one.workers.values())

    def is_waiting(self) -> bool:
        """Tell whether some worker has yet to say what it holds."""
        workers = self._routing.workers
        return not workers.admission_complete or any(worker.is_silent for worker in workers.by_id.values())

    def _lost(self, call: Call) -> bool:
        """End a call that a dead worker had started; False: none had, or it may run again."""
        certificate = self._started.get(call.call_id)
        if certificate is None or call.tool.definition.idempotent:
            return False
        if call.tool.pool is None or certificate.pool.partition(APART)[0] != call.tool.pool.family:
            # which calls it had started was its own word
            return False
        call.killers = (certificate,)
        self._ledger.finish(call, failures.forsaken(call.call_id, call.tool, certificate))
        return True

    def _was_let_go(self, call: Call) -> bool:
        """End a call that may have ended, and whose outcome nobody asked for in time; False: none, or it may run again."""
        if call.tool.definition.idempotent:
            return False
        if call.call_id not in self._unclaimed and not self._is_in_gap(call):
            return False
        text = (
            f"{call.tool.name} may have ended while its client was away; its outcome was let go, and it was not run again, "
            "because the tool is not declared idempotent"
        )
        self._ledger.finish(call, fault(call.call_id, "BROKER_LOST", text, {"tool": call.tool.name}))
        return True

    def _is_in_gap(self, call: Call) -> bool:
        pool = call.tool.pool
        return bool(self._gaps) and pool is not None and self._routing.now < self._gaps.get(pool.family, 0.0)

    def _claim(self, call: Call, orphan: Orphan) -> None:
        """Join a call with what a worker holds of it."""
        outcome, body = orphan.outcome, orphan.body
        self._remove(orphan)
        self.undoubt(call)
        if outcome is None:
            self._dispatcher.adopt(call, orphan.worker, orphan.seq)
            return
        self._ledger.finish(call, *failures.checked(orphan.worker, outcome, body))
        if orphan.receipt is not None:
            # its share is the session's from here on
            orphan.receipt.left -= 1
            call.session.expect(orphan.receipt, 1)

    # -- time ------------------------------------------------------------------------------------------------

    def _settle(self, pool: Pool, now: float) -> None:
        """Decide the doubts that can be decided now."""
        # a tool may have moved to a worker of its own, or back, while its calls were in doubt
        mine = [
            call
            for call in self.doubts.values()
            if call.tool.pool is not None and call.tool.pool.family == pool.family
        ]
        free: list[Call] = []
        in_doubt = self._is_in_doubt(pool)
        for call in mine:
            if call.state is _ENDED:
                del self.doubts[call.call_id]
                continue
            orphan = self._orphan_of(call)
            if orphan is not None:
                self._join(call, orphan)
                continue
            if in_doubt or (call.tool.pool is not None and self._may_follow(call, call.tool.pool)):
                continue
            self.undoubt(call)
            if not (self._lost(call) or self._was_let_go(call) or self._routing.health.shuts_out(call)):
                free.append(call)
        for call in free:
            its = call.tool.pool
            if its is not None and its.failure and not its.closed:
                self._ledger.finish(call, failures.unavailable(call.call_id, its, its.failure))
            elif its is not None:
                self._dispatcher.submit([call], its, now)

    def _let_go(self, worker: Worker, now: float) -> None:
        """Nobody asked for some orphans of a worker in time."""
        self._timed.discard(worker)
        for orphan in self.orphans.of(worker):
            if orphan.ends > now:
                continue
            orphan.ends = math.inf
            call = self._asker(orphan)
            if orphan.seq:
                self._routing.detached.late(orphan)
                # it occupies its worker until that says so
                orphan.is_unwanted = True
                self._routing.workers.stop_call(worker, orphan.call_id, orphan.seq, "cancel", now)
            elif call is None:
                if orphan.outcome is not None:
                    kept = failures.checked(worker, orphan.outcome, orphan.body)
                    self._routing.detached.inherit(orphan, *kept)
                self._forget(orphan)
            elif call.state is _ENDED:
                del self.doubts[orphan.call_id]
                self._forget(orphan)
            # else somebody asks for it, and it is on its way
        left = min((orphan.ends for orphan in self.orphans.of(worker)), default=math.inf)
        if left < math.inf:
            self._timed.add(worker)
            self._routing.timers.add(left, self._let_go, worker)

    def _forget(self, orphan: Orphan) -> None:
        self._remove(orphan)
        self.were_abandoned((orphan.call_id,))
        if orphan.receipt is not None:
            orphan.receipt.left -= 1

    def _remove(self, orphan: Orphan) -> None:
        if self.orphans.remove(orphan) and self.doubts:
            # calls with keys may have waited for that; later in this turn, since who removes it is about to settle others
            self._routing.timers.add(self._routing.now, self._settle, orphan.worker.pool)

    def _unheard(self, worker: Worker, now: float) -> None:
        """A worker has not spoken: the call that it runs keeps it from that, and nobody may be waiting for it."""
        if not worker.is_silent or worker.state >= WorkerState.DYING:
            return
        if not any(
            call.tool.pool is not None
            and call.tool.pool.family == worker.pool.family
            and call.state is not _ENDED
            for call in self.doubts.values()
        ):
            self._routing.workers.give_up(worker, "silence")
        self._routing.timers.add(now + limits.ORPHAN_S, self._unheard, worker)


def _cut(call: Call) -> messages.Outcome:
    text = "the connection to its worker was lost in the middle of the stream"
    return fault(call.call_id, "BROKER_LOST", text, {"tool": call.tool.name})
