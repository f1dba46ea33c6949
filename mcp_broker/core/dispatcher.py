"""Calls on their way between pools, workers and the ledger: who gets which, and what becomes of it.

Rules
    A worker gets a call only while it has credit. Who waits is served as :mod:`~mcp_broker.core.fairness` says; a call
    that is queued again (its worker died before it started it) goes to the front.
    The death of a worker fails only calls that it had started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core import failures, outbox
from mcp_broker.core.backpressure import Backpressure
from mcp_broker.core.budget import Budget
from mcp_broker.core.calls import Call, CallEvent, CallState, Ledger, fault
from mcp_broker.core.ceiling import Ceiling
from mcp_broker.core.parts import counted
from mcp_broker.core.pool import Pool
from mcp_broker.core.receipts import Receipt
from mcp_broker.wire import messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.core.client_session import ClientSession
    from mcp_broker.core.dead_letters import DeadLetters
    from mcp_broker.core.health_observer import HealthObserver
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.worker import Worker
    from mcp_broker.wire.node import Certificate

# looking an enum's member up costs as much as the comparison
_QUEUED, _IN_FLIGHT, _ENDED = CallState


class Dispatcher:
    """Moves calls between pools, workers and the ledger."""

    def __init__(self, ledger: Ledger, dead_letters: DeadLetters) -> None:
        self._ledger = ledger
        self.dead_letters = dead_letters
        self.pools: dict[str, Pool] = {}
        self.budget = Budget()
        self.ceiling = Ceiling(self.pools)
        #: outcomes that nobody waited for: of calls that had ended, or were never given
        self.late = 0
        #: asked about outcomes of calls that no worker of this broker was given; set by who knows of them
        self.orphaned: Callable[[Worker, messages.Outcome, Body | None, Receipt], bool] = lambda *_: False
        #: ids of calls that have ended while a worker still holds them; nobody may use them meanwhile
        self.ghosts: set[bytes] = set()
        #: set by who looks after the tools, before the first call
        self.health: HealthObserver
        self.backpressure = Backpressure()

    def pool(self, name: str) -> Pool:
        """Return the pool of that name, made at its first mention."""
        pool = self.pools.get(name)
        if pool is None:
            pool = self.pools[name] = Pool(name, self.budget)
        return pool

    def submit(self, calls: list[Call], pool: Pool, now: float) -> None:
        """Give accepted calls to workers with credit; let the rest wait, as many as may."""
        if self.backpressure:
            calls = self.backpressure.sift(calls, self.may_wait)
        if self.ceiling.limit is not None:
            # others may have waited longer
            self._queue(calls, pool, now)
            self._pump_in_turn(now)
            return
        if pool.gates:
            calls = self._submit_gated(calls, pool, now)
        at, total = 0, len(calls)
        backlog = pool.backlog
        while at < total and not (backlog.count and backlog.is_ready):
            worker, room = pool.next_worker()
            if worker is None:
                break
            self._assign(calls[at : at + room], worker, now)
            at += room
        if at < total:
            self._queue(calls[at:], pool, now)

    def _submit_gated(self, calls: list[Call], pool: Pool, now: float) -> list[Call]:
        """Deal with the calls that have to pass a gate; return the others."""
        gated = [call for call in calls if call.tool.gate is not None]
        if not gated:
            return calls
        self._queue(gated, pool, now)
        self.pump(pool, now)
        return [call for call in calls if call.tool.gate is None]

    def _queue(self, calls: list[Call], pool: Pool, now: float) -> None:
        left = pool.queue(calls, now)
        if left and pool.gates:
            # some came to wait only because their gates are looked at when all are in
            self.pump(pool, now)
            left = pool.queue(left, now)
        for call in left:
            if self.may_wait(call, pool):
                pool.queue([call], now)

    def may_wait(self, call: Call, pool: Pool) -> bool:
        """Tell whether there is room for a call to wait; if not, it ends here."""
        refusal = self.budget.refusal(call, pool)
        if refusal is not None:
            self._ledger.refuse(call, refusal)
        return refusal is None

    def _sift(self, calls: list[Call], pool: Pool) -> list[Call]:
        """Return those of some calls that their clients can take results of; no worker holds the others."""
        ready = self.backpressure.sift(calls)
        if pool.gates and len(ready) < len(calls):
            for call in set(calls).difference(ready):
                self._let_go(call, pool)
        return ready

    def pump(self, pool: Pool, now: float) -> None:
        """Hand out waiting calls while there is credit."""
        if self.ceiling.limit is not None:
            self._pump_in_turn(now)
            return
        backlog = pool.backlog
        while backlog.count:
            worker, room = pool.next_worker()
            if worker is None:
                return
            run = pool.take(room, now)
            if not run:
                # all behind closed gates
                return
            if self.backpressure:
                run = self._sift(run, pool)
            if run:
                self._assign(run, worker, now)

    def _pump_in_turn(self, now: float) -> None:
        """Hand out waiting calls of all pools, one of each after the other, while there is room below the ceiling."""
        idle = False
        while not idle:
            idle = True
            for pool in self.ceiling.waiting():
                worker, _ = pool.next_worker()
                if self.ceiling.room() <= 0 or worker is None:
                    continue
                run = pool.take(1, now)
                if self.backpressure:
                    run = self._sift(run, pool)
                if run:
                    self._assign(run, worker, now)
                    self.ceiling.served(pool)
                    idle = False

    def _assign(self, calls: list[Call], worker: Worker, now: float) -> None:
        seq, held, send = worker.seq, worker.held, worker.outbox.append
        for call in calls:
            if call.state is not _QUEUED:
                # only that cell of DISPATCHED leads anywhere
                call.step(CallEvent.DISPATCHED)
            call.state = _IN_FLIGHT
            seq += 1
            call.seq = seq
            call.attempts += 1
            call.worker = worker
            held[call.call_id] = call
            if call.idle is not None:
                call.idle.touched_at = now
            left_ms = int((call.deadline - now) * 1000)
            tool, body = call.tool, call.body
            dispatch = messages.Dispatch(
                seq,
                call.call_id,
                tool.name,
                left_ms if left_ms > 0 else 1,
                call.arguments,
                call.session.caller_raw,
                call.extra,
            )
            send(dispatch if body is None else outbox.Big(dispatch, body))
            if tool.is_streaming:
                call.limit = limits.STREAM_WINDOW_MAX
                self._raise_limit(call, worker)
        worker.seq = seq
        worker.mark_dirty()

    def outcomes(  # noqa: C901, PLR0912 (the hot path: a function more costs as much as what it would do)
        self, worker: Worker, outcomes: tuple[messages.Outcome, ...], body: Body | None
    ) -> None:
        """Take a worker's outcomes: end each one's call, or only free its place if it has ended."""
        worker.received += len(outcomes)
        receipt = Receipt(worker.received)
        held, finish, gates = worker.held, self._ledger.finish, worker.pool.gates
        watched = self.health.watched
        # one question a call for both, since mostly there is neither
        is_attended = bool(gates or watched)
        session: ClientSession | None = None
        again: list[Call] = []
        count = 0
        for outcome in outcomes:
            call = held.pop(outcome.call_id, None)
            if call is None:
                if not self.orphaned(worker, outcome, body, receipt):
                    self.late += 1
                continue
            worker.served += 1
            call.worker = None
            if is_attended:
                self._let_go(call, worker.pool)
                if call.tool in watched and call.state is not _ENDED and outcome.code == messages.OK:
                    self.health.succeeded(call)
            if call.state is _ENDED:
                self.ghosts.discard(call.call_id)
                self.late += 1
                continue
            if call.session is not session:
                if session is not None:
                    session.expect(receipt, count)
                session, count = call.session, 0
            count += 1
            if call.expected_bytes and body is None:
                self.backpressure.small(call)
            if outcome.code == "OK" and (outcome.body is not None or body is not None):
                if outcome.parts != call.parts:
                    outcome = counted(call, outcome)  # noqa: PLW2901
                if body is not None and (instead := self.backpressure.large(call, len(body))) is not None:
                    outcome, body = instead, None  # noqa: PLW2901
                finish(call, outcome, body)
            elif self.health.runs_again(call, outcome):
                count -= 1
                again.append(call)
            else:
                finish(call, *failures.checked(worker, outcome, body))
        if session is not None:
            session.expect(receipt, count)
        worker.receipts.add(receipt)
        for call in reversed(again):
            call.step(CallEvent.REQUEUED)
            worker.pool.requeue(call)

    @staticmethod
    def _let_go(call: Call, pool: Pool) -> None:
        """A worker holds a call no more: its tool's next one may go."""
        if call.tool.gate is not None:
            pool.backlog.release(call.tool.gate)

    def part(
        self, worker: Worker, part: messages.Part, body: Body | None, now: float
    ) -> tuple[Call, messages.Outcome] | None:
        """Forward a part of a stream, if it is the next one of a call that this worker holds, and within its credit.

        Returns:
            None, or the call that cannot go on and how it has to end (the worker's fault).
        """
        call = worker.held.get(part.call_id)
        if call is None or call.state is CallState.ENDED:
            self.late += 1
            return None
        if part.index != call.parts or part.index >= call.limit or not call.tool.is_streaming:
            text = f"worker {worker.worker_id} sent part {part.index} as number {call.parts} of at most {call.limit}"
            return call, fault(call.call_id, "INTERNAL", text)
        call.parts += 1
        if call.idle is not None:
            call.idle.touched_at = now
        entry = part if body is None else outbox.Big(part, body)
        call.session.kept.keep(entry)
        call.session.send(entry)
        if call.parts == call.limit:
            self._raise_limit(call, worker)
        return None

    def progress(self, worker: Worker, progress: messages.Progress, now: float) -> None:
        """Tell a caller how far its call has come; it takes the newest only."""
        call = worker.held.get(progress.call_id)
        if call is None or call.state is CallState.ENDED:
            return
        if call.idle is not None:
            call.idle.touched_at = now
        call.session.tell(progress)

    def credit(self, call: Call, credit: messages.StreamCredit) -> None:
        """Take a caller's room for parts.

        The worker hears of it when it is about to run out, or in steps: a caller that raises its limit without taking
        parts cannot fill the worker's outbox.
        """
        call.wanted = max(call.wanted, min(credit.limit, call.parts + limits.STREAM_AHEAD_MAX))
        call.session.kept.cover(call.call_id, call.wanted - limits.STREAM_WINDOW_MAX)
        step = limits.STREAM_WINDOW_MAX // 2
        is_short = call.limit - call.parts < step // 2
        if call.worker is not None and (is_short or call.wanted - call.limit >= step):
            self._raise_limit(call, call.worker)

    @staticmethod
    def _raise_limit(call: Call, worker: Worker) -> None:
        if call.tool.is_streaming and call.wanted > call.limit:
            call.limit = call.wanted
            worker.send(messages.StreamCredit(call.call_id, call.limit))

    def release(self, call: Call) -> None:
        """Take a call that is about to end out of its pool's queue; a worker that holds it goes on holding."""
        if call.state is CallState.QUEUED and call.tool.pool is not None:
            call.tool.pool.unqueue(call)
            if self.backpressure:
                self.backpressure.release(call)

    def relieve(self, session: ClientSession, now: float) -> None:
        """Let calls of a session that was behind wait in their principal's turn, as far as it has read meanwhile."""
        pools: dict[Pool, None] = {}
        for call in self.backpressure.caught_up(session):
            if call.tool.pool is not None:
                call.tool.pool.queue_again([call], now)
                pools[call.tool.pool] = None
        for pool in pools:
            self.pump(pool, now)

    def adopt(self, call: Call, worker: Worker, seq: int) -> None:
        """Join an accepted call with its execution, which a worker began for an earlier broker or connection."""
        call.step(CallEvent.DISPATCHED)
        call.seq, call.worker = seq, worker
        call.attempts += 1
        worker.held[call.call_id] = call
        worker.held = dict(sorted(worker.held.items(), key=lambda item: item[1].seq))
        if call.tool.gate is not None:
            call.tool.gate.held += 1

    def take_back(self, worker: Worker, calls: list[Call], now: float) -> None:
        """Let calls wait again that a worker was given and never started; those that ended are forgotten."""
        again: list[Call] = []
        for call in calls:
            del worker.held[call.call_id]
            call.worker = None
            self._let_go(call, worker.pool)
            if call.state is _ENDED:
                self.ghosts.discard(call.call_id)
                continue
            call.attempts -= 1
            again.append(call)
        self._requeue(again, worker.pool, now)

    def _requeue(self, calls: list[Call], pool: Pool, now: float) -> None:
        for call in reversed(calls):
            if self.health.ends(call):
                continue
            call.step(CallEvent.REQUEUED)
            pool.requeue(call)
        self.pump(pool, now)

    def forget(self, worker: Worker, certificate: Certificate, now: float) -> None:
        """Settle all that a dead worker held: what it had started fails (or runs again), the rest waits again."""
        held, worker.held = list(worker.held.values()), {}
        worker.outbox.clear()
        again: list[Call] = []
        exceeding = failures.exceeding(held, certificate)
        self.health.worker_died(certificate, [call for call in held if call.seq <= certificate.started_seq])
        for call in held:
            call.worker = None
            self._let_go(call, worker.pool)
            if call.state is CallState.ENDED:
                self.ghosts.discard(call.call_id)
                continue
            if call.seq > certificate.started_seq:
                call.attempts -= 1
                again.append(call)
                continue
            call.killers = (*call.killers, certificate)
            if exceeding == 1:
                # it would do the same again
                self._ledger.finish(call, failures.exhausted(call, certificate))
            elif len(call.killers) >= limits.POISON_DEATHS:
                self.dead_letters.add(call, now)
                self._ledger.finish(call, failures.lost(call, certificate, "POISONED"))
            elif (
                call.tool.definition.idempotent and call.attempts < limits.ATTEMPTS_MAX and call.may_run_again
            ):
                again.append(call)
            elif exceeding:
                self._ledger.finish(call, failures.exhausted(call, certificate, among=exceeding))
            else:
                self._ledger.finish(call, failures.lost(call, certificate, "WORKER_LOST"))
        self._requeue(again, worker.pool, now)

    def end_waiting(self, tool: Tool, outcome: Callable[[bytes], messages.Outcome]) -> None:
        """End every waiting call of a tool; ``outcome`` makes each one's from its id."""
        pool = tool.pool
        if pool is None:
            return
        for call in [*pool.backlog.values(), *self.backpressure.of_pool(pool)]:
            if call.tool is tool:
                self.release(call)
                self._ledger.finish(call, outcome(call.call_id))

    def fail_backlog(self, pool: Pool, reason: str) -> None:
        """End every waiting call of a pool that its supervisor gave up."""
        for call in [*pool.backlog.values(), *self.backpressure.of_pool(pool)]:
            self.release(call)
            self._ledger.finish(call, failures.unavailable(call.call_id, pool, reason))
