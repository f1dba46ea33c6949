"""One pool: its slots, and what they amount to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker.core.children import BecameReady, Refused, State, Unwanted, Wanted
from mcp_broker.core.restart import Restarts
from mcp_broker.supervisor.slot import Slot
from mcp_broker.wire import node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_broker.config import PoolTable
    from mcp_broker.core.restart import Policy
    from mcp_broker.supervisor.slot import Ground
    from mcp_broker.wire.messages import ToolDefinition


class Pool:
    """Workers of one kind.

    Args:
        policy: how often they may be restarted, all together.
        start_s: from spawned to ready, at most.
    """

    def __init__(self, ground: Ground, name: str, table: PoolTable, policy: Policy, start_s: float) -> None:
        self.name = name
        self._table = table
        self._restarts = Restarts(policy)
        self.slots = [Slot(ground, name, table, self._restarts, start_s) for _ in range(table.min)]
        self.tools: tuple[ToolDefinition, ...] = ()

    @property
    def tool_names(self) -> tuple[str, ...]:
        """What its workers serve."""
        return tuple(tool.name for tool in self.tools)

    def start(self) -> None:
        """Want every slot up; slots that were given up start afresh."""
        for slot in self.slots:
            slot.tell(Wanted())

    def stop(self) -> None:
        """Want every slot down."""
        for slot in self.slots:
            slot.tell(Unwanted())

    def find(self, worker_id: str) -> Slot | None:
        """Return the slot whose present life has this id."""
        for slot in self.slots:
            if slot.life is not None and slot.life.worker_id == worker_id:
                return slot
        return None

    def worker_up(self, worker_id: str, tools: tuple[ToolDefinition, ...]) -> None:
        """Take the broker's word that a worker is ready; about one that is gone it means nothing."""
        slot = self.find(worker_id)
        if slot is not None:
            self.tools = tools
            slot.tell(BecameReady())

    def worker_refused(self, worker_id: str, reason: str) -> None:
        """Take the broker's word that a worker will not become ready."""
        slot = self.find(worker_id)
        if slot is not None:
            slot.tell(Refused(reason))

    def deadlines(self) -> Iterator[float]:
        """Return the instants at which slots have something to do."""
        for slot in self.slots:
            deadline = slot.child.deadline()
            if deadline is not None:
                yield deadline

    @property
    def is_stopped(self) -> bool:
        """No process is left, and none will come."""
        return not any(slot.child.is_alive or slot.child.state is State.BACKOFF for slot in self.slots)

    @property
    def ready(self) -> int:
        """How many workers can take work."""
        return sum(slot.child.state is State.RUNNING for slot in self.slots)

    @property
    def reason(self) -> str:
        """Why a slot is not as it should be, of the worst one."""
        for state in (State.FATAL, State.BACKOFF, State.STOPPING):
            for slot in self.slots:
                if slot.child.state is state and slot.child.reason:
                    return slot.child.reason
        return ""

    @property
    def state(self) -> str:
        """One of ready, starting, degraded, failed, stopped."""
        states = [slot.child.state for slot in self.slots]
        if all(state is State.RUNNING for state in states):
            return "ready"
        if all(state is State.FATAL for state in states):
            return "failed"
        if State.FATAL in states or State.BACKOFF in states:
            return "degraded"
        if State.STARTING in states or any(slot.child.is_wanted for slot in self.slots):
            return "starting"
        return "stopped"

    def report(self) -> node.PoolReport:
        """Return what the broker tells those who ask."""
        return node.PoolReport(
            name=self.name,
            state=self.state,
            wanted=sum(slot.child.is_wanted for slot in self.slots),
            workers=tuple(
                node.WorkerReport(
                    id=slot.life.worker_id,
                    pid=slot.life.process.pid,
                    state=slot.child.state.value,
                    since_wall=slot.life.process.started_wall,
                    rss_kib=slot.life.rss_kib,
                    cpu_s=slot.life.cpu_s,
                )
                for slot in self.slots
                if slot.life is not None and slot.life.process is not None
            ),
            reason=self.reason,
            restarts=self._restarts.total,
            rate_per_s=self._table.rate_per_s,
            burst=self._table.burst,
        )
