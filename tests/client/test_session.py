"""The client's session as a pure machine: resume, resend, batches, deadlines, streams, refusals."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from mcp_broker import errors, limits
from mcp_broker.client.session import ClientSession, PendingCall, State, Upload, Wishes
from mcp_broker.client.session.machine import BACKOFF_MAX_S
from mcp_broker.wire import messages, payload
from mcp_broker.wire.messages import Priority

EMPTY = b"\x80"
SESSION = b"s" * 16
NIL = b"\xc0"


def welcome(
    *,
    epoch: int = 7,
    session_id: bytes = SESSION,
    resumed: bool = False,
    window: int = 1024,
    lineage: str = "",
) -> messages.Welcome:
    granted = messages.GrantedLimits(window=window, heartbeat_ms=250, stream_window=4)
    return messages.Welcome(epoch, (1, 0), session_id, resumed, "me", granted, lineage=lineage)


def opened(**how: Any) -> ClientSession:
    session = ClientSession(b"p" * 8, "token")
    reopen(session, 0.0, **how)
    return session


def reopen(session: ClientSession, now: float, **how: Any) -> messages.Hello:
    session.dial(now)
    session.connected(now)
    [(hello, _)] = session.outgoing(now)
    session.receive(welcome(**how), None, now)
    assert isinstance(hello, messages.Hello)
    return hello


def outcomes(first: int, *pending: PendingCall, code: str = "OK", epoch: int = 7) -> messages.Outcomes:
    fault = None if code == "OK" else messages.Fault("no", False, EMPTY)
    body = NIL if code == "OK" else None
    return messages.Outcomes(
        epoch, first, tuple(messages.Outcome(one.call_id, code, body, None, fault) for one in pending)
    )


def sent(session: ClientSession, now: float = 0.0) -> list[Any]:
    return [message for message, _ in session.outgoing(now)]


def ends(session: ClientSession) -> list[tuple[PendingCall, str]]:
    taken, session.book.ended = session.book.ended, []
    return [(end.pending, "OK" if end.error is None else end.error.code) for end in taken]


def test_everything_submitted_since_the_last_flush_is_one_message() -> None:
    session = opened()
    calls = [session.submit("t", 5.0, EMPTY, 0.0) for _ in range(10)]
    [message] = sent(session)
    assert [call.call_id for call in message.calls] == [one.call_id for one in calls]
    assert sent(session) == []


def test_batches_keep_the_bounds_of_items_bytes_and_window() -> None:
    session = opened()
    for _ in range(300):
        session.submit("t", 5.0, EMPTY, 0.0)
    assert [len(message.calls) for message in sent(session)] == [256, 44]
    session = opened()
    for _ in range(5):
        session.submit("t", 5.0, bytes(60_000), 0.0)
    assert [len(message.calls) for message in sent(session)] == [2, 2, 1]
    session = opened(window=3)
    calls = [session.submit("t", 5.0, EMPTY, 0.0) for _ in range(5)]
    assert not session.has_room
    assert [len(message.calls) for message in sent(session)] == [3]
    session.receive(outcomes(1, calls[0]), None, 0.0)
    assert [len(message.calls) for message in sent(session)] == [1]


def test_large_arguments_go_alone_in_the_second_frame() -> None:
    session = opened()
    large = bytes(limits.INLINE_BYTES_MAX + 1)
    for arguments in (EMPTY, large, EMPTY):
        session.submit("t", 5.0, arguments, 0.0)
    out = session.outgoing(0.0)
    assert [body for _, body in out] == [None, large, None]
    middle = out[1][0]
    assert isinstance(middle, messages.Calls)
    assert [call.arguments for call in middle.calls] == [None]


def test_call_that_cannot_be_is_refused_before_it_is_taken() -> None:
    session = opened()
    with pytest.raises(errors.PayloadTooLarge) as too_large:
        session.submit("t", 5.0, bytes(limits.BODY_BYTES_MAX + 1), 0.0)
    assert too_large.value.details["limit_bytes"] == limits.BODY_BYTES_MAX
    for tool, timeout_s in (("t", 0.0), ("t", 1e9), ("t", float("nan")), ("", 5.0), ("t" * 129, 5.0)):
        with pytest.raises(errors.InvalidArgument):
            session.submit(tool, timeout_s, EMPTY, 0.0)
    assert session.book.calls == {}


def test_nothing_but_hello_goes_out_before_welcome() -> None:
    session = ClientSession(b"p" * 8, "token")
    session.submit("t", 5.0, EMPTY, 0.0)
    assert sent(session) == []
    session.dial(0.0)
    assert sent(session) == []
    session.connected(0.0)
    assert [type(message) for message in sent(session)] == [messages.Hello]
    assert sent(session) == []
    session.receive(welcome(), None, 0.0)
    assert [type(message) for message in sent(session)] == [messages.Calls]


def test_resumed_session_sends_again_what_has_no_outcome_in_order() -> None:
    session = opened()
    first, second = (session.submit("t", 5.0, EMPTY, 0.0) for _ in range(2))
    sent(session)
    session.disconnected("cut")
    third = session.submit("t", 5.0, EMPTY, 0.5)
    hello = reopen(session, 1.0, resumed=True)
    assert (hello.session_id, hello.ack) == (SESSION, 0)
    # the outcome of the first was on its way when the connection went
    session.receive(outcomes(1, first), None, 1.0)
    [message] = sent(session, 1.0)
    assert [call.call_id for call in message.calls] == [second.call_id, third.call_id]
    assert [call.timeout_ms for call in message.calls] == [4000, 4500]
    assert ends(session) == [(first, "OK")]


def test_session_that_is_not_resumed_loses_what_was_sent_and_sends_the_rest() -> None:
    session = opened()
    lost = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.disconnected("cut")
    fresh = session.submit("t", 5.0, EMPTY, 0.5)
    reopen(session, 1.0, session_id=b"x" * 16, epoch=8)
    assert ends(session) == [(lost, "BROKER_LOST")]
    [message] = sent(session, 1.0)
    assert [call.call_id for call in message.calls] == [fresh.call_id]
    assert (message.epoch, message.ack) == (8, 0)


def test_call_that_may_have_run_is_never_given_to_another_session() -> None:
    session = opened()
    call = session.submit("t", 50.0, EMPTY, 0.0)
    sent(session)
    session.disconnected("cut")
    # resumed, and lost again before the call was sent again
    reopen(session, 1.0, resumed=True)
    session.disconnected("cut")
    reopen(session, 2.0, session_id=b"x" * 16, epoch=8)
    assert sent(session, 2.0) == []
    assert ends(session) == [(call, "BROKER_LOST")]


def test_message_that_no_socket_took_was_never_sent() -> None:
    session = opened()
    call = session.submit("t", 50.0, EMPTY, 0.0)
    unsent = sent(session)
    session.disconnected("cut", unsent)
    reopen(session, 1.0, session_id=b"x" * 16, epoch=8)
    [message] = sent(session, 1.0)
    assert [one.call_id for one in message.calls] == [call.call_id]
    assert ends(session) == []


def test_duplicates_are_dropped_and_counted_outcomes_acknowledged() -> None:
    session = opened()
    calls = [session.submit("t", 5.0, EMPTY, 0.0) for _ in range(3)]
    sent(session)
    session.receive(outcomes(1, calls[0], calls[1]), None, 0.0)
    session.receive(outcomes(2, calls[1], calls[2]), None, 0.0)
    assert ends(session) == [(call, "OK") for call in calls]
    session.submit("t", 5.0, EMPTY, 0.0)
    [message] = sent(session)
    assert message.ack == 3


def test_ack_goes_alone_after_64_outcomes_or_with_a_heartbeat() -> None:
    session = opened()
    calls = [session.submit("t", 5.0, EMPTY, 0.0) for _ in range(65)]
    sent(session)
    session.receive(outcomes(1, *calls[:63]), None, 0.0)
    assert sent(session) == []
    session.receive(outcomes(64, calls[63]), None, 0.0)
    assert sent(session) == [messages.Ack(7, 64)]
    session.receive(outcomes(65, calls[64]), None, 0.0)
    assert sent(session) == []
    session.receive(messages.Heartbeat(7), None, 0.0)
    assert sent(session) == [messages.Ack(7, 65)]


def test_ack_goes_alone_after_4_large_outcomes() -> None:
    session = opened()
    calls = [session.submit("t", 5.0, EMPTY, 0.0) for _ in range(10)]
    sent(session)

    def large(number: int) -> None:
        outcome = messages.Outcome(calls[number - 1].call_id, "OK", None, None)
        session.receive(messages.Outcomes(7, number, (outcome,)), NIL, 0.0)

    for number in range(1, 4):
        large(number)
        assert not session.has_outgoing
    large(4)
    assert session.has_outgoing
    assert sent(session) == [messages.Ack(7, 4)]
    large(5)
    session.submit("t", 5.0, EMPTY, 0.0)
    [message] = sent(session)
    assert message.ack == 5
    for number in range(6, 9):
        large(number)
        assert sent(session) == [], "the count begins anew with each acknowledgement"


def test_gap_in_the_numbers_of_outcomes_is_repaired_by_resuming() -> None:
    session = opened()
    calls = [session.submit("t", 5.0, EMPTY, 0.0) for _ in range(2)]
    sent(session)
    session.receive(outcomes(2, calls[1]), None, 0.0)
    assert session.state is State.DISCONNECTED
    assert ends(session) == []
    hello = reopen(session, 0.1, resumed=True)
    assert hello.ack == 0


def test_message_of_another_epoch_is_dropped() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.receive(outcomes(1, call, epoch=6), None, 0.0)
    session.receive(messages.Goodbye(6), None, 0.0)
    assert session.state is State.OPEN
    assert ends(session) == []


def test_silence_with_calls_in_flight_means_a_new_connection() -> None:
    session = opened()
    session.expire(100.0)
    session.submit("t", 60.0, EMPTY, 100.0)
    assert sent(session, 100.0), "open still: nobody has to speak while nothing is under way"
    assert session.deadline() == pytest.approx(100.0 + limits.SILENCE_S)
    session.expire(100.9)
    session.receive(messages.Heartbeat(7), None, 100.9)
    session.expire(101.5)
    assert sent(session, 101.5) == [messages.Ack(7, 0)]
    session.expire(102.0)
    assert session.state is State.DISCONNECTED
    session.back_off(102.0, 1.0)
    assert session.deadline() == session.dial_at


def test_back_off_doubles_to_a_second_with_jitter() -> None:
    session = ClientSession(b"p" * 8, "token")
    delays = []
    for _ in range(8):
        session.dial(0.0)
        session.disconnected("refused")
        session.back_off(0.0, 1.0)
        assert session.dial_at is not None
        delays.append(session.dial_at)
    assert delays[:3] == pytest.approx([0.05, 0.1, 0.2])
    assert delays[-1] == BACKOFF_MAX_S
    session.back_off(0.0, 0.0)
    assert session.dial_at == BACKOFF_MAX_S / 2


def test_back_off_comes_after_each_round_of_the_places_to_try() -> None:
    session = ClientSession(b"p" * 8, "token")
    session.places = 3
    delays = []
    for _ in range(9):
        session.dial(0.0)
        session.disconnected("refused")
        session.back_off(0.0, 1.0)
        assert session.dial_at is not None
        delays.append(session.dial_at)
    assert delays == pytest.approx([0, 0, 0.05, 0, 0, 0.1, 0, 0, 0.2])


def test_idle_session_that_was_cut_waits_for_a_reason_to_reconnect() -> None:
    session = opened()
    session.disconnected("cut")
    session.back_off(0.0, 0.5)
    assert session.deadline() == float("inf")
    session.submit("t", 5.0, EMPTY, 10.0)
    assert session.deadline() < 10.0


def test_client_ends_a_call_itself_half_a_second_after_its_deadline() -> None:
    session = opened()
    call = session.submit("t", 2.0, EMPTY, 0.0)
    sent(session)
    for now in (0.9, 1.8, 2.4):
        session.receive(messages.Heartbeat(7), None, now)
        session.expire(now)
    assert ends(session) == []
    session.expire(2.5)
    assert ends(session) == [(call, "DEADLINE_EXCEEDED")]
    session.receive(outcomes(1, call), None, 2.6)
    assert ends(session) == []
    assert session.book.late == 1


def test_call_that_was_never_sent_ends_at_its_deadline_and_may_be_tried_again() -> None:
    session = ClientSession(b"p" * 8, "token")
    call = session.submit("t", 2.0, EMPTY, 0.0)
    session.expire(2.0)
    [end] = session.book.ended
    assert end.pending is call
    assert isinstance(end.error, errors.BrokerLost)
    assert end.error.retryable
    assert (end.error.call_id, end.error.tool) == (call.call_id, "t")


@pytest.mark.parametrize("at", [0.0, 0.32475523128441586, 1023.115694194924])
def test_silence_ends_the_connection_at_the_instant_that_was_named(at: float) -> None:
    # not a rounding error later: whoever waits for exactly that instant would spin until then
    session = opened()
    session.submit("t", 60.0, EMPTY, at)
    sent(session, at)
    session.expire(session.deadline())
    assert session.state is State.DISCONNECTED


def test_cancel_before_sending_is_silent_and_after_it_tells_the_broker_once() -> None:
    session = opened()
    queued = session.submit("t", 5.0, EMPTY, 0.0)
    assert session.cancel(queued)
    assert sent(session) == []
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    assert session.cancel(call)
    assert not session.cancel(call)
    assert sent(session) == [messages.Cancel(7, (call.call_id,))]
    assert ends(session) == [(queued, "CANCELLED"), (call, "CANCELLED")]
    assert session.book.in_flight == 1, "its place in the window is free when the broker says so"
    session.receive(outcomes(1, call), None, 0.0)
    assert (session.book.in_flight, session.book.calls) == (0, {})
    assert ends(session) == []


def test_cancel_while_disconnected_is_told_after_resuming() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.disconnected("cut")
    assert session.cancel(call)
    reopen(session, 1.0, resumed=True)
    assert sent(session, 1.0) == [messages.Cancel(7, (call.call_id,))]
    assert session.book.calls == {}


def parts(call: PendingCall, *indexes: int) -> messages.Partial:
    return messages.Partial(7, tuple(messages.Part(call.call_id, at, payload.pack(at)) for at in indexes))


def test_stream_gives_parts_in_order_and_credit_as_they_are_taken() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0, streamed=True)
    sent(session)
    session.receive(parts(call, 0, 1, 1, 2, 3), None, 0.0)
    assert [part for _, part in session.book.arrived] == [0, 1, 2, 3]
    session.took(call)
    assert sent(session) == []
    session.took(call)
    assert sent(session) == [messages.Credit(7, (messages.StreamCredit(call.call_id, 6),))]


def test_stream_of_large_parts_has_fewer_of_them_on_their_way() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0, streamed=True)
    sent(session)
    large = bytes(limits.STREAM_AHEAD_BYTES // 2)
    for at in range(4):
        part = messages.Part(call.call_id, at, None)
        session.receive(messages.Partial(7, (part,)), payload.pack(large), 0.0)
    told = []
    for _ in range(4):
        session.took(call)
        told.append(sent(session))
    credits_ = [messages.Credit(7, (messages.StreamCredit(call.call_id, limit),)) for limit in (5, 6)]
    assert told == [[], [], [credits_[0]], [credits_[1]]], (
        "two are on their way, where four small ones would be"
    )


@pytest.mark.parametrize(("indexes", "code"), [((0, 2), "BROKER_LOST"), ((0, 1, 2, 3, 4), "INTERNAL")])
def test_stream_with_a_gap_or_beyond_its_credit_is_cancelled(indexes: tuple[int, ...], code: str) -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0, streamed=True)
    sent(session)
    session.receive(parts(call, *indexes), None, 0.0)
    assert ends(session) == [(call, code)]
    assert sent(session) == [messages.Cancel(7, (call.call_id,))]


def stream_end(first: int, call: PendingCall, parts: int) -> messages.Outcomes:
    return messages.Outcomes(7, first, (messages.Outcome(call.call_id, "OK", NIL, parts=parts),))


def test_stream_outlives_its_connection_and_drops_the_parts_that_it_has_had() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0, streamed=True)
    sent(session)
    session.receive(parts(call, 0, 1, 2), None, 0.0)
    session.disconnected("cut")
    reopen(session, 1.0, resumed=True)
    # before the call was said again
    session.receive(parts(call, 1, 2, 3), None, 1.0)
    session.receive(stream_end(1, call, 4), None, 1.0)
    assert [part for _, part in session.book.arrived] == [0, 1, 2, 3]
    assert ends(session) == [(call, "OK")]


def test_resumed_stream_says_its_limit_again_before_its_call() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0, streamed=True)
    sent(session)
    session.receive(parts(call, 0, 1, 2), None, 0.0)
    session.took(call)
    session.took(call)
    credit = messages.Credit(7, (messages.StreamCredit(call.call_id, 6),))
    assert sent(session) == [credit]
    session.disconnected("cut")
    session.took(call)
    reopen(session, 1.0, resumed=True)
    again = sent(session, 1.0)
    assert (again[0], type(again[1])) == (credit, messages.Calls)


def test_credit_of_parts_taken_while_the_call_is_said_again_is_not_lost() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0, streamed=True)
    sent(session)
    session.receive(parts(call, 0, 1, 2, 3), None, 0.0)
    session.disconnected("cut")
    reopen(session, 1.0, resumed=True)
    for _ in range(4):
        session.took(call)
    assert messages.Credit(7, (messages.StreamCredit(call.call_id, 8),)) in sent(session, 1.0)


def test_success_of_a_stream_with_parts_missing_is_an_error() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0, streamed=True)
    plain = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.receive(parts(call, 0, 1), None, 0.0)
    session.receive(stream_end(1, call, 3), None, 0.0)
    session.receive(stream_end(2, plain, 1), None, 0.0)
    assert ends(session) == [(call, "BROKER_LOST"), (plain, "BROKER_LOST")]


def test_progress_reaches_only_who_asked_and_only_the_newest() -> None:
    session = opened()
    asked = session.submit("t", 5.0, EMPTY, 0.0, wishes=Wishes(on_progress="whom"))
    other = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    news = (
        messages.Progress(asked.call_id, 0.1, "a"),
        messages.Progress(other.call_id, 0.1, "b"),
        messages.Progress(asked.call_id, None, "c"),
        messages.Progress(b"u" * 16, 0.1, "unknown"),
    )
    session.receive(messages.Progresses(7, news), None, 0.0)
    assert list(session.book.progressed.values()) == [(asked, None, "c")]


def test_idle_timeout_travels_with_the_call_and_must_be_one() -> None:
    session = opened()
    session.submit("t", 5.0, EMPTY, 0.0, wishes=Wishes(idle_timeout_s=0.25))
    session.submit("t", 5.0, EMPTY, 0.0, wishes=Wishes(on_progress=print))
    [message] = sent(session)
    assert [call.extra for call in message.calls] == [messages.CallExtra(idle_timeout_ms=250), None]
    with pytest.raises(errors.InvalidArgument, match="idle_timeout_s is 0"):
        session.submit("t", 5.0, EMPTY, 0.0, wishes=Wishes(idle_timeout_s=0))


def test_a_session_that_its_own_broker_gave_up_does_not_say_its_calls_again() -> None:
    # another broker finds out what became of them; this one has cancelled and forgotten them
    session = opened(lineage="5f1d")
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.disconnected("cut")
    reopen(session, 1.0, lineage="5f1d", session_id=b"t" * 16)
    assert ends(session) == [(call, "BROKER_LOST")]
    assert sent(session, 1.0) == []


def test_a_call_whose_time_is_over_is_not_said_again() -> None:
    # the broker that had it has ended it, and its worker may have forgotten it: another broker would run it
    session = opened(lineage="5f1d")
    late, call = (session.submit("t", timeout_s, EMPTY, 0.0) for timeout_s in (1.0, 5.0))
    sent(session)
    session.disconnected("cut")
    reopen(session, 1.0, epoch=8, lineage="5f1d", session_id=b"t" * 16)
    [message] = sent(session, 1.0)
    assert [one.call_id for one in message.calls] == [call.call_id]
    session.expire(1.5)
    assert ends(session) == [(late, "DEADLINE_EXCEEDED")]


def test_priority_travels_with_the_call_and_must_be_one() -> None:
    session = opened()
    for priority in (Priority.HIGH, Priority.NORMAL, 2):
        session.submit("t", 5.0, EMPTY, 0.0, wishes=Wishes(priority=priority))
    [message] = sent(session)
    assert [call.extra for call in message.calls] == [
        messages.CallExtra(priority=0), None, messages.CallExtra(priority=2)
    ]  # fmt: skip
    for wrong in (3, -1, "high"):
        with pytest.raises(errors.InvalidArgument, match="a priority is"):
            session.submit("t", 5.0, EMPTY, 0.0, wishes=Wishes(priority=wrong))  # type: ignore[arg-type]


def test_priority_is_still_there_when_a_call_is_sent_again() -> None:
    session = opened()
    session.submit("t", 5.0, EMPTY, 0.0, wishes=Wishes(priority=Priority.LOW))
    [message] = sent(session)
    session.disconnected("cut", [message])
    assert session.book.queue[0].call.extra == messages.CallExtra(priority=2)


def test_parts_that_come_before_the_call_is_said_again_count() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.disconnected("cut")
    reopen(session, 1.0, resumed=True)
    # the broker had the call, and its stream begins before the client comes to send anything
    session.receive(parts(call, 0, 1), None, 1.0)
    assert sent(session, 1.0)[0] == messages.Credit(7, (messages.StreamCredit(call.call_id, 6),))
    session.receive(outcomes(1, call), None, 1.0)
    [end] = session.book.ended
    assert end.value == [0, 1]


def uploading(session: ClientSession) -> tuple[PendingCall, Upload]:
    upload = Upload("a source", deque())
    call = session.submit("t", 5.0, EMPTY, 0.0, wishes=Wishes(upload=upload, upload_name="data"))
    [calls] = sent(session)
    assert calls.calls[0].extra == messages.CallExtra(upload="data")
    return call, upload


def limit(call: PendingCall, number: int) -> messages.Credit:
    return messages.Credit(7, (messages.StreamCredit(call.call_id, number),))


def chunks(session: ClientSession) -> list[tuple[int, bytes | None, bytes | None, bool]]:
    return [
        (message.chunks[0].index, message.chunks[0].data, body, message.chunks[0].last)
        for message, body in session.outgoing(0.0)
        if isinstance(message, messages.Chunks)
    ]


def test_chunks_are_sent_when_the_worker_reads_large_ones_in_the_second_frame() -> None:
    session = opened()
    call, upload = uploading(session)
    rooms = [upload.has_room]
    session.receive(limit(call, 2), None, 0.0)
    assert session.book.uploads.raised == [call]
    large = bytes(limits.CHUNK_BYTES_MAX)
    session.book.uploads.add(call, b"abc")
    rooms.append(upload.has_room)
    session.book.uploads.add(call, large)
    rooms.append(upload.has_room)
    assert rooms == [False, True, False]
    assert session.has_outgoing
    assert chunks(session) == [(0, b"abc", None, False), (1, None, large, False)]
    session.receive(limit(call, 3), None, 0.0)
    session.book.uploads.add(call, b"")
    assert chunks(session) == [(2, b"", None, True)]


def test_resumed_upload_sends_again_what_no_limit_has_confirmed() -> None:
    session = opened()
    session.book.uploads.window = 4
    call, _ = uploading(session)
    session.receive(limit(call, 4), None, 0.0)
    for number in range(4):
        session.book.uploads.add(call, bytes([number]))
    chunks(session)
    session.receive(limit(call, 6), None, 0.0)
    session.book.uploads.add(call, b"\4")
    session.disconnected("cut")
    reopen(session, 1.0, resumed=True)
    assert [index for index, *_ in chunks(session)] == [2, 3, 4]


def test_source_that_raises_cancels_its_call_and_is_the_cause() -> None:
    session = opened()
    call, _ = uploading(session)
    fault = ValueError("disk on fire")
    session.book.spoil(call, fault)
    [end] = session.book.ended
    assert isinstance(end.error, errors.Cancelled)
    assert "ValueError: disk on fire" in end.error.message
    assert end.error.__cause__ is fault
    assert sent(session) == [messages.Cancel(7, (call.call_id,))]
    session.book.uploads.add(call, b"late")
    session.receive(limit(call, 4), None, 0.0)
    assert (sent(session), session.book.uploads.raised) == ([], [])


@pytest.mark.parametrize("also", [{"detach": True}, {"idempotency_key": "k"}])
def test_upload_can_be_neither_detached_nor_keyed(also: dict[str, Any]) -> None:
    session = opened()
    wishes = Wishes(upload=Upload("a source", deque()), upload_name="data", **also)
    with pytest.raises(errors.InvalidArgument, match="neither detached"):
        session.submit("t", 5.0, EMPTY, 0.0, wishes=wishes)


def test_plain_call_of_a_streaming_tool_collects_its_parts() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.receive(parts(call, 0, 1), None, 0.0)
    session.receive(parts(call, 2), None, 0.0)
    session.receive(outcomes(1, call), None, 0.0)
    [end] = session.book.ended
    assert end.value == [0, 1, 2]


def test_goodbye_ends_what_was_sent_and_forgets_the_session() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.receive(messages.Goodbye(7, "shutting down"), None, 0.0)
    assert ends(session) == [(call, "BROKER_LOST")]
    hello = reopen(session, 1.0, session_id=b"x" * 16, epoch=8)
    assert hello.session_id is None


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "UNSUPPORTED_VERSION", "FORBIDDEN"])
def test_final_refusal_of_hello_ends_every_call_with_its_code(code: str) -> None:
    session = ClientSession(b"p" * 8, "token")
    call = session.submit("t", 5.0, EMPTY, 0.0)
    session.dial(0.0)
    session.connected(0.0)
    session.receive(messages.Error(7, code, "no", payload.pack({"supported": [2]}), fatal=True), None, 0.0)
    assert session.state is State.REFUSED
    [end] = session.book.ended
    assert (end.pending, end.error.code if end.error else "") == (call, code)
    with pytest.raises(errors.CALL_ERRORS[code]):
        session.submit("t", 5.0, EMPTY, 1.0)


def test_overloaded_broker_is_asked_again_later() -> None:
    session = ClientSession(b"p" * 8, "token")
    session.dial(0.0)
    session.connected(0.0)
    session.receive(messages.Error(7, "OVERLOADED", "full", EMPTY, fatal=True), None, 0.0)
    assert session.state is State.DISCONNECTED


def test_session_of_another_key_is_given_up_and_a_new_one_asked_for() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.disconnected("cut")
    session.dial(1.0)
    session.connected(1.0)
    session.receive(messages.Error(7, "FORBIDDEN", "not yours", EMPTY, fatal=True), None, 1.0)
    assert ends(session) == [(call, "BROKER_LOST")]
    assert session.state is State.DISCONNECTED
    assert reopen(session, 2.0).session_id is None


def test_close_says_goodbye_and_cancels_what_is_left() -> None:
    session = opened()
    call = session.submit("t", 5.0, EMPTY, 0.0)
    sent(session)
    session.close()
    assert sent(session) == [messages.Goodbye(7, "closed")]
    assert ends(session) == [(call, "CANCELLED")]
    with pytest.raises(errors.ClientClosed, match="closed"):
        session.submit("t", 5.0, EMPTY, 0.0)


def test_unreadable_result_is_an_error_of_its_call_only() -> None:
    session = opened()
    bad, good = (session.submit("t", 5.0, EMPTY, 0.0) for _ in range(2))
    sent(session)
    broken = messages.Outcome(bad.call_id, "OK", b"\xc1")
    session.receive(messages.Outcomes(7, 1, (broken, messages.Outcome(good.call_id, "OK", NIL))), None, 0.0)
    assert ends(session) == [(bad, "INTERNAL"), (good, "OK")]
