"""A pool: the workers of one kind, and the calls that wait for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.core.budget import Budget, Waiting
from mcp_broker.core.fairness import Backlog, Gate
from mcp_broker.core.worker import Worker, WorkerState
from mcp_broker.wire.messages import Priority

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mcp_broker.core.bucket import Rate
    from mcp_broker.core.calls import Call
    from mcp_broker.core.client_session import ClientSession
    from mcp_broker.core.registry import Tool
    from mcp_broker.wire.messages import ToolDefinition
    from mcp_broker.wire.node import PoolReport

_READY: Final = WorkerState.READY
_NORMAL: Final = int(Priority.NORMAL)

#: between the name of a pool and that of a tool that has a worker of its own
APART: Final = "~"


class Pool:
    """The workers of one kind and their backlog.

    Args:
        budget: what may wait at the broker, all pools together.

    Attributes:
        backlog: all calls of this pool that wait for a worker, by id.
        doubts: calls that may have started at a worker which has not spoken yet (core/reconciliation), by id.
        waiting: how many both are, with those that wait for their client to read (core/backpressure) or for the outcome of another
            call (core/idempotency), and how large.
        gates: of its tools that are bounded; empty for most pools.
        rate: what the operator lets each of its tools take.
        drain_per_s: waiting calls that its workers took of late; 0: none ever waited for long.
        report: what the supervisor last said of it.
        failure: why it takes no calls, or "": it was given up, or is closed.
        closed: by whose wish it takes no calls, or ""; what waits is served yet.
        is_vacant: the supervisor was told that nothing waits for it since it was closed.
        edition: the latest that one of its workers had.
        brought: what workers of that edition serve, by name: also a tool that is served apart, for when it comes back.
    """

    def __init__(self, name: str, budget: Budget) -> None:
        self.name = name
        self.workers: dict[str, Worker] = {}
        self.backlog: Backlog[Call] = Backlog()
        self.doubts: dict[bytes, Call] = {}
        self.waiting = Waiting()
        self.gates: tuple[Gate, ...] = ()
        self.rate: Rate | None = None
        self.report: PoolReport | None = None
        self.failure = self.closed = ""
        self.is_vacant = False
        self.edition = 0
        self.brought: dict[str, ToolDefinition] = {}
        self.drain_per_s = 0.0
        self._waits_since: float | None = None
        self._budget = budget
        self._drained = 0
        self._measured_at = 0.0

    @property
    def family(self) -> str:
        """The name of the pool that has the module: pools of single tools come from it."""
        return self.name.partition(APART)[0]

    # -- what waits -----------------------------------------------------------------------------------

    def queue(self, calls: list[Call], now: float) -> list[Call]:
        """Let calls wait for credit, as many as there is room for; return the others."""
        left: list[Call] = []
        at, total = 0, len(calls)
        while at < total:
            # what is the same for all calls of a session is asked once
            session = calls[at].session
            grant = session.grant
            principal, weight, highest = grant.caller.principal, grant.weight, grant.priority
            room, room_bytes = self._budget.room(principal, self.waiting)
            count = size = 0
            while at < total and calls[at].session is session:
                call = calls[at]
                at += 1
                held = call.bytes_held()
                if count >= room or size + held > room_bytes:
                    left.append(call)
                    continue
                count += 1
                size += held
                # 0 is the highest: nobody comes before what its token allows
                level = max(_NORMAL if call.extra is None else call.extra.priority, highest)
                cost = 1 + held // limits.COST_BYTES
                self.backlog.add(call.call_id, call, now, principal, weight, level, call.tool.gate, cost)
            if count:
                self.waiting.add(count, size)
                self._budget.add(principal, count, size)
        return left

    def requeue(self, call: Call) -> None:
        """Let a call wait in front of all others that was given to a worker before, which did not start it."""
        self.backlog.requeue(call.call_id, call, call.tool.gate)
        self.count_in(call)

    def queue_again(self, calls: list[Call], now: float) -> None:
        """Let calls wait in their principal's turn that have waited before, here or elsewhere."""
        for call in reversed(self.queue(calls, now)):
            # there was more than may wait, by calls that had been given to workers before
            self.requeue(call)

    def unqueue(self, call: Call) -> None:
        """Take a call out of the queue, before its arguments are let go."""
        if self.backlog.remove(call.call_id) is not None or self.doubts.pop(call.call_id, None) is not None:
            self.count_out(call)

    def doubt(self, call: Call) -> None:
        """Let a call wait of which nobody can say yet whether it has started."""
        self.doubts[call.call_id] = call
        self.count_in(call)

    def take(self, most: int, now: float) -> list[Call]:
        """Take out the calls that are served now, up to ``most``; none, if all that wait are behind closed gates."""
        calls = self.backlog.take(most, now)
        self._drained += len(calls)
        session: ClientSession | None = None
        count = size = 0
        for call in calls:
            if call.session is not session:
                if session is not None:
                    self._count(session, -count, -size)
                session, count, size = call.session, 0, 0
            count += 1
            size += call.bytes_held()
        if session is not None:
            self._count(session, -count, -size)
        return calls

    def count_in(self, call: Call) -> None:
        """A call of this pool waits, here or elsewhere."""
        self._count(call.session, 1, call.bytes_held())

    def count_out(self, call: Call) -> None:
        """It waits no more."""
        self._count(call.session, -1, -call.bytes_held())

    def _count(self, session: ClientSession, calls: int, size: int) -> None:
        self.waiting.add(calls, size)
        self._budget.add(session.grant.caller.principal, calls, size)

    def regate(self, tools: Iterable[Tool], now: float) -> None:
        """Its tools have changed: count anew what passes their gates, and let what waits, wait by them."""
        gates = tuple(tool.gate for tool in tools if tool.gate is not None)
        if gates == self.gates:
            return
        self.gates = gates
        held = [call.tool.gate for worker in self.workers.values() for call in worker.held.values()]
        passed = [gate for gate in held if gate is not None]
        for gate in (*gates, *passed):
            gate.held = 0
        for gate in passed:
            gate.held += 1
        calls = list(self.backlog.values())
        for call in calls:
            self.unqueue(call)
        self.queue_again(calls, now)

    # -- who serves it -----------------------------------------------------------------------------------

    def next_worker(self) -> tuple[Worker | None, int]:
        """Return the worker with credit that holds the fewest calls, and how many it may have before the next one."""
        best: Worker | None = None
        least = second = limits.WORKER_DEPTH_MAX
        for worker in self.workers.values():
            if worker.state is not _READY:
                continue
            held = len(worker.held)
            if held >= worker.depth:
                continue
            if held < least:
                best, least, second = worker, held, least
            elif held < second:
                second = held
        if best is None:
            return None, 0
        return best, min(best.depth - least, second - least + 1)

    # -- how fast -------------------------------------------------------------------------------------------

    def measure(self, now: float) -> None:
        """Note, every now and then, how fast the backlog drains; while nothing waits, nobody can tell."""
        if not self.backlog.count:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        drained, self._drained = self._drained, 0
        span_s, self._measured_at = now - self._measured_at, now
        if not self.backlog.count or not 0 < span_s <= limits.DRAIN_SPAN_S_MAX:
            return
        rate = drained / span_s
        self.drain_per_s = (self.drain_per_s * 3 + rate) / 4 if self.drain_per_s else rate

    def wait_s(self, now: float) -> float:
        """Estimate how long a call that comes now waits; 0 if no other worker could shorten that."""
        # what waits behind closed gates waits for other calls
        if not self.backlog.count or not self.backlog.is_ready or self._waits_since is None:
            return 0.0
        estimate = self.backlog.count / self.drain_per_s if self.drain_per_s else 0.0
        return max(estimate, min(now - self._waits_since, limits.DRAIN_SPAN_S_MAX))

    def retry_after_s(self, waiting: int) -> float:
        """Estimate when it is worth trying again: once a tenth of what waits now will have been served."""
        if not self.drain_per_s:
            return limits.RETRY_AFTER_S
        estimate = waiting / 10 / self.drain_per_s
        return round(min(max(estimate, limits.RETRY_AFTER_S_MIN), limits.RETRY_AFTER_S_MAX), 3)
