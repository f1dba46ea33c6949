"""Detached calls: they go on when their client goes away, and whoever has their id may take them up again.

A call that asked for it (``extra.detach``) is not cancelled with its session. Its outcome waits here, for a time and
within bounds, until a session of the same principal *attaches* to the call by its id. In memory: a broker that is
restarted knows them only while a client or a worker does; a worker that registers tells of those that it holds. Source: docs/protocol.md, "Detached calls".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.core import failures
from mcp_broker.core.calls import Call, fault
from mcp_broker.core.client_session import ClientSession
from mcp_broker.core.shelf import Shelf
from mcp_broker.wire import messages
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.orphans import Orphan
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.receipts import Receipt
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing
    from mcp_broker.core.worker import Worker
    from mcp_broker.wire.node import Certificate


class Waiting(Slim):
    """The outcome of a detached call that nobody has fetched."""

    outcome: messages.Outcome
    body: Body | None
    #: whose it is
    tool: Tool


class _Adrift(ClientSession):
    """Stands in for the session of detached calls."""

    __slots__ = ("_detached",)

    def __init__(self, detached: Detached, session: ClientSession) -> None:
        super().__init__(b"", b"", session.user_id, session.grant, session.takes, [])
        self._detached = detached
        self.live = detached.live

    def send(self, entry: Any) -> None:  # noqa: ANN401
        """Nobody listens."""

    def expect(self, receipt: Receipt, count: int) -> None:
        """An outcome that is kept here has arrived, as far as its worker is concerned."""

    def deliver(self, outcome: messages.Outcome, body: Body | None) -> None:
        """Keep the outcome."""
        call = self.live.pop(outcome.call_id)
        self._detached.keep(self.grant.caller.principal, call.tool, outcome, body)


class Detached:
    """All calls without a client, and outcomes that wait for one."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._ledger = routing.ledger
        #: detached calls without an outcome, by id
        self.live: dict[bytes, Call] = {}
        #: (principal, call id) -> outcome: nobody takes another one's place by using its id
        self.outcomes: Shelf[tuple[str, bytes], Waiting] = Shelf(routing.timers, limits.DETACHED_TTL_S)

    def leave(self, session: ClientSession, now: float) -> None:
        """Take over the calls of a session that ends, as far as they asked for it."""
        mine = [call for call in session.live.values() if call.extra is not None and call.extra.detach]
        if not mine:
            return
        adrift = _Adrift(self, session)
        for call in mine:
            del session.live[call.call_id]
            self.live[call.call_id] = call
            self._routing.dispatcher.backpressure.move(call, adrift)
        if adrift.is_behind:
            # what the client had yet to read is no matter any more
            self._routing.dispatcher.relieve(adrift, now)

    def keep(self, principal: str, tool: Tool, outcome: messages.Outcome, body: Body | None) -> None:
        """Let an outcome wait to be fetched; past the bounds, the oldest of whoever has the most is dropped."""
        size = limits.RECORD_BYTES + len(body if body is not None else outcome.body or b"")
        key = principal, outcome.call_id
        self.outcomes.put(key, Waiting(outcome, body, tool), principal, size, self._routing.now)
        self.outcomes.trim(limits.DETACHED_MAX, limits.DETACHED_BYTES_MAX)

    def tool_of(self, worker: Worker, held: messages.Held) -> Tool | None:
        """Return the tool of a detached call that a worker holds, if that is one of its pool's."""
        tool = self._routing.registry.tools.get(held.tool) if held.tool else None
        is_its = tool is not None and tool.pool is not None and tool.pool.family == worker.pool.family
        return tool if is_its else None

    def inherit(self, orphan: Orphan, outcome: messages.Outcome, body: Body | None = None) -> None:
        """Keep the outcome of a call that nobody has asked for since the broker was replaced, if it is detached."""
        if orphan.tool is not None and not orphan.is_unwanted:
            self.keep(orphan.principal, orphan.tool, outcome, body)

    def bereaved(self, orphans: list[Orphan], certificate: Certificate) -> None:
        """Their worker has died."""
        for orphan in orphans:
            if orphan.tool is not None:
                self.inherit(orphan, failures.forsaken(orphan.call_id, orphan.tool, certificate))

    def late(self, orphan: Orphan) -> None:
        """A call that runs, and that nobody has asked for, is stopped: its time is over."""
        if orphan.tool is not None:
            text = f"{orphan.tool.name} had no outcome within its time; it was running"
            details = {"which": "timeout", "was": "running"}
            self.inherit(orphan, fault(orphan.call_id, "DEADLINE_EXCEEDED", text, details))

    def attach(self, session: ClientSession, call_id: bytes) -> messages.Outcome | None:
        """Give a detached call, or its outcome, to a session of the same principal that may call its tool.

        Returns:
            None, or the refusal.
        """
        principal = session.grant.caller.principal
        call = self._ledger.calls.get(call_id)
        if (
            call is not None
            and call.extra is not None
            and call.extra.detach
            and call.session.grant.caller.principal == principal
        ):
            if (refusal := _forbidden(session, call_id, call.tool)) is not None:
                return refusal
            # also from a session whose end nobody has noticed yet
            call.session.live.pop(call_id, None)
            self._routing.dispatcher.backpressure.move(call, session)
            session.live[call_id] = call
            return None
        waiting = self.outcomes.get((principal, call_id))
        if waiting is not None:
            if (refusal := _forbidden(session, call_id, waiting.tool)) is not None:
                return refusal
            self.outcomes.take((principal, call_id))
            session.deliver(waiting.outcome, waiting.body)
            return None
        reconciliation = self._routing.reconciliation
        orphan = reconciliation.orphans.detached(principal, call_id) if call is None else None
        if orphan is not None and orphan.tool is not None:
            if (refusal := _forbidden(session, call_id, orphan.tool)) is None:
                self._adopt(session, orphan, orphan.tool)
            return refusal
        if call is None and reconciliation.is_waiting():
            text = "whether there is such a call is not known yet: workers have yet to tell this broker what they hold"
            details = {"reason": "starting", "retry_after_s": limits.RETRY_AFTER_S}
            return fault(call_id, "UNAVAILABLE", text, details, retryable=True)
        text = (
            f"there is no detached call {call_id.hex()}: it never was detached, it was fetched, or it ended over "
            f"{limits.DETACHED_TTL_S / 60:g} minutes ago"
        )
        return fault(call_id, "NOT_FOUND", text, {"call_id": call_id.hex()})

    def _adopt(self, session: ClientSession, orphan: Orphan, tool: Tool) -> None:
        """Make a call of what a worker holds."""
        deadline = max(orphan.ends, self._routing.now + limits.ORPHAN_S)
        call_id, extra, slot = orphan.call_id, messages.CallExtra(detach=True), self._ledger.slot(deadline)
        call = Call(call_id, b"", extra, None, session, tool, deadline, slot)
        # its arguments are with its worker: it cannot run again
        call.attempts = limits.ATTEMPTS_MAX - 1
        session.live[call_id] = call
        self._ledger.accept([call])
        self._routing.reconciliation.claims(call)


def _forbidden(session: ClientSession, call_id: bytes, tool: Tool) -> messages.Outcome | None:
    """Return how it ends that a session wants the call of a tool that it may not call, or None."""
    refusal = session.grant.refusal(tool.name, tool.level)
    if refusal is None:
        return None
    details = {"tool": tool.name, "principal": session.grant.caller.principal}
    return fault(call_id, "FORBIDDEN", refusal, details)
