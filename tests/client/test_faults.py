"""What the clients live through when connections break and brokers restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from mcp_broker import Client, errors
from mcp_broker.wire import messages, payload
from tests.client.support.broker import ScriptedBroker, fault, ok
from tests.support.proxy import TcpProxy
from tests.support.waiting import wait_for


@pytest.fixture
def proxy(broker: ScriptedBroker) -> Iterator[TcpProxy]:
    with TcpProxy(broker.endpoint) as running:
        yield running


@pytest.fixture
def client(broker: ScriptedBroker, proxy: TcpProxy) -> Iterator[Client]:
    with Client.connect(broker.profile(proxy.endpoint)) as connected:
        yield connected


def ways_to(endpoint: str) -> set[int]:
    """Return the local ports from which this process is connected to an endpoint.

    A client that nobody calls has no thread of its own: what it sends into a connection that is over, before the kernel's
    word of that has reached it, counts as sent.
    """
    port = int(endpoint.rpartition(":")[2])
    return {
        connection.laddr.port
        for connection in psutil.Process().net_connections("tcp")
        if connection.raddr and connection.raddr.port == port
    }


def test_call_outlives_a_cut_connection_and_runs_once(
    client: Client, broker: ScriptedBroker, proxy: TcpProxy
) -> None:
    future = client.submit("hold")
    wait_for(lambda: broker.held)
    began = time.monotonic()
    proxy.cut()
    wait_for(lambda: len(broker.of_kind(messages.Hello)) == 2)
    assert time.monotonic() - began < 0.9, "noticed by the connection, not by silence"
    broker.release()
    assert future.result(5) == "released"
    assert broker.runs[future.call_id] == 1
    hellos = broker.of_kind(messages.Hello)
    assert hellos[0].session_id is None
    assert hellos[1].session_id is not None


@pytest.mark.slow
def test_half_open_connection_is_noticed_by_silence_and_the_lost_call_sent_again(
    client: Client, broker: ScriptedBroker, proxy: TcpProxy
) -> None:
    assert client.call("echo", {"a": 1}) == {"a": 1}
    proxy.stall(only_existing=True)
    began = time.monotonic()
    assert client.call("echo", {"a": 2}, timeout_s=10) == {"a": 2}
    assert time.monotonic() - began < 3
    assert set(broker.runs.values()) == {1}


@pytest.mark.slow
def test_stalled_path_that_comes_back_loses_nothing(
    client: Client, broker: ScriptedBroker, proxy: TcpProxy
) -> None:
    futures = [client.submit("echo", {"i": at}) for at in range(10)]
    proxy.stall()
    futures += [client.submit("echo", {"i": at}) for at in range(10, 20)]
    attempts = len(broker.of_kind(messages.Hello))
    wait_for(lambda: proxy.accepted > attempts)
    proxy.resume()
    assert [future.result(10)["i"] for future in futures] == list(range(20))
    assert set(broker.runs.values()) == {1}


def test_idle_connection_that_was_cut_is_opened_again_for_the_next_call(
    client: Client, broker: ScriptedBroker, proxy: TcpProxy
) -> None:
    assert client.call("echo", {"a": 1}) == {"a": 1}
    before = ways_to(proxy.endpoint)
    assert before
    proxy.cut()
    broker.forget()
    wait_for(lambda: not before & ways_to(proxy.endpoint), what="the client's own end of the connection")
    assert client.call("echo", {"a": 2}, timeout_s=10) == {"a": 2}


def test_restarted_broker_loses_calls_that_were_sent_and_serves_new_ones() -> None:
    first = ScriptedBroker().start()
    keys, port = first.keys, first.port
    with Client.connect(first.profile()) as client:
        futures = [client.submit("hold") for _ in range(64)]
        wait_for(lambda: len(first.held) == 64)
        first.stop()
        with ScriptedBroker(port, keys=keys, epoch=8) as second:
            began = time.monotonic()
            assert client.call("echo", {"a": 1}, timeout_s=10) == {"a": 1}
            assert time.monotonic() - began < 2
            for future in futures:
                with pytest.raises(errors.BrokerLost) as lost:
                    future.result(5)
                assert not lost.value.retryable
            assert len(second.runs) == 1


def test_call_made_while_the_broker_is_away_waits_for_it() -> None:
    first = ScriptedBroker().start()
    keys, port = first.keys, first.port
    with Client.connect(first.profile()) as client:
        assert ways_to(first.endpoint)
        first.stop()
        wait_for(lambda: not ways_to(first.endpoint), what="the client's own end of the connection")
        future = client.submit("echo", {"a": 1}, timeout_s=10)
        with ScriptedBroker(port, keys=keys, epoch=8):
            assert future.result(5) == {"a": 1}


def test_call_that_finds_no_broker_within_its_time_may_be_tried_again() -> None:
    first = ScriptedBroker().start()
    with Client.connect(first.profile()) as client:
        first.stop()
        with pytest.raises(errors.BrokerLost) as lost:
            client.call("echo", timeout_s=0.3)
        assert lost.value.retryable


def test_goodbye_ends_calls_and_new_ones_find_the_next_session(
    client: Client, broker: ScriptedBroker
) -> None:
    future = client.submit("hold")
    wait_for(lambda: broker.held)
    broker.say(messages.Goodbye(broker.epoch, "the broker is shutting down"))
    with pytest.raises(errors.BrokerLost, match="shutting down"):
        future.result(5)
    assert client.call("echo", {"a": 1}) == {"a": 1}


def test_broker_that_beats_and_says_nothing_is_overruled_at_the_deadline(
    client: Client, broker: ScriptedBroker
) -> None:
    began = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded):
        client.call("hold", timeout_s=0.2)
    assert 0.6 < time.monotonic() - began < 1.2


def test_duplicate_unknown_and_late_outcomes_change_nothing(client: Client, broker: ScriptedBroker) -> None:
    def twice(serving: ScriptedBroker, session_id: bytes, call: messages.Call, packed: bytes) -> None:
        route = serving.sessions[session_id].routing_id
        serving.outcome(session_id, ok(b"?" * 16, "nobody's"))
        serving.outcome(session_id, ok(call.call_id, "first"))
        again = messages.Outcomes(
            serving.epoch, serving.sessions[session_id].sent, (ok(call.call_id, "again"),)
        )
        serving.send(route, again)
        serving.outcome(session_id, fault(call.call_id, "INTERNAL", "second"))

    broker.script["twice"] = twice
    future = client.submit("twice")
    assert future.result(5) == "first"
    assert client.call("echo", {"a": 1}) == {"a": 1}
    assert future.result() == "first"


def test_bytes_that_are_no_message_are_dropped(client: Client, broker: ScriptedBroker) -> None:
    def noise() -> None:
        for route in broker.routes:
            broker._socket.send_multipart([route, b"\xc1 nonsense"])
            broker._socket.send_multipart([route, b"\x92\xa5NOVEL\x07", b"body", b"more"])

    broker.do(noise)
    assert client.call("echo", {"a": 1}) == {"a": 1}
    assert client._link.malformed == 2


def test_stream_whose_last_parts_were_lost_ends_as_lost(client: Client, broker: ScriptedBroker) -> None:
    def gap(broker: ScriptedBroker, session_id: bytes, call: messages.Call, _packed: bytes) -> None:
        part = messages.Part(call.call_id, 0, payload.pack("first"))
        broker.send(broker.sessions[session_id].routing_id, messages.Partial(broker.epoch, (part,)))
        broker.outcome(session_id, messages.Outcome(call.call_id, "OK", payload.pack(None), parts=2))

    broker.script["gap"] = gap
    stream = client.stream("gap")
    assert next(stream) == "first"
    with pytest.raises(errors.BrokerLost, match="1 parts of the stream"):
        next(stream)


def test_many_cuts_under_load_lose_and_double_nothing(
    client: Client, broker: ScriptedBroker, proxy: TcpProxy
) -> None:
    stop = threading.Event()

    def cutting() -> None:
        while not stop.wait(0.05):
            proxy.cut()

    thread = threading.Thread(target=cutting)
    thread.start()
    try:
        results = [one["i"] for one in client.map("echo", ({"i": at} for at in range(3000)))]
    finally:
        stop.set()
        thread.join()
    assert results == list(range(3000))
    assert set(broker.runs.values()) == {1}
