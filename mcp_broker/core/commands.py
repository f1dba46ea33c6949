"""Commands: calls of the broker's own tools that its supervisor carries out.

Rules
    A command is an accepted call like any other: it ends once, by the supervisor's answer, by its deadline, by its
    caller, or because the supervisor says nothing for :data:`~mcp_broker.limits.COMMAND_SILENCE_S`.
    A command that has ended here may still be carried out there: each says what is wanted, not what to do, so that
    giving it again is harmless.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.core import own_tools
from mcp_broker.core.calls import Call, CallState, fault
from mcp_broker.wire import messages, node, payload
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.routing import Routing


class Pending(Slim):
    """A command without an answer yet."""

    call: Call
    heard_at: float


class Commands:
    """The commands that the supervisor has been given and has not answered."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._count = 0
        self.pending: dict[int, Pending] = {}

    def begin(self, call: Call, arguments: dict[str, Any], now: float) -> messages.Outcome | None:
        """Pass a call on; returns its outcome if that cannot be."""
        if len(self.pending) >= limits.COMMANDS_MAX:
            text = f"{limits.COMMANDS_MAX} commands are under way already"
            details = {"limit": "commands", "maximum": limits.COMMANDS_MAX, "retry_after_s": 1.0}
            return fault(call.call_id, "OVERLOADED", text, details)
        self._count += 1
        self.pending[self._count] = Pending(call, now)
        principal = call.session.grant.caller.principal
        left_ms = max(1, int((call.deadline - now) * 1000))
        command = node.Command(self._count, call.tool.name, arguments, principal, left_ms)
        self._routing.to_node.append(command)
        self._routing.timers.add(now + limits.COMMAND_SILENCE_S, self._listen, self._count)
        return None

    def heard(self, message: node.Progressed | node.Commanded, now: float) -> None:
        """Take the supervisor's word; about a command that has ended it means nothing."""
        pending = self.pending.get(message.id)
        if pending is None:
            return
        pending.heard_at = now
        call = pending.call
        if isinstance(message, node.Commanded):
            del self.pending[message.id]
            if call.state is not CallState.ENDED:
                self._end(call, message)
        elif call.state is CallState.ENDED:
            del self.pending[message.id]
        else:
            call.session.tell(messages.Progress(call.call_id, message.fraction, message.text))

    def _end(self, call: Call, answer: node.Commanded) -> None:
        if answer.code == messages.OK:
            outcome, body = own_tools.packed_outcome(call.call_id, payload.pack(answer.result))
        else:
            outcome, body = fault(call.call_id, answer.code, answer.message, answer.details), None
        self._routing.ledger.finish(call, outcome, body)

    def _listen(self, number: int, now: float) -> None:
        """Look whether the supervisor still says something of a command."""
        pending = self.pending.get(number)
        if pending is None:
            return
        if pending.call.state is CallState.ENDED:
            del self.pending[number]
        elif now - pending.heard_at >= limits.COMMAND_SILENCE_S:
            del self.pending[number]
            text = (
                f"the supervisor has not answered for {limits.COMMAND_SILENCE_S:g} s; {pending.call.tool.name} may be "
                "carried out yet, and may be given again"
            )
            self._routing.ledger.finish(
                pending.call,
                fault(pending.call.call_id, "UNAVAILABLE", text, {"reason": "supervisor_silent"}),
            )
        else:
            at = pending.heard_at + limits.COMMAND_SILENCE_S
            self._routing.timers.add(at, self._listen, number)
