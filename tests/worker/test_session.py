"""The worker's half of the protocol, without a socket."""

from __future__ import annotations

from typing import Any

import pytest

from mcp_broker import limits
from mcp_broker.wire import codec, messages, payload
from mcp_broker.worker.outcomes import fault
from mcp_broker.worker.pace import Pace
from mcp_broker.worker.session import SILENCE_BUSY_S, SILENCE_IDLE_S, Session, State

EPOCH = 9
CALLER = codec.raw(messages.Caller("ada", 0, ()))


def frames(message: messages.Message, body: bytes | None = None) -> tuple[bytes, bytes | None]:
    return codec.encode(message), body


def welcome(epoch: int = EPOCH) -> tuple[bytes, bytes | None]:
    granted = messages.GrantedLimits(window=256, heartbeat_ms=250, stream_window=4)
    return frames(messages.Welcome(epoch, (1, 0), b"s" * 16, resumed=False, name="w-1", granted=granted))


def dispatch(
    number: int, *, epoch: int = EPOCH, arguments: bytes | None = b"\x80", ack: int = 0
) -> tuple[bytes, bytes | None]:
    call = messages.Dispatch(number, bytes([number]) * 16, "try.it", 1000, arguments, CALLER)
    return frames(messages.Dispatches(epoch, ack, (call,)))


def said(session: Session) -> list[Any]:
    packed, session.outgoing[:] = list(session.outgoing), []
    return [codec.from_worker.decode(one[0]) for one in packed]


@pytest.fixture
def session() -> Session:
    """Return a session that serves, at time 0."""
    made = Session((), 1, "test")
    made.opened(0.0)
    made.receive(*welcome(), 0.0)
    said(made)
    return made


def ok(pending: Any, body: bytes | None = b"\xc0") -> messages.Outcome:
    return messages.Outcome(pending.dispatch.call_id, "OK", body, messages.Usage(1, 2, 3, 4))


def test_registers_first_and_is_ready_after_welcome() -> None:
    session = Session((), 1, "test")
    session.opened(0.0)
    assert [type(message) for message in said(session)] == [messages.Register]
    session.receive(*dispatch(1), 0.0)
    assert not session.inbox
    session.receive(*welcome(), 0.0)
    assert said(session) == [messages.Ready(EPOCH, 1)]
    assert session.state is State.SERVING


@pytest.mark.parametrize("capabilities", [(), ("progress",)])
def test_progress_is_sent_to_a_broker_that_takes_it(capabilities: tuple[str, ...]) -> None:
    session = Session((), 1, "test")
    session.opened(0.0)
    granted = messages.GrantedLimits(window=256, heartbeat_ms=250)
    session.receive(
        *frames(messages.Welcome(EPOCH, (1, 0), b"s" * 16, False, "w-1", granted, capabilities)), 0.0
    )
    session.receive(*dispatch(1), 0.0)
    pending = session.start()
    said(session)
    session.progress(pending, 0.5, "half")
    item = messages.Progress(pending.dispatch.call_id, 0.5, "half")
    assert said(session) == ([messages.Progresses(EPOCH, (item,))] if capabilities else [])
    session.lost()
    session.progress(pending, 1.0, "late")
    assert said(session) == []


def test_refusal_is_kept_for_the_operator() -> None:
    session = Session((), 1, "test")
    session.opened(0.0)
    session.receive(
        *frames(messages.Error(EPOCH, "INVALID_ARGUMENT", "try.it is taken", b"\x80", fatal=True)), 0.0
    )
    assert (session.state, session.refusal) == (State.REFUSED, "INVALID_ARGUMENT: try.it is taken")


def test_fatal_error_later_begins_another_session(session: Session) -> None:
    session.receive(
        *frames(messages.Error(EPOCH, "UNAUTHENTICATED", "REGISTER first", b"\x80", fatal=True)), 1.0
    )
    assert session.state is State.CLOSED


def test_messages_of_another_epoch_and_noise_are_dropped(session: Session) -> None:
    session.receive(*dispatch(1, epoch=EPOCH + 1), 0.0)
    session.receive(b"noise", None, 0.0)
    session.receive(*frames(messages.Register(0, "MCPB", (1,), ())), 0.0)
    assert not session.inbox
    assert session.state is State.SERVING


