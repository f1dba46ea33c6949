"""Which pool serves a tool: that of its module, or one of its own.

A tool that is *isolated* is served by one worker of a pool NAME~TOOL, which runs one call at a time; the other tools of its
module stay where they are. It moves only while no worker holds a call of it; what waits moves along.
The pool is the supervisor's to start and to end. Whether a tool is to be there is told with its standing: a broker that follows
another lets its calls wait for that worker, or goes on leaving it.
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
        unsettled: pools of one tool that is not there yet, and does not serve; mostly empty.
    """

    def __init__(self, routing: Routing, lifecycles: Lifecycles, operations: Operations) -> None:
        self._routing = routing
        self._lifecycles = lifecycles
        self._operations = operations
        self.apart: dict[Tool, None] = {}
        self.unsettled: dict[Pool, None] = {}

    def settled(self, pool: Pool, now: float) -> None:
        """A worker of a pool of one tool is ready: the tool goes there, unless it does so already."""
        self.unsettled.pop(pool, None)
        tool = self._routing.registry.tools.get(pool.name.partition(APART)[2])
        if tool is None:
            return
        condition = self._lifecycles.of(tool)
        if tool.pool is pool:
            self.apart[tool] = None
            condition.isolated = True
            if not condition.apart:
                # an earlier broker had begun to let it go
                self.rejoin(condition, now)
        elif tool in self._operations.running:
            return
        elif not condition.apart:
            self._operations.leave(pool)
        elif not self.begin(condition, (Phase.QUIET, Phase.MOVE), pool, now):
            # nothing is given out of a tool that does not serve: it need not be asked to be quiet
            if tool.pool is None or self._is_held(tool, tool.pool):
                self.unsettled[pool] = None
            else:
                self._move(tool, pool, now)

    def resume(self, condition: Condition, now: float) -> None:
        """Go on where an earlier broker left a tool that had a worker of its own, or was to get one: its calls wait for that."""
        if not condition.isolated:
            self.begin(condition, (Phase.ISOLATE, Phase.QUIET, Phase.MOVE), None, now)

    def begin(self, condition: Condition, phases: tuple[Phase, ...], target: Pool | None, now: float) -> bool:
        """Let a tool go elsewhere, through these phases; its calls wait meanwhile.

        Returns:
            False if it does not serve: then it stays where it is.
        """
        if not condition.life.may(Event.RECOVER):
            return False
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
        return True

    def rejoin(self, condition: Condition, now: float) -> None:
        """Have a tool served among the others of its module again."""
        pool = condition.tool.pool
        if pool is None or condition.tool in self._operations.running:
            return
        # before its calls have ended: whoever follows this broker has to go on with it
        self._lifecycles.want_apart(condition, wanted=False)
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
            if not self._is_held(tool, pool):
                self._move(tool, home, now)
                self._routing.dispatcher.pump(home, now)

    @staticmethod
    def _is_held(tool: Tool, pool: Pool) -> bool:
        return any(call.tool is tool for worker in pool.workers.values() for call in worker.held.values())

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
        self._lifecycles.want_apart(condition, wanted=condition.isolated)
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
        for pool in (source, target):
            self._routing.workers.retell(pool)

    def _settle(self, condition: Condition, error: str, now: float) -> None:
        if condition.life.state is State.RECOVERING:
            self._lifecycles.change(condition, Event.DONE, now, error=error)
