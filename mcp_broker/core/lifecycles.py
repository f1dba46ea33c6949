"""The lives of all tools: changes of state, what they do to calls, and what outlives the broker of it.

A state does to calls what :data:`~mcp_broker.core.lifecycle.TREATMENT` says: a tool whose calls wait has a gate that lets none
through, so that what waits for it holds up nobody else; one that takes none has its waiting calls ended, and is asked for
by every session anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_broker.core import lifecycle
from mcp_broker.core.condition import Condition
from mcp_broker.core.lifecycle import Event, State, Treatment
from mcp_broker.core.pool import APART
from mcp_broker.wire import node

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing

#: where a tool is left that is in this state when its broker ends; all others begin again as REGISTERED
STANDING: Final = {
    State.PAUSING: State.PAUSED,
    State.PAUSED: State.PAUSED,
    State.STOPPING: State.STOPPED,
    State.STOPPED: State.STOPPED,
    State.INACTIVE: State.INACTIVE,
    State.ERROR: State.ERROR,
    State.UNREGISTERED: State.UNREGISTERED,
}


class Lifecycles:
    """The conditions of one broker's tools."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        #: where an earlier broker left tools that are not known here yet
        self._left: dict[str, node.Standing] = {}
        self._told: tuple[node.Standing, ...] = ()

    def of(self, tool: Tool) -> Condition:
        """Return a tool's condition."""
        if tool.condition is None:
            now = self._routing.now
            left = self._left.pop(tool.name, None)
            if left is None or not left.state:
                life = lifecycle.Lifecycle(now)
            else:
                life = lifecycle.Lifecycle.at(State[left.state.upper()], left.reason, now)
            tool.condition = Condition(tool, life)
            tool.condition.by_operator = left is not None and left.by_operator
            tool.condition.apart = left is not None and left.apart
            # an earlier broker may have left it so
            tool.condition.isolated = tool.pool is not None and APART in tool.pool.name
            self._apply(tool.condition, now)
            if tool.condition.apart:
                self._routing.health.placement.resume(tool.condition, now)
        return tool.condition

    def recall(self, left: Iterable[node.Standing]) -> None:
        """Know where an earlier broker left its tools."""
        self._left = {standing.tool: standing for standing in left}
        for name in list(self._left):
            tool = self._routing.registry.tools.get(name)
            if tool is not None:
                self.of(tool)

    def change(
        self, condition: Condition, event: Event, now: float, *, reason: str = "", error: str = ""
    ) -> None:
        """Let something happen in a tool's life, and to its calls.

        Raises:
            InvalidTransition: it cannot happen there (the operator's fault).
        """
        if condition.life.handle(event, now, reason=reason, error=error):
            self._apply(condition, now)
        self._tell()

    def want_apart(self, condition: Condition, *, wanted: bool) -> None:
        """Note whether a tool is to have a worker of its own."""
        if condition.apart is not wanted:
            condition.apart = wanted
            self._tell()

    def _apply(self, condition: Condition, now: float) -> None:
        """Do to a tool's calls what its state says."""
        tool, treatment = condition.tool, condition.life.treatment
        pool = tool.pool
        if pool is None:
            return
        if treatment is Treatment.END:
            # before a gate opens: what waits behind it is not to run
            self._routing.dispatcher.end_waiting(tool, condition.closed)
        is_held = treatment is Treatment.WAIT
        if tool.is_held is not is_held:
            tool.is_held = is_held
            tool.fence()
            pool.regate(self._routing.registry.of(pool), now)
            if not is_held:
                self._routing.dispatcher.pump(pool, now)
        if not condition.is_plain:
            self._routing.registry.changed()

    def _tell(self) -> None:
        """Have the supervisor keep what a broker that follows this one has to know."""
        standings = []
        for tool in self._routing.registry.tools.values():
            condition = tool.condition
            stays = None if condition is None else STANDING.get(condition.life.state)
            if condition is not None and (stays is not None or condition.apart):
                standings.append(
                    node.Standing(
                        tool=tool.name,
                        state="" if stays is None else stays.name.lower(),
                        reason="" if stays is None else condition.life.reason,
                        by_operator=condition.by_operator,
                        apart=condition.apart,
                    )
                )
        # of tools that nobody has brought yet, the word of the broker before stands
        told = (*standings, *self._left.values())
        if told != self._told:
            self._told = told
            self._routing.to_node.append(node.Standings(told))
