"""Calls with keys under random peers: calls that follow others, are detached, sent again to another broker, or wait to be read.

Hypothesis chooses the steps, as in ``test_outcomes.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_broker import limits
from mcp_broker.core.budget import Bound, Budget
from mcp_broker.wire import messages, payload
from tests.core.support import EPOCH, FakeGrant, World, definition

if TYPE_CHECKING:
    from mcp_broker.core.client_session import ClientSession
    from mcp_broker.core.worker import Worker

CLIENTS = 3


def principal(number: int) -> str:
    return f"principal {number % CLIENTS % 2}"


class Keys:
    """A broker, its peers, and a method for each thing that may happen; the number chooses among several of a kind."""

    def __init__(self, room: int, *, idempotent: bool) -> None:
        self.world = World()
        self.world.machine.dispatcher.budget = Budget(Bound(room, 1000))
        self.tool = definition("echo.echo", idempotent=idempotent)
        self.calls = self.lifecycles = 0
        self.ended: list[bytes] = []
        self.sessions = [self._hello(number) for number in range(CLIENTS)]
        self.operator = self.world.hello("operator")
        self.join(0)

    def _hello(self, number: int) -> ClientSession:
        return self.world.hello(f"c{number}", FakeGrant(principal=principal(number)))

    def _worker(self, number: int) -> Worker | None:
        workers = [worker for worker in self.world.machine.workers.by_id.values() if worker.is_registered]
        return workers[number % len(workers)] if workers else None

    def _send(self, number: int, *, again: bool) -> None:
        self.calls += 1
        key = f"key {number % 2}" if number else None
        extra = messages.CallExtra(idempotency_key=key, detach=number % 4 == 1, again=again)
        call_id, timeout_ms = self.calls.to_bytes(16, "big"), 100 + 400 * number
        request = messages.Call(call_id, "echo.echo", timeout_ms, payload.pack({"text": "x"}), extra)
        self.world.client_says(f"c{number % CLIENTS}", messages.Calls(EPOCH, 0, (request,)))

    def call(self, number: int) -> None:
        self._send(number, again=False)

    def again(self, number: int) -> None:
        self._send(number, again=True)

    def answer(self, number: int) -> None:
        worker = self._worker(number)
        if worker is not None and worker.held:
            self.world.answer(worker.worker_id, next(iter(worker.held)), "OK" if number else "CANCELLED")

    def answer_large(self, number: int) -> None:
        worker = self._worker(number)
        if worker is not None and worker.held:
            outcome = messages.Outcome(next(iter(worker.held)), "OK", None)
            body = bytes(3 * limits.CLIENT_BEHIND_BYTES // 4)
            self.world.worker_says(worker.worker_id, messages.Outcomes(EPOCH, 1, (outcome,)), body)

    def read(self, number: int) -> None:
        session = self.sessions[number % CLIENTS]
        self.world.client_says(f"c{number % CLIENTS}", messages.Ack(EPOCH, session.sent))

    def die(self, number: int) -> None:
        worker = self._worker(number)
        if worker is not None:
            self.world.died(worker.worker_id, started_seq=number)

    def join(self, _: int) -> None:
        self.world.serve(f"echo-{self.lifecycles}", 2, "echo", self.tool)
        self.lifecycles += 1

    def survive(self, number: int) -> None:
        """A worker comes that an earlier broker admitted; it may hold the next call, or never say a word."""
        world, name = self.world, f"echo-{self.lifecycles}"
        self.lifecycles += 1
        world.admit(name)
        world.machine.reconciliation.expects(world.machine.workers.by_id[name], world.now)
        held = messages.Held((self.calls + 1).to_bytes(16, "big"), number % 2, principal(number))
        if number:
            self._send(number, again=True)
        if number < CLIENTS + 1:
            world.worker_says(name, messages.Register(0, "MCPB", (1,), (self.tool,), seq=1, held=(held,)))
            world.worker_says(name, messages.Ready(EPOCH, 2))

    def cancel(self, number: int) -> None:
        call_id = max(1, self.calls - number).to_bytes(16, "big")
        for client in range(CLIENTS):
            self.world.client_says(f"c{client}", messages.Cancel(EPOCH, (call_id,)))

    def goodbye(self, number: int) -> None:
        client = number % CLIENTS
        self.world.client_says(f"c{client}", messages.Goodbye(EPOCH))
        self.sessions[client] = self._hello(client)

    def steer(self, number: int) -> None:
        self.calls += 1
        name = f"system.tools.{'start' if number % 2 else 'stop'}"
        call_id = b"operator" + self.calls.to_bytes(8, "big")
        order = messages.Call(call_id, name, 500, payload.pack({"tool": "echo.echo"}))
        self.world.client_says("operator", messages.Calls(EPOCH, 0, (order,)))

    def wait(self, number: int) -> None:
        self.world.later(number / 4)

    def check(self) -> None:
        for session in self.sessions:
            self.ended += self.world.outcomes(session)
        self.world.outcomes(self.operator)
        self.world.check()
        assert len(set(self.ended)) == len(self.ended), "no outcome came twice"


_VERBS = [name for name in vars(Keys) if not name.startswith("_") and name != "check"]
#: most of what happens is calls
_STEP = st.tuples(st.sampled_from([*_VERBS, "call", "call", "again"]), st.integers(0, 5))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(_STEP, max_size=60), st.sampled_from([2, 4, 1000]), st.booleans())
def test_every_call_with_a_key_ends_exactly_once_whatever_happens(
    steps: list[tuple[str, int]], room: int, idempotent: bool
) -> None:
    keys = Keys(room, idempotent=idempotent)
    for verb, number in steps:
        getattr(keys, verb)(number)
        keys.check()
    keys.world.later(60)
    keys.check()
    machine = keys.world.machine
    assert len(machine.ledger) == 0
    assert machine.dispatcher.budget.total.calls == 0
    assert all(record.call is None for record in machine.idempotency.records.values())
