"""What a pool amounts to: its state and its reason in words, for the broker and for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker.core.children import State
from mcp_broker.wire import node

if TYPE_CHECKING:
    from mcp_broker.supervisor.pool import Pool
    from mcp_broker.supervisor.slot import Slot


def state(pool: Pool) -> node.PoolState:
    """Return the state of all its members together."""
    if pool.closed:
        return "closing" if pool.members else "closed"
    states = [slot.child.state for slot in pool.members]
    if all(state is State.RUNNING for state in states):
        return "degraded" if pool.setback else "ready"
    if all(state is State.FATAL for state in states):
        return "failed"
    if State.FATAL in states or State.BACKOFF in states:
        return "degraded"
    if State.STARTING in states or any(slot.child.is_wanted for slot in pool.members):
        return "starting"
    return "stopped"


def reason(pool: Pool) -> str:
    """Return why it is closed, or a slot is not as it should be, of the worst one; or why the last roll stopped."""
    if pool.closed:
        return pool.closed
    for state in (State.FATAL, State.BACKOFF, State.STOPPING):
        for slot in (*pool.members, *pool.spares):
            if slot.child.state is state and slot.child.reason:
                return slot.child.reason
    if pool.setback:
        return f"its successors could not start, so the workers before them stay: {pool.setback}"
    return ""


def report(pool: Pool) -> node.PoolReport:
    """Return what the broker tells those who ask."""
    table = pool.table
    return node.PoolReport(
        name=pool.name,
        state=state(pool),
        wanted=pool.size,
        workers=tuple(_worker(slot) for slot in pool.slots if slot.is_born),
        reason=reason(pool),
        restarts=pool.restarts,
        rate_per_s=table.rate_per_s,
        burst=table.burst,
        least=min(pool.size, table.min),
        most=max(pool.size, table.max or 0),
        spares=0 if pool.closed else table.spare,
    )


def _worker(slot: Slot) -> node.WorkerReport:
    life = slot.life
    assert life is not None  # noqa: S101 (it is born)
    return life.report("spare" if slot.is_warm else slot.child.state.value)
