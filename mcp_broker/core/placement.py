"""Which pool serves a tool: that of its module, or one of its own.

A tool that is *isolated* is served by one worker of a pool NAME~TOOL, which runs one call at a time; the other tools of its
module stay where they are. It moves only while no worker holds a call of it; what waits moves along.
The pool is the supervisor's to start and to end. A broker that follows another finds the pool and its worker, and has the tool
moved there again.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core.lifecycle import Event, State
from mcp_broker.core.operations import Operation, Operations, Phase
from mcp_broker.core.pool import APART

if TYPE_CHECKING:
    from mcp_broker.core.condition import Condition
    from mcp_broker.core.lifecycles import Lifecycles
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing


class Placement:
    """Moves tools.

    Attributes:
        apart: tools that have a worker of their own; mostly empty.
    """

    def __init__(self, routing: Routing, lives: Lifecycles, operations: Operations) -> None:
        self._routing = routing
        self._lifecycles = lives
        self._operations = operations
        self.apart: dict[Tool, None] = {}

    def settled(self, pool: Pool, now: float) -> None:
        """A worker of a pool of one tool is ready: the tool goes there, unless it does so already."""
        tool = self._routing.registry.tools.get(pool.name.partition(APART)[2])
        if tool is None:
            return
        if tool.pool is pool:
            self.apart[tool] = None
            self._lifecycles.of(tool).isolated = True
        elif tool not in self._operations.running:
            # an earlier broker had it isolated
            self.begin(self._lifecycles.of(tool), (Phase.QUIET, Phase.MOVE), pool, now)

    def begin(self, condition: Condition, phases: tuple[Phase, ...], target: Pool | None, now: float) -> None:
        """Let a tool go elsewhere, through these phases; its calls wait meanwhile. One that does not serve stays where it is."""
        if not condition.life.may(Event.RECOVER):
            return
        where = "among others" if target is not None and APART not in target.name else "by itself"
        self._lifecycles.change(condition, Event.RECOVER, now, reason=f"is to be served {where}")
        operation = Operation(
            condition.tool,
            deque(phases),
            lambda error, then: self._settle(condition, error, then),
            quiet_s=limits.RECOVER_S,
            target=target,
        )
        self._operations.begin(operation, now)

    def rejoin(self, condition: Condition, now: float) -> None:
        """Have a tool served among the others of its module again."""
        pool = condition.tool.pool
        if pool is None or condition.tool in self._operations.running:
            return
        if not condition.isolated:
            # one that never came up, and that nobody knows of any more
            left = self._routing.dispatcher.pools.get(f"{pool.name}{APART}{condition.tool.name}")
            if left is not None:
                self._operations.leave(left)
            return
        home = self._routing.dispatcher.pool(pool.name.partition(APART)[0])
        self.begin(condition, (Phase.QUIET, Phase.MOVE), home, now)

    def evicted(self, pool: Pool, now: float) -> None:
        """Take the supervisor's word that it has a pool no more, or closes it.

        If it was one of one tool, that is served among the others of its module again, unless a worker holds a call of it.
        """
        base, apart, _ = pool.name.partition(APART)
        home = self._routing.dispatcher.pools.get(base)
        if not apart or home is None or home.report is None:
            return
        for tool in self._routing.registry.of(pool):
            if not any(
                call.tool is tool for worker in pool.workers.values() for call in worker.held.values()
            ):
                self._move(tool, home, now)
                self._routing.dispatcher.pump(home, now)

    def move(self, tool: Tool, target: Pool, now: float) -> None:
        """Let another pool serve a tool of which no worker holds a call; one of its own that it leaves is wanted no more."""
        source = tool.pool
        if source is None or source is target:
            return
        self._move(tool, target, now)
        if APART not in target.name:
            self._operations.leave(source)

    def _move(self, tool: Tool, target: Pool, now: float) -> None:
        source = tool.pool
        if source is None or source is target:
            return
        condition = self._lifecycles.of(tool)
        waiting = [call for call in source.backlog.values() if call.tool is tool]
        aside = [call for call in self._routing.dispatcher.backpressure.of_pool(source) if call.tool is tool]
        aside += self._routing.idempotency.followers(tool)
        doubts = [call for call in source.doubts.values() if call.tool is tool]
        for call in (*waiting, *doubts):
            source.unqueue(call)
        for call in aside:
            source.count_out(call)
        tool.pool = target
        condition.isolated = APART in target.name
        if condition.isolated:
            self.apart[tool] = None
        else:
            self.apart.pop(tool, None)
        # its module may have changed since the other pool's workers began
        tool.define(target.brought.get(tool.name, tool.definition))
        for call in aside:
            target.count_in(call)
        for call in doubts:
            target.doubt(call)
        for pool in (source, target):
            pool.regate(self._routing.registry.of(pool), now)
        target.queue_again(waiting, now)
        self._routing.registry.changed()

    def _settle(self, condition: Condition, error: str, now: float) -> None:
        if condition.life.state is State.RECOVERING:
            self._lifecycles.change(condition, Event.DONE, now, error=error)
