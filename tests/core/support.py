"""A broker's machine without sockets: what peers say goes in as values, what they would hear comes out."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from mcp_broker.core.routing import Routing
from mcp_broker.wire import codec, messages, node, payload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_broker.core.client_session import ClientSession
    from mcp_broker.core.outbox import Body

EPOCH = 7


class FakeGrant:
    """A grant for everything, or for the names given, until an instant."""

    def __init__(
        self,
        *names: str,
        expires_at: float = 1e9,
        principal: str = "tester",
        weight: int = 1,
        priority: int = 0,
    ) -> None:
        self.names = names
        self.weight = weight
        self.priority = priority
        self.expires_at = expires_at
        self.caller = messages.Caller(principal, 0, names or ("*",), admin=True)

    def refusal(self, tool: str, level: int) -> str | None:
        del level
        return None if not self.names or tool in self.names else f"{tool} is not in the scope"


class World:
    """One machine, a clock that the test turns, and short names for what peers do."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        numbers = itertools.count(1)
        self.machine = Routing(EPOCH, now, lambda size: next(numbers).to_bytes(size, "big"))
        self._ids = itertools.count(1)
        self._workers = itertools.count(1)

    def hello(
        self, name: str = "c1", grant: FakeGrant | None = None, session_id: bytes | None = None
    ) -> ClientSession:
        message = messages.Hello(0, "MCPB", (1,), "token", session_id)
        session = self.machine.clients.hello(
            name.encode(), f"key-{name}", message, grant or FakeGrant(), self.now
        )
        assert session is not None
        return session

    def client_says(self, name: str, message: Any, body: bytes | None = None) -> bool:
        return self.machine.clients.message(name.encode(), f"key-{name}", message, body, self.now)

    def call(self, name: str = "c1", tool: str = "echo.echo", timeout_s: float = 30.0, **extra: Any) -> bytes:
        return self.calls(name, (tool,), timeout_s, **extra)[0]

    def calls(
        self,
        name: str,
        tools: Sequence[str],
        timeout_s: float = 30.0,
        arguments: bytes = b"\x80",
        **extra: Any,
    ) -> list[bytes]:
        """Send calls of these tools in one message; ``extra`` goes into the CallExtra of each."""
        call_ids = [next(self._ids).to_bytes(16, "big") for _ in tools]
        more = messages.CallExtra(**extra) if extra else None
        requests = [
            messages.Call(call_id, tool, int(timeout_s * 1000), arguments, more)
            for call_id, tool in zip(call_ids, tools, strict=True)
        ]
        self.client_says(name, messages.Calls(EPOCH, 0, tuple(requests)))
        return call_ids

    def admit(self, worker_id: str, pool: str = "echo") -> None:
        admitted = node.Admitted(thumbprint=f"key-{worker_id}", worker_id=worker_id, pool=pool)
        self.machine.from_node(node.Admit((admitted,)), self.now)

    def worker_says(self, worker_id: str, message: Any, body: bytes | None = None) -> bool:
        return self.machine.workers.message(worker_id.encode(), f"key-{worker_id}", message, body, self.now)

    def ready(self, worker_id: str = "echo-1", depth: int = 16, pool: str = "echo", **changes: Any) -> None:
        self.serve(worker_id, depth, pool, definition(f"{pool}.echo", **changes))

    def serve(self, worker_id: str, depth: int, pool: str, *tools: messages.ToolDefinition) -> None:
        """Have a worker come with these tools."""
        self.admit(worker_id, pool)
        self.worker_says(worker_id, messages.Register(0, "MCPB", (1,), tools))
        self.worker_says(worker_id, messages.Ready(EPOCH, depth))

    def answer(self, worker_id: str, call_id: bytes, code: str = "OK") -> None:
        fault = None if code == "OK" else messages.Fault("failed", False, messages.EMPTY_DETAILS)
        body = b"\xc0" if code == "OK" else None
        self.worker_says(
            worker_id, messages.Outcomes(EPOCH, 1, (messages.Outcome(call_id, code, body, None, fault),))
        )

    def died(self, worker_id: str, started_seq: int = 0) -> None:
        self.machine.from_node(node.Died(certificate(worker_id, started_seq)), self.now)

    def later(self, seconds: float) -> None:
        """Let time pass, in steps that end at each of the machine's own deadlines."""
        until = self.now + seconds
        while True:
            self.now = min(until, max(self.now + 1e-6, self.machine.deadline()))
            self.machine.expire(self.now)
            if self.now >= until:
                return

    def heard_by(self, session: ClientSession) -> list[tuple[messages.ToClient, Body | None]]:
        if session in self.machine.clients.dirty:
            self.machine.clients.dirty.remove(session)
        return [(codec.to_client.decode(envelope), body) for envelope, body in session.take_outbox(EPOCH)]

    def faults(self, session: ClientSession) -> dict[bytes, dict[str, Any]]:
        """Return the details of what failed for a session since it was asked last, with the code."""
        return {
            outcome.call_id: {"code": outcome.code, **payload.unpack_map(outcome.fault.details)}
            for message, _ in self.heard_by(session)
            if isinstance(message, messages.Outcomes)
            for outcome in message.outcomes
            if outcome.fault is not None
        }

    def outcomes(self, session: ClientSession) -> dict[bytes, str]:
        """Return what ended for a session since it was asked last: call id -> code."""
        return {
            outcome.call_id: outcome.code
            for message, _ in self.heard_by(session)
            if isinstance(message, messages.Outcomes)
            for outcome in message.outcomes
        }

    def heard_by_worker(self, worker_id: str) -> list[Any]:
        worker = self.machine.workers.by_id[worker_id]
        if worker in self.machine.workers.dirty:
            self.machine.workers.dirty.remove(worker)
        return [codec.to_worker.decode(envelope) for envelope, _ in worker.take_outbox(EPOCH)]

    def dispatched(self, worker_id: str) -> list[bytes]:
        """Return the calls that a worker was given since it was asked last."""
        return [
            dispatch.call_id
            for message in self.heard_by_worker(worker_id)
            if isinstance(message, messages.Dispatches)
            for dispatch in message.calls
        ]

    def interrupts(self) -> list[node.Interrupt]:
        return [message for message in self.machine.to_node if isinstance(message, node.Interrupt)]

    def check(self) -> None:
        """Hold the machine to its invariants."""
        machine = self.machine
        live = {call_id for session in machine.clients.sessions.values() for call_id in session.live}
        live |= set(machine.detached.live)
        assert live == set(machine.ledger.calls), "every live call belongs to a session that lives"
        queued = {call_id for pool in machine.dispatcher.pools.values() for call_id in pool.backlog}
        held = {
            call_id
            for worker in machine.workers.by_id.values()
            for call_id, call in worker.held.items()
            if machine.ledger.calls.get(call_id) is call
        }
        aside = [
            call
            for pool in machine.dispatcher.pools.values()
            for call in machine.dispatcher.backpressure.of_pool(pool)
        ]
        assert len(aside) == len(machine.dispatcher.backpressure)
        assert not queued & {call.call_id for call in aside}, "no call waits in two places"
        queued |= {call.call_id for call in aside}
        doubts = {call_id for call_id in machine.reconciliation.doubts if call_id in machine.ledger.calls}
        assert not doubts & (queued | held), "no call is in doubt that waits or is held"
        queued |= doubts
        queued |= {call.call_id for call in machine.enquiries}
        queued |= {one.call.call_id for one in machine.commands.pending.values()} & set(machine.ledger.calls)
        following = [
            call for record in machine.idempotency.records.values() for call in record.followers.values()
        ]
        assert not {call.call_id for call in following} & (queued | held), (
            "no call follows that waits or is held"
        )
        queued |= {call.call_id for call in following}
        assert queued | held == set(machine.ledger.calls), "every live call waits or is held"
        assert not queued & held, "no call waits and is held"
        for pool in machine.dispatcher.pools.values():
            others = [call for call in (*aside, *following) if call.tool.pool is pool]
            waiting = [*pool.backlog.values(), *pool.doubts.values(), *others]
            assert set(pool.doubts) <= doubts
            assert pool.backlog.count == len(list(pool.backlog.values()))
            assert pool.waiting.calls == len(waiting)
            assert pool.waiting.bytes == sum(call.bytes_held() for call in waiting)
            if pool.backlog.is_ready:
                assert pool.next_worker()[0] is None, "no call waits while a worker has credit"
            for gate in pool.gates:
                passed = [
                    call
                    for worker in pool.workers.values()
                    for call in worker.held.values()
                    if call.tool.gate is gate
                ]
                assert gate.held == len(passed), "a gate counts what workers hold"
                assert gate.waiting == sum(call.tool.gate is gate for call in pool.backlog.values())
        budget = machine.dispatcher.budget
        assert budget.total.calls == sum(pool.waiting.calls for pool in machine.dispatcher.pools.values())
        assert budget.total.calls == sum(waiting.calls for waiting in budget.principals.values())
        assert budget.total.bytes == sum(waiting.bytes for waiting in budget.principals.values())
        for worker in machine.workers.by_id.values():
            assert [call.seq for call in worker.held.values()] == sorted(
                call.seq for call in worker.held.values()
            )


def definition(name: str, **changes: Any) -> messages.ToolDefinition:
    return messages.ToolDefinition(**{"name": name, "version": "1.0.0", "capabilities": ("test",), **changes})


def certificate(worker_id: str, started_seq: int = 0) -> node.Certificate:
    return node.Certificate(
        worker_id=worker_id, pool=worker_id.rsplit("-", 1)[0], pid=1, cause="ended by signal 9 (SIGKILL)",
        kind="signal", signal="SIGKILL", started_seq=started_seq,
    )  # fmt: skip
