"""The broker's machine: clients' and workers' messages in, outboxes and node messages out.

Rules
    Everything that decides is here or in the machines that this one owns; the shell only moves bytes.
    No peer can stop it: a refusal is an entry in that peer's outbox, never an exception.

The shell hands decoded messages to :attr:`Routing.clients`, :attr:`Routing.workers` and :meth:`Routing.from_node`, calls
:meth:`Routing.expire` once a turn, and then sends what the dirty sessions and workers and :attr:`Routing.to_node` hold.

What is deliberately absent: payloads (opaque), tokens (the shell verifies them and passes a Grant).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core import own_tools
from mcp_broker.core.bucket import Rate
from mcp_broker.core.calls import Call, CallState, Ledger, fault
from mcp_broker.core.client_sessions import ClientSessions
from mcp_broker.core.commands import Commands
from mcp_broker.core.dead_letters import DeadLetters
from mcp_broker.core.demand import Demands
from mcp_broker.core.detached import Detached
from mcp_broker.core.dispatcher import Dispatcher
from mcp_broker.core.enquiries import Enquiries
from mcp_broker.core.idempotency import Idempotency
from mcp_broker.core.rates import Rates
from mcp_broker.core.reconciliation import Reconciliation
from mcp_broker.core.registry import Registry
from mcp_broker.core.timers import Timers
from mcp_broker.core.tool_health import ToolHealth
from mcp_broker.core.workers import Workers
from mcp_broker.wire import messages, node

if TYPE_CHECKING:
    from collections.abc import Callable


class Routing:
    """Owns every session, call and pool of one broker.

    Args:
        epoch: this broker's number; larger than that of any broker before it.
        ids: makes random ids of the length asked for (the shell's; machines have no randomness).
    """

    def __init__(self, epoch: int, now: float, ids: Callable[[int], bytes]) -> None:
        self.epoch = epoch
        self.began = now
        #: the instant of the latest turn
        self.now = now
        self._ids = ids
        self.ledger = Ledger(now)
        self.registry = Registry()
        self.registry.add_own(own_tools.DEFINITIONS)
        self.rates = Rates()
        self.timers = Timers()
        self.dispatcher = Dispatcher(self.ledger, DeadLetters(self.timers))
        #: what the supervisor is to be told, in order
        self.to_node: list[node.NodeMessage] = []
        self.lineage = ""
        self.reconciliation = Reconciliation(self)
        self.dispatcher.orphaned = self.reconciliation.outcome
        self.idempotency = Idempotency(self)
        self.detached = Detached(self)
        self.health = ToolHealth(self)
        self.dispatcher.health = self.health
        self.ledger.failing = self.health.failing
        self.ledger.keyed = self.idempotency.finished
        self.commands = Commands(self)
        self.enquiries = Enquiries(self)
        self.clients = ClientSessions(self)
        self.workers = Workers(self)
        self._demands = Demands(self.dispatcher)
        self.draining = False
        self._drain_until = self._part_at = 0.0
        self.drained = False
        self.boot: node.Boot | None = None
        #: facts of the process around it, for `status`
        self.pid = 0
        self.software_version = ""
        #: what the shell's doors refused before anybody had a session; they count
        self.refused = {"handshakes": 0, "addresses": 0, "frames": 0}
        #: told of our own bugs: where, and what was raised; set by the shell, which goes on
        self.bug: Callable[[str, Exception], None] = _raise
        self._heartbeat_at = now + limits.HEARTBEAT_S
        self._beats = 0

    def end(self, call: Call, outcome: messages.Outcome, why: node.Why, now: float) -> None:
        """End a call from outside: its outcome now, the kill behind it."""
        worker, seq = call.worker, call.seq
        self.dispatcher.release(call)
        self.ledger.finish(call, outcome)
        if worker is not None:
            self.dispatcher.ghosts.add(call.call_id)
            self.workers.stop_call(worker, call.call_id, seq, why, now)

    def end_late(self, call: Call, now: float) -> None:
        """End a call whose deadline has passed."""
        text = f"{call.tool.name} had no outcome within its time"
        if call.tool.pool is None:
            state = "being carried out by the supervisor, which goes on with it"
        elif call.state is not CallState.QUEUED:
            state = "running"
        elif call.tool.is_held and call.tool.condition is not None:
            state = f"waiting: its tool is {call.tool.condition.standing}"
        else:
            state = "waiting for a worker"
        details = {"which": "timeout", "was": state}
        outcome = fault(call.call_id, "DEADLINE_EXCEEDED", f"{text}; it was {state}", details)
        self.end(call, outcome, "deadline", now)

    def new_id(self) -> bytes:
        """Return 16 random bytes, for a session."""
        return self._ids(16)

    def from_node(self, message: node.FromSupervisor, now: float) -> None:
        """Take one message of the supervisor."""
        if isinstance(message, node.Shutdown):
            self.draining = True
            self._drain_until = now + message.drain_s
            self.clients.forget_allowed()
        elif isinstance(message, node.Boot):
            self.boot = message
            self.lineage = message.lineage
            self._limit(message.limits)
        elif isinstance(message, node.Limits):
            self._limit(message.limits)
        elif isinstance(message, node.Observe):
            # the shell's: machines log nothing
            return
        elif isinstance(message, node.Standings):
            self.health.lifecycles.recall(message.tools)
        elif isinstance(message, node.Abandoned):
            self.reconciliation.were_abandoned(message.call_ids)
        elif isinstance(message, node.Progressed | node.Commanded):
            self.commands.heard(message, now)
        else:
            self._demands.is_due = self._demands.is_due or isinstance(message, node.Report)
            self.workers.from_node(message, now)

    def _limit(self, configured: dict[str, int | float]) -> None:
        rate = Rate.of(configured.get("rate_per_s"), int(configured.get("burst", 0)))
        self.rates.principal = rate
        self.registry.most = int(configured.get("tools", limits.TOOLS_MAX))
        self.dispatcher.ceiling.limit = int(configured["executions"]) if "executions" in configured else None

    def deadline(self) -> float:
        """Return when :meth:`expire` has something to do at the latest."""
        at = self._heartbeat_at if not self.enquiries else self.now
        for other in (self.ledger.deadline(), self.timers.deadline(), self.health.deadline()):
            if other is not None and other < at:
                at = other
        if self.draining:
            at = min(at, self._part_at or self._drain_until)
        return at

    def expire(self, now: float) -> None:
        """Do what is due: deadlines, timers, heartbeats, the end of a drain."""
        self.now = now
        for call in self.ledger.due(now):
            if call.state is not CallState.ENDED:
                self.end_late(call, now)
        for call in self.ledger.silent(now):
            idle_s = call.idle.timeout_s if call.idle is not None else 0.0
            text = f"{call.tool.name} sent no part and no progress for {idle_s:g} s"
            details = {"which": "idle", "idle_timeout_s": idle_s}
            self.end(call, fault(call.call_id, "DEADLINE_EXCEEDED", text, details), "deadline", now)
        self.enquiries.turn(now)
        self.timers.run(now)
        if self.workers.retiring:
            self.workers.dismiss_free(now)
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + limits.HEARTBEAT_S
            self.clients.cut_off(now)
            self._beat()
            # calls that ended otherwise than by their worker's word leave room too, and detached ones have no client to say so
            for session in self.dispatcher.backpressure.sessions:
                self.dispatcher.relieve(session, now)
            for pool in self.dispatcher.pools.values():
                pool.measure(now)
            self.to_node += self._demands.news(now)
            if self.health.watched or self.health.placement.apart or self.health.placement.unsettled:
                self.health.look(now)
        self.health.settle(now)
        if self.draining and not self.drained and (not self.ledger.calls or now >= self._drain_until):
            self._part(now)

    def _part(self, now: float) -> None:
        """Stop once clients have said that they read the last outcomes, or the time for that is over.

        What libzmq has received and nobody has read is lost when its connection ends.
        """
        owes = any(session.outbox or session.unacked for session in self.clients.open.values())
        if not self._part_at:
            self._part_at = now + limits.PART_S
            self.clients.beat(messages.Heartbeat(self.epoch), everyone=True)
        if not owes or now >= self._part_at:
            self.drained = True
            self._say_goodbye()

    def _beat(self) -> None:
        self._beats += 1
        beat = messages.Heartbeat(self.epoch)
        self.clients.beat(beat, everyone=self._beats % limits.IDLE_BEATS == 0)
        self.workers.beat(beat, everyone=self._beats % limits.WORKER_IDLE_BEATS == 0)

    def _say_goodbye(self) -> None:
        unfinished = len(self.ledger.calls)
        for call in list(self.ledger.calls.values()):
            self.dispatcher.release(call)
            self.ledger.finish(
                call, fault(call.call_id, "BROKER_LOST", "the broker was stopped before the call ended")
            )
        self.clients.dismiss()
        self.workers.dismiss()
        self.to_node.append(node.Drained(unfinished))


def _raise(_where: str, error: Exception) -> None:
    raise error