def test_cancelled_call_that_waits_is_answered_without_running(session: Session) -> None:
    for number in (1, 2, 3):
        session.receive(*dispatch(number), 0.0)
    running = session.start()
    session.receive(*frames(messages.Cancel(EPOCH, (b"\1" * 16, b"\2" * 16, b"\7" * 16))), 0.0)
    session.flush()
    (outcomes,) = said(session)
    assert [(outcome.call_id, outcome.code) for outcome in outcomes.outcomes] == [(b"\2" * 16, "CANCELLED")]
    assert session.cancelled == {running.dispatch.call_id}
    assert [pending.dispatch.seq for pending in session.inbox] == [3]


def test_calls_cancelled_while_nothing_runs_are_answered_at_once(session: Session) -> None:
    # nobody would flush: the loop does that after it ran something, and the broker gives it nothing more meanwhile
    for number in (1, 2):
        session.receive(*dispatch(number), 0.0)
    session.receive(*frames(messages.Cancel(EPOCH, (b"\1" * 16, b"\2" * 16))), 0.0)
    (outcomes,) = said(session)
    assert [outcome.code for outcome in outcomes.outcomes] == ["CANCELLED", "CANCELLED"]
    assert not session.inbox


def test_outcomes_are_batched_and_numbered_on(session: Session) -> None:
    for number in (1, 2, 3):
        session.receive(*dispatch(number), 0.0)
    for _ in range(2):
        pending = session.start()
        session.finish(pending, ok(pending))
    session.flush()
    pending = session.start()
    session.finish(pending, ok(pending))
    session.flush()
    session.flush()
    assert [(message.first, len(message.outcomes)) for message in said(session)] == [(1, 2), (3, 1)]


def test_large_result_goes_alone_with_its_frame(session: Session) -> None:
    for number in (1, 2):
        session.receive(*dispatch(number), 0.0)
    first, second = session.start(), session.start()
    session.finish(first, ok(first))
    session.finish(second, ok(second, None), b"x" * 100_000)
    assert [body for _, body in session.outgoing] == [None, b"x" * 100_000]
    assert [len(message.outcomes) for message in said(session)] == [1, 1]


def test_batch_never_exceeds_its_bounds(session: Session) -> None:
    for number in range(1, 4):
        session.receive(*dispatch(number), 0.0)
        pending = session.start()
        session.finish(pending, ok(pending, payload.pack(b"x" * 60_000)))
    session.flush()
    assert [len(message.outcomes) for message in said(session)] == [2, 1]


def test_large_arguments_come_in_the_second_frame(session: Session) -> None:
    head, _ = dispatch(1, arguments=None)
    session.receive(head, b"\x81\xa1x\x01", 0.0)
    assert session.start().arguments == b"\x81\xa1x\x01"


def test_deadline_counts_from_arrival(session: Session) -> None:
    session.receive(*dispatch(1), 50.0)
    assert session.start().deadline == 51.0


def test_new_connection_takes_over_what_runs_and_nothing_that_only_waited(session: Session) -> None:
    for number in (1, 2):
        session.receive(*dispatch(number), 0.0)
    old = session.start()
    session.opened(1.0)
    (register,) = said(session)
    assert register.seq == 2
    assert register.held == (messages.Held(b"\1" * 16, 1, "ada"),)
    assert not session.inbox
    session.receive(*welcome(EPOCH + 1), 1.0)
    said(session)
    session.finish(old, ok(old))
    assert not session.part(old, 0, b"\xc0"), "parts belong to the connection that they began on"
    session.flush()
    (outcomes,) = said(session)
    assert (outcomes.epoch, outcomes.first, len(outcomes.outcomes)) == (EPOCH + 1, 1, 1)


def test_outcomes_are_kept_until_they_are_acknowledged_and_sent_again(session: Session) -> None:
    for number in (1, 2):
        session.receive(*dispatch(number), 0.0)
        pending = session.start()
        session.finish(pending, ok(pending))
        session.flush()
    assert [(one.first, len(one.outcomes)) for one in said(session)] == [(1, 1), (2, 1)]
    session.receive(*frames(messages.Ack(EPOCH, 1)), 0.0)
    session.lost()
    session.opened(1.0)
    (register,) = said(session)
    assert register.held == (messages.Held(b"\2" * 16, 0, "ada"),)
    session.receive(*welcome(EPOCH + 1), 1.0)
    ready, outcomes = said(session)
    assert (outcomes.first, [one.call_id for one in outcomes.outcomes]) == (1, [b"\2" * 16])
    assert isinstance(ready, messages.Ready)
    session.receive(*dispatch(3, epoch=EPOCH + 1, ack=1), 1.0)
    session.lost()
    session.opened(2.0)
    assert said(session)[0].held == ()


