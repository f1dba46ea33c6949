"""The broker's machine under random peers, deaths and lost connections: one outcome a call, and nothing left over.

Hypothesis chooses the steps and prints the shortest sequence that breaks an invariant; the whole system is driven by
``test_simulation.py``.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_broker.core.budget import Bound, Budget
from mcp_broker.core.client_session import ClientState
from mcp_broker.wire import messages
from tests.core.support import EPOCH, FakeGrant, World

_STEP = st.tuples(
    st.sampled_from(
        ["call", "answer", "fail", "die", "join", "cancel", "lose", "resume", "later", "goodbye"]
    ),
    st.integers(0, 5),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_STEP, max_size=60), st.sampled_from([None, 1, 2, 4]), st.sampled_from([2, 5, 1000]))
def test_every_accepted_call_ends_exactly_once_whatever_happens(
    steps: list[tuple[str, int]], cap: int | None, room: int
) -> None:
    """A small simulation: the invariants hold after each step, and at the end nothing is left."""
    world = World()
    world.machine.dispatcher.budget = Budget(Bound(room, 1000))
    session = world.hello()
    world.ready("echo-0", depth=3, idempotent=True, concurrency_max=cap)
    lives = 1
    ended: list[bytes] = []
    submitted: list[bytes] = []

    def hear() -> None:
        ended.extend(
            outcome.call_id
            for message, _ in world.heard_by(session)
            if isinstance(message, messages.Outcomes)
            for outcome in message.outcomes
        )

    for verb, number in steps:
        workers = [worker for worker in world.machine.workers.by_id.values() if worker.is_registered]
        worker = workers[number % len(workers)] if workers else None
        held = list(worker.held) if worker is not None else []
        if verb == "call" and session.state is ClientState.OPEN:
            submitted.append(world.call(timeout_s=number + 0.1, priority=number % 3))
        elif verb in {"answer", "fail"} and worker is not None and held:
            world.answer(worker.worker_id, held[0], "OK" if verb == "answer" else "TOOL_FAILED")
        elif verb == "die" and worker is not None:
            world.died(worker.worker_id, started_seq=number)
        elif verb == "join":
            world.ready(f"echo-{lives}", depth=3, idempotent=True, concurrency_max=cap)
            lives += 1
        elif verb == "cancel" and submitted:
            world.client_says("c1", messages.Cancel(EPOCH, (submitted[number % len(submitted)],)))
        elif verb == "lose":
            world.machine.clients.unreachable(b"c1", world.now)
        elif verb == "resume" and session.state is ClientState.LOST:
            world.client_says("c1", messages.Heartbeat(EPOCH))
            message = messages.Hello(0, "MCPB", (1,), "t", session.session_id, ack=len(ended))
            world.machine.clients.hello(b"c1", "key-c1", message, FakeGrant(), world.now)
        elif verb == "goodbye" and number == 0:
            world.client_says("c1", messages.Goodbye(EPOCH))
        elif verb == "later":
            world.later(number / 4)
        if session.state is ClientState.OPEN:
            hear()
        world.check()
    was_closed = session.state is not ClientState.OPEN
    world.later(10)
    world.check()
    assert len(world.machine.ledger) == 0
    assert len(set(ended)) == len(ended), "no outcome came twice"
    if not was_closed:
        hear()
        assert sorted(ended) == sorted(submitted)
