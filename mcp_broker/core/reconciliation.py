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
- none of these yet: it is *in doubt*, and waits for the workers that have not spoken, or for its deadline.

What workers hold and no client asks for in time is let go; a worker that does not speak in time, because it runs a
call that nobody waits for, is ended. Source: docs/protocol.md, "Worker sessions"; ADR 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.core import losses
from mcp_broker.core.calls import Call, CallState, fault
from mcp_broker.core.workers import WorkerState
from mcp_broker.wire import codec, messages
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mcp_broker.core.outbox import Body
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.receipts import Receipt
    from mcp_broker.core.routing import Routing
    from mcp_broker.core.workers import Worker
    from mcp_broker.wire.node import Certificate

_ENDED = CallState.ENDED


class Orphan(Slim):
    """A call that a worker holds and no client of this broker has asked for."""

    worker: Worker
    #: its number at that worker; 0: finished
    seq: int
    principal: str
    outcome: messages.Outcome | None = None
    body: Body | None = None
    receipt: Receipt | None = None
    #: nobody asked for it in time: it is being stopped
    is_unwanted: bool = False


class Reconciliation:
    """Orphans, calls in doubt, and what the dead had started."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._dispatcher = routing.dispatcher
        self._ledger = routing.ledger
        self.orphans: dict[bytes, Orphan] = {}
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
        orphans = {call_id: one for call_id, one in told.items() if call_id not in worker.held}
        for call_id, one in orphans.items():
            self.orphans[call_id] = Orphan(worker, one.seq, one.principal)
        if orphans:
            self._routing.timers.add(now + limits.ORPHAN_S, self._let_go, (worker, tuple(orphans)))
        self._settle(worker.pool, now)

    def outcome(self, worker: Worker, outcome: messages.Outcome, body: Body | None, receipt: Receipt) -> bool:
        """Keep an outcome that no call of ours waits for, if its worker has told of it."""
        orphan = self.orphans.get(outcome.call_id)
        if orphan is None or orphan.worker is not worker or orphan.outcome is not None:
            return False
        if orphan.is_unwanted:
            self._forget(outcome.call_id)
            return True
        orphan.seq, orphan.outcome, orphan.body, orphan.receipt = 0, outcome, body, receipt
        receipt.left += 1
        call = self.doubts.get(outcome.call_id)
        if call is None:
            return True
        if call.state is not _ENDED:
            self._claim(call, orphan)
        else:
            # its caller has another outcome: nobody will ask for this one
            del self.doubts[outcome.call_id]
            self._forget(outcome.call_id)
            receipt.left -= 1
        return True

    def died(self, worker: Worker, now: float) -> None:
        """A worker's death is settled: what it ran without an outcome is known by the marks, if at all."""
        gone = [
            call_id
            for call_id, orphan in self.orphans.items()
            if orphan.worker is worker and orphan.outcome is None
        ]
        for call_id in gone:
            del self.orphans[call_id]
        worker.is_silent = False
        self._settle(worker.pool, now)

    def is_running(self, worker: Worker, call_id: bytes, seq: int) -> bool:
        """Tell whether a worker runs this call, and nobody has asked for it."""
        orphan = self.orphans.get(call_id)
        return orphan is not None and orphan.worker is worker and orphan.seq == seq

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

    # -- what clients say ------------------------------------------------------------------------------

    def claims(self, call: Call) -> bool:
        """Take an accepted call that was sent again; False: it is one like any other."""
        call_id = call.call_id
        orphan = self.orphans.get(call_id)
        if orphan is not None:
            if orphan.principal != call.session.grant.caller.principal:
                # ids are no secret between a principal and itself only
                text = "a call with this id is already under way"
                self._ledger.finish(call, fault(call_id, "INVALID_ARGUMENT", text))
                return True
            if call.tool.is_streaming:
                # an earlier broker had its parts; what the worker still does is let go with its orphan
                self._ledger.finish(call, _cut(call))
                return True
            if orphan.outcome is None and not orphan.seq:
                # finished: its outcome is on its way
                self.doubts[call_id] = call
                return True
            self._claim(call, orphan)
            return True
        return self._lost(call) or self._doubt(call) or self._was_let_go(call)

    def _doubt(self, call: Call) -> bool:
        pool = call.tool.pool
        if pool is None or not self._is_in_doubt(pool):
            return False
        self.doubts[call.call_id] = call
        return True

    def _is_in_doubt(self, pool: Pool) -> bool:
        complete = self._routing.crew.admission_complete
        kin = (other for other in self._dispatcher.pools.values() if other.family == pool.family)
        return not complete or any(worker.is_silent for one in kin for worker in one.workers.values())

    def _lost(self, call: Call) -> bool:
        """End a call that a dead worker had started; False: none had, or it may run again."""
        certificate = self._started.get(call.call_id)
        if certificate is None or call.tool.definition.idempotent:
            return False
        text = (
            f"worker {certificate.worker_id} was lost after it had started {call.tool.name}: {certificate.cause}; "
            "it was not run again, because the tool is not declared idempotent"
        )
        details: dict[str, Any] = {"worker": certificate.worker_id, "tool": call.tool.name, "attempts": 1}
        details["certificate"] = codec.as_plain(certificate)
        self._ledger.finish(call, fault(call.call_id, "WORKER_LOST", text, details))
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
        del self.orphans[call.call_id]
        self.doubts.pop(call.call_id, None)
        if orphan.outcome is None:
            self._dispatcher.adopt(call, orphan.worker, orphan.seq)
            return
        self._ledger.finish(call, *losses.checked(orphan.worker, orphan.outcome, orphan.body))
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
            orphan = self.orphans.get(call.call_id)
            if orphan is not None:
                if orphan.outcome is not None or orphan.seq:
                    self._claim(call, orphan)
                continue
            if in_doubt:
                continue
            del self.doubts[call.call_id]
            if not (self._lost(call) or self._was_let_go(call) or self._routing.care.shuts_out(call)):
                free.append(call)
        for call in free:
            if call.tool.pool is not None:
                self._dispatcher.submit([call], call.tool.pool, now)

    def _let_go(self, subject: tuple[Worker, tuple[bytes, ...]], now: float) -> None:
        """Nobody asked for these in time."""
        worker, call_ids = subject
        for call_id in call_ids:
            orphan = self.orphans.get(call_id)
            if orphan is None or orphan.worker is not worker:
                continue
            if orphan.seq:
                # it occupies its worker until that says so
                orphan.is_unwanted = True
                self._routing.crew.stop_call(worker, call_id, orphan.seq, "cancel", now)
                continue
            call = self.doubts.get(call_id)
            if call is not None and call.state is not _ENDED:
                # somebody asks for it, and it is on its way
                continue
            self.doubts.pop(call_id, None)
            self._forget(call_id)
            if orphan.receipt is not None:
                orphan.receipt.left -= 1

    def _forget(self, call_id: bytes) -> None:
        del self.orphans[call_id]
        self.were_abandoned((call_id,))

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
            self._routing.crew.give_up(worker)
        self._routing.timers.add(now + limits.ORPHAN_S, self._unheard, worker)


def _cut(call: Call) -> messages.Outcome:
    text = "the connection to its worker was lost in the middle of the stream"
    return fault(call.call_id, "BROKER_LOST", text, {"tool": call.tool.name})
