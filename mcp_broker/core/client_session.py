r"""A client's session as the broker sees it: the table of what it may do when, and what it is owed.

::

    STRANGER --HELLO--> OPEN --UNREACHABLE--> LOST --GRACE_OVER--> CLOSED
                         ^  \                 |
                         |   GOODBYE          |
                         |    `---> CLOSED    |
                         +------- HELLO (resume, same key)

Source: docs/protocol.md, "Client sessions".
"""

from __future__ import annotations

from collections import deque
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Final, Protocol

import mcp_broker.limits as bounds
from mcp_broker.core import outbox
from mcp_broker.core.parts import KeptParts
from mcp_broker.core.receipts import Receipt, Share
from mcp_broker.wire import codec, messages
from mcp_broker.wire.messages import Outcome
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.registry import Tool


class ClientState(IntEnum):
    """What the broker knows about a client's connection."""

    STRANGER = 0
    OPEN = 1
    LOST = 2
    CLOSED = 3


class ClientEvent(IntEnum):
    """What can happen to a client session."""

    HELLO = 0
    RENEW = 1
    GOODBYE = 2
    CALLS = 3
    CANCEL = 4
    ACK = 5
    CREDIT = 6
    HEARTBEAT = 7
    UNREACHABLE = 8
    GRACE_OVER = 9


class Verdict(Enum):
    """What the table says to an event."""

    TAKE = "take"
    #: answered with a fatal ERROR: the peer has to say HELLO first
    REFUSE = "refuse"
    #: true, and of no consequence here
    IGNORE = "ignore"
    #: only our own bug leads here
    BUG = "bug"


_T: Final = Verdict.TAKE
_R: Final = Verdict.REFUSE
_I: Final = Verdict.IGNORE
_B: Final = Verdict.BUG
_S, _O, _L, _C = ClientState

#: state -> event -> (next state, verdict). A peer never meets LOST or CLOSED sessions except by HELLO: its
#: routing id is a STRANGER's again.
CLIENT_TABLE: Final[tuple[tuple[tuple[ClientState, Verdict], ...], ...]] = (
    # HELLO   RENEW     GOODBYE   CALLS     CANCEL    ACK       CREDIT    HEARTBEAT UNREACH.  GRACE_OVER
    ((_O, _T), (_S, _R), (_S, _I), (_S, _R), (_S, _R), (_S, _R), (_S, _R), (_S, _R), (_S, _I), (_S, _B)),  # STRANGER
    ((_O, _R), (_O, _T), (_C, _T), (_O, _T), (_O, _T), (_O, _T), (_O, _T), (_O, _T), (_L, _T), (_O, _I)),  # OPEN
    ((_O, _T), (_L, _B), (_L, _B), (_L, _B), (_L, _B), (_L, _B), (_L, _B), (_L, _B), (_L, _I), (_C, _T)),  # LOST
    ((_C, _B), (_C, _B), (_C, _B), (_C, _B), (_C, _B), (_C, _B), (_C, _B), (_C, _B), (_C, _I), (_C, _I)),  # CLOSED
)  # fmt: skip

#: which event a message is
EVENT_OF_KIND: Final[dict[type, ClientEvent]] = {
    messages.Hello: ClientEvent.HELLO,
    messages.Renew: ClientEvent.RENEW,
    messages.Goodbye: ClientEvent.GOODBYE,
    messages.Calls: ClientEvent.CALLS,
    messages.Cancel: ClientEvent.CANCEL,
    messages.Ack: ClientEvent.ACK,
    messages.Credit: ClientEvent.CREDIT,
    messages.Chunks: ClientEvent.CREDIT,
    messages.Heartbeat: ClientEvent.HEARTBEAT,
}


class Grant(Protocol):
    """What a verified token gives; made by the shell (auth), asked by the machines."""

    @property
    def caller(self) -> messages.Caller:
        """Who it is."""
        ...

    @property
    def expires_at(self) -> float:
        """Instant, on the machines' clock, after which it counts no more."""
        ...

    @property
    def weight(self) -> int:
        """Its principal's share where many wait, 1 to WEIGHT_MAX."""
        ...

    @property
    def priority(self) -> int:
        """The highest class in which its calls may wait, a Priority."""
        ...

    def refusal(self, tool: str, level: int) -> str | None:
        """Return why a tool is not covered, or None if it is."""
        ...


class Sent(Slim):
    """One message of outcomes that went to a client: the number of its last one, the entries, and their bytes."""

    last: int
    entries: list[Any]
    size: int


