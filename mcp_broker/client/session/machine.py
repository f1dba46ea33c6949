"""The client's session: what may be said when. Source: docs/protocol.md, "Client sessions".

Rules
    What may happen in which state is :data:`~mcp_broker.client.session.table.TABLE`; its cells are methods here.
    Every call that :meth:`ClientSession.submit` takes ends exactly once, in ``session.book.ended``.

::

                      dial()               connected()           WELCOME
    [DISCONNECTED] -----------> [OPENING] ------------> [WAITING] ------> [OPEN]
       ^  back_off() names           |  time, no answer   |   | time          | silence, cut, GOODBYE,
       |  the next dial_at           |                    |   |               | ERROR fatal
       '-----------------------------+--------------------+---|---------------'
                                     |                        |
       any --close()--> [CLOSED]     '--> [REFUSED] <---------'  this key, token or version is not taken

The shell calls an event method, then :meth:`~ClientSession.outgoing`, and settles what ``book.ended`` and
``book.arrived`` hold. DISCONNECTED means that no socket is wanted: the shell closes what it has, calls
:meth:`~ClientSession.back_off`, and opens another at ``dial_at`` if the session ``is_needed``.

A call that was sent and has no outcome is sent again after WELCOME of the same broker, or of one of its lineage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from mcp_broker import errors, limits
from mcp_broker.client.session.calls import CallBook, Packed
from mcp_broker.client.session.pending import PendingCall, Wishes, again, read_details
from mcp_broker.client.session.table import FINAL_REFUSALS, TABLE, Event, State
from mcp_broker.wire import encoding, messages

#: outcomes that may be unacknowledged before an ACK of its own goes out
ACK_EVERY: Final = 64
#: as how many an outcome with a second frame counts: the broker lets few large ones be made before it hears of them
BODY_WEIGHT: Final = ACK_EVERY // 4
#: looking an enum's member up costs as much as the comparison
_OPEN: Final = State.OPEN
#: time for TCP and CURVE, and then for WELCOME, before another attempt
OPENING_S: Final = limits.HANDSHAKE_MS / 1000
WAITING_S: Final = 2.0
BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 1.0


class ClientSession:
    """One client's session and its calls.

    Args:
        prefix: 8 random bytes, the first part of every call id; its own for each session machine.
        token: sent in HELLO; the shell may replace it before a connection.
        agent: name and version of the software, for people.

    Attributes:
        places: addresses that the shell tries in turn; the pause comes after a round of all.
        dial_at: instant from which the shell may open a connection; None: :meth:`back_off` first.
        name: the client's principal, as the broker says.
        refusal: why the state is REFUSED.
        received: outcomes of this session so far.
        wanted: somebody waits for the connection itself.
        compresses: the broker's workers take compressed arguments.
        why_lost: why there is no connection, for people.
    """

    def __init__(self, prefix: bytes, token: str, agent: str = "") -> None:
        self.book = CallBook(prefix)
        self.token = token
        self.agent = agent
        self._enter(State.DISCONNECTED)
        self.epoch = 0
        self.session_id: bytes | None = None
        self.lineage = ""
        self.name = ""
        self.granted = messages.GrantedLimits(
            window=limits.CLIENT_WINDOW_MAX, heartbeat_ms=int(limits.HEARTBEAT_S * 1000)
        )
        self.received = 0
        self._acked = 0
        self._control: list[messages.Message] = []
        self.dial_at: float | None = None
        self.attempts = 0
        self.places = 1
        self.wanted = self.compresses = False
        self.why_lost = "nothing was tried yet"
        self.refusal: errors.BrokerError | None = None
        self._heard_at = 0.0
        self._attempt_ends = 0.0

    def _enter(self, state: State) -> None:
        self.state = state
        self._row = _ROWS[state]

    # -- the connection ---------------------------------------------------------------------------------

    def dial(self, now: float) -> None:
        """The shell opens a new connection."""
        self._row[Event.DIAL](self, now)

    def connected(self, now: float) -> None:
        """The connection stands and takes messages: HELLO goes first."""
        self._row[Event.CONNECTED](self, now)

    def disconnected(self, why: str, unsent: Sequence[messages.Message] = ()) -> None:
        """The connection is gone, or could not be made.

        Args:
            why: for people.
            unsent: messages of the last :meth:`outgoing` that no socket took.
        """
        self._row[Event.DISCONNECTED](self, why, unsent)

    def back_off(self, now: float, jitter: float) -> None:
        """Set :attr:`dial_at`; ``jitter`` is a random number from 0 to 1."""
        self._row[Event.BACK_OFF](self, now, jitter)

    def refuse(self, error: errors.BrokerError) -> None:
        """The broker will never take this credential."""
        self._row[Event.REFUSE](self, error)

    def close(self) -> None:
        """End the session here and now; unfinished calls are cancelled."""
        self._row[Event.CLOSE](self)

    @property
    def is_needed(self) -> bool:
        """Tell whether anybody waits for something that a connection would bring."""
        return self.wanted or bool(self.book.calls)

    # -- calls ------------------------------------------------------------------------------------------

    @property
    def has_room(self) -> bool:
        """Tell whether the granted window has room for another call."""
        return len(self.book.calls) < self.granted.window

    def submit(
        self,
        tool: str,
        timeout_s: float,
        arguments: bytes,
        now: float,
        waiter: Any = None,  # noqa: ANN401 (opaque)
        *,
        streamed: bool = False,
        wishes: Wishes | None = None,
    ) -> PendingCall:
        """Take a call; as :meth:`CallBook.submit`.

        Raises:
            ClientClosed: the session was closed.
            BrokerError: it was refused; or an argument of the call cannot be.
        """
        if self.state is not _OPEN:
            pending: PendingCall = self._row[Event.SUBMIT](
                self, tool, timeout_s, arguments, now, waiter, streamed, wishes
            )
            return pending
        # the cell of OPEN, without asking the table for every call
        return self.book.submit(tool, timeout_s, arguments, now, waiter, streamed=streamed, wishes=wishes)

    def cancel(self, pending: PendingCall) -> bool:
        """End a call as CANCELLED now and tell the broker; False if it had ended before."""
        return bool(self._row[Event.CANCEL](self, pending))

    def took(self, pending: PendingCall) -> None:
        """A streamed part was taken: one more may come."""
        self._row[Event.TAKE](self, pending)

    # -- the broker's messages, the clock -----------------------------------------------------------------

    def receive(self, message: messages.ToClient, body: bytes | memoryview | None, now: float) -> None:
        """Take one message of the broker."""
        if self.state is _OPEN and message.epoch != self.epoch:
            return
        self._heard_at = now
        self._row[type(message)](self, message, body)

    def deadline(self) -> float:
        """Return when :meth:`expire` or :meth:`dial` is due at the latest; infinity: never."""
        state, at = self.state, self.book.due
        if state is _OPEN:
            return min(at, self._heard_at + limits.SILENCE_S) if self.book.in_flight else at
        if state is State.OPENING or state is State.WAITING:
            return min(at, self._attempt_ends)
        if state is State.DISCONNECTED and self.is_needed and self.dial_at is not None:
            return min(at, self.dial_at)
        return at

    def expire(self, now: float) -> None:
        """Do what is due. The shell first hands over what came in, or its own pause would look like silence."""
        self._row[Event.EXPIRE](self, now)

    @property
    def has_outgoing(self) -> bool:
        """Tell whether :meth:`outgoing` would return anything."""
        if self._control:
            return True
        if self.state is not _OPEN:
            return False
        book = self.book
        if book.queue and book.in_flight < self.granted.window:
            return True
        return (
            bool(book.cancels or book.credits or book.uploads.chunks)
            or self.received - self._acked >= ACK_EVERY
        )

    def outgoing(self, now: float) -> list[Packed]:
        """Return what is to be sent now, in order, and count it as sent."""
        out: list[Packed] = [(message, None) for message in self._control] if self._control else []
        self._control = []
        if self.state is not _OPEN:
            return out
        book = self.book
        if book.cancels or book.credits or book.uploads.chunks:
            out += book.requests(self.epoch)
        if book.queue:
            if not book.in_flight:
                # until now the broker had no reason to speak
                self._heard_at = now
            before = len(out)
            out += book.batches(self.epoch, self.received, self.granted.window - book.in_flight, now)
            if len(out) > before:
                self._acked = self.received
        if self.received - self._acked >= ACK_EVERY:
            out.append((messages.Ack(self.epoch, self.received), None))
            self._acked = self.received
        return out

    # -- cells of the table: what the shell does --------------------------------------------------------------

    def _ignore(self, *_: Any) -> None:
        """True, and of no consequence here."""

    def _bug(self, *_: Any) -> None:
        raise errors.InvalidTransition(f"this cannot happen to a session that is {self.state.value}")

    def _no_submit(self, *_: Any) -> None:
        if self.refusal is None:
            raise errors.ClientClosed("this client is closed; make a new one with connect()")
        raise again(self.refusal)

    def _dial(self, now: float) -> None:
        self.dial_at = None
        self.attempts += 1
        self._attempt_ends = now + OPENING_S
        self._enter(State.OPENING)

    def _connected(self, now: float) -> None:
        self._attempt_ends = now + WAITING_S
        self._control = [
            messages.Hello(
                epoch=0,
                protocol=messages.PROTOCOL,
                majors=(messages.MAJOR,),
                token=self.token,
                session_id=self.session_id,
                capabilities=("streaming", "progress", "zstd"),
                agent=self.agent,
                ack=self.received,
            )
        ]
        self._enter(State.WAITING)

    def _disconnected(self, why: str, unsent: Sequence[messages.Message] = ()) -> None:
        self.book.put_back(unsent)
        self._lose(why)

    def _lose(self, why: str) -> None:
        self.why_lost = why
        self._control = []
        self.dial_at = None
        self._enter(State.DISCONNECTED)

    def _back_off(self, now: float, jitter: float) -> None:
        rounds, tried = divmod(self.attempts, self.places)
        delay = 0.0 if tried else min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(max(0, rounds - 1), 10))
        self.dial_at = now + delay * (0.5 + jitter / 2)

    def _refuse(self, error: errors.BrokerError) -> None:
        self._lose(str(error))
        self.refusal = error
        self._enter(State.REFUSED)
        code = error.code if error.code in errors.CALL_ERRORS else errors.Unauthenticated.code
        self.book.end_all(code, error.message, error.details)

    def _close(self) -> None:
        was_open = self.state is State.OPEN
        self._lose("the client was closed")
        self.book.end_all("CANCELLED", "the client was closed before the call ended")
        if was_open:
            self._control = [messages.Goodbye(self.epoch, "closed")]
        self._enter(State.CLOSED)

    def _submit(self, *call: Any) -> PendingCall:
        *rest, streamed, wishes = call
        return self.book.submit(*rest, streamed=streamed, wishes=wishes)

    def _cancel(self, pending: PendingCall) -> bool:
        return self.book.abandon(pending, "CANCELLED", "cancelled by its caller")

    def _take(self, pending: PendingCall) -> None:
        self.book.took(pending)

    def _expire(self, now: float) -> None:
        if now >= self.book.due:
            self.book.expire(now, None if self.state is State.OPEN else self.why_lost)
        if self.state is State.OPEN:
            if self.book.in_flight and now >= self._heard_at + limits.SILENCE_S:
                self._lose(f"the broker was silent for {limits.SILENCE_S:g} s")
        elif self.state is not State.DISCONNECTED and now >= self._attempt_ends:
            self._lose("no broker answered in time")

    # -- cells of the table: what the broker says ---------------------------------------------------------------

    def _welcome(self, message: messages.Welcome, _: bytes | memoryview | None) -> None:
        is_another, self.epoch = message.epoch != self.epoch, message.epoch
        self.granted = message.granted
        self.book.stream_window = message.granted.stream_window
        self.book.uploads.window = message.granted.upload_window
        self.name = message.name
        self.compresses = encoding.ZSTD in message.capabilities
        self.attempts = 0
        self._enter(State.OPEN)
        if message.resumed and message.session_id == self.session_id:
            self.book.resume()
        else:
            if is_another and message.lineage and message.lineage == self.lineage:
                # another broker under the same supervisor: it finds out what became of our calls
                self.book.resume(elsewhere=True)
            else:
                self.book.end_sent("no broker knows the session any more; whether the call ran is unknown")
            self.session_id = message.session_id
            self.received = 0
        self.lineage = message.lineage
        self._acked = self.received

    def _outcomes(self, message: messages.Outcomes, body: bytes | memoryview | None) -> None:
        outcomes = message.outcomes
        known = self.received + 1 - message.first
        if known < 0:
            # cannot happen on one connection; resuming brings what is missing
            self._lose("outcomes were lost on the way")
            return
        if known:
            outcomes = outcomes[known:]
        self.received += len(outcomes)
        if body is not None:
            self._acked -= BODY_WEIGHT
        self.book.outcomes(outcomes, body)

    def _partial(self, message: messages.Partial, body: bytes | memoryview | None) -> None:
        self.book.parts(message.parts, body)

    def _progress(self, message: messages.Progresses, _: bytes | memoryview | None) -> None:
        self.book.progress(message.progress)

    def _credit(self, message: messages.Credit, _: bytes | memoryview | None) -> None:
        self.book.uploads.credit(message.credits)

    def _heartbeat(self, _: messages.Heartbeat, __: bytes | memoryview | None) -> None:
        self._control = [messages.Ack(self.epoch, self.received)]
        self._acked = self.received

    def _goodbye(self, message: messages.Goodbye, _: bytes | memoryview | None) -> None:
        why = message.reason or "the broker said goodbye"
        self._forget_session(why)
        self._lose(why)

    def _refused_hello(self, message: messages.Error, _: bytes | memoryview | None) -> None:
        if not message.fatal:
            return
        if message.code == errors.Forbidden.code and self.session_id is not None:
            # the session is another key's; without it we may still be welcome
            self._forget_session(message.message)
            self._lose(message.message)
        elif message.code in FINAL_REFUSALS:
            self._refuse(errors.call_error(message.code, message.message, read_details(message.details)))
        else:
            self._lose(message.message)

    def _error(self, message: messages.Error, _: bytes | memoryview | None) -> None:
        if message.fatal:
            self._lose(message.message)

    def _forget_session(self, why: str) -> None:
        self.book.end_sent(why)
        self.session_id = None
        self.received = 0


#: the table with its methods looked up once: the hot path is one dict access
_ROWS: Final = {
    state: {event: getattr(ClientSession, cell.value) for event, cell in row.items()}
    for state, row in TABLE.items()
}
