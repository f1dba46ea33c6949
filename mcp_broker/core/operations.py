r"""What is being done to tools: the phases of a change of state, or of a step of recovery, and when each is over.

::

    pause            QUIET  HOOKS                       every phase ends by itself: QUIET with the last call that a
    resume, start           HOOKS                       worker holds (its deadline at the latest, or after
    stop             QUIET  HOOKS                       RECOVER_S where calls of others wait for it), the others
    reset                   HOOKS | REPLACE, PENALTY    at their limit
    restart                 REPLACE, PENALTY
    isolate                 ISOLATE, QUIET, MOVE, PENALTY
    rejoin                  QUIET, MOVE
    update                  UPDATE

A tool has one operation at most; a later one takes the place of what was under way. What it came to is told to whoever began it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.core.pool import APART
from mcp_broker.core.worker import WorkerState
from mcp_broker.wire import messages, node
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing
from mcp_broker.core.worker import Worker


class Phase(Enum):
    """One thing after the other."""

    #: until no worker holds a call of it
    QUIET = "quiet"
    #: until its workers have run their hooks
    HOOKS = "hooks"
    #: until other processes have taken the place of those that serve it
    REPLACE = "replace"
    #: until a worker of its own is ready
    ISOLATE = "isolate"
    #: it goes to the pool that is to serve it
    MOVE = "move"
    #: until its calls have waited long enough
    PENALTY = "penalty"
    #: until the workers of earlier editions of its pool are gone
    UPDATE = "update"


class Operation(Slim):
    """One operation under way.

    Attributes:
        phases: what is left of it, the first one under way.
        done: told when it is over, with what went wrong, "" if nothing.
        event: whose hooks are to run.
        quiet_s: how long QUIET may take.
        penalty_s: how long PENALTY takes.
        target: where MOVE leads.
        until: when the phase is over at the latest.
        order: the number under which workers were asked.
        waiting: ids of the workers that are waited for, in the order in which they were asked, each with the number of the
            last call that it had been given by then.
        errors: what went wrong so far.
    """

    tool: Tool
    phases: deque[Phase]
    done: Callable[[str, float], None]
    event: str = ""
    quiet_s: float = math.inf
    penalty_s: float = 0.0
    target: Pool | None = None
    has_begun: bool = False
    until: float = math.inf
    order: int = 0
    waiting: dict[str, int] | None = None
    errors: tuple[str, ...] = ()


class Operations:
    """All operations of one broker."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        #: under way, by tool; mostly empty
        self.running: dict[Tool, Operation] = {}
        self._orders = 0

    def begin(self, operation: Operation, now: float) -> None:
        """Begin an operation, in place of what was under way with its tool."""
        before = self.running.get(operation.tool)
        if before is not None and Phase.ISOLATE in operation.phases:
            # what was to have a pool of its own goes on to that
            before.target = None
        self.drop(operation.tool)
        self.running[operation.tool] = operation
        self._advance(operation, now)

    def drop(self, tool: Tool) -> None:
        """Stop what is under way with a tool; whoever began it hears nothing."""
        operation = self.running.pop(tool, None)
        if operation is not None:
            self._go_without(operation)

    def hooked(self, worker: Worker, message: messages.Hooked, now: float) -> None:
        """Take a worker's word that it has run its hooks."""
        for operation in list(self.running.values()):
            if operation.order == message.order and operation.waiting is not None:
                operation.waiting.pop(worker.worker_id, None)
                if message.error:
                    operation.errors = (*operation.errors, f"{worker.worker_id}: {message.error}")
                self._advance(operation, now)

    def turn(self, now: float) -> None:
        """Go on with what can go on."""
        for operation in list(self.running.values()):
            self._advance(operation, now)

    def deadline(self) -> float | None:
        """Return when a phase is over at the latest, or None."""
        at = min((operation.until for operation in self.running.values()), default=math.inf)
        return None if at == math.inf else at

    # -- phases -----------------------------------------------------------------------------------------

    def _advance(self, operation: Operation, now: float) -> None:
        while operation.phases:
            if self.running.get(operation.tool) is not operation:
                return
            phase = operation.phases[0]
            if not operation.has_begun:
                operation.has_begun, operation.until, operation.waiting = True, math.inf, None
                self.BEGINNINGS[phase](self, operation, now)
            if not self.QUESTIONS[phase](self, operation, now):
                return
            operation.phases.popleft()
            operation.has_begun = False
        if self.running.get(operation.tool) is operation:
            del self.running[operation.tool]
            operation.done("; ".join(operation.errors), now)

    def _serving(self, tool: Tool) -> list[Worker]:
        """Return the workers that can be told something about a tool."""
        workers = tool.pool.workers.values() if tool.pool is not None else ()
        return [worker for worker in workers if worker.state is WorkerState.READY]

    def _begin_quiet(self, operation: Operation, now: float) -> None:
        operation.until = now + operation.quiet_s

    def _is_quiet(self, operation: Operation, now: float) -> bool:
        tool = operation.tool
        workers: Iterable[Worker] = tool.pool.workers.values() if tool.pool is not None else ()
        if not any(call.tool is tool for worker in workers for call in worker.held.values()):
            return True
        if now < operation.until:
            return False
        operation.errors = (*operation.errors, f"calls of it still run after {operation.quiet_s:g} s")
        # to move it now would lose count of them
        while Phase.MOVE in operation.phases:
            operation.phases.remove(Phase.MOVE)
        self._go_without(operation)
        return True

    def _begin_hooks(self, operation: Operation, now: float) -> None:
        tool, operation.waiting = operation.tool, {}
        if operation.event not in tool.traits:
            return
        self._orders += 1
        operation.order, operation.until = self._orders, now + limits.HOOK_S
        for worker in self._serving(tool):
            operation.waiting[worker.worker_id] = worker.seq
            worker.send(messages.Hook(self._routing.epoch, operation.order, operation.event, tool.name))

    def _have_hooked(self, operation: Operation, now: float) -> bool:
        by_id = self._routing.workers.by_id
        # a process that is gone took its state along, and the next one begins with its start hooks
        waiting = operation.waiting = {
            one: given for one, given in (operation.waiting or {}).items() if one in by_id
        }
        if not waiting:
            return True
        if now < operation.until:
            return False
        if any(call.seq <= given for one, given in waiting.items() for call in by_id[one].held.values()):
            # it hears of it when the calls that it was given before are over, which have deadlines; others come behind it
            operation.until = now + limits.HOOK_S
            return False
        text = (
            f"{', '.join(sorted(waiting))} did not run its {operation.event} hooks within {limits.HOOK_S:g} s"
        )
        operation.errors = (*operation.errors, text)
        for worker_id in waiting:
            # a worker that retires would hold what waits in it until its hook has ended
            self._routing.workers.give_up(by_id[worker_id], "hook")
        return True

    def _begin_replace(self, operation: Operation, now: float) -> None:
        operation.until = now + limits.RECOVER_S
        operation.waiting = {worker.worker_id: worker.seq for worker in self._serving(operation.tool)}
        for worker_id in operation.waiting:
            self._replace(worker_id, f"a step of recovery of {operation.tool.name}")

    def _replace(self, worker_id: str, why: str) -> None:
        self._routing.to_node.append(node.Replace(worker_id, why))

    def _are_replaced(self, operation: Operation, now: float) -> bool:
        by_id = self._routing.workers.by_id
        left = {
            worker_id: given
            for worker_id, given in (operation.waiting or {}).items()
            if worker_id in by_id and by_id[worker_id].state is WorkerState.READY
        }
        operation.waiting = left
        if not left:
            return True
        if now < operation.until:
            return False
        text = f"{', '.join(sorted(left))} could not be replaced within {limits.RECOVER_S:g} s"
        operation.errors = (*operation.errors, text)
        return True

    def _begin_isolate(self, operation: Operation, now: float) -> None:
        operation.until = now + limits.RECOVER_S
        pool = operation.tool.pool
        if pool is not None:
            operation.target = self._routing.dispatcher.pool(f"{pool.name}{APART}{operation.tool.name}")
            # that an earlier one failed says nothing of this one
            operation.target.failure = ""
            lifecycles = self._routing.health.lifecycles
            lifecycles.want_apart(lifecycles.of(operation.tool), wanted=True)
            self._routing.to_node.append(node.Isolate(pool.name, operation.tool.name, wanted=True))

    def _is_isolated(self, operation: Operation, now: float) -> bool:
        target = operation.target
        if target is not None:
            # it may have gone and come again meanwhile
            target = operation.target = self._routing.dispatcher.pool(target.name)
            if any(worker.state is WorkerState.READY for worker in target.workers.values()):
                return True
        failure = "" if target is None else target.failure
        if now < operation.until and not failure:
            return False
        text = f"no worker of its own was ready within {limits.RECOVER_S:g} s"
        operation.errors = (*operation.errors, f"its own worker failed: {failure}" if failure else text)
        operation.phases = deque((Phase.ISOLATE,))
        self._go_without(operation)
        return True

    def _go_without(self, operation: Operation) -> None:
        """Have the pool of its own no more, where a tool has not moved to."""
        target, tool = operation.target, operation.tool
        if target is not None and tool.pool is not target:
            self.leave(target)

    def leave(self, pool: Pool) -> None:
        """Have a pool of one tool no more, if it is one."""
        base, apart, name = pool.name.partition(APART)
        tool, lifecycles = self._routing.registry.tools.get(name), self._routing.health.lifecycles
        if apart and tool is not None:
            lifecycles.want_apart(lifecycles.of(tool), wanted=False)
        if apart:
            self._routing.to_node.append(node.Isolate(base, name, wanted=False))

    def _begin_move(self, operation: Operation, now: float) -> None:
        if operation.target is not None:
            self._routing.health.placement.move(operation.tool, operation.target, now)

    def _begin_penalty(self, operation: Operation, now: float) -> None:
        operation.until = now + operation.penalty_s

    def _at_once(self, operation: Operation, now: float) -> bool:  # noqa: ARG002 (the shape of a question)
        return True

    def _is_updated(self, operation: Operation, now: float) -> bool:  # noqa: ARG002 (the shape of a question)
        pool = operation.tool.pool
        return pool is None or all(worker.edition >= pool.edition for worker in pool.workers.values())

    def _begin_nothing(self, operation: Operation, now: float) -> None:
        """It goes on by itself."""

    def _is_time(self, operation: Operation, now: float) -> bool:
        return now >= operation.until

    #: phase -> what is done at its beginning, and what tells its end
    BEGINNINGS: Final[dict[Phase, Callable[[Operations, Operation, float], None]]] = {
        Phase.QUIET: _begin_quiet,
        Phase.HOOKS: _begin_hooks,
        Phase.REPLACE: _begin_replace,
        Phase.ISOLATE: _begin_isolate,
        Phase.MOVE: _begin_move,
        Phase.PENALTY: _begin_penalty,
        Phase.UPDATE: _begin_nothing,
    }
    QUESTIONS: Final[dict[Phase, Callable[[Operations, Operation, float], bool]]] = {
        Phase.QUIET: _is_quiet,
        Phase.HOOKS: _have_hooked,
        Phase.REPLACE: _are_replaced,
        Phase.ISOLATE: _is_isolated,
        Phase.MOVE: _at_once,
        Phase.PENALTY: _is_time,
        Phase.UPDATE: _is_updated,
    }
