"""What must hold, whatever happens: the outcome contract, credit, budgets, and that nothing is left over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.client.session import State
from mcp_broker.core.client_session import ClientState
from mcp_broker.core.lifecycle import State as ToolState
from mcp_broker.core.lifecycle import Treatment
from mcp_broker.core.pool import APART
from tests.core.support import World as Watch

if TYPE_CHECKING:
    from mcp_broker.client.session import Ended
    from mcp_broker.core.routing import Routing
    from mcp_broker.worker.session import Pending
    from tests.sim.broker import Broker
    from tests.sim.shell import Shell
    from tests.sim.work import Record
    from tests.sim.world import World

#: an outcome comes at most this long after its deadline, seconds; and what the clock's arithmetic may add
GRACE_S: Final = 0.5
_EPSILON_S: Final = 0.003
#: the broker finds a deadline within one slot of its wheel
_WHEEL_S: Final = 0.05
#: how late something that happened to a connection may still show
_AFTERMATH_S: Final = 0.6
#: dear checks are made every so many of the broker's turns
_DEAR_EVERY: Final = 16

#: how calls of honest clients and workers may end
CODES: Final = frozenset(
    {
        "OK", "TOOL_FAILED", "DEADLINE_EXCEEDED", "CANCELLED", "WORKER_LOST", "POISONED", "UNAVAILABLE", "OVERLOADED",
        "NOT_FOUND", "BROKER_LOST",
    }
)  # fmt: skip

#: states of a tool that end by themselves
_PASSING: Final = frozenset(
    {ToolState.PAUSING, ToolState.RESUMING, ToolState.STOPPING, ToolState.STARTING, ToolState.RECOVERING}
)


class Violation(AssertionError):  # noqa: N818 (what the code under test did, not this code)
    """Something that must hold does not."""


class _Watched(Watch):
    """A machine that somebody else made, held to the checks of the machines' own tests."""

    def __init__(self, machine: Routing) -> None:
        self.machine = machine


