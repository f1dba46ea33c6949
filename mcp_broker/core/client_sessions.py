"""The clients' side of the broker's machine: their sessions, and the cancelling of calls."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.core import uploads
from mcp_broker.core.acceptance import Acceptance
from mcp_broker.core.calls import CallState, fault
from mcp_broker.core.client_session import (
    CLIENT_TABLE,
    EVENT_OF_KIND,
    ClientEvent,
    ClientSession,
    ClientState,
    Grant,
    Verdict,
)
from mcp_broker.core.outbox import item_of
from mcp_broker.errors import InvalidTransition
from mcp_broker.wire import messages, node, payload

if TYPE_CHECKING:
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.routing import Routing


class ClientSessions:
    """All client sessions, by id and by where they are reached."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._dispatcher = routing.dispatcher
        self.acceptance = Acceptance(routing, self._give_up)
        #: sessions with something to send
        self.dirty: list[ClientSession] = []
        #: all and only OPEN sessions, by routing id
        self.open: dict[bytes, ClientSession] = {}
        #: OPEN and LOST ones, by session id
        self.sessions: dict[bytes, ClientSession] = {}
        #: how many sessions :meth:`cut_off` has ended
        self.cut_offs = 0

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
            if message.epoch == self._routing.epoch:
                if message.ack <= session.sent:
                    self.acceptance.calls(session, message, body, now)
                else:
                    self._refuse_ack(session, message.ack)
            return True
        after, verdict = CLIENT_TABLE[session.state][EVENT_OF_KIND[type(message)]]
        if verdict is Verdict.BUG:
            raise InvalidTransition(f"{type(message).__name__} in client state {session.state.name}")
        if message.epoch != self._routing.epoch and not isinstance(message, messages.Goodbye):
            return True
        if isinstance(message, messages.Ack):
            self._acknowledge(session, message.count, now)
        elif isinstance(message, messages.Cancel):
            for call_id in message.call_ids:
                self._cancel(session, call_id, now)
        elif isinstance(message, messages.Credit):
            self._credit(session, message)
        elif isinstance(message, messages.Chunks):
            self._chunks(session, message, body, now)
        elif isinstance(message, messages.Goodbye):
            self._close(session, "the client said goodbye", now)
        session.state = after
        return True

    def hello(
        self, routing_id: bytes, user_id: str, message: messages.Hello, grant: Grant, now: float
    ) -> ClientSession | None:
        """Open or resume a session for a verified token.

        Returns:
            The session, or None if the broker takes no more, or no more of this principal (the shell answers OVERLOADED).
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
            session.takes = frozenset(message.capabilities)
            session.trust(grant)
            session.resume(routing_id, message.ack)
            welcome_first = session.outbox
            session.outbox = []
        else:
            if self._is_full(grant.caller.principal):
                return None
            session = ClientSession(
                self._routing.new_id(),
                routing_id,
                user_id,
                grant,
                frozenset(message.capabilities),
                self.dirty,
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
                ("streaming", "progress", "zstd"),
                self._routing.lineage,
            )
        )
        session.outbox.extend(welcome_first)
        for call in session.live.values():
            if call.upload is not None and call.upload.limit:
                session.send(uploads.credit(call, call.upload, self._routing.epoch))
        if session.is_behind:
            self._dispatcher.relieve(session, now)
        return session

    def _is_full(self, principal: str) -> bool:
        if len(self.sessions) < limits.PRINCIPAL_SESSIONS_MAX:
            return False
        its = sum(session.grant.caller.principal == principal for session in self.sessions.values())
        return len(self.sessions) >= limits.SESSIONS_MAX or its >= limits.PRINCIPAL_SESSIONS_MAX

    def renew(self, routing_id: bytes, user_id: str, grant: Grant, now: float) -> bool:
        """Replace a session's token; False if there is no such session, or it is another principal's."""
        session = self.open.get(routing_id)
        if session is None or session.user_id != user_id:
            return False
        if grant.caller.principal != session.grant.caller.principal:
            return False
        session.trust(grant)
        session.send(messages.Renewed(self._routing.epoch, max(0, int((grant.expires_at - now) * 1000))))
        return True

    def _acknowledge(self, session: ClientSession, count: int, now: float) -> None:
        if count > session.sent:
            self._refuse_ack(session, count)
            return
        session.acknowledge(count)
        if session.is_behind:
            self._dispatcher.relieve(session, now)

    def _refuse_ack(self, session: ClientSession, count: int) -> None:
        """Answer who acknowledges what it cannot have: what it has yet to read would count as read."""
        text = (
            f"{count} outcomes are acknowledged, and {session.sent} were sent; the number is that of the last outcome "
            "that came without a gap before it"
        )
        details = {"acknowledged": count, "sent": session.sent}
        session.send(error("MALFORMED_FRAME", text, fatal=True, epoch=self._routing.epoch, details=details))

    def _cancel(self, session: ClientSession, call_id: bytes, now: float) -> None:
        call = session.live.get(call_id)
        if call is not None:
            self._routing.end(call, fault(call_id, "CANCELLED", "cancelled by its caller"), "cancel", now)

    def _credit(self, session: ClientSession, message: messages.Credit) -> None:
        for credit in message.credits:
            call = session.live.get(credit.call_id)
            if call is not None:
                self._dispatcher.credit(call, credit)

    def _chunks(
        self, session: ClientSession, message: messages.Chunks, body: Body | None, now: float
    ) -> None:
        for chunk in message.chunks:
            call = session.live.get(chunk.call_id)
            if call is None or call.upload is None:
                continue
            end = uploads.take(call, call.upload, chunk, body, self._routing.epoch)
            if end is not None:
                self._routing.end(call, end, "cancel", now)

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
            self._give_up(session, "its client went away", now)

    def _give_up(self, session: ClientSession, why: str, now: float) -> None:
        """End a session whose client may come back, and ask for its calls: here, or at the broker after this one."""
        abandoned = _of(session)
        if abandoned:
            self._routing.reconciliation.were_abandoned(abandoned)
            self._routing.to_node.append(node.Abandoned(abandoned))
        self._close(session, why, now)

    def _close(self, session: ClientSession, why: str, now: float) -> None:
        if self.open.get(session.routing_id) is session:
            del self.open[session.routing_id]
        self.sessions.pop(session.session_id, None)
        self._routing.detached.leave(session, now)
        session.state = ClientState.CLOSED
        for call in list(session.live.values()):
            if call.state is not CallState.ENDED:
                # else it followed one that ended before it in this loop
                outcome = fault(call.call_id, "CANCELLED", f"cancelled, because {why}")
                self._routing.end(call, outcome, "cancel", now)
        session.release()

    def cut_off(self, now: float) -> None:
        """End sessions until what clients have yet to read is within its bound.

        The principal that has most of it loses its session that has most: nobody pays for what others do not read.
        """
        held = {session: size for session in self.sessions.values() if (size := session.held_bytes)}
        total = sum(held.values())
        if total <= limits.UNREAD_BYTES_MAX:
            return
        by_principal: dict[str, list[ClientSession]] = {}
        sums: Counter[str] = Counter()
        for session in sorted(held, key=held.__getitem__):
            principal = session.grant.caller.principal
            by_principal.setdefault(principal, []).append(session)
            sums[principal] += held[session]
        while total > limits.UNREAD_BYTES_MAX:
            [(principal, _)] = sums.most_common(1)
            session = by_principal[principal].pop()
            sums[principal] -= held[session]
            total -= held[session]
            self.cut_offs += 1
            self._give_up(session, "its client does not read its results", now)

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


def _of(session: ClientSession) -> tuple[bytes, ...]:
    """Return the calls that a client which went away may still ask for: it knows no outcome of them."""
    sent = (entry for sent in session.unacked for entry in sent.entries)
    items = (item_of(entry) for entry in (*sent, *session.outbox))
    outcomes = (item.call_id for item in items if isinstance(item, messages.Outcome))
    return (*outcomes, *session.live)


def error(
    code: str, text: str, *, fatal: bool, epoch: int, details: dict[str, Any] | None = None
) -> messages.Error:
    """Make an ERROR message: an answer that concerns no call."""
    return messages.Error(epoch, code, text, payload.pack(details or {}), fatal)
