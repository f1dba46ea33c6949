"""Whatever the broker and the network do, each call gets exactly one outcome."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_broker.client.session import ClientSession, PendingCall, Stage, State
from mcp_broker.wire import messages

EMPTY = b"\x80"
GRANTED = messages.GrantedLimits(window=6, heartbeat_ms=250, stream_window=4)

small = st.integers(0, 7)
epochs = st.sampled_from([7, 7, 7, 8])
codes = st.sampled_from(["OK", "TOOL_FAILED", "CANCELLED", "BROKER_LOST", "A_NEWER_CODE"])
bodies = st.sampled_from([b"\xc0", b"\x01", b"\xc1", None])


def _steps() -> st.SearchStrategy[tuple[str, Any]]:
    return st.one_of(
        st.tuples(st.just("submit"), st.booleans()),
        st.tuples(st.just("cancel"), small),
        st.tuples(st.just("took"), small),
        st.tuples(st.just("flush"), st.none()),
        st.tuples(st.just("flush and fail"), st.none()),
        st.tuples(st.just("wait"), st.sampled_from([0.01, 0.3, 1.1, 3.0])),
        st.tuples(st.just("connection"), st.sampled_from(["dial", "cut", "connected"])),
        st.tuples(
            st.just("welcome"), st.tuples(epochs, st.booleans(), st.sampled_from([b"s" * 16, b"t" * 16]))
        ),
        st.tuples(
            st.just("outcomes"),
            st.tuples(epochs, small, st.lists(st.tuples(small, codes, bodies), min_size=1, max_size=4)),
        ),
        st.tuples(
            st.just("parts"),
            st.tuples(epochs, st.lists(st.tuples(small, small, bodies), min_size=1, max_size=4)),
        ),
        st.tuples(st.just("heartbeat"), epochs),
        st.tuples(st.just("goodbye"), epochs),
        st.tuples(
            st.just("error"),
            st.tuples(st.sampled_from(["FORBIDDEN", "OVERLOADED", "INVALID_ARGUMENT"]), st.booleans()),
        ),
    )


class World:
    """Drives a session, and keeps what each call was told."""

    def __init__(self) -> None:
        self.session = ClientSession(b"p" * 8, "token")
        self.now = 0.0
        self.calls: list[PendingCall] = []
        self.ends: dict[bytes, int] = {}
        #: session ids under which a call was sent
        self.sent_in: dict[bytes, set[bytes | None]] = {}

    def call(self, at: int) -> bytes:
        return self.calls[at].call_id if at < len(self.calls) else bytes([at]) * 16

    def step(self, what: str, how: Any) -> None:
        session = self.session
        if what == "submit":
            if session.state not in {State.REFUSED, State.CLOSED}:
                self.calls.append(session.submit("t", 2.0, EMPTY, self.now, streamed=how))
        elif what in {"cancel", "took"} and how < len(self.calls):
            (session.cancel if what == "cancel" else session.took)(self.calls[how])
        elif what == "flush":
            self.flush()
        elif what == "flush and fail":
            session.disconnected("cut", [message for message, _ in session.outgoing(self.now)])
        elif what == "wait":
            self.now += how
            session.expire(self.now)
        elif what == "connection":
            self.connection(how)
        else:
            self.message(what, how)
        self.settle()

    def connection(self, how: str) -> None:
        session = self.session
        if how == "dial" and session.state is State.DISCONNECTED:
            session.back_off(self.now, 0.5)
            session.dial(self.now)
        elif how == "connected" and session.state is State.OPENING:
            session.connected(self.now)
        elif how == "cut":
            session.disconnected("cut")

    def message(self, what: str, how: Any) -> None:
        message: messages.ToClient | None = None
        if what == "welcome":
            epoch, resumed, session_id = how
            message = messages.Welcome(epoch, (1, 0), session_id, resumed, "me", GRANTED)
        elif what == "outcomes":
            epoch, first, items = how
            fault = messages.Fault("no", False, EMPTY)
            made = [messages.Outcome(self.call(at), code, body, None, fault) for at, code, body in items]
            message = messages.Outcomes(epoch, first, tuple(made))
        elif what == "parts":
            epoch, items = how
            message = messages.Partial(
                epoch, tuple(messages.Part(self.call(at), index, body) for at, index, body in items)
            )
        elif what == "heartbeat":
            message = messages.Heartbeat(how)
        elif what == "goodbye":
            message = messages.Goodbye(how, "over")
        elif what == "error":
            message = messages.Error(7, how[0], "no", EMPTY, fatal=how[1])
        if message is not None:
            self.session.receive(message, None, self.now)

    def flush(self) -> None:
        for message, _ in self.session.outgoing(self.now):
            if isinstance(message, messages.Calls):
                for call in message.calls:
                    self.sent_in.setdefault(call.call_id, set()).add(self.session.session_id)

    def settle(self) -> None:
        book = self.session.book
        for end in book.ended:
            self.ends[end.pending.call_id] = self.ends.get(end.pending.call_id, 0) + 1
        book.ended = []
        book.arrived = []
        flying = [one for one in book.calls.values() if one.stage in {Stage.SENT, Stage.ABANDONED}]
        assert book.in_flight == len(flying)
        assert all(one.stage is not Stage.ENDED for one in book.calls.values())
        assert max(self.ends.values(), default=0) <= 1, "a call ended twice"
        alive = {one.call_id for one in book.calls.values() if one.stage is not Stage.ABANDONED}
        assert alive == {one.call_id for one in self.calls} - set(self.ends), "a call was lost"


@settings(max_examples=300, deadline=None)
@given(st.lists(_steps(), max_size=60))
def test_each_call_ends_exactly_once_whatever_happens(steps: list[tuple[str, Any]]) -> None:
    world = World()
    for what, how in [("connection", "dial"), ("connection", "connected"), ("flush", None), *steps]:
        world.step(what, how)
    world.now += 10
    world.step("wait", 1.0)
    assert set(world.ends) == {call.call_id for call in world.calls}, "its time is over, and nobody was told"
    assert all(len(sessions) == 1 for sessions in world.sent_in.values()), (
        "sent in two sessions: may run twice"
    )