class Invariants:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._turns = 0
        #: code -> calls that ended with it
        self.codes: dict[str, int] = {}
        #: calls that ran more than once
        self.repeats = 0

    def hold(self, truth: object, *what: Any) -> None:
        """Make a broken invariant a violation."""
        if not truth:
            raise Violation(" ".join(map(str, what)))

    # -- calls ---------------------------------------------------------------------------------------

    def executed(self, call_id: bytes) -> None:
        """A worker begins to run a call."""
        record = self._world.records[call_id]
        record.executions += 1
        if record.executions == 1:
            return
        self.repeats += 1
        name = f"call {call_id.hex()} of {record.tool}"
        self.hold(record.is_idempotent, f"{name} runs again, and its tool is not idempotent")
        lives = 1 + self._world.supervisor.epoch - record.epoch
        self.hold(record.executions <= limits.ATTEMPTS_MAX * lives, f"{name} runs {record.executions} times")

    def ended(self, record: Record, end: Ended, code: str, *, by_itself: bool) -> None:
        """A client has an outcome."""
        now = self._world.agenda.now
        name = f"call {record.call_id.hex()} of {record.tool}"
        self.codes[code] = self.codes.get(code, 0) + 1
        self.hold(not record.code, f"{name} ended twice: {record.code}, {code}")
        self.hold(code in CODES, f"{name} ended with {code}: {end.error}")
        stalls_s = record.client.stalls_s - record.stalls_s
        late_s = now - record.pending.deadline - stalls_s
        self.hold(late_s <= GRACE_S + _EPSILON_S, f"{name} ended {late_s:.3f} s after its deadline")
        is_troubled = record.client.troubled_until + _AFTERMATH_S >= record.submitted_at
        if code == "OK":
            self._check_result(record, end.value, name)
        elif code == "TOOL_FAILED":
            self.hold(record.plan.does == "fail", f"{name} failed, which it was not to do")
        elif code == "DEADLINE_EXCEEDED":
            self.hold(now >= record.pending.deadline - _EPSILON_S, f"{name} expired before its deadline")
        elif code in {"WORKER_LOST", "POISONED"}:
            assert end.error is not None
            if "certificate" in end.error.details:
                self.hold(record.executions, f"{name} died with a worker that had never started it")
        if not is_troubled:
            self.hold(
                not by_itself, f"{name}: its client had to end it ({code}), and nothing had come between"
            )
            # a stream does not outlive its worker's connection
            is_cut = record.is_stream and not by_itself
            self.hold(code != "BROKER_LOST" or is_cut, f"{name}: BROKER_LOST, and nothing had come between")
        if record.is_proof:
            self.hold(
                code == "OK",
                f"{name} was made after all faults were over, and ended with {code}: {end.error}",
            )

    def _check_result(self, record: Record, value: Any, name: str) -> None:
        plan = record.plan
        if record.tool.startswith("system."):
            return
        self.hold(record.executions, f"{name} has a result and never ran")
        self.hold(plan.does == "ok", f"{name} has a result, and was to {plan.does}")
        if record.is_stream:
            parts = record.parts if record.is_streamed else (value or [])
            self.hold(parts == list(range(plan.parts)), f"{name} has the parts {parts} of {plan.parts}")
        else:
            self.hold(value == plan.value, f"{name} has another call's result")

    # -- credit ----------------------------------------------------------------------------------------

    def dispatched(self, worker: Shell, pendings: list[Pending]) -> None:
        """A worker has read calls that it was given."""
        for pending in pendings:
            seq = pending.dispatch.seq
            self.hold(seq > worker.last_seq, f"{worker.name} got seq {seq} after {worker.last_seq}")
            worker.last_seq = seq
        session = worker.session
        # what runs since an earlier connection, its broker need not know
        running = sum(pending.life == session.life for pending in session.running.values())
        held = len(session.inbox) + running
        self.hold(
            not pendings or held <= worker.depth_most,
            f"{worker.name} holds {held} calls, and announced {worker.depth_most} at most",
        )

    # -- the broker ------------------------------------------------------------------------------------

    def turned(self, broker: Broker) -> None:
        """The broker has done a turn."""
        self._turns += 1
        ledger = broker.machine.ledger
        failed = sum(ledger.failed.values())
        self.hold(
            ledger.accepted == ledger.succeeded + failed + len(ledger.calls),
            f"{ledger.accepted} calls accepted, {ledger.succeeded + failed} ended, {len(ledger.calls)} live",
        )
        if self._turns % _DEAR_EVERY == 0:
            self.look(broker)

    def look(self, broker: Broker) -> None:
        """Look at all that the broker holds."""
        machine, now = broker.machine, self._world.agenda.now
        _Watched(machine).check()
        for call in machine.ledger.calls.values():
            self.hold(
                call.deadline > now - _WHEEL_S, f"call {call.call_id.hex()} lives on after its deadline"
            )
        window = limits.CLIENT_WINDOW_MAX
        for session in machine.clients.sessions.values():
            owed = session.unacked_count + len(session.outbox)
            self.hold(len(session.live) <= window, f"a session has {len(session.live)} calls")
            self.hold(owed <= 4 * window, f"a session is owed {owed} outcomes")
            self.hold(
                session.unacked_bytes <= 2 * limits.PEER_BACKLOG_BYTES_MAX + limits.ENVELOPE_BYTES_MAX,
                f"a session is owed {session.unacked_bytes} bytes",
            )
            self.hold(len(session.at_risk) <= 4 * window, "a session remembers too many calls")
            self.hold(
                sum(sent.size for sent in session.unacked) == session.unacked_bytes, "bytes are miscounted"
            )
        self._check_budget(machine)
        self._check_ghosts(machine)
        self._check_workers(machine)
        self._check_tools(machine)
        self._check_clients()

    def _check_budget(self, machine: Routing) -> None:
        """No more calls wait than may; those that workers gave back wait besides."""
        # a worker that has died since gave its calls back too
        budget, workers = machine.dispatcher.budget, len(self._world.supervisor.slots())
        besides = limits.WORKER_DEPTH_MAX * workers
        for waiting, calls, size in (
            (budget.total, limits.BROKER_QUEUE_CALLS_MAX, limits.BROKER_QUEUE_BYTES_MAX),
            *(
                (pool.waiting, limits.QUEUE_CALLS_MAX, limits.QUEUE_BYTES_MAX)
                for pool in machine.dispatcher.pools.values()
            ),
            *(
                (one, limits.PRINCIPAL_QUEUE_CALLS_MAX, limits.PRINCIPAL_QUEUE_BYTES_MAX)
                for one in budget.principals.values()
            ),
        ):
            self.hold(waiting.calls <= calls + besides, f"{waiting.calls} calls wait, {calls} may")
            self.hold(
                waiting.bytes <= size + limits.BODY_BYTES_MAX * (1 + workers), f"{waiting.bytes} bytes wait"
            )

    def _check_ghosts(self, machine: Routing) -> None:
        held = {call_id for worker in machine.workers.by_id.values() for call_id in worker.held}
        over = held - machine.ledger.calls.keys()
        self.hold(
            machine.dispatcher.ghosts == over, "ended calls that a worker holds are not those remembered"
        )

    def _check_tools(self, machine: Routing) -> None:
        """A tool's state is done to its calls, and what is remembered of it is bounded."""
        for tool in machine.registry.tools.values():
            condition, pool = tool.condition, tool.pool
            if condition is None or pool is None:
                continue
            life, waits = condition.life, any(call.tool is tool for call in pool.backlog.values())
            is_held = life.treatment is Treatment.WAIT
            self.hold(
                not is_held or (tool.gate is not None and tool.gate.limit == 0),
                f"{tool.name} is {life.state.name}, and its calls go on",
            )
            # the steps of this turn's failures are taken with the next
            self.hold(
                life.treatment is not Treatment.END or not waits,
                f"{tool.name} is {life.state.name}, and calls wait for it",
            )
            self.hold(condition.isolated == (APART in pool.name), f"{tool.name} is served by {pool.name}")
            is_passing = life.state in _PASSING
            self.hold(
                not is_passing or tool in machine.health.operations.running,
                f"{tool.name} is {life.state.name}, and nothing leads on",
            )
            self.hold(len(life.history) <= limits.LIFECYCLE_KEPT, "a history grows")

    def _check_workers(self, machine: Routing) -> None:
        """What a worker has, its broker knows that it holds; what it does not know is on its way."""
        for worker in self._world.supervisor.workers():
            known = machine.workers.by_id.get(worker.name)
            wire = worker.wire
            if known is None or wire is None or not wire.is_up or wire.is_cut:
                continue
            if known.routing_id != wire.routing_id or not known.is_registered:
                continue
            session = worker.session
            has = {pending.dispatch.call_id for pending in session.inbox} | session.running.keys()
            orphans = {call_id for _, call_id in machine.reconciliation.orphans}
            self.hold(
                has <= known.held.keys() | orphans,
                f"{worker.name} has calls that the broker does not count: {has}",
            )

    def _check_clients(self) -> None:
        for client in self._world.clients:
            book = client.session.book
            self.hold(book.calls.keys() >= client.open.keys(), f"{client.name} lost track of calls")
            self.hold(book.in_flight <= client.session.granted.window, f"{client.name} is beyond its window")
            flying = sum(pending.stage.value in {"sent", "abandoned"} for pending in book.calls.values())
            self.hold(
                book.in_flight == flying, f"{client.name} counts {book.in_flight} in flight, has {flying}"
            )

    # -- the end -----------------------------------------------------------------------------------------

    def settled(self) -> None:
        """All faults are long over, and nobody wants anything any more: nothing is left."""
        world = self._world
        broker = world.supervisor.broker
        assert broker is not None
        machine = broker.machine
        for record in world.records.values():
            self.hold(record.code or record.client.is_gone, f"call {record.call_id.hex()} never ended")
        self.hold(not machine.ledger.calls, f"the broker still has {len(machine.ledger.calls)} calls")
        self.hold(machine.ledger.deadline() is None, "the broker still waits for a deadline")
        self.hold(not machine.dispatcher.budget.total.calls, "calls are counted as waiting")
        self.hold(not machine.dispatcher.ghosts, f"ghosts are left: {len(machine.dispatcher.ghosts)}")
        self.hold(not machine.reconciliation.orphans, "calls that nobody asked for are left")
        self.hold(not machine.reconciliation.doubts, "calls in doubt are left")
        self.hold(not machine.health.operations.running, "operations are left")
        letters = len(machine.dispatcher.dead_letters)
        self.hold(len(machine.timers) <= letters, f"{len(machine.timers)} timers are left")
        self.hold(not broker.wires.keys() ^ {c.wire.routing_id for c in world.peers() if c.wire is not None},
                  "the broker has connections that no peer has")  # fmt: skip
        workers = {worker.name for worker in world.supervisor.workers()}
        self.hold(machine.workers.by_id.keys() == workers, "the broker knows other workers than there are")
        self.hold(len(machine.workers.by_thumbprint) == len(workers), "keys of dead workers are left")
        for known in machine.workers.by_id.values():
            self.hold(not known.held, f"{known.worker_id} still holds {len(known.held)} calls")
            self.hold(not known.outbox, f"{known.worker_id} was not sent everything")
            self.hold(not known.receipts, f"{known.worker_id} was not told of its outcomes")
        for worker in world.supervisor.workers():
            session = worker.session
            left = len(session.inbox) + len(session.running) + len(session.cancelled) + len(session.credits)
            self.hold(not left, f"{worker.name} has something left")
            self.hold(not session.kept, f"{worker.name} keeps outcomes that have arrived")
            self.hold(not session._outbox, f"{worker.name} keeps outcomes to itself")
            self.hold(not session.outgoing, f"{worker.name} has not sent everything")
        self._check_sessions(machine)
        self.look(broker)

    def _check_sessions(self, machine: Routing) -> None:
        clients = {client.session.session_id for client in self._world.clients}
        self.hold(
            machine.clients.sessions.keys() == clients, "the broker has other sessions than clients have"
        )
        for session in machine.clients.sessions.values():
            self.hold(session.state is ClientState.OPEN, "a session is not open")
            self.hold(not session.live, "a session has calls left")
            self.hold(not session.unacked, f"{session.unacked_count} outcomes were never acknowledged")
            self.hold(not session.outbox, "a client was not sent everything")
        for client in self._world.clients:
            book = client.session.book
            self.hold(client.session.state is State.OPEN, f"{client.name} is not open")
            left = len(book.calls) + len(book.queue) + len(book.cancels) + len(book.credits) + book.in_flight
            self.hold(not left, f"{client.name} has something left: {left}")
