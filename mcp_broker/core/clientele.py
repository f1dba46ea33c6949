"""The clients' side of the broker's machine: sessions, the acceptance of calls, and their cancelling.

Rules
    Every CALLS item is answered: it is accepted (and then ends exactly once), or refused with an outcome.
    Who may call what is the grant's answer, asked once a tool and session and kept for the hot path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.core import introspection
from mcp_broker.core.calls import Call, fault
from mcp_broker.core.clients import (
    CLIENT_TABLE,
    EVENT_OF_KIND,
    ClientEvent,
    ClientSession,
    ClientState,
    Grant,
    Verdict,
)
from mcp_broker.core.pools import unavailable
from mcp_broker.errors import InvalidTransition, MalformedFrame
from mcp_broker.wire import codec, messages, payload

if TYPE_CHECKING:
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.pools import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing


class Clientele:
    """All client sessions, by id and by where they are reached."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._ledger = routing.ledger
        self._registry = routing.registry
        self._dispatcher = routing.dispatcher
        #: sessions with something to send
        self.dirty: list[ClientSession] = []
        #: all and only OPEN sessions, by routing id
        self.open: dict[bytes, ClientSession] = {}
        #: OPEN and LOST ones, by session id
        self.sessions: dict[bytes, ClientSession] = {}
        #: calls refused before acceptance
        self.refusals = 0
        #: the instant of the message that is being served
        self._now = 0.0
        #: suggestions made since this instant; each compares a name with all others
        self._hints = 0
        self._hints_at = 0.0

    def message(
        self, routing_id: bytes, user_id: str, message: messages.FromClient, body: Body | None, now: float
    ) -> bool:
        """Take one client message, HELLO excepted.

        Returns:
            False if this routing id has no session for this key: the shell answers with a fatal ERROR.
        """
        session = self.open.get(routing_id)
        if session is None or session.user_id != user_id:
            _, verdict = CLIENT_TABLE[ClientState.STRANGER][EVENT_OF_KIND[type(message)]]
            return verdict is not Verdict.REFUSE
        if type(message) is messages.Calls:
            self._calls(session, message, body, now)
            return True
        after, verdict = CLIENT_TABLE[session.state][EVENT_OF_KIND[type(message)]]
        if verdict is Verdict.BUG:
            raise InvalidTransition(f"{type(message).__name__} in client state {session.state.name}")
        if message.epoch != self._routing.epoch and not isinstance(message, messages.Goodbye):
            return True
        if isinstance(message, messages.Ack):
            session.acknowledge(message.count)
        elif isinstance(message, messages.Cancel):
            for call_id in message.call_ids:
                self._cancel(session, call_id, now)
        elif isinstance(message, messages.Credit):
            for credit in message.credits:
                call = session.live.get(credit.call_id)
                if call is not None:
                    self._dispatcher.credit(call, credit)
        elif isinstance(message, messages.Goodbye):
            self._close(session, "the client said goodbye", now)
        session.state = after
        return True

    def hello(
        self, routing_id: bytes, user_id: str, message: messages.Hello, grant: Grant, now: float
    ) -> ClientSession | None:
        """Open or resume a session for a verified token.

        Returns:
            The session, or None if the broker takes no more (the shell answers OVERLOADED).
        """
        known = self.open.get(routing_id)
        if known is not None:
            if known.user_id == user_id:
                known.send(
                    error(
                        "INVALID_ARGUMENT",
                        "HELLO came twice on one connection",
                        fatal=False,
                        epoch=self._routing.epoch,
                    )
                )
                return known
            # a routing id is only a name that the peer chose: who had it before is unreachable by it now
            self._lose(known, now)
        session = self.sessions.get(message.session_id) if message.session_id is not None else None
        resumed = (
            session is not None
            and session.user_id == user_id
            and session.grant.caller.principal == grant.caller.principal
        )
        if session is not None and resumed:
            if self.open.get(session.routing_id) is session:
                del self.open[session.routing_id]
            session.state = ClientState.OPEN
            session.grant = grant
            session.caller_raw = codec.raw(grant.caller)
            session.allowed_version = -1
            session.resume(routing_id, message.ack)
            welcome_first = session.outbox
            session.outbox = []
        else:
            if len(self.sessions) >= limits.SESSIONS_MAX:
                return None
            session = ClientSession(
                self._routing.new_id(), routing_id, user_id, grant, codec.raw(grant.caller), self.dirty
            )
            self.sessions[session.session_id] = session
            welcome_first = []
        session.agent = message.agent
        self.open[routing_id] = session
        session.send(
            messages.Welcome(
                self._routing.epoch,
                (messages.MAJOR, messages.MINOR),
                session.session_id,
                resumed,
                grant.caller.principal,
                messages.GrantedLimits(
                    window=limits.CLIENT_WINDOW_MAX,
                    heartbeat_ms=int(limits.HEARTBEAT_S * 1000),
                    token_ms=max(0, int((grant.expires_at - now) * 1000)),
                ),
                ("streaming",),
            )
        )
        session.outbox.extend(welcome_first)
        return session

    def renew(self, routing_id: bytes, user_id: str, grant: Grant, now: float) -> bool:
        """Replace a session's token; False if there is no such session, or it is another principal's."""
        session = self.open.get(routing_id)
        if session is None or session.user_id != user_id:
            return False
        if grant.caller.principal != session.grant.caller.principal:
            return False
        session.grant = grant
        session.caller_raw = codec.raw(grant.caller)
        session.allowed_version = -1
        session.send(messages.Renewed(self._routing.epoch, max(0, int((grant.expires_at - now) * 1000))))
        return True

    def _calls(self, session: ClientSession, message: messages.Calls, body: Body | None, now: float) -> None:
        if message.epoch != self._routing.epoch:
            return
        self._now = now
        session.acknowledge(message.ack)
        if session.allowed_version != self._registry.version:
            session.allowed = {}
            session.allowed_version = self._registry.version
        # what is the same for the whole batch is asked once
        is_open = now < session.grant.expires_at and not self._routing.draining
        allowed, live, known = session.allowed, session.live, self._ledger.calls
        accept, submit = self._ledger.accept, self._dispatcher.submit
        room = session.room()
        at_risk = session.at_risk
        ghosts = self._dispatcher.ghosts
        if body is not None and len(message.calls) != 1:
            # whose arguments the second frame holds, nobody can say
            for request in message.calls:
                text = "a message with a second frame holds exactly one call"
                self._refuse(session, fault(request.call_id, "INVALID_ARGUMENT", text))
            return
        for request in message.calls:
            if session.state is ClientState.CLOSED:
                return
            tool = allowed.get(request.tool) if is_open else None
            if tool is None:
                tool = self._admit(session, request, now)
                if tool is None:
                    continue
            call_id = request.call_id
            if call_id in at_risk and call_id not in known:
                # sent again after a resume: its outcome is on its way
                continue
            if (
                call_id in known
                or call_id in ghosts
                or room <= 0
                or (request.arguments is None) is (body is None)
            ):
                self._refuse_call(session, request, body)
                continue
            pool = tool.pool
            call = Call(request, body, session, tool, now + request.timeout_ms * 0.001)
            if pool is None:
                self._answer(call)
                continue
            if pool.is_closed:
                self._refuse_busy(session, request, pool)
                continue
            accept(call)
            live[call_id] = call
            room -= 1
            submit(call, pool, now)

    def _refuse(self, session: ClientSession, outcome: messages.Outcome) -> None:
        self.refusals += 1
        if session.is_hopeless:
            # it goes on asking and acknowledges nothing: what it is owed may not fill the broker
            self._close(session, "it acknowledges no outcomes", self._now)
            return
        session.send(outcome)

    def _admit(self, session: ClientSession, request: messages.Call, now: float) -> Tool | None:
        """Find the tool and ask the grant; the slow path, once a tool and session."""
        call_id, name = request.call_id, request.tool
        if now >= session.grant.expires_at:
            text = "the token of this session has expired; make a new profile with `mcp-broker credentials issue`"
            self._refuse(session, fault(call_id, "UNAUTHENTICATED", text, {"reason": "expired"}))
            return None
        tool = self._registry.tools.get(name)
        if self._routing.draining and (tool is None or tool.pool is not None):
            text = "the broker is shutting down and takes no new calls"
            self._refuse(session, fault(call_id, "UNAVAILABLE", text, {"reason": "draining"}))
            return None
        refusal = session.grant.refusal(name, tool.level if tool is not None else 0)
        if refusal is not None:
            self._refuse(
                session,
                fault(
                    call_id, "FORBIDDEN", refusal, {"tool": name, "principal": session.grant.caller.principal}
                ),
            )
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
                self._refuse(session, unavailable(call_id, pool, pool.failure))
                return None
            self._refuse(
                session,
                fault(
                    call_id,
                    "NOT_FOUND",
                    f"there is no tool {name}{meant}",
                    {"tool": name, "did_you_mean": similar},
                ),
            )
            return None
        session.allowed[name] = tool
        return tool

    def _similar(self, session: ClientSession, name: str, now: float) -> list[str]:
        """Return what the caller may have meant; nobody can make the broker spend its time on guessing."""
        if now - self._hints_at >= limits.HINTS_S:
            self._hints_at, self._hints = now, 0
        self._hints += 1
        if self._hints > limits.HINTS_MAX:
            return []
        visible = (known for known in self._registry.tools if session.grant.refusal(known, 0) is None)
        return self._registry.similar(name, visible)

    def _refuse_call(self, session: ClientSession, request: messages.Call, body: Body | None) -> None:
        call_id = request.call_id
        if call_id in self._ledger.calls or call_id in self._dispatcher.ghosts:
            outcome = fault(
                call_id,
                "INVALID_ARGUMENT",
                "a call with this id is already under way",
                {"call_id": call_id.hex()},
            )
            if call_id in session.live:
                # answering would end the first call at the client too; a duplicate of one's own is a resend
                self.refusals += 1
                return
        elif session.room() <= 0:
            outcome = fault(
                call_id, "OVERLOADED", f"the session's window of {limits.CLIENT_WINDOW_MAX} unfinished calls is full",
                {"limit": limits.CLIENT_WINDOW_MAX, "retry_after_s": 0.1},
            )  # fmt: skip
        else:
            where = "twice" if body is not None else "neither in the call nor in a second frame"
            outcome = fault(call_id, "INVALID_ARGUMENT", f"the arguments came {where}", {})
        self._refuse(session, outcome)

    def _refuse_busy(self, session: ClientSession, request: messages.Call, pool: Pool) -> None:
        if pool.failure:
            outcome = unavailable(request.call_id, pool, pool.failure)
        else:
            outcome = fault(
                request.call_id,
                "OVERLOADED",
                f"{len(pool.backlog)} calls wait for pool {pool.name!r} already",
                {"pool": pool.name, "retry_after_s": 1.0},
            )
        self._refuse(session, outcome)

    def _answer(self, call: Call) -> None:
        """Serve one of the broker's own tools, here and now."""
        session = call.session
        self._ledger.accept(call)
        session.live[call.call_id] = call
        if call.bytes_held() > limits.OWN_ARGUMENTS_BYTES_MAX:
            # they are read in the broker's own turn
            text = f"the broker's own tools take at most {limits.OWN_ARGUMENTS_BYTES_MAX} bytes of arguments"
            self._ledger.finish(call, fault(call.call_id, "INVALID_ARGUMENT", text))
            return
        try:
            arguments = payload.unpack_map(call.packed_arguments())
        except MalformedFrame as malformed:
            self._ledger.finish(call, fault(call.call_id, "INVALID_ARGUMENT", str(malformed)))
            return
        self._ledger.finish(call, *introspection.answer(self._routing, call, arguments))

    def _cancel(self, session: ClientSession, call_id: bytes, now: float) -> None:
        call = session.live.get(call_id)
        if call is not None:
            self._routing.end(call, fault(call_id, "CANCELLED", "cancelled by its caller"), "cancel", now)

    def unreachable(self, routing_id: bytes, now: float) -> None:
        """The socket could not reach this client any more."""
        session = self.open.get(routing_id)
        if session is not None:
            self._lose(session, now)

    def _lose(self, session: ClientSession, now: float) -> None:
        after, verdict = CLIENT_TABLE[session.state][ClientEvent.UNREACHABLE]
        session.state = after
        self.open.pop(session.routing_id, None)
        if verdict is Verdict.TAKE:
            session.lost_at = now
            self._routing.timers.add(now + limits.RESUME_GRACE_S, self._grace_over, session)

    def _grace_over(self, session: ClientSession, now: float) -> None:
        # a session that was resumed and lost again has a later timer of its own
        if session.state is ClientState.LOST and now - session.lost_at >= limits.RESUME_GRACE_S - 0.001:
            self._close(session, "its client went away", now)

    def _close(self, session: ClientSession, why: str, now: float) -> None:
        if self.open.get(session.routing_id) is session:
            del self.open[session.routing_id]
        self.sessions.pop(session.session_id, None)
        session.state = ClientState.CLOSED
        for call in list(session.live.values()):
            self._routing.end(
                call, fault(call.call_id, "CANCELLED", f"cancelled, because {why}"), "cancel", now
            )
        session.live.clear()
        session.outbox.clear()
        session.unacked.clear()

    def forget_allowed(self) -> None:
        """Have every session ask again what it may call: something above the grants has changed."""
        for session in self.sessions.values():
            session.allowed = {}

    def beat(self, beat: messages.Heartbeat, *, everyone: bool) -> None:
        """Say to clients that the broker lives."""
        for session in self.open.values():
            if session.live or session.unacked or everyone:
                session.send(beat)

    def dismiss(self) -> None:
        """Say goodbye to every client."""
        for session in list(self.open.values()):
            session.send(messages.Goodbye(self._routing.epoch, "the broker is shutting down"))


def error(
    code: str, text: str, *, fatal: bool, epoch: int, details: dict[str, Any] | None = None
) -> messages.Error:
    """Make an ERROR message: an answer that concerns no call."""
    return messages.Error(epoch, code, text, payload.pack(details or {}), fatal)