def test_what_finishes_without_a_connection_is_told_to_the_next_broker(session: Session) -> None:
    session.receive(*dispatch(1), 0.0)
    pending = session.start()
    session.lost()
    session.finish(pending, ok(pending, None), b"x" * 100_000)
    session.flush()
    assert session.outgoing == []
    session.opened(1.0)
    said(session)
    session.receive(*welcome(EPOCH + 1), 1.0)
    _, (packed, body) = session.outgoing
    message = codec.from_worker.decode(packed)
    assert isinstance(message, messages.Outcomes)
    assert message.outcomes[0].call_id == b"\1" * 16
    assert body == b"x" * 100_000


def again(number: int, call: int) -> tuple[bytes, bytes | None]:
    """Have a call run a second time, under another number."""
    repeated = messages.Dispatch(number, bytes([call]) * 16, "try.it", 1000, b"\x80", CALLER)
    return frames(messages.Dispatches(EPOCH, 0, (repeated,)))


def test_of_a_call_that_ran_again_the_next_broker_is_told_the_latest_only(session: Session) -> None:
    for packed in (dispatch(1), dispatch(2), again(3, 1), dispatch(4)):
        session.receive(*packed, 0.0)
        pending = session.start()
        session.finish(pending, ok(pending, bytes([pending.dispatch.seq])))
        if pending.dispatch.seq != 1:
            session.flush()
    session.receive(*again(5, 4), 0.0)
    session.start()
    session.opened(0.5)
    (register,) = said(session)
    # two and the second one of the first; the fourth runs
    assert [(one.call_id[0], one.seq) for one in register.held] == [(2, 0), (1, 0), (4, 5)]
    session.receive(*welcome(EPOCH + 1), 0.5)
    told = [message for message in said(session) if isinstance(message, messages.Outcomes)]
    assert [(one.first, [outcome.body for outcome in one.outcomes]) for one in told] == [
        (1, [b"\2"]),
        (2, [b"\3"]),
    ]


