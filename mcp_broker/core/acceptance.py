"""The acceptance of calls: each is accepted, and then ends exactly once, or refused with an outcome.

Who may call what is the grant's answer, asked once a tool and session and kept for the hot path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core.calls import Call, Upload, fault
from mcp_broker.core.client_session import ClientSession, ClientState
from mcp_broker.core.failures import unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.core.outbox import Body
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing
    from mcp_broker.core.wheel import Slot
    from mcp_broker.wire import messages

_CLOSED = ClientState.CLOSED


class Acceptance:
    """Takes CALLS messages of open sessions.

    Args:
        close: ends a session, and its calls, for a reason.
    """

    def __init__(self, routing: Routing, close: Callable[[ClientSession, str, float], None]) -> None:
        self._routing = routing
        self._close = close
        self._ledger = routing.ledger
        self._registry = routing.registry
        self._dispatcher = routing.dispatcher
        self._rates = routing.rates
        #: suggestions made since this instant; each compares a name with all others
        self._hints = 0
        self._hints_at = 0.0

    def calls(  # noqa: C901, PLR0912 (the hot path: a function more costs as much as what it would do)
        self, session: ClientSession, message: messages.Calls, body: Body | None, now: float
    ) -> None:
        """Accept or refuse each call of a message."""
        session.acknowledge(message.ack)
        if session.is_behind:
            self._dispatcher.relieve(session, now)
        if session.allowed_version != self._registry.version:
            session.allowed = {}
            session.allowed_version = self._registry.version
        if body is not None and len(message.calls) != 1:
            # whose arguments the second frame holds, nobody can say
            text = "a message with a second frame holds exactly one call"
            for request in message.calls:
                self._refuse(session, fault(request.call_id, "INVALID_ARGUMENT", text), now)
            return
        # what is the same for the whole message is asked once
        is_open = now < session.grant.expires_at and not self._routing.draining
        allowed = session.allowed if is_open else {}
        live, at_risk, known, ghosts = (
            session.live,
            session.at_risk,
            self._ledger.calls,
            self._dispatcher.ghosts,
        )
        room = session.room()
        is_metered = self._rates.principal is not None or self._registry.is_metered
        pool: Pool | None = None
        batch: list[Call] = []
        slot: Slot[Call] | None = None
        timeout_ms, deadline = 0, 0.0
        for request in message.calls:
            call_id = request.call_id
            tool = allowed.get(request.tool)
            extra = request.extra
            if (
                tool is None
                or room <= 0
                or call_id in live
                or call_id in known
                or call_id in ghosts
                or call_id in at_risk
                or (extra is not None and extra.is_special)
                or (request.arguments is None) is (body is None)
            ):
                # a refusal may close the session, which ends all that was accepted
                batch, slot = self._take(batch, pool, now), None
                tool = self._examine(session, request, allowed, body, now)
                if session.state is _CLOSED:
                    return
                if tool is None:
                    continue
            if tool.pool is not pool:
                batch, slot = self._take(batch, pool, now), None
                pool = tool.pool
                if pool is not None and pool.failure and not (extra is not None and extra.again):
                    self._refuse(session, unavailable(call_id, pool, pool.failure), now)
                    if session.state is _CLOSED:
                        return
                    # the next one asks again
                    pool = None
                    continue
            if is_metered and (outcome := self._too_fast(session, request, tool, now)) is not None:
                batch, slot = self._take(batch, pool, now), None
                self._refuse(session, outcome, now)
                if session.state is _CLOSED:
                    return
                continue
            if slot is None or request.timeout_ms != timeout_ms:
                timeout_ms = request.timeout_ms
                deadline = now + timeout_ms * 0.001
                slot = self._ledger.slot(deadline)
            call = Call(call_id, request.arguments, extra, body, session, tool, deadline, slot)
            live[call_id] = call
            room -= 1
            batch.append(call)
            if extra is not None and extra.is_special:
                # alone in its batch, since it was examined
                batch, slot = self._take_special(call, extra, pool, now), None
                # the next one asks again
                pool = None
            elif pool is None:
                # it may change what the next one may do
                batch, slot = self._take(batch, pool, now), None
        self._take(batch, pool, now)

    def _too_fast(
        self, session: ClientSession, request: messages.Call, tool: Tool, now: float
    ) -> messages.Outcome | None:
        """Return how a call ends that comes before its time; one that was sent before is asked when nobody knows of it."""
        if request.extra is not None and request.extra.again and tool.pool is not None:
            return None
        return self._rates.refusal(request.call_id, tool, session.grant.caller.principal, now)

    def _take(self, batch: list[Call], pool: Pool | None, now: float) -> list[Call]:
        """Accept calls for one pool, None being the broker itself; return an empty list for the next ones."""
        if batch:
            self._ledger.accept(batch)
            if pool is not None:
                self._dispatcher.submit(batch, pool, now)
            else:
                for call in batch:
                    self._routing.enquiries.take(call, now)
        return []

    def _take_special(
        self, call: Call, extra: messages.CallExtra, pool: Pool | None, now: float
    ) -> list[Call]:
        """Accept a call that asks for more than to be run; return an empty list for the next ones."""
        if pool is None:
            return self._take([call], pool, now)
        self._ledger.accept([call])
        if extra.idle_timeout_ms is not None:
            self._ledger.watch(call, extra.idle_timeout_ms, now)
        if extra.upload is not None:
            call.upload = Upload()
            if extra.detach or extra.idempotency_key is not None:
                text = "a call with an upload can be neither detached nor keyed: what it is given is not kept"
                self._ledger.finish(call, fault(call.call_id, "INVALID_ARGUMENT", text))
                return []
        if extra.detach and call.tool.is_streaming:
            text = "a streaming tool cannot be detached: its parts are not kept"
            self._ledger.finish(call, fault(call.call_id, "INVALID_ARGUMENT", text, {"tool": call.tool.name}))
            return []
        key = extra.idempotency_key
        if key is not None and self._routing.idempotency.claims(call, key, now):
            return []
        if extra.again:
            if self._routing.reconciliation.claims(call):
                return []
            refusal = self._as_new(call, pool, now)
            if refusal is not None:
                self._ledger.refuse(call, refusal)
                return []
        self._dispatcher.submit([call], pool, now)
        return []

    def _as_new(self, call: Call, pool: Pool, now: float) -> messages.Outcome | None:
        """Return how a call ends that was sent again, by its client's word only, and that would not be taken as a new one."""
        if pool.failure:
            return unavailable(call.call_id, pool, pool.failure)
        principal = call.session.grant.caller.principal
        refusal = self._routing.health.refusal(call.tool, call.call_id, principal, now)
        if now < self._routing.began + limits.ORPHAN_S:
            # what waited at an earlier broker passed its rates there, and comes all at once
            return refusal
        return refusal or self._rates.refusal(call.call_id, call.tool, principal, now)

    def _examine(
        self,
        session: ClientSession,
        request: messages.Call,
        allowed: dict[str, Tool],
        body: Body | None,
        now: float,
    ) -> Tool | None:
        """Find a call's tool, or refuse it; the slow path, once a tool and session."""
        call_id = request.call_id
        if request.extra is not None and request.extra.attach:
            self._attach(session, request, request.extra, now)
            return None
        is_known = call_id in self._ledger.calls
        if call_id in session.at_risk and not is_known:
            # sent again after a resume: its outcome is on its way
            return None
        if call_id in session.live:
            # a duplicate of one's own is a resend; to refuse it, since the broker drains now, would end the first too
            return None
        tool = allowed.get(request.tool) or self._admit(session, request, now)
        if tool is None:
            return None
        if is_known or call_id in self._dispatcher.ghosts:
            text = "a call with this id is already under way"
            outcome = fault(call_id, "INVALID_ARGUMENT", text, {"call_id": call_id.hex()})
        elif session.room() <= 0:
            outcome = _window_full(call_id)
        elif (request.arguments is None) is (body is None):
            where = "twice" if body is not None else "neither in the call nor in a second frame"
            outcome = fault(call_id, "INVALID_ARGUMENT", f"the arguments came {where}", {})
        else:
            return tool
        self._refuse(session, outcome, now)
        return None

    def _attach(
        self, session: ClientSession, request: messages.Call, extra: messages.CallExtra, now: float
    ) -> None:
        """Give a session a detached call, unless it has it already."""
        call_id = request.call_id
        if call_id in session.live or (extra.again and call_id in session.at_risk):
            # in the latter case its outcome is on its way, as that of any call that is sent again after a resume
            return
        if now >= session.grant.expires_at:
            refusal: messages.Outcome | None = _expired(call_id)
        elif session.room() <= 0:
            refusal = _window_full(call_id)
        else:
            refusal = self._routing.detached.attach(session, call_id)
        if refusal is not None:
            self._refuse(session, refusal, now)

    def _refuse(self, session: ClientSession, outcome: messages.Outcome, now: float) -> None:
        refused = self._ledger.refused
        refused[outcome.code] = refused.get(outcome.code, 0) + 1
        if session.is_hopeless:
            # it goes on asking and acknowledges nothing: what it is owed may not fill the broker
            self._close(session, "it acknowledges no outcomes", now)
            return
        session.deliver(outcome, None)

    def _admit(self, session: ClientSession, request: messages.Call, now: float) -> Tool | None:
        """Find the tool and ask the grant."""
        call_id, name = request.call_id, request.tool
        if now >= session.grant.expires_at:
            self._refuse(session, _expired(call_id), now)
            return None
        tool = self._registry.tools.get(name)
        if self._routing.draining and (tool is None or tool.pool is not None):
            text = "the broker is shutting down and takes no new calls"
            self._refuse(session, fault(call_id, "UNAVAILABLE", text, {"reason": "draining"}), now)
            return None
        refusal = session.grant.refusal(name, tool.level if tool is not None else 0)
        if refusal is not None:
            self._refuse(
                session,
                fault(
                    call_id, "FORBIDDEN", refusal, {"tool": name, "principal": session.grant.caller.principal}
                ),
                now,
            )
            return None
        if tool is None and request.extra is not None and request.extra.again:
            # an earlier broker may have had the tool, and a worker of that time may have run it
            text = f"there is no tool {name} any more; a call that was sent before may have run"
            self._refuse(session, fault(call_id, "BROKER_LOST", text, {"tool": name}), now)
            return None
        if tool is None:
            similar = self._similar(session, name, now)
            meant = f"; did you mean {similar[0]}?" if similar else "; `mcp-broker tools` lists what there is"
            failed = [
                pool.name
                for pool in self._dispatcher.pools.values()
                if pool.failure and name.startswith(pool.name)
            ]
            if failed:
                pool = self._dispatcher.pools[failed[0]]
                self._refuse(session, unavailable(call_id, pool, pool.failure), now)
                return None
            starting = [] if similar else self._starting()
            if starting:
                names = ", ".join(starting)
                text = f"there is no tool {name} yet; of these pools no worker has come so far: {names}"
                details = {"reason": "starting", "pools": starting, "retry_after_s": limits.RETRY_AFTER_S}
                self._refuse(session, fault(call_id, "UNAVAILABLE", text, details, retryable=True), now)
                return None
            self._refuse(
                session,
                fault(
                    call_id,
                    "NOT_FOUND",
                    f"there is no tool {name}{meant}",
                    {"tool": name, "did_you_mean": similar},
                ),
                now,
            )
            return None
        return self._let_in(session, request, tool, now)

    def _let_in(self, session: ClientSession, request: messages.Call, tool: Tool, now: float) -> Tool | None:
        """Ask how the tool is, and remember it where nobody need ask again."""
        if tool.condition is None or tool.condition.is_plain:
            session.allowed[tool.name] = tool
            return tool
        if request.extra is not None and request.extra.again:
            # it may have been accepted once, and run already: whether it does is asked when it is taken
            return tool
        outcome = self._routing.health.refusal(tool, request.call_id, session.grant.caller.principal, now)
        if outcome is not None:
            self._refuse(session, outcome, now)
            return None
        return tool

    def _starting(self) -> list[str]:
        """Return the pools whose tools nobody knows yet."""
        pools = [
            pool
            for pool in self._dispatcher.pools.values()
            if not pool.failure and pool.report is not None and pool.report.wanted
        ]
        known = {tool.pool for tool in self._registry.tools.values()}
        return sorted(pool.name for pool in pools if pool not in known)

    def _similar(self, session: ClientSession, name: str, now: float) -> list[str]:
        """Return what the caller may have meant; nobody can make the broker spend its time on guessing."""
        if now - self._hints_at >= limits.HINTS_S:
            self._hints_at, self._hints = now, 0
        self._hints += 1
        if self._hints > limits.HINTS_MAX:
            return []
        visible = (known for known in self._registry.tools if session.grant.refusal(known, 0) is None)
        return self._registry.similar(name, visible)


def _expired(call_id: bytes) -> messages.Outcome:
    text = "the token of this session has expired; make a new profile with `mcp-broker credentials issue`"
    return fault(call_id, "UNAUTHENTICATED", text, {"reason": "expired"})


def _window_full(call_id: bytes) -> messages.Outcome:
    text = f"the session's window of {limits.CLIENT_WINDOW_MAX} unfinished calls is full"
    return fault(
        call_id,
        "OVERLOADED",
        text,
        {"limit": "window", "maximum": limits.CLIENT_WINDOW_MAX, "retry_after_s": 0.1},
    )
