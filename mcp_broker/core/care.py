"""The care of tools: what failures and successes mean for them, and what is done about it.

Rules
    What happens to calls only moves the machines here (breaker, ladder, lifecycle). What follows for others (calls that wait,
    gates, workers) is done by :meth:`Care.settle`, once a turn: it would else come in the middle of what caused it.
    While nothing fails, nothing here is asked: successes count only for tools in :attr:`Care.watched`, and a session may
    keep a tool that it was let in for (:attr:`~mcp_broker.core.condition.Condition.is_plain`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker.core import breaker, lifecycle
from mcp_broker.core.condition import Condition

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing
    from mcp_broker.wire import messages


class Care:
    """Looks after the tools of one broker."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._dispatcher = routing.dispatcher
        self._registry = routing.registry
        #: tools of which somebody waits for a success; mostly empty
        self.watched: dict[Tool, None] = {}
        #: tools whose breaker has opened since the last turn
        self._tripped: dict[Tool, None] = {}

    def of(self, tool: Tool) -> Condition:
        """Return a tool's condition."""
        if tool.condition is None:
            tool.condition = Condition(tool, lifecycle.Lifecycle(self._routing.now))
        return tool.condition

    # -- what calls tell --------------------------------------------------------------------------------

    def refusal(self, tool: Tool, call_id: bytes, principal: str, now: float) -> messages.Outcome | None:
        """Return how a call ends that its tool does not take now, or None."""
        condition = tool.condition
        if condition is None:
            return None
        trial = None if condition.breaker is None else condition.breaker.trial
        if trial is not None and trial not in self._routing.ledger.calls:
            # it was refused for another reason before it was accepted
            self._hear(condition, breaker.Event.ABANDONED, trial, principal, now)
        return condition.refusal(call_id, principal, now)

    def failing(self, call: Call, outcome: messages.Outcome) -> None:
        """Take note of a call's end without a result."""
        tool, now = call.tool, self._routing.now
        if tool.pool is None:
            return
        event = breaker.event_of(outcome.code) if call.attempts else breaker.Event.ABANDONED
        if event is not breaker.Event.FAILED and (tool.condition is None or tool.condition.breaker is None):
            return
        condition = self.of(tool)
        if condition.breaker is None:
            condition.breaker = breaker.Breaker(now)
            self.watched[tool] = None
        self._hear(condition, event, call.call_id, call.session.grant.caller.principal, now)

    def succeeded(self, call: Call) -> None:
        """Take note of a result of a watched tool."""
        condition, now = self.of(call.tool), self._routing.now
        if condition.breaker is not None:
            principal = call.session.grant.caller.principal
            self._hear(condition, breaker.Event.SUCCEEDED, call.call_id, principal, now)
        if condition.ladder is not None:
            condition.ladder.succeeded(now)
        if not condition.is_watched:
            self.watched.pop(call.tool, None)

    def _hear(
        self, condition: Condition, event: breaker.Event, call_id: bytes, principal: str, now: float
    ) -> None:
        its = condition.breaker
        if its is None:
            return
        before = its.openings
        its.handle(event, call_id, principal, now)
        if its.openings != before:
            self._tripped[condition.tool] = None

    # -- what workers tell -------------------------------------------------------------------------------

    def ready(self, pool: Pool, now: float) -> None:
        """A worker of a pool can take calls."""
        for tool in self._registry.of(pool):
            self.of(tool).life.handle(lifecycle.Event.READY, now)

    # -- once a turn ------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Do what follows for others."""
        if self._tripped:
            tripped, self._tripped = self._tripped, {}
            for tool in tripped:
                self._shut(tool, now)

    def look(self, now: float) -> None:
        """Forget what was quiet for long, every now and then."""
        for tool in list(self.watched):
            condition = self.of(tool)
            if condition.breaker is not None and condition.breaker.is_quiet(now):
                condition.breaker = None
            if not condition.is_watched:
                del self.watched[tool]

    def _shut(self, tool: Tool, now: float) -> None:
        """A breaker opened: nobody is let in unasked any more, and nobody waits for nothing."""
        condition = self.of(tool)
        self._registry.changed()
        its = condition.breaker
        if its is not None and its.state is breaker.State.OPEN:
            retry_after_s = its.until - now
            self._dispatcher.end_waiting(tool, lambda call_id: condition.tripped(call_id, retry_after_s))
