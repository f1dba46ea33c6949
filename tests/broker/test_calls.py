"""A real broker process, spoken to over its sockets: calls, refusals, faults."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zmq
from zmq.utils import z85

from mcp_broker import limits
from mcp_broker.wire import codec, messages, node, payload
from tests.support.broker import BrokerProcess, Curve, Peer, answer, definition
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.process

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def shared() -> Iterator[BrokerProcess]:
    """One broker with one worker, for tests that leave both as they were."""
    with BrokerProcess() as broker:
        broker.echo = broker.ready_worker()  # type: ignore[attr-defined]
        yield broker


@pytest.fixture
def broker() -> Iterator[BrokerProcess]:
    """A broker of its own, for tests that break it."""
    with BrokerProcess() as process:
        yield process


def details(outcome: messages.Outcome) -> dict[str, Any]:
    assert outcome.fault is not None
    return payload.unpack_map(outcome.fault.details)


def test_call_reaches_the_worker_and_its_result_the_caller(shared: Any) -> None:
    client = shared.open_client(principal="alice", clearance=3)
    call_id = client.call(arguments={"value": 7}, timeout_s=2)
    dispatch = shared.echo.receive(messages.Dispatches).calls[0]
    assert (dispatch.call_id, dispatch.tool) == (call_id, "echo.echo")
    assert payload.unpack(dispatch.arguments) == {"value": 7}
    assert 1000 < dispatch.timeout_ms <= 2000
    assert payload.unpack(bytes(dispatch.caller)) == ["alice", 3, ["*"], True, []]
    answer(shared.echo, dispatch, 7)
    outcome = client.outcome(call_id)
    assert (outcome.code, payload.unpack(outcome.body or b"")) == ("OK", 7)


def test_large_arguments_and_results_travel_in_the_second_frame(shared: Any) -> None:
    client = shared.open_client()
    call_id = os.urandom(16)
    body = payload.pack({"value": os.urandom(1 << 20)})
    client.send(messages.Calls(client.epoch, 0, (messages.Call(call_id, "echo.echo", 5000, None),)), body)
    dispatch = shared.echo.receive(messages.Dispatches).calls[0]
    assert dispatch.arguments is None
    assert shared.echo.body == body
    shared.echo.send(messages.Outcomes(shared.echo.epoch, 1, (messages.Outcome(call_id, "OK"),)), body)
    assert client.outcome(call_id).body is None
    assert client.body == body


def test_unknown_tool_is_not_found_and_names_the_nearest(shared: Any) -> None:
    client = shared.open_client()
    outcome = client.outcome(client.call("echo.ecko"))
    assert outcome.code == "NOT_FOUND"
    assert details(outcome)["did_you_mean"] == ["echo.echo"]


def test_call_outside_the_scope_is_forbidden_and_reaches_no_worker(shared: Any) -> None:
    client = shared.open_client(scopes=("text.*",), admin=False)
    assert client.outcome(client.call()).code == "FORBIDDEN"
    assert shared.echo.hears_nothing_but((messages.Heartbeat, messages.Ack), 0.2)


def test_call_before_hello_is_refused_and_reaches_no_worker(shared: Any) -> None:
    client = shared.client()
    client.call()
    error = client.receive(messages.Error)
    assert (error.code, error.fatal) == ("UNAUTHENTICATED", True)
    assert shared.echo.hears_nothing_but((messages.Heartbeat, messages.Ack), 0.2)


def test_client_without_curve_is_refused_and_reaches_no_worker(shared: Any) -> None:
    socket = shared.context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.connect(shared.client_endpoint)
        token = shared.issuer.token(Curve().thumbprint)
        socket.send(codec.encode(messages.Hello(0, "MCPB", (1,), token)))
        call = messages.Call(os.urandom(16), "echo.echo", 1000, b"\x80")
        socket.send(codec.encode(messages.Calls(0, 0, (call,))))
        assert not socket.poll(500), "it is not even answered"
    finally:
        socket.close()
    assert shared.echo.hears_nothing_but((messages.Heartbeat, messages.Ack), 0.2)


def test_client_with_another_brokers_key_in_its_profile_is_refused(shared: Any) -> None:
    socket = shared.context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    ours, wrong = Curve(), Curve()
    socket.curve_serverkey = z85.encode(wrong.public)
    socket.curve_publickey, socket.curve_secretkey = z85.encode(ours.public), z85.encode(ours.secret)
    try:
        socket.connect(shared.client_endpoint)
        socket.send(codec.encode(messages.Hello(0, "MCPB", (1,), shared.issuer.token(ours.thumbprint))))
        assert not socket.poll(500)
    finally:
        socket.close()


def test_token_bound_to_another_key_is_refused(shared: Any) -> None:
    client = shared.client()
    client.send(messages.Hello(0, "MCPB", (1,), shared.issuer.token(Curve().thumbprint)))
    error = client.receive(messages.Error)
    assert (error.code, error.fatal) == ("UNAUTHENTICATED", True)
    assert payload.unpack_map(error.details)["reason"] == "bound_to_other_key"


def test_expired_token_is_refused(shared: Any) -> None:
    client = shared.client()
    client.send(
        messages.Hello(
            0, "MCPB", (1,), shared.issuer.token(client.key.thumbprint, wall_now=time.time() - 7200)
        )
    )
    assert payload.unpack_map(client.receive(messages.Error).details)["reason"] == "expired"


def test_another_major_version_gets_the_supported_list(shared: Any) -> None:
    client = shared.client()
    client.send(messages.Hello(0, "MCPB", (2, 3), shared.issuer.token(client.key.thumbprint)))
    error = client.receive(messages.Error)
    assert (error.code, payload.unpack_map(error.details)) == ("UNSUPPORTED_VERSION", {"supported": [1]})


def test_later_version_whose_hello_looks_different_gets_the_supported_list_too(shared: Any) -> None:
    client = shared.client()
    client.send(payload.pack(["HELLO", 0, "MCPB", [2], {"quite": "another"}, 7]))
    error = client.receive(messages.Error)
    assert (error.code, payload.unpack_map(error.details)) == ("UNSUPPORTED_VERSION", {"supported": [1]})


@pytest.mark.parametrize("garbage", [b"", b"\xc1", os.urandom(300), b"\x91" * 5000, b"\x92\xa7WELCOME\x01"])
def test_garbage_costs_its_sender_only(shared: Any, garbage: bytes) -> None:
    bystander = shared.open_client()
    client = shared.open_client()
    client.send(garbage)
    assert client.receive(messages.Error).code in {"MALFORMED_FRAME", "UNKNOWN_KIND"}
    assert bystander.outcome(bystander.call("system.status")).code == "OK"


def test_worker_messages_on_the_client_socket_are_refused(shared: Any) -> None:
    client = shared.open_client()
    client.send(messages.Register(0, "MCPB", (1,), ()))
    assert client.receive(messages.Error).code == "UNKNOWN_KIND"


def test_outcome_that_nobody_asked_for_is_dropped(shared: Any) -> None:
    client = shared.open_client()
    call_id = client.call()
    dispatch = shared.echo.receive(messages.Dispatches).calls[0]
    stranger = messages.Outcome(os.urandom(16), "OK", b"\xc0")
    shared.echo.send(messages.Outcomes(shared.echo.epoch, 1, (stranger,)))
    answer(shared.echo, dispatch, "mine")
    assert payload.unpack(client.outcome(call_id).body or b"") == "mine"


def test_duplicate_tool_of_another_pool_is_refused_with_its_name(shared: Any) -> None:
    key = shared.admit("other-1", "other")

    def refused() -> messages.Error | None:
        other = shared.worker(key)
        other.send(messages.Register(0, "MCPB", (1,), (definition("other.fine"), definition("echo.echo"))))
        try:
            received: messages.Error = other.receive(messages.Error, 1.0)
        except AssertionError:
            return None
        return received

    error = wait_for(refused, what="the refusal")
    assert error is not None
    assert (error.code, payload.unpack_map(error.details)["name"]) == ("INVALID_ARGUMENT", "echo.echo")
    assert shared.expect(node.WorkerRefused).worker_id == "other-1"
    client = shared.open_client()
    assert client.outcome(client.call("other.fine")).code == "NOT_FOUND", "registration is all or nothing"


def test_deadline_ends_the_call_and_has_the_worker_interrupted(broker: BrokerProcess) -> None:
    worker = broker.ready_worker()
    client = broker.open_client()
    call_id = client.call(timeout_s=0.1)
    dispatch = worker.receive(messages.Dispatches).calls[0]
    assert client.outcome(call_id, within_s=1).code == "DEADLINE_EXCEEDED"
    stages = [broker.expect(node.Interrupt, 2) for _ in range(3)]
    assert [stage.stage for stage in stages] == ["raise", "term", "kill"]
    assert {stage.seq for stage in stages} == {dispatch.seq}


def test_cancelled_call_ends_as_cancelled(broker: BrokerProcess) -> None:
    worker = broker.ready_worker()
    client = broker.open_client()
    call_id = client.call()
    worker.receive(messages.Dispatches)
    client.send(messages.Cancel(client.epoch, (call_id,)))
    assert client.outcome(call_id, within_s=1).code == "CANCELLED"
    assert worker.receive(messages.Cancel).call_ids == (call_id,)


def certificate(worker_id: str, started_seq: int) -> node.Certificate:
    return node.Certificate(
        worker_id=worker_id, pool="echo", pid=1, cause="ended by signal 9 (SIGKILL)", kind="signal",
        signal="SIGKILL", started_seq=started_seq,
    )  # fmt: skip


def test_death_of_a_worker_fails_only_what_it_had_started(broker: BrokerProcess) -> None:
    first = broker.ready_worker()
    client = broker.open_client()
    started, waiting = client.call(), client.call()
    seqs: list[int] = []
    while len(seqs) < 2:
        seqs += [dispatch.seq for dispatch in first.receive(messages.Dispatches).calls]
    second = broker.ready_worker(worker_id="echo-2")
    broker.tell(node.Died(certificate("echo-1", started_seq=1)))
    lost = client.outcome(started, within_s=2)
    assert lost.code == "WORKER_LOST"
    assert details(lost)["certificate"]["signal"] == "SIGKILL"
    again = second.receive(messages.Dispatches, 2).calls[0]
    assert again.call_id == waiting
    answer(second, again, "done")
    assert client.outcome(waiting).code == "OK"


def test_idempotent_call_runs_again_and_is_poisoned_by_its_second_victim(broker: BrokerProcess) -> None:
    tool = definition("echo.echo", idempotent=True)
    first = broker.ready_worker(tool)
    client = broker.open_client()
    call_id = client.call()
    first.receive(messages.Dispatches)
    second = broker.ready_worker(tool, worker_id="echo-2")
    broker.tell(node.Died(certificate("echo-1", started_seq=1)))
    assert second.receive(messages.Dispatches, 2).calls[0].call_id == call_id
    broker.tell(node.Died(certificate("echo-2", started_seq=1)))
    assert client.outcome(call_id, within_s=2).code == "POISONED"


def test_calls_of_a_client_that_vanished_are_cancelled_within_a_second(broker: BrokerProcess) -> None:
    worker = broker.ready_worker()
    client = broker.open_client()
    call_id = client.call(timeout_s=30)
    worker.receive(messages.Dispatches)
    client.close()
    assert worker.receive(messages.Cancel, within_s=1.0).call_ids == (call_id,)


def test_session_resumes_with_the_outcomes_that_were_not_acknowledged(broker: BrokerProcess) -> None:
    worker = broker.ready_worker()
    client = broker.open_client()
    assert client.welcome is not None
    call_id = client.call(timeout_s=30)
    dispatch = worker.receive(messages.Dispatches).calls[0]
    client.close()
    answer(worker, dispatch, "kept")
    again = broker.client(client.key)
    token = broker.issuer.token(client.key.thumbprint)
    again.send(messages.Hello(0, "MCPB", (1,), token, client.welcome.session_id))
    again.welcome = again.receive(messages.Welcome)
    assert again.welcome is not None
    assert again.welcome.resumed
    outcomes = again.receive(messages.Outcomes)
    assert (outcomes.first, outcomes.outcomes[0].call_id) == (1, call_id)


def test_session_of_one_key_cannot_be_resumed_by_another(broker: BrokerProcess) -> None:
    broker.ready_worker()
    victim = broker.open_client()
    assert victim.welcome is not None
    thief = broker.client()
    token = broker.issuer.token(thief.key.thumbprint)
    thief.send(messages.Hello(0, "MCPB", (1,), token, victim.welcome.session_id))
    assert not thief.receive(messages.Welcome).resumed


def test_client_that_gives_credit_and_reads_nothing_is_cut_off(broker: BrokerProcess) -> None:
    worker = broker.ready_worker(definition("echo.echo", streaming=True))
    client = broker.open_client()
    # libzmq reads the connection no further than this
    client.socket.setsockopt(zmq.RCVHWM, 1)
    call_id = client.call(timeout_s=30)
    worker.receive(messages.Dispatches)
    before = psutil.Process(broker.process.pid).memory_info().rss
    part = os.urandom(MIB)
    credit = messages.Credit(client.epoch, (messages.StreamCredit(call_id, 2**53),))

    def answered() -> Any:
        client.send(credit)
        try:
            return worker.receive(messages.Credit | messages.Cancel, 0.2)
        except AssertionError:
            return None

    sent, limit = 0, limits.STREAM_WINDOW_MAX
    while sent < 512:
        for index in range(sent, limit):
            worker.send(messages.Partial(worker.epoch, (messages.Part(call_id, index, None),)), part)
        sent = limit
        told = wait_for(answered, what="credit, or the end of the call")
        if isinstance(told, messages.Cancel):
            break
        limit = told.credits[0].limit
    # what the broker may hold, what it had let the worker send, and what the kernel holds
    bound = limits.CLIENT_SEND_HWM * MIB + limits.PEER_BACKLOG_BYTES_MAX + 2 * limits.STREAM_AHEAD_MAX * MIB
    assert sent * MIB < bound
    assert psutil.Process(broker.process.pid).memory_info().rss - before < bound
    other = broker.open_client()
    assert other.outcome(other.call("system.status")).code == "OK"


def test_second_client_with_the_same_routing_id_gets_nothing_of_the_first(broker: BrokerProcess) -> None:
    worker = broker.ready_worker()
    victim = broker.open_client()
    call_id = victim.call(timeout_s=30)
    dispatch = worker.receive(messages.Dispatches).calls[0]
    victim.close()

    def robbed() -> Peer | None:
        # while the victim's connection is still there, libzmq gives the second one of its name no ear
        thief = broker.client(routing_id=victim.routing_id)
        thief.send(
            messages.Hello(0, "MCPB", (1,), broker.issuer.token(thief.key.thumbprint, principal="thief"))
        )
        try:
            assert thief.receive(messages.Welcome, 0.3).name == "thief"
        except AssertionError:
            return None
        return thief

    thief = wait_for(robbed, what="the freed routing id being taken")
    assert thief is not None
    answer(worker, dispatch, "secret")
    assert thief.hears_nothing_but((messages.Heartbeat,), 0.6), "not even that there was a call"
    assert call_id != b""


def test_unknown_worker_key_is_not_admitted(broker: BrokerProcess) -> None:
    broker.admit("known-1")
    stranger = broker.worker(Curve())
    stranger.send(messages.Register(0, "MCPB", (1,), (definition("evil.tool"),)))
    assert stranger.hears_nothing_but((), 0.5)


def test_shutdown_lets_running_calls_end_and_refuses_new_ones(broker: BrokerProcess) -> None:
    worker = broker.ready_worker()
    client = broker.open_client()
    running = client.call(timeout_s=30)
    dispatch = worker.receive(messages.Dispatches).calls[0]
    broker.tell(node.Shutdown(5.0))
    refused = None
    while refused is None or refused.code == "NOT_FOUND":
        refused = client.outcome(client.call("echo.nothing"))
    assert refused.code == "UNAVAILABLE"
    answer(worker, dispatch, "done")
    assert client.outcome(running).code == "OK"
    assert broker.expect(node.Drained).unfinished == 0
    assert worker.receive(messages.Drain)
    assert broker.process.wait(5) == 0
