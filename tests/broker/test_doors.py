"""Who may connect at all: by address and by key, refused at the handshake and counted."""

from __future__ import annotations

import pytest

from mcp_broker.wire import messages, payload
from tests.support.broker import BrokerProcess, Curve, Peer

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
        assert refused(broker, welcome) == {"handshakes": 1, "addresses": 1}
        assert not stranger.socket.poll(100), "it is not even answered"


def test_who_has_another_key_is_not_answered_where_keys_are_listed() -> None:
    key = Curve()
    with BrokerProcess(only=(key.thumbprint,)) as broker:
        stranger = says_hello(broker, broker.client())
        welcome = says_hello(broker, broker.client(key))
        assert refused(broker, welcome) == {"handshakes": 1, "addresses": 0}
        assert not stranger.socket.poll(100)