def test_old_outcomes_that_nobody_acknowledges_are_let_go(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HELD_MAX", 2)
    for number in (1, 2, 3):
        session.receive(*dispatch(number), 0.0)
        pending = session.start()
        session.finish(pending, ok(pending))
        session.flush()
    assert [kept.outcomes[0].call_id for kept in session.kept] == [b"\2" * 16, b"\3" * 16]
    session.opened(0.25)
    assert said(session)[0].let_go_ms == 750, "the first call's caller may ask for it so long"
    session.opened(2.0)
    assert said(session)[0].let_go_ms == 0


def test_worker_tells_the_tools_of_detached_calls_for_whoever_knows_their_ids_only(session: Session) -> None:
    for number in (1, 2):
        call = messages.Dispatch(
            number, bytes([number]) * 16, "try.it", 1000, b"\x80", CALLER, messages.CallExtra(detach=True)
        )
        session.receive(*frames(messages.Dispatches(EPOCH, 0, (call,))), 0.0)
    ended = session.start()
    session.finish(ended, ok(ended))
    session.start()
    session.opened(0.25)
    assert said(session)[0].held == (
        messages.Held(b"\1" * 16, 0, "ada", "try.it"),
        messages.Held(b"\2" * 16, 2, "ada", "try.it", 750),
    )


def test_worker_that_keeps_all_it_may_and_runs_all_it_may_can_register(session: Session) -> None:
    many = limits.HELD_MAX + limits.WORKER_DEPTH_MAX
    for number in range(1, many + 1):
        call = messages.Dispatch(number, number.to_bytes(16, "big"), "try.it", 1000, b"\x80", CALLER)
        session.receive(*frames(messages.Dispatches(EPOCH, 0, (call,))), 0.0)
        pending = session.start()
        if number <= limits.HELD_MAX:
            session.finish(pending, ok(pending))
    said(session)
    session.opened(1.0)
    (register,) = said(session)
    assert len(register.held) == many


def test_worker_lets_go_of_what_would_make_its_registration_too_large() -> None:
    tools = [
        messages.ToolDefinition(
            name=f"try.it{n}", version="1.0.0", capabilities=("try",), parameters="x" * 32_000
        )
        for n in range(32)
    ]
    session = Session(tools, 1, "test")
    session.opened(0.0)
    session.receive(*welcome(), 0.0)
    for number in range(1, 3001):
        call = messages.Dispatch(number, number.to_bytes(16, "big"), "try.it", 1000, b"\x80", CALLER)
        session.receive(*frames(messages.Dispatches(EPOCH, 0, (call,))), 0.0)
        pending = session.start()
        session.finish(pending, messages.Outcome(pending.dispatch.call_id, "OK", b"\xc0"))
    said(session)
    session.opened(0.5)
    ((envelope, _),) = session.outgoing
    register = codec.from_worker.decode(envelope)
    assert isinstance(register, messages.Register)
    assert 0 < len(register.held) < 3000
    assert register.held[-1].call_id == (3000).to_bytes(16, "big"), "the oldest go first"
    assert register.let_go_ms == 500


def test_stream_may_send_up_to_its_window_or_credit(session: Session) -> None:
    session.receive(*dispatch(1), 0.0)
    # credit may overtake the start of its call
    session.receive(*frames(messages.Credit(EPOCH, (messages.StreamCredit(b"\1" * 16, 6),))), 0.0)
    pending = session.start()
    assert [session.may_send(pending, index) for index in (3, 4, 5, 6)] == [True, True, True, False]
    session.receive(*frames(messages.Credit(EPOCH, (messages.StreamCredit(b"\1" * 16, 2),))), 0.0)
    assert session.may_send(pending, 5)
    session.finish(pending, ok(pending))
    assert not session.credits


def test_heartbeat_is_answered_and_silence_ends_the_connection(session: Session) -> None:
    session.receive(*frames(messages.Heartbeat(EPOCH)), 5.0)
    assert said(session) == [messages.Heartbeat(EPOCH)]
    assert session.silent_at() == 5.0 + SILENCE_IDLE_S
    session.receive(*dispatch(1), 6.0)
    assert session.silent_at() == 6.0 + SILENCE_BUSY_S


def test_fault_is_cut_to_what_a_message_may_hold() -> None:
    outcome = fault(b"x" * 16, "TOOL_FAILED", "m" * 10_000, {"huge": "x" * 100_000})
    packed = codec.encode(messages.Outcomes(1, 1, (outcome,)))
    message = codec.from_worker.decode(packed)
    assert isinstance(message, messages.Outcomes)
    (read,) = message.outcomes
    assert read.fault is not None
    assert payload.unpack(read.fault.details) == {"truncated": True}
    assert len(read.fault.message) == limits.TEXT_CHARS_MAX


@pytest.mark.parametrize(
    ("concurrency", "service_s", "depth"),
    [(1, 0.00001, 200), (1, 0.000001, 256), (1, 0.0015, 2), (1, 0.1, 1), (4, 0.1, 4), (8, 0.0015, 9)],
)
def test_depth_hides_the_round_trip_and_no_more(concurrency: int, service_s: float, depth: int) -> None:
    pace = Pace(concurrency)
    assert pace.announce() == concurrency, "what was not measured yet may be long"
    pace.served(int(service_s * 1e9), 1)
    assert abs(pace.depth() - depth) <= 1


def test_depth_is_announced_again_when_it_doubles_or_halves(session: Session) -> None:
    for _ in range(100):
        session.pace.served(120_000, 1)
    session.flush()
    assert said(session) == [messages.Ready(EPOCH, 17)], "once it is known"
    for _ in range(100):
        session.pace.served(100_000, 1)
    session.flush()
    assert said(session) == [], "a little more is not worth a message"
    for _ in range(100):
        session.pace.served(10_000, 1)
    session.flush()
    assert [type(message) for message in said(session)] == [messages.Ready]
    session.flush()
    assert said(session) == []


@pytest.mark.parametrize("concurrency", [1, 16])
def test_worker_whose_tools_turn_long_asks_for_just_what_it_runs(concurrency: int) -> None:
    pace = Pace(concurrency)
    pace.announce()
    pace.served(1_900_000, 1)
    assert pace.has_changed() == (concurrency == 1), "one more of 16 is not worth a message"
    pace = Pace(concurrency)
    pace.announce()
    pace.served(100_000, 1)
    assert pace.announce() > concurrency
    for _ in range(30):
        pace.served(5_000_000, 1)
        if pace.has_changed():
            pace.announce()
    assert pace.depth() == concurrency
    assert not pace.has_changed()


def test_worker_that_has_run_nothing_yet_is_given_one_call() -> None:
    """A pool of long tools must not give its first worker what its idle neighbours could do."""
    session = Session((), 1, "test")
    session.opened(0.0)
    session.receive(*welcome(), 0.0)
    assert said(session)[-1] == messages.Ready(EPOCH, 1)
    session.pace.served(5_000_000, 1)
    session.flush()
    assert said(session) == []