class ClientSession:
    """One client's session. Who it is never changes; where it is reached may.

    Attributes:
        routing_id: where it is reached now.
        live: calls of this session that have no outcome yet, by id.
        allowed: tools found covered by the grant, a cache for the hot path; valid for one registry version.
        outbox: what to send at the end of this turn, in order.
        delivered: how many outcomes were ever queued for this session; the newest of them will have this number.
        shares: workers' messages that its unacknowledged outcomes belong to, oldest first.
        unacked: outcomes sent and not yet acknowledged, message by message, oldest first.
        unacked_count, unacked_bytes: how many they are, and how large.
        kept: parts of streams that the client has not confirmed.
        news: call id -> how far it has come, where the client has yet to hear that.
        takes: what the client can do besides, by its own word.
        at_risk: calls that the client may send again since it resumed, though we had them: without an outcome, or with
            one that it had not acknowledged. Ids are never used twice, so the set may stay until the next resume.
        queued_bytes: of the large results in the outbox.
        expected_bytes: of large results that workers are expected to make for it.
        is_behind: it has so much to read that some of its calls are set aside (see core/backpressure).
        sent: how many outcomes were ever numbered for this session; the newest of ``unacked`` has this number.
    """

    __slots__ = (
        "_dirty_list",
        "agent",
        "allowed",
        "allowed_version",
        "at_risk",
        "caller_raw",
        "delivered",
        "dirty",
        "expected_bytes",
        "grant",
        "is_behind",
        "kept",
        "live",
        "lost_at",
        "news",
        "outbox",
        "queued_bytes",
        "routing_id",
        "sent",
        "session_id",
        "shares",
        "state",
        "takes",
        "unacked",
        "unacked_bytes",
        "unacked_count",
        "user_id",
    )  # fmt: skip

    def __init__(
        self,
        session_id: bytes,
        routing_id: bytes,
        user_id: str,
        grant: Grant,
        takes: frozenset[str],
        dirty_list: list[ClientSession],
    ) -> None:
        self.session_id = session_id
        self.routing_id = routing_id
        self.user_id = user_id
        self.takes = takes
        self.agent = ""
        self.state = ClientState.OPEN
        self.live: dict[bytes, Call] = {}
        self.allowed: dict[str, Tool] = {}
        self.trust(grant)
        self.outbox: list[Any] = []
        self.dirty = False
        self._dirty_list = dirty_list
        self.delivered = 0
        self.shares: deque[Share] = deque()
        self.unacked: deque[Sent] = deque()
        self.unacked_count = self.unacked_bytes = 0
        self.sent = 0
        self.queued_bytes = self.expected_bytes = 0
        self.is_behind = False
        self.lost_at = 0.0
        self.kept = KeptParts()
        self.news: dict[bytes, messages.Progress] = {}
        self.at_risk: frozenset[bytes] = frozenset()

    def trust(self, grant: Grant) -> None:
        """Take what a verified token gives, in place of what one gave before."""
        self.grant = grant
        self.allowed_version = -1
        caller = grant.caller
        if "zstd" in self.takes:
            caller = messages.Caller(
                caller.principal, caller.clearance, caller.scopes, caller.admin, ("zstd",)
            )
        #: packed once for all calls
        self.caller_raw = codec.raw(caller)

    def send(self, entry: Any) -> None:  # noqa: ANN401 (a message, an item or a Big)
        """Queue an entry for the end of this turn."""
        self.outbox.append(entry)
        if not self.dirty:
            self.dirty = True
            self._dirty_list.append(self)

    def tell(self, progress: messages.Progress) -> None:
        """Tell how far a call has come, in place of what was to be told before, if this client hears it."""
        if "progress" in self.takes:
            self.news[progress.call_id] = progress
            if not self.dirty:
                self.dirty = True
                self._dirty_list.append(self)

    def deliver(self, outcome: Outcome, body: outbox.Body | None) -> None:
        """Queue the outcome of one of this session's calls, unless nobody is left to hear it."""
        self.live.pop(outcome.call_id, None)
        if self.news:
            self.news.pop(outcome.call_id, None)
        if self.state is _C:
            return
        self.delivered += 1
        if body is None:
            self.outbox.append(outcome)
        else:
            self.outbox.append(outbox.Big(outcome, body))
            self.queued_bytes += len(body)
        if not self.dirty:
            self.dirty = True
            self._dirty_list.append(self)

    def expect(self, receipt: Receipt, count: int) -> None:
        """Note that the last ``count`` outcomes that were delivered belong to a worker's message."""
        if self.state is _C:
            return
        receipt.left += count
        self.shares.append(Share(self.delivered, receipt, count))

    def take_outbox(self, epoch: int) -> list[outbox.Packed]:
        """Return the turn's messages, packed; outcomes among them are numbered and kept until acknowledged."""
        entries, self.outbox = self.outbox, []
        self.dirty = False
        self.queued_bytes = 0
        packed: list[outbox.Packed] = []
        for kind, run in outbox.runs(entries):
            first = run[0]
            if kind is Outcome:
                self._pack(epoch, run, packed)
            elif kind is outbox.Big:
                if type(first.item) is Outcome:
                    message: messages.Message = messages.Outcomes(epoch, self.sent + 1, (first.item,))
                    self._number(run, len(first.body))
                else:
                    message = messages.Partial(epoch, (first.item,))
                packed.append((codec.encode(message), first.body))
            elif kind is messages.Part:
                parts = [run] if len(run) == 1 else outbox.split(run)
                packed.extend((codec.encode(messages.Partial(epoch, tuple(part))), None) for part in parts)
            else:
                packed.append((codec.encode(first), None))
        if self.news:
            news, self.news = list(self.news.values()), {}
            runs = (news[at : at + bounds.BATCH_MAX] for at in range(0, len(news), bounds.BATCH_MAX))
            packed.extend((codec.encode(messages.Progresses(epoch, tuple(run))), None) for run in runs)
        return packed

    def _pack(self, epoch: int, run: list[Outcome], packed: list[outbox.Packed]) -> None:
        envelope = codec.encode(messages.Outcomes(epoch, self.sent + 1, tuple(run)))
        if len(envelope) <= bounds.ENVELOPE_BYTES_MAX:
            packed.append((envelope, None))
            self._number(run, len(envelope))
            return
        for part in outbox.split(run):
            envelope = codec.encode(messages.Outcomes(epoch, self.sent + 1, tuple(part)))
            packed.append((envelope, None))
            self._number(part, len(envelope))

    def _number(self, run: list[Any], size: int) -> None:
        self.sent += len(run)
        self.unacked.append(Sent(self.sent, run, size))
        self.unacked_count += len(run)
        self.unacked_bytes += size

    def acknowledge(self, count: int) -> None:
        """Forget the messages of outcomes that the client says it has."""
        unacked = self.unacked
        while unacked and unacked[0].last <= count:
            sent = unacked.popleft()
            self.unacked_count -= len(sent.entries)
            self.unacked_bytes -= sent.size
            if self.kept.by_call:
                for entry in sent.entries:
                    self.kept.forget(outbox.item_of(entry).call_id)
        shares = self.shares
        while shares and shares[0].number <= count:
            share = shares.popleft()
            share.receipt.left -= share.count

    def release(self) -> None:
        """Nobody will acknowledge anything any more."""
        self.live.clear()
        self.outbox.clear()
        self.unacked.clear()
        self.unacked_count = self.unacked_bytes = 0
        for share in self.shares:
            share.receipt.left -= share.count
        self.shares.clear()
        self.kept.clear()
        self.news.clear()

    def resume(self, routing_id: bytes, ack: int) -> None:
        """Go on at another place: what was sent and not acknowledged is sent again, with the same numbers."""
        self.acknowledge(ack)
        again = [entry for sent in self.unacked for entry in sent.entries]
        self.sent -= len(again)
        self.unacked.clear()
        self.unacked_count = self.unacked_bytes = 0
        # parts that wait here are among those kept
        again += [entry for entry in self.outbox if type(outbox.item_of(entry)) is Outcome]
        self.outbox = []
        self.routing_id = routing_id
        self.queued_bytes = sum(len(entry.body) for entry in again if type(entry) is outbox.Big)
        self.at_risk = frozenset((*self.live, *(outbox.item_of(entry).call_id for entry in again)))
        parts = self.kept.by_call
        for entry in again:
            # an outcome comes after all parts of its call
            for part in parts.get(outbox.item_of(entry).call_id, ()):
                self.send(part)
            self.send(entry)
        for call_id in parts.keys() & self.live.keys():
            for part in parts[call_id]:
                self.send(part)

    @property
    def unread_bytes(self) -> int:
        """Return how many bytes of results this client has yet to acknowledge, small ones in the outbox excepted."""
        return self.unacked_bytes + self.queued_bytes

    @property
    def held_bytes(self) -> int:
        """Return the same with the parts of streams that its credit does not cover yet."""
        return self.unread_bytes + self.kept.size

    @property
    def due_bytes(self) -> int:
        """Return the same with what is expected to come."""
        return self.unacked_bytes + self.queued_bytes + self.expected_bytes

    @property
    def is_hopeless(self) -> bool:
        """Tell whether the client has let more unacknowledged outcomes gather than any window explains."""
        return (
            self.unacked_count + len(self.outbox) >= 4 * bounds.CLIENT_WINDOW_MAX
            or self.unacked_bytes >= 2 * bounds.CLIENT_UNREAD_BYTES_MAX
        )

    def room(self) -> int:
        """Return how many more calls the session's window takes.

        Outcomes that the client does not acknowledge count too, or one that never reads could fill the broker.
        """
        if self.unread_bytes >= bounds.CLIENT_UNREAD_BYTES_MAX:
            return 0
        return min(
            bounds.CLIENT_WINDOW_MAX - len(self.live),
            2 * bounds.CLIENT_WINDOW_MAX - self.unacked_count - len(self.outbox),
        )
