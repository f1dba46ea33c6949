"""Who may connect at all: by address and by key, refused at the handshake and counted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import zmq

from mcp_broker.broker.zap_handler import ZapHandler
from mcp_broker.core.refusals import Refusals
from mcp_broker.wire import messages, node, payload
from tests.support.broker import BrokerProcess, Curve, Peer
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.process


def says_hello(broker: BrokerProcess, peer: Peer) -> Peer:
    peer.send(messages.Hello(0, "MCPB", (1,), broker.issuer.token(peer.key.thumbprint)))
    return peer


def refused(broker: BrokerProcess, peer: Peer) -> dict[str, int]:
    peer.welcome = peer.receive(messages.Welcome)
    outcome = peer.outcome(peer.call("system.status"))
    assert outcome.body is not None
    counts: dict[str, int] = payload.unpack(outcome.body)["refused"]
    return counts


def test_who_comes_from_elsewhere_is_not_answered_and_is_counted() -> None:
    with BrokerProcess(allow=("127.0.0.2/32", "10.0.0.0/8")) as broker:
        address = broker.client_endpoint.removeprefix("tcp://")
        stranger = says_hello(broker, broker.client())
        welcome = says_hello(broker, broker.client(endpoint=f"tcp://127.0.0.2:0;{address}"))
        assert refused(broker, welcome) == {"handshakes": 1, "addresses": 1, "frames": 0}
        assert not stranger.socket.poll(100), "it is not even answered"


def test_who_has_another_key_is_not_answered_where_keys_are_listed() -> None:
    key = Curve()
    with BrokerProcess(only=(key.thumbprint,)) as broker:
        stranger = says_hello(broker, broker.client())
        welcome = says_hello(broker, broker.client(key))
        assert refused(broker, welcome) == {"handshakes": 1, "addresses": 0, "frames": 0}
        assert not stranger.socket.poll(100)


def test_frames_that_are_refused_before_any_session_are_counted_and_cost_one_line_of_each_kind(
    tmp_path: Path,
) -> None:
    path = tmp_path / "broker.log"
    with path.open("wb") as log, BrokerProcess(log=log) as broker:
        stranger = broker.client()
        for _ in range(100):
            stranger.send(b"\xc1 is no msgpack")
            stranger.receive(messages.Error)
        assert refused(broker, says_hello(broker, broker.client()))["frames"] == 100
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["event"], line["code"]) for line in lines] == [("wire.refused", "MALFORMED_FRAME")]


def test_the_broker_logs_at_the_level_that_it_was_told_last(tmp_path: Path) -> None:
    path = tmp_path / "broker.log"
    with path.open("wb") as log, BrokerProcess(log=log, log_level="error") as broker:
        stranger = broker.client()
        stranger.send(b"\xc1 is no msgpack")
        stranger.receive(messages.Error)
        broker.tell(node.Observe("warning"))
        # the same link says it in order: who is let in now was heard of after the level
        broker.ready_worker()
        stranger.send(b"\x93\xa4NEWS\x01\x00")
        stranger.receive(messages.Error)
    assert [json.loads(line)["code"] for line in path.read_text().splitlines()] == ["UNKNOWN_KIND"]


def test_handshakes_that_are_refused_again_and_again_are_told_by_number_at_the_end_of_a_period(
    caplog: pytest.LogCaptureFixture,
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    counts = {"handshakes": 0, "addresses": 0}
    doorkeeper = ZapHandler(context, {}, (), counts)
    doorkeeper._refusals = Refusals(period_s=0.2)
    with context.socket(zmq.REQ) as socket:
        socket.connect("inproc://zeromq.zap.01")
        for number in range(5):
            socket.send_multipart(
                [b"1.0", b"%d" % number, b"no such domain", b"127.0.0.1", b"", b"CURVE", bytes(32)]
            )
            assert socket.recv_multipart()[2] == b"400"
        wait_for(lambda: len(caplog.records) == 2, what="the end of the period")
    context.term()
    first, more = caplog.records
    assert (first.getMessage(), more.getMessage()) == ("zap.refused", "zap.refused_more")
    assert vars(more)["more"] == {"unknown domain": 4}
    assert counts["handshakes"] == 5
