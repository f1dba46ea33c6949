"""The workers' side of the broker's machine: registration, outcomes and deaths.

A worker's lease belongs to its node: what is true of a worker's process comes from the supervisor (Admit, Died),
what is true of its connection from its messages.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core import uploads
from mcp_broker.core.bucket import Rate
from mcp_broker.core.calls import CallState
from mcp_broker.core.client_session import Verdict
from mcp_broker.core.death_log import keep
from mcp_broker.core.interruptions import Interruptions
from mcp_broker.core.pool import APART
from mcp_broker.core.registry import Registration
from mcp_broker.core.worker import EVENT_OF_KIND, WORKER_TABLE, Worker, WorkerEvent, WorkerState
from mcp_broker.errors import InvalidArgument, InvalidTransition
from mcp_broker.wire import messages, node, payload

if TYPE_CHECKING:
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.routing import Routing
    from mcp_broker.wire.ports import PortReport
    from mcp_broker.wire.reclaims import Reclaim


#: pressures of a worker's report at which it gets no calls
_CLOSE: Final = frozenset({"unmeasured", "throttle", "exceeded"})


class Workers:
    """All workers, by id, by key and by where they are reached."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._interruptions = Interruptions(routing)
        self._dispatcher = routing.dispatcher
        #: all and only workers whose state is not GONE
        self.by_id: dict[str, Worker] = {}
        self.by_thumbprint: dict[str, Worker] = {}
        #: workers with something to send
        self.dirty: list[Worker] = []
        #: workers that are to go once they are free
        self.retiring: dict[str, Worker] = {}
        #: newest first
        self.deaths: deque[node.Certificate] = deque(maxlen=limits.DEATHS_MAX)
        #: leased ports, as last reported
        self.ports: tuple[PortReport, ...] = ()
        #: what was taken back after deaths, newest first
        self.reclaims: deque[Reclaim] = deque(maxlen=limits.RECLAIMS_MAX)
        #: set by the first ADMIT: until then an unknown key may still be admitted
        self.admission_complete = False

    # -- what workers say --------------------------------------------------------------------------

    def message(
        self,
        routing_id: bytes,
        user_id: str,
        message: messages.FromWorker,
        body: Body | None,
        now: float,
    ) -> bool:
        """Take one worker message; False if no live worker has this key or it must REGISTER first."""
        event = EVENT_OF_KIND[type(message)]
        worker = self.by_thumbprint.get(user_id)
        if worker is None:
            return WORKER_TABLE[WorkerState.GONE][event][1] is not Verdict.REFUSE
        if event is not WorkerEvent.REGISTER and worker.routing_id != routing_id:
            # an old connection's last words
            return WORKER_TABLE[WorkerState.ADMITTED][event][1] is not Verdict.REFUSE
        after, verdict = WORKER_TABLE[worker.state][event]
        if verdict is Verdict.REFUSE:
            return False
        if verdict is Verdict.BUG:
            raise InvalidTransition(f"{event.name} in worker state {worker.state.name}")
        if verdict is Verdict.IGNORE:
            return True
        if type(message) is messages.Outcomes:
            if message.epoch == self._routing.epoch:
                self._outcomes(worker, message, body, now)
            return True
        if isinstance(message, messages.Register):
            return self._register(worker, routing_id, message, now)
        if message.epoch != self._routing.epoch:
            return True
        self._take(worker, after, message, body, now)
        return True

    def _take(
        self,
        worker: Worker,
        after: WorkerState,
        message: messages.FromWorker,
        body: Body | None,
        now: float,
    ) -> None:
        was, worker.state = worker.state, after
        if isinstance(message, messages.Ready):
            worker.announce(message.depth)
            if was is WorkerState.REGISTERED:
                self._routing.health.ready(worker.pool, now)
                self._up(worker)
                if worker.is_retiring:
                    worker.state = WORKER_TABLE[after][WorkerEvent.RETIRE][0]
            self._dispatcher.pump(worker.pool, now)
        elif isinstance(message, messages.Partial):
            for part in message.parts:
                broken = self._dispatcher.part(worker, part, body, now)
                if broken is not None:
                    # the tool is stopped too: nobody takes what else it says
                    self._routing.end(*broken, "cancel", now)
        elif isinstance(message, messages.Progresses):
            for progress in message.progress:
                self._dispatcher.progress(worker, progress, now)
        elif isinstance(message, messages.Credit):
            for credit in message.credits:
                call = worker.held.get(credit.call_id)
                if call is not None and call.state is not CallState.ENDED:
                    uploads.grant(call, credit.limit, self._routing.epoch, now)
        elif isinstance(message, messages.Hooked):
            self._routing.health.operations.hooked(worker, message, now)
        elif isinstance(message, messages.Goodbye):
            self._disconnected(worker)

    def _up(self, worker: Worker) -> None:
        """Tell the supervisor of a ready worker, and what its pool serves, for a broker that follows this one."""
        tools = tuple(tool.definition for tool in self._routing.registry.of(worker.pool))
        self._routing.to_node.append(node.WorkerUp(worker.worker_id, tools))

    def retell(self, pool: Pool) -> None:
        """Tell the supervisor anew what a pool serves."""
        worker = next((one for one in pool.workers.values() if one.state is WorkerState.READY), None)
        if worker is not None:
            # without any, the next one tells
            self._up(worker)

    def _outcomes(self, worker: Worker, message: messages.Outcomes, body: Body | None, now: float) -> None:
        held = worker.held
        behind = self._dispatcher.backpressure.behind(
            held.get(outcome.call_id) for outcome in message.outcomes
        )
        self._dispatcher.outcomes(worker, message.outcomes, body)
        if worker.pool.backlog or self._dispatcher.ceiling.limit is not None:
            self._dispatcher.pump(worker.pool, now)
        # results that were smaller than expected leave room for others
        for session in behind:
            self._dispatcher.relieve(session, now)

    def _register(self, worker: Worker, routing_id: bytes, message: messages.Register, now: float) -> bool:
        worker.routing_id = routing_id
        # it is no other worker of its pool, which its tools would have to agree with
        worker.state = WorkerState.ADMITTED
        # what an old connection had not carried yet, it never will
        worker.outbox.clear()
        refusal: str | None = None
        details: dict[str, Any] = {}
        code = "INVALID_ARGUMENT"
        came = Registration.JOINED
        if message.protocol != messages.PROTOCOL or messages.MAJOR not in message.majors:
            code, refusal = "UNSUPPORTED_VERSION", f"this broker speaks version {messages.MAJOR}"
            details = {"supported": [messages.MAJOR]}
        else:
            try:
                came = self._routing.registry.register(worker.pool, message.tools, worker.edition)
            except InvalidArgument as invalid:
                refusal, details = invalid.message, invalid.details
        if refusal is not None:
            worker.send(messages.Error(self._routing.epoch, code, refusal, payload.pack(details), fatal=True))
            self._routing.to_node.append(node.WorkerRefused(worker.worker_id, refusal))
            return True
        worker.state = WorkerState.REGISTERED
        worker.pool.failure = worker.pool.closed
        if came is not Registration.JOINED:
            self._supersede(worker.pool)
        self._routing.registry.learn(worker.pool, message.traits)
        self._routing.health.registered(worker.pool)
        worker.pool.regate(self._routing.registry.of(worker.pool), now)
        worker.connected(message.seq)
        worker.send(
            messages.Welcome(
                self._routing.epoch,
                (messages.MAJOR, messages.MINOR),
                self._routing.new_id(),
                resumed=False,
                name=worker.worker_id,
                granted=messages.GrantedLimits(
                    window=limits.WORKER_DEPTH_MAX, heartbeat_ms=int(limits.HEARTBEAT_S * 1000)
                ),
                capabilities=("progress",),
                lineage=self._routing.lineage,
            )
        )
        self._routing.reconciliation.registered(worker, message, now)
        return True

    def _supersede(self, pool: Pool) -> None:
        """Give no more calls to workers of earlier editions, which serve other tools, and tell the supervisor."""
        for worker in pool.workers.values():
            if worker.edition < pool.edition and worker.state < WorkerState.DYING:
                self._retire(worker)
        self._routing.to_node.append(node.Superseded(pool.name, pool.edition))
        self._routing.health.updating(pool, self._routing.now)

    def unreachable(self, routing_id: bytes) -> None:
        """The socket could not reach a worker; whether its process lives is its node's to say."""
        worker = next((worker for worker in self.by_id.values() if worker.routing_id == routing_id), None)
        if worker is None:
            return
        after, verdict = WORKER_TABLE[worker.state][WorkerEvent.UNREACHABLE]
        if verdict is Verdict.TAKE:
            self._disconnected(worker)
            worker.state = after

    def _disconnected(self, worker: Worker) -> None:
        """Its connection has ended; what it holds it goes on holding, until it says what that is, or dies."""
        worker.state = WorkerState.ADMITTED
        worker.routing_id = b""

    # -- what the node says -------------------------------------------------------------------------

    def from_node(self, message: node.FromSupervisor, now: float) -> None:
        """Take a message about workers."""
        if isinstance(message, node.Admit):
            for admitted in message.workers:
                self._admit(admitted, now)
            self.admission_complete = True
        elif isinstance(message, node.Died):
            self._routing.reconciliation.had_started(message.certificate, message.started_calls)
            self._died(message.certificate, now)
        elif isinstance(message, node.Reclaimed):
            self.reclaims.appendleft(message.reclaim)
        elif isinstance(message, node.Deaths):
            self.deaths.extend(message.certificates)
            self.reclaims.extend(message.reclaims)
            known = {one.worker_id: one for one in (*message.certificates, *message.others)}
            for worker_id, calls in message.started_calls.items():
                if worker_id in known:
                    self._routing.reconciliation.had_started(known[worker_id], calls)
        elif isinstance(message, node.Retire):
            for worker_id in message.workers:
                worker = self.by_id.get(worker_id)
                if worker is not None:
                    self._retire(worker)
        elif isinstance(message, node.Tools):
            self._routing.registry.recall(self._dispatcher.pool(message.pool), message.tools)
        elif isinstance(message, node.Report):
            self.ports = message.ports
            self._report(message.pools, now)

    def _report(self, reports: tuple[node.PoolReport, ...], now: float) -> None:
        dispatcher, registry = self._dispatcher, self._routing.registry
        placement = self._routing.health.placement
        for report in reports:
            pool = dispatcher.pool(report.name)
            pool.report = report
            registry.set_rate(pool, Rate.of(report.rate_per_s, report.burst))
            pool.closed = report.reason if report.state == "closing" else ""
            # told anew after each report: one may be opened and closed again before anybody looks
            pool.is_vacant = False
            pool.failure = report.reason if report.state in {"closing", "closed", "failed"} else ""
            if report.state in {"closing", "closed"}:
                placement.evicted(pool, now)
            if pool.failure and not pool.closed:
                dispatcher.fail_backlog(pool, pool.failure)
            self._throttle(report, now)
        named = {report.name for report in reports}
        for pool in [pool for pool in dispatcher.pools.values() if pool.report and pool.name not in named]:
            # it is in the configuration no more, and its workers have gone
            placement.evicted(pool, now)
            if APART in pool.name and pool.workers:
                # until they are settled, what they held may have to wait here again: later reports say the same
                continue
            dispatcher.fail_backlog(pool, "it was taken out of the configuration")
            registry.forget(pool)
            if not pool.workers:
                del dispatcher.pools[pool.name]

    def _throttle(self, report: node.PoolReport, now: float) -> None:
        """Give no calls to workers that are close to a limit, until they are not any more."""
        for seen in report.workers:
            worker = self.by_id.get(seen.id)
            is_close = seen.pressure in _CLOSE
            if worker is None or worker.is_throttled is is_close:
                continue
            worker.throttle(on=is_close)
            if not is_close:
                self._dispatcher.pump(worker.pool, now)

    def _admit(self, admitted: node.Admitted, now: float) -> None:
        if admitted.worker_id in self.by_id:
            return
        pool = self._dispatcher.pool(admitted.pool)
        worker = Worker(admitted.worker_id, admitted.thumbprint, pool, self.dirty, admitted.edition)
        worker.throttle(on=admitted.is_measured)
        if not (self.admission_complete or admitted.is_spare):
            # a spare has not been told to connect: there is nothing that it could hold
            self._routing.reconciliation.expects(worker, now)
        pool.workers[worker.worker_id] = worker
        self.by_id[worker.worker_id] = worker
        self.by_thumbprint[worker.thumbprint] = worker

    def _retire(self, worker: Worker) -> None:
        worker.is_retiring = True
        self.retiring[worker.worker_id] = worker
        worker.state = WORKER_TABLE[worker.state][WorkerEvent.RETIRE][0]

    def dismiss_free(self, now: float) -> None:
        """Send those away that are to go and hold nothing any more. Their supervisor sees to those that do not go."""
        for worker in self.retiring.values():
            if (
                worker.state is WorkerState.RETIRING
                and worker.is_free(now)
                and not self._routing.reconciliation.holds(worker)
            ):
                worker.state = WORKER_TABLE[worker.state][WorkerEvent.DRAIN][0]
                worker.send(messages.Drain(self._routing.epoch))

    def _died(self, certificate: node.Certificate, now: float) -> None:
        keep(self.deaths, certificate)
        worker = self.by_id.get(certificate.worker_id)
        if worker is None:
            return
        after, verdict = WORKER_TABLE[worker.state][WorkerEvent.DIED]
        if verdict is not Verdict.TAKE:
            return
        worker.state = after
        worker.certificate = certificate
        # outcomes that it flushed before its death may still be on their way through the socket
        settle_s = limits.DEATH_SETTLE_S if worker.held else 0.0
        self._routing.timers.add(now + settle_s, self._settle, worker)

    def _settle(self, worker: Worker, now: float) -> None:
        worker.state = WORKER_TABLE[worker.state][WorkerEvent.SETTLED][0]
        self.by_id.pop(worker.worker_id, None)
        self.retiring.pop(worker.worker_id, None)
        self.by_thumbprint.pop(worker.thumbprint, None)
        worker.pool.workers.pop(worker.worker_id, None)
        certificate = worker.certificate
        if certificate is None:
            raise InvalidTransition(f"worker {worker.worker_id} settled without a certificate")
        self._dispatcher.forget(worker, certificate, now)
        self._routing.reconciliation.died(worker, now)

    # -- what the broker does ---------------------------------------------------------------------------

    def stop_call(self, worker: Worker, call_id: bytes, seq: int, why: node.Why, now: float) -> None:
        """Have a worker drop a call that has ended: by message if it waits there, by signal if it runs."""
        worker.send(messages.Cancel(self._routing.epoch, (call_id,)))
        self._interruptions.begin(worker, call_id, seq, why, now)

    def give_up(self, worker: Worker, why: node.Why) -> None:
        """End a worker that does not speak to this broker, or that a hook keeps from its calls."""
        self._interruptions.end(worker, why)

    def beat(self, beat: messages.Heartbeat, *, everyone: bool) -> None:
        """Say to workers that the broker lives, and which outcomes it has."""
        for worker in self.by_id.values():
            if not worker.is_registered:
                continue
            done = worker.receipts.advance()
            if worker.told < done:
                worker.send(messages.Ack(self._routing.epoch, done))
            elif worker.held or everyone:
                worker.send(beat)

    def dismiss(self) -> None:
        """Tell every worker that no more calls will come."""
        for worker in self.by_id.values():
            after, verdict = WORKER_TABLE[worker.state][WorkerEvent.DRAIN]
            if verdict is Verdict.TAKE:
                worker.state = after
                worker.send(messages.Drain(self._routing.epoch))
