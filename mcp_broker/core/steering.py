"""What operators do with tools: the broker's own tools ``system.tools.*``.

Each says what is wanted and answers with the tool's condition as it is then; what takes longer (calls that end, hooks, other
processes) goes on behind it, and the history tells how it went. What cannot be done in the tool's state is refused with what
can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core.condition import Condition, described
from mcp_broker.core.lifecycle import Event, State
from mcp_broker.core.operations import Operation, Phase
from mcp_broker.core.worker import WorkerState
from mcp_broker.errors import InvalidArgument, InvalidTransition, NotFound

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.routing import Routing
    from mcp_broker.core.tool_health import ToolHealth

Answer = Callable[["Routing", "Call", dict[str, Any]], dict[str, Any]]

_STILL: Final = (Phase.QUIET, Phase.HOOKS)


class Steering:
    """One wish of an operator for one tool."""

    def __init__(self, routing: Routing, condition: Condition, reason: str, now: float) -> None:
        self._routing = routing
        self._health: ToolHealth = routing.health
        self._condition = condition
        self._reason = reason
        self._now = now

    def _change(self, event: Event, error: str = "") -> None:
        self._health.lifecycles.change(self._condition, event, self._now, reason=self._reason, error=error)

    def _begin(self, phases: tuple[Phase, ...], event: str, *, is_strict: bool) -> None:
        """Begin what leads out of the state that it is in now.

        Args:
            is_strict: a hook that fails makes it an ERROR; else it is noted, and the tool goes where it was to go.
        """
        condition, state = self._condition, self._condition.life.state

        def done(error: str, then: float) -> None:
            if condition.life.state is not state:
                return
            lives = self._health.lifecycles
            if error and is_strict:
                lives.change(condition, Event.FAIL, then, error=error)
                return
            lives.change(condition, Event.DONE, then, reason=self._reason, error=error)
            if condition.life.state is State.STARTED:
                lives.change(condition, Event.DONE, then)

        operation = Operation(condition.tool, deque(phases), done, event)
        self._health.operations.begin(operation, self._now)

    def _hook(self, event: str) -> None:
        """Have hooks run that change nothing, whatever comes of them."""
        condition = self._condition
        note = condition.life.note

        def done(error: str, then: float) -> None:
            if error:
                note(error, then)

        self._health.operations.begin(
            Operation(condition.tool, deque((Phase.HOOKS,)), done, event), self._now
        )

    def pause(self) -> None:
        """Let its calls wait."""
        self._change(Event.PAUSE)
        if self._condition.life.state is State.PAUSING:
            self._begin(_STILL, "pause", is_strict=False)

    def resume(self) -> None:
        """Let them go on."""
        self._change(Event.RESUME)
        self._begin((Phase.HOOKS,), "resume", is_strict=True)

    def stop(self) -> None:
        """Take no calls, and have its stop hooks run when the last one has ended."""
        self._change(Event.STOP)
        if self._condition.life.state is State.STOPPING:
            self._begin(_STILL, "stop", is_strict=False)

    def start(self) -> None:
        """Have its start hooks run, and take calls again."""
        self._change(Event.START)
        self._begin((Phase.HOOKS,), "start", is_strict=True)

    def disable(self) -> None:
        """Take no new calls; what waits and what runs goes on."""
        self._change(Event.DEACTIVATE)
        self._hook("deactivate")

    def enable(self) -> None:
        """Have it serve, wherever it is: what recovery did and what the breaker counted is forgiven."""
        condition, state = self._condition, self._condition.life.state
        condition.breaker = None
        condition.by_operator = False
        if condition.ladder is not None:
            condition.ladder.forgive()
        if state in {State.PAUSED, State.PAUSING}:
            self.resume()
        elif state is State.STOPPED:
            self.start()
        elif state is State.UNREGISTERED:
            self._change(Event.REGISTER)
            pool = condition.tool.pool
            if pool is not None and any(
                worker.state is WorkerState.READY for worker in pool.workers.values()
            ):
                self._change(Event.READY)
        elif state is State.RECOVERING:
            # it need not be brought to an end first, and a worker of its own is not wanted any more
            self._health.operations.drop(condition.tool)
            self._change(Event.DONE)
        elif state in {State.INACTIVE, State.ERROR}:
            if state is State.ERROR:
                self._change(Event.DEACTIVATE)
            self._change(Event.ACTIVATE)
            self._hook("activate")
        self._health.placement.rejoin(condition, self._now)
        self._routing.registry.changed()

    def reset(self) -> None:
        """Have its workers forget what they hold, by its reset hooks, or else by other processes."""
        self._recover(Phase.HOOKS if "reset" in self._condition.tool.traits else Phase.REPLACE)

    def recover(self) -> None:
        """Have other processes take the place of those that serve it."""
        self._recover(Phase.REPLACE)

    def _recover(self, phase: Phase) -> None:
        self._change(Event.RECOVER)
        self._begin((phase,), "reset", is_strict=True)

    def isolate(self) -> None:
        """Give it a worker of its own, until it is enabled again."""
        if not self._condition.isolated:
            if not self._condition.life.may(Event.RECOVER):
                self._change(Event.RECOVER)
            phases = (Phase.ISOLATE, Phase.QUIET, Phase.MOVE)
            self._health.placement.begin(self._condition, phases, None, self._now)

    def unregister(self) -> None:
        """Take it out: its callers are told that there is no such tool."""
        self._condition.by_operator = True
        self._change(Event.UNREGISTER)
        self._hook("stop")

    def history(self) -> None:
        """Change nothing."""


#: name under ``system.tools.`` -> what it does, and how it is described
WISHES: Final[dict[str, tuple[Callable[[Steering], None], str]]] = {
    "pause": (Steering.pause, "Let a tool's calls wait; those that run end."),
    "resume": (Steering.resume, "Let a paused tool's calls go on."),
    "stop": (Steering.stop, "Take no calls of a tool any more, and run its stop hooks."),
    "start": (Steering.start, "Run a stopped tool's start hooks, and take its calls again."),
    "disable": (Steering.disable, "Take no new calls of a tool; those that were taken go on."),
    "enable": (
        Steering.enable,
        "Have a tool serve again, and forgive what recovery and its breaker hold against it.",
    ),
    "reset": (Steering.reset, "Have a tool's workers drop their state."),
    "recover": (Steering.recover, "Replace the processes that serve a tool."),
    "isolate": (Steering.isolate, "Give a tool a worker of its own that runs one call at a time."),
    "unregister": (Steering.unregister, "Take a tool out."),
    "history": (Steering.history, "Tell a tool's state, breaker, recovery and history."),
}


def answering(wish: Callable[[Steering], None]) -> Answer:
    """Make the answer of one of the broker's own tools of a wish."""

    def answer(routing: Routing, call: Call, wanted: dict[str, Any]) -> dict[str, Any]:
        name = wanted["tool"]
        tool = routing.registry.tools.get(name)
        if tool is None or tool.pool is None:
            similar = routing.registry.similar(name, routing.registry.tools)
            raise NotFound(f"there is no tool {name}", {"tool": name, "did_you_mean": similar})
        condition = routing.health.lifecycles.of(tool)
        principal = call.session.grant.caller.principal
        reason = wanted.get("reason", "")[: limits.TEXT_CHARS_MAX // 2]
        reason = f"{reason} ({principal})" if reason else f"by {principal}"
        try:
            wish(Steering(routing, condition, reason, routing.now))
        except InvalidTransition as error:
            raise InvalidArgument(f"{name}: {error.message}", error.details) from error
        return described(condition, routing.now)

    return answer
