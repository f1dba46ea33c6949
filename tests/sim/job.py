"""A call that a simulated worker runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.wire import messages, payload
from mcp_broker.worker.outcomes import fault
from tests.sim.agenda import Alarm
from tests.sim.work import ROWS, TAIL, Plan

if TYPE_CHECKING:
    from mcp_broker.worker.session import Pending
    from tests.sim.worker import Worker


class Job:
    """A call on its way.

    Attributes:
        part: the next part of its stream, made and not yet sent.
        awaits: its stream may send nothing before its caller takes something: no tool code runs.
    """

    __slots__ = ("alarm", "awaits", "index", "part", "pending", "plan", "started_at")

    def __init__(self, worker: Worker, pending: Pending, plan: Plan) -> None:
        agenda = worker.world.agenda
        self.pending = pending
        self.plan = plan
        self.started_at = agenda.now
        self.index = 0
        self.part: bytes | None = None
        self.awaits = False
        self.alarm = Alarm(agenda, lambda: worker.progress(self))

    @property
    def seq(self) -> int:
        return self.pending.dispatch.seq

    @property
    def is_stream(self) -> bool:
        return self.pending.dispatch.tool.endswith((ROWS, TAIL))

    def result(self) -> tuple[messages.Outcome, bytes | None]:
        """Make the outcome of a call that came to its end, and its second frame; a stream's tells its parts."""
        call_id, plan = self.pending.dispatch.call_id, self.plan
        if plan.does == "fail":
            return fault(call_id, "TOOL_FAILED", "as planned"), None
        if self.is_stream:
            return messages.Outcome(call_id, "OK", payload.pack(None), parts=self.index), None
        packed = payload.pack(plan.value)
        if len(packed) > limits.INLINE_BYTES_MAX:
            return messages.Outcome(call_id, "OK", None), packed
        return messages.Outcome(call_id, "OK", packed), None

    def cancelled(self) -> messages.Outcome:
        """Make the outcome of a call that was interrupted."""
        return fault(self.pending.dispatch.call_id, "CANCELLED", "the call was interrupted")
