"""The health of tools: what failures and successes mean for them, and what is done about it.

Rules
    What happens to calls only moves the machines here (breaker, ladder, lifecycle). What follows for others (calls that wait,
    gates, workers) is done by :meth:`ToolHealth.settle`, once a turn: it would else come in the middle of what caused it.
    While nothing fails, nothing here is asked: successes count only for tools in :attr:`ToolHealth.watched`, and a session may
    keep a tool that it was let in for (:attr:`~mcp_broker.core.condition.Condition.is_plain`).
    A tool that an operator paused, stopped or took out is not recovered: the step is noted, and not done.

Source: docs/recovery.md.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core import breaker
from mcp_broker.core.calls import CallState
from mcp_broker.core.lifecycle import Event, State, Treatment
from mcp_broker.core.lifecycles import Lifecycles
from mcp_broker.core.operations import Operation, Operations, Phase
from mcp_broker.core.placement import Placement
from mcp_broker.core.pool import APART
from mcp_broker.core.recovery import CEILING, Attempt, Cause, Failure, Ladder, Step
from mcp_broker.errors import MalformedFrame
from mcp_broker.wire import messages, payload

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.condition import Condition
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing
    from mcp_broker.wire.node import Certificate

#: outcomes that say more than that a call failed: a fault of the process that answered
_CAUSES: Final = {"RESOURCE_EXHAUSTED": Cause.LIMIT, "INTERNAL": Cause.PROTOCOL}
#: the attempt before the latest
_TWO: Final = 2
#: the details of the broker's own word on a dropped result are shorter; a worker's are not taken apart
_SHORT_BYTES: Final = 256


def cause_of(certificate: Certificate) -> Cause | None:
    """Tell what a death says of the tool whose call ran; None: nothing, since its caller or an operator wanted it."""
    kind, signal = certificate.kind, certificate.signal
    if kind == "limit" or certificate.is_oom:
        return Cause.LIMIT
    if kind == "violation" or signal == "SIGSYS":
        return Cause.SECURITY
    if kind == "deadline":
        return Cause.TIMEOUT
    if kind in {"cancel", "silence", "hook", "operator", "boot_failure"}:
        return None
    return Cause.KILLED if kind == "signal" and signal == "SIGKILL" else Cause.CRASH


class ToolHealth:
    """Looks after the tools of one broker."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._dispatcher = routing.dispatcher
        self._registry = routing.registry
        self.lifecycles = Lifecycles(routing)
        self.operations = Operations(routing)
        self.placement = Placement(routing, self.lifecycles, self.operations)
        #: tools of which somebody waits for a success; mostly empty
        self.watched: dict[Tool, None] = {}
        #: tools whose breaker has opened since the last turn
        self._tripped: dict[Tool, None] = {}
        #: steps that have yet to be done -> whether the process is gone already
        self._steps: dict[Tool, tuple[Attempt, bool]] = {}

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

    def ends(self, call: Call) -> bool:
        """End a call that was taken and has never started, if its tool's state ends what waits; tell whether it did."""
        condition = call.tool.condition
        return condition is not None and condition.life.treatment is Treatment.END and self.shuts_out(call)

    def shuts_out(self, call: Call) -> bool:
        """End an accepted call that was sent again and runs nowhere, if its tool takes none; tell whether it did."""
        condition = call.tool.condition
        if condition is None or condition.life.treatment not in {Treatment.REFUSE, Treatment.END}:
            return False
        self._routing.ledger.finish(call, condition.closed(call.call_id))
        return True

    def failing(self, call: Call, outcome: messages.Outcome) -> None:
        """Take note of a call's end without a result."""
        tool, now = call.tool, self._routing.now
        if tool.pool is None:
            return
        says = breaker.event_of(outcome.code) if call.attempts else breaker.Event.ABANDONED
        if outcome.code == "RESOURCE_EXHAUSTED" and _is_callers(outcome):
            says = breaker.Event.ABANDONED
        if says is not breaker.Event.FAILED and (tool.condition is None or tool.condition.breaker is None):
            return
        condition, principal = self.lifecycles.of(tool), call.session.grant.caller.principal
        if condition.breaker is None:
            condition.breaker = breaker.Breaker(now)
            self.watched[tool] = None
        was, has_tripped = condition.breaker.state, self._hear(condition, says, call.call_id, principal, now)
        if says is not breaker.Event.FAILED or call.killers:
            # a death was told by its certificate
            return
        text = "" if outcome.fault is None else outcome.fault.message[:200]
        cause = _CAUSES.get(outcome.code)
        if cause is None and outcome.code == "TOOL_FAILED" and "recover" in tool.traits:
            cause = Cause.EXCEPTION
        if cause is None and has_tripped:
            cause = Cause.PROBE if was is breaker.State.HALF_OPEN else Cause.BREAKER
        if cause is not None:
            self._failed(tool, Failure(now, cause, principal, text), died=False)

    def runs_again(self, call: Call, outcome: messages.Outcome) -> bool:
        """Tell whether a call whose tool raised is to run again, as the tool's author said it may."""
        definition = call.tool.definition
        if (
            outcome.code != "TOOL_FAILED"
            or "recover" not in call.tool.traits
            or not definition.idempotent
            or call.attempts >= limits.ATTEMPTS_MAX
            or not call.may_run_again
            or call.record is not None
        ):
            return False
        text = "" if outcome.fault is None else outcome.fault.message[:200]
        failure = Failure(self._routing.now, Cause.EXCEPTION, call.session.grant.caller.principal, text)
        self._failed(call.tool, failure, died=False)
        return True

    def succeeded(self, call: Call) -> None:
        """Take note of a result of a watched tool."""
        condition, now = self.lifecycles.of(call.tool), self._routing.now
        if condition.breaker is not None:
            principal = call.session.grant.caller.principal
            self._hear(condition, breaker.Event.SUCCEEDED, call.call_id, principal, now)
        if condition.ladder is not None:
            condition.ladder.succeeded(now)
        if not condition.is_watched:
            self.watched.pop(call.tool, None)

    def _hear(
        self, condition: Condition, event: breaker.Event, call_id: bytes, principal: str, now: float
    ) -> bool:
        """Tell a breaker of a call; return whether it has opened."""
        its = condition.breaker
        if its is None:
            return False
        before = its.openings
        its.handle(event, call_id, principal, now)
        if its.openings == before:
            return False
        self._tripped[condition.tool] = None
        return True

    def _failed(self, tool: Tool, failure: Failure, *, died: bool) -> None:
        condition = self.lifecycles.of(tool)
        if condition.ladder is None:
            condition.ladder = Ladder()
        attempt = condition.ladder.failed(failure, died=died, isolated=condition.isolated)
        self.watched[tool] = None
        if attempt is not None:
            self._steps[tool] = attempt, died

    # -- what workers tell -------------------------------------------------------------------------------

    def registered(self, pool: Pool) -> None:
        """A worker of a pool has brought its tools."""
        for tool in self._registry.of(pool):
            self.lifecycles.of(tool)

    def ready(self, pool: Pool, now: float) -> None:
        """A worker of a pool can take calls."""
        for tool in self._registry.of(pool):
            self.lifecycles.of(tool).life.handle(Event.READY, now)
        if APART in pool.name:
            self.placement.settled(pool, now)

    def updating(self, pool: Pool, now: float) -> None:
        """Workers of a later edition serve other tools: until those of earlier ones are gone, both do."""
        for tool in self._registry.of(pool):
            condition = self.lifecycles.of(tool)
            if condition.life.may(Event.UPDATE) and tool not in self.operations.running:
                self.lifecycles.change(
                    condition, Event.UPDATE, now, reason=f"edition {pool.edition} of its pool"
                )
                done = functools.partial(self._updated, condition)
                self.operations.begin(Operation(tool, deque((Phase.UPDATE,)), done), now)

    def _updated(self, condition: Condition, error: str, now: float) -> None:
        if condition.life.state is State.UPDATING:
            self.lifecycles.change(condition, Event.DONE, now, error=error)

    def worker_died(self, certificate: Certificate, started: list[Call]) -> None:
        """A worker died, and took these calls along; some may have had an outcome before."""
        cause = cause_of(certificate)
        if cause is None:
            return
        resources: dict[str, Any] = {
            "worker": certificate.worker_id,
            "max_rss_kib": certificate.max_rss_kib,
            "cpu_s": certificate.cpu_s,
            "uptime_s": certificate.uptime_s,
            "calls_started": certificate.calls_started,
        }
        if cause is Cause.TIMEOUT:
            # whose time was over ended then; others that ran beside it are not to blame
            started = [call for call in started if call.state is CallState.ENDED] or started
        blamed: dict[Tool, str] = {call.tool: call.session.grant.caller.principal for call in started}
        for tool, principal in blamed.items():
            self._failed(
                tool, Failure(self._routing.now, cause, principal, certificate.cause, resources), died=True
            )

    # -- once a turn ------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Do what follows for others."""
        if self._tripped:
            tripped, self._tripped = self._tripped, {}
            for tool in tripped:
                self._shut(tool, now)
        if self._steps:
            steps, self._steps = self._steps, {}
            for tool, (attempt, died) in steps.items():
                self._take_step(self.lifecycles.of(tool), attempt, died=died, now=now)
        if self.operations.running:
            self.operations.turn(now)

    def deadline(self) -> float | None:
        """Return when :meth:`settle` has something to do at the latest, or None."""
        return self.operations.deadline() if self.operations.running else None

    def look(self, now: float) -> None:
        """Forget what was quiet for long, every now and then."""
        for tool in list(self.watched):
            condition = self.lifecycles.of(tool)
            if condition.breaker is not None and condition.breaker.is_quiet(now):
                condition.breaker = None
            if not condition.is_watched:
                del self.watched[tool]
        for pool in list(self.placement.unsettled):
            self.placement.settled(pool, now)
        for tool in list(self.placement.apart):
            if self._registry.tools.get(tool.name) is not tool:
                # forgotten, with the pool of its module
                del self.placement.apart[tool]
                continue
            condition = self.lifecycles.of(tool)
            ladder = condition.ladder
            if ladder is not None:
                ladder.decay(now)
            if ladder is not None and (ladder.position is None or ladder.position < Step.ISOLATE):
                self.placement.rejoin(condition, now)

    def _shut(self, tool: Tool, now: float) -> None:
        """A breaker opened: nobody is let in unasked any more, and nobody waits for nothing."""
        condition = self.lifecycles.of(tool)
        self._registry.changed()
        its = condition.breaker
        if its is not None and its.state is breaker.State.OPEN:
            retry_after_s = its.until - now
            self._dispatcher.end_waiting(tool, lambda call_id: condition.tripped(call_id, retry_after_s))

    def _take_step(self, condition: Condition, attempt: Attempt, *, died: bool, now: float) -> None:
        step, life, ladder = attempt.step, condition.life, condition.ladder
        why = f"{attempt.failure.cause.value}: {attempt.failure.text}"
        if step is Step.UNREGISTER:
            if life.may(Event.UNREGISTER):
                self.lifecycles.change(
                    condition, Event.UNREGISTER, now, reason=f"recovery gave it up after a {why}"
                )
            return
        phases: list[Phase] = []
        if step is Step.RESET:
            phases.append(Phase.HOOKS if "reset" in condition.tool.traits else Phase.REPLACE)
        elif (
            step is Step.RESTART
            and not died
            and not (attempt.failure.cause in CEILING and _is_in_vain(ladder))
        ):
            phases.append(Phase.REPLACE)
        elif step is Step.ISOLATE and not condition.isolated:
            phases += [Phase.ISOLATE, Phase.QUIET, Phase.MOVE]
        jitter = int.from_bytes(self._routing.new_id()[:2], "big") / 65536
        penalty_s = 0.0 if ladder is None else ladder.penalty_s(jitter)
        if penalty_s:
            phases.append(Phase.PENALTY)
        if not phases:
            return
        if not life.may(Event.RECOVER):
            attempt.error = f"not done, since the tool is {life.state.name.lower()}"
            return
        self.lifecycles.change(condition, Event.RECOVER, now, reason=f"{step.name.lower()} after a {why}")

        def done(error: str, then: float) -> None:
            attempt.error = error
            if error and phases[0] is Phase.HOOKS:
                # what does not forget its state loses it with its process
                again = deque((Phase.REPLACE,))
                self.operations.begin(Operation(condition.tool, again, finish), then)
                return
            finish(error, then)

        def finish(error: str, then: float) -> None:
            self._finish(condition, error, then)

        operation = Operation(condition.tool, deque(phases), done, "reset", limits.RECOVER_S, penalty_s)
        self.operations.begin(operation, now)

    def _finish(self, condition: Condition, error: str, now: float) -> None:
        """A step is done, or could not be: either way calls go on, and tell whether it helped."""
        if condition.life.state is State.RECOVERING:
            self.lifecycles.change(condition, Event.DONE, now, error=error)


def _is_in_vain(ladder: Ladder | None) -> bool:
    """Tell whether new processes have failed like those before them: more of them would too."""
    if ladder is None or len(ladder.attempts) < _TWO:
        return False
    before = ladder.attempts[-2]
    return before.step is Step.RESTART and before.succeeded is False


def _is_callers(outcome: messages.Outcome) -> bool:
    """Tell whether it was its caller who had no room for a result."""
    if outcome.fault is None or len(outcome.fault.details) > _SHORT_BYTES:
        return False
    try:
        details = payload.unpack_map(outcome.fault.details)
    except MalformedFrame:
        return False
    return details.get("limit") == "unread_bytes"
