"""How one tool is: its life, its breaker, its place on the ladder of recovery, and what is being done to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_broker.core import breaker as breakers
from mcp_broker.core import lifecycle
from mcp_broker.core.calls import fault
from mcp_broker.core.lifecycle import Treatment
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.recovery import Attempt, Failure, Ladder
    from mcp_broker.core.registry import Tool
    from mcp_broker.wire import messages


class Condition(Slim):
    """One tool's condition; a tool has one once anything of it is known.

    Attributes:
        life: where it is in its life.
        breaker: None while nothing has failed for a while.
        ladder: None until something failed that climbs.
        isolated: it has a worker of its own.
        apart: it is to have one; a broker that follows this one has to know.
        by_operator: an operator unregistered it: its callers are told that there is no such tool.
    """

    tool: Tool
    life: lifecycle.Lifecycle
    breaker: breakers.Breaker | None = None
    ladder: Ladder | None = None
    isolated: bool = False
    apart: bool = False
    by_operator: bool = False

    @property
    def is_plain(self) -> bool:
        """Tell whether nobody need ask before a call of it is taken."""
        refuses = self.life.treatment in {Treatment.REFUSE, Treatment.END}
        return not refuses and (self.breaker is None or self.breaker.state is breakers.State.CLOSED)

    @property
    def is_watched(self) -> bool:
        """Tell whether its successes are to be counted."""
        return self.breaker is not None or (
            self.ladder is not None and (self.ladder.is_open or self.ladder.in_a_row > 0)
        )

    @property
    def standing(self) -> str:
        """Say in a few words where it is in its life, why, and what tells more."""
        reason = f", {self.life.reason}" if self.life.reason else ""
        return f"{self.life.state.name.lower()}{reason}; `mcp-broker why {self.tool.name}` tells more"

    def refusal(self, call_id: bytes, principal: str, now: float) -> messages.Outcome | None:
        """Return how a call ends that may not come in now, or None; one that may be let through as a trial is it from now on."""
        if self.life.treatment in {Treatment.REFUSE, Treatment.END}:
            return self.closed(call_id)
        if self.breaker is None:
            return None
        retry_after_s = self.breaker.handle(breakers.Event.ASKED, call_id, principal, now)
        return self.tripped(call_id, retry_after_s) if retry_after_s else None

    def closed(self, call_id: bytes) -> messages.Outcome:
        """Make the outcome of a call of a tool whose state takes none."""
        name, state = self.tool.name, self.life.state
        if state is lifecycle.State.UNREGISTERED and self.by_operator:
            text = f"there is no tool {name}: an operator took it out"
            return fault(call_id, "NOT_FOUND", text, {"tool": name, "did_you_mean": []})
        reason = self.life.reason or state.name.lower()
        text = f"the tool {name} takes no calls, it is {state.name.lower()}: {reason}; `mcp-broker why {name}` tells more"
        # by an operator's hand it comes back, and nobody knows when
        details = {"tool": name, "state": state.name.lower(), "reason": reason}
        return fault(call_id, "UNAVAILABLE", text, details, retryable=False)

    def tripped(self, call_id: bytes, retry_after_s: float) -> messages.Outcome:
        """Make the outcome of a call of a tool whose breaker is open."""
        name = self.tool.name
        retry_after_s = round(max(retry_after_s, 0.001), 3)
        text = f"the tool {name} failed too often of late; it is tried again in {retry_after_s:g} s"
        details = {"tool": name, "reason": "breaker open", "retry_after_s": retry_after_s}
        return fault(call_id, "UNAVAILABLE", text, details)


def described(condition: Condition, now: float) -> dict[str, Any]:
    """Tell a tool's condition as a payload; instants are told by their age, in seconds."""
    life, breaker, ladder = condition.life, condition.breaker, condition.ladder
    told: dict[str, Any] = {
        "tool": condition.tool.name,
        "state": life.state.name.lower(),
        "since_s": round(now - life.since, 3),
        "reason": life.reason,
        "calls": life.treatment.name.lower(),
        "isolated": condition.isolated,
        "history": [
            {
                "age_s": round(now - change.at, 3),
                "event": change.event.name.lower(),
                "before": change.before.name.lower(),
                "after": change.after.name.lower(),
                "duration_s": change.duration_s,
                "error": change.error,
            }
            for change in life.history
        ],
        "breaker": None,
        "ladder": None,
    }
    if breaker is not None:
        breaker.tally.turn(now)
        told["breaker"] = {
            "state": breaker.state.name.lower(),
            "calls": breaker.tally.calls,
            "failures": breaker.tally.failures,
            "openings": breaker.openings,
            "retry_after_s": round(max(0.0, breaker.until - now), 3)
            if breaker.state is breakers.State.OPEN
            else 0.0,
        }
    if ladder is not None:
        told["ladder"] = {
            "position": None if ladder.position is None else ladder.position.name.lower(),
            "in_a_row": ladder.in_a_row,
            "tried": ladder.tried,
            "recovered": ladder.recovered,
            "success_rate": ladder.success_rate,
            "failures": [_failure(failure, now) for failure in ladder.failures],
            "attempts": [_attempt(attempt, now) for attempt in ladder.attempts],
        }
    return told


def _failure(failure: Failure, now: float) -> dict[str, Any]:
    return {
        "age_s": round(now - failure.at, 3),
        "cause": failure.cause.value,
        "principal": failure.principal,
        "text": failure.text,
        "resources": failure.resources,
    }


def _attempt(attempt: Attempt, now: float) -> dict[str, Any]:
    outcome = "open" if attempt.succeeded is None else "succeeded" if attempt.succeeded else "failed"
    return {
        "age_s": round(now - attempt.at, 3),
        "step": attempt.step.name.lower(),
        "cause": attempt.failure.cause.value,
        "outcome": outcome,
        "duration_s": attempt.duration_s,
        "error": attempt.error,
    }
