"""Questions about the broker itself, which it answers between other work.

An answer may list a thousand tools. So many are given in a turn, and the others wait for the next ones, session after
session: who asks a thousand times waits for itself, and nobody else does for longer than a turn's share.

What changes something is not put off: the next call of the same message may count on it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core import own_tools
from mcp_broker.core.calls import Call, CallState, fault
from mcp_broker.errors import MalformedFrame, PayloadTooLarge
from mcp_broker.wire import payload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_broker.core.client_session import ClientSession
    from mcp_broker.core.routing import Routing
    from mcp_broker.wire import messages


class Enquiries:
    """Serves calls of the broker's own tools, and holds those that wait for their turn; false if none does."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        #: session -> its calls that wait, in their order; the session whose turn is next comes first, and none is empty
        self._waiting: dict[ClientSession, deque[Call]] = {}
        #: small answers that may still be given in this turn
        self._left = limits.OWN_ANSWERS_MAX

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __iter__(self) -> Iterator[Call]:
        """Yield the calls that wait."""
        for calls in self._waiting.values():
            yield from (call for call in calls if call.state is not CallState.ENDED)

    def take(self, call: Call, now: float) -> None:
        """Answer an accepted call of one of the broker's own tools, now or in a later turn."""
        refusal = _unreadable(call)
        if refusal is not None:
            self._routing.ledger.finish(call, refusal)
        elif not own_tools.TOOLS[call.tool.name].only_tells:
            self._answer(call, now)
            # it may have changed what may be called, by the next call of the same message
            call.session.allowed.clear()
        elif self._left > 0 and not self._waiting:
            self._left -= self._answer(call, now)
        else:
            self._waiting.setdefault(call.session, deque()).append(call)

    def turn(self, now: float) -> None:
        """Answer as many as one turn may."""
        self._left = limits.OWN_ANSWERS_MAX
        while self._waiting and self._left > 0:
            session = next(iter(self._waiting))
            calls = self._waiting.pop(session)
            call = calls.popleft()
            if calls:
                self._waiting[session] = calls
            if call.state is not CallState.ENDED:
                self._left -= self._answer(call, now)

    def _answer(self, call: Call, now: float) -> int:
        """End a call with its answer, or leave it to the supervisor; returns as how many small answers it counts."""
        finish = self._routing.ledger.finish
        unread = call.session.unread_bytes
        if unread >= limits.CLIENT_BEHIND_BYTES:
            text = f"this client has yet to take {unread:,} bytes of results; read them, then ask again"
            details = {"limit": "unread_bytes", "maximum": limits.CLIENT_BEHIND_BYTES, "retry_after_s": 0.1}
            finish(call, fault(call.call_id, "OVERLOADED", text, details))
            return 1
        try:
            arguments = payload.unpack_map(call.packed_arguments())
        except MalformedFrame as malformed:
            finish(call, fault(call.call_id, "INVALID_ARGUMENT", str(malformed)))
            return 1
        answer = own_tools.serve(self._routing, call, arguments, now)
        if answer is None:
            return 1
        outcome, body = answer
        finish(call, outcome, body)
        # what was too large to be sent took as long
        is_large = body is not None or outcome.code == PayloadTooLarge.code
        return limits.OWN_ANSWERS_MAX // 2 if is_large else 1


def _unreadable(call: Call) -> messages.Outcome | None:
    """Return how a call ends whose arguments the broker does not read."""
    if call.bytes_held() > limits.OWN_ARGUMENTS_BYTES_MAX:
        # they are read in the broker's own turn
        text = f"the broker's own tools take at most {limits.OWN_ARGUMENTS_BYTES_MAX} bytes of arguments"
    elif call.extra is not None and call.extra.encoding is not None:
        text = "the broker's own tools take no encoded arguments"
    else:
        return None
    return fault(call.call_id, "INVALID_ARGUMENT", text)
