"""ZAP: who may finish a handshake."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker.auth import zap
from mcp_broker.auth.zap import Verdict, ZapError, ZapRequest
from mcp_broker.errors import MalformedFrame

if TYPE_CHECKING:
    from mcp_broker.ids import UserId

KEY = b"k" * 32
USER = zap.thumbprint(KEY)
DOMAINS = {
    "clients": zap.clients_rule(revoked=frozenset()),
    "broken": lambda user_id: Verdict.REFUSE,
}


def frames(
    domain: bytes = b"clients", mechanism: bytes = b"CURVE", credentials: tuple[bytes, ...] = (KEY,)
) -> list[bytes]:
    return [b"1.0", b"7", domain, b"127.0.0.1", b"", mechanism, *credentials]


def status(sent: list[bytes]) -> int:
    return zap.decide(zap.parse(sent), DOMAINS).status


def test_thumbprint_is_the_one_of_rfc_8037() -> None:
    # appendix A.3, for the key of appendix A.1
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    assert zap.jwk_thumbprint("Ed25519", public) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_thumbprints_of_one_key_differ_by_curve() -> None:
    assert zap.jwk_thumbprint("Ed25519", KEY) != zap.thumbprint(KEY)
    assert len(USER) == 43


def test_thumbprint_takes_no_other_length() -> None:
    with pytest.raises(ValueError, match="31"):
        zap.thumbprint(KEY[1:])


def test_curve_key_of_a_client_is_admitted_under_its_thumbprint() -> None:
    reply = zap.decide(zap.parse(frames()), DOMAINS)
    assert reply.admitted
    assert zap.reply_frames(reply) == [b"1.0", b"7", b"200", b"OK", USER.encode(), b""]


@pytest.mark.parametrize(
    "sent",
    [
        frames(mechanism=b"NULL", credentials=()),
        frames(mechanism=b"PLAIN", credentials=(b"ada", b"secret")),
        frames(mechanism=b"curve"),
        frames(mechanism=b"GSSAPI"),
        frames(credentials=()),
        frames(credentials=(KEY[1:],)),
        frames(credentials=(KEY + b"k",)),
        frames(credentials=(KEY, KEY)),
        frames(domain=b""),
        frames(domain=b"workers"),
        frames(domain=b"clients\0"),
        frames(domain=b"CLIENTS"),
        frames(domain=b"broken"),
    ],
)
def test_everything_else_is_refused_for_good_and_without_a_user_id(sent: list[bytes]) -> None:
    reply = zap.decide(zap.parse(sent), DOMAINS)
    assert (reply.status, reply.user_id, reply.admitted) == (400, "", False)


def test_revoked_client_key_is_refused_from_the_next_handshake_on() -> None:
    revoked: set[UserId] = set()
    domains = {"clients": zap.clients_rule(revoked)}
    request = zap.parse(frames())
    assert zap.decide(request, domains).status == 200
    revoked.add(USER)
    assert zap.decide(request, domains).status == 400


def test_unknown_worker_tries_again_until_admission_is_complete() -> None:
    admitted: set[UserId] = set()
    complete = False
    domains = {"workers": zap.workers_rule(admitted, lambda: complete)}
    request = zap.parse(frames(domain=b"workers"))
    assert zap.decide(request, domains).status == 300
    complete = True
    assert zap.decide(request, domains).status == 400
    admitted.add(USER)
    reply = zap.decide(request, domains)
    assert (reply.status, reply.user_id) == (200, USER)


def test_clients_key_is_not_a_workers_key() -> None:
    domains = {**DOMAINS, "workers": zap.workers_rule(frozenset(), lambda: True)}
    assert zap.decide(zap.parse(frames(domain=b"workers")), domains).status == 400


@pytest.mark.parametrize(
    ("sent", "has_id"),
    [
        ([], False),
        (frames()[:5], False),
        ([*frames(), b"", b""], False),
        ([b"1.0", b"7" * 256, *frames()[2:]], False),
        ([b"1.1", *frames()[1:]], True),
        ([b"", *frames()[1:]], True),
        (frames(domain=b"clients\xff"), True),
        (frames(mechanism=b"CURV\xc3\x89"), True),
        (frames(domain=b"d" * 256), True),
        (frames(credentials=(b"k" * 256,)), True),
    ],
)
def test_malformed_request_is_an_error_that_is_answered_if_it_can_be(sent: list[bytes], has_id: bool) -> None:
    with pytest.raises(ZapError) as caught:
        zap.parse(sent)
    assert isinstance(caught.value, MalformedFrame)
    reply = zap.error_reply(caught.value)
    assert (reply is not None) == has_id
    if reply is not None:
        assert zap.reply_frames(reply) == [b"1.0", b"7", b"500", b"malformed request", b"", b""]


FIELD = st.one_of(st.sampled_from([b"1.0", b"CURVE", b"clients", b"", KEY, b"\xff"]), st.binary(max_size=300))


@given(st.lists(FIELD, max_size=10))
def test_any_frames_are_a_request_or_an_error(sent: list[bytes]) -> None:
    try:
        request = zap.parse(sent)
    except ZapError:
        return
    assert isinstance(request, ZapRequest)
    reply = zap.decide(request, DOMAINS)
    assert reply.admitted == bool(reply.user_id)
    assert reply.admitted <= (request.mechanism == "CURVE" and request.domain == "clients")
    assert len(zap.reply_frames(reply)) == 6


@pytest.mark.parametrize(
    ("address", "allowed", "expected"),
    [
        ("127.0.0.1", (), 200),
        ("127.0.0.1", ("127.0.0.0/8",), 200),
        ("10.1.2.3", ("127.0.0.0/8", "10.0.0.0/8"), 200),
        ("11.1.2.3", ("127.0.0.0/8", "10.0.0.0/8"), 400),
        ("::1", ("127.0.0.0/8",), 400),
        ("::1", ("::1/128",), 200),
        ("::ffff:127.0.0.1", ("127.0.0.0/8",), 200),
        ("", ("10.0.0.0/8",), 200),
        ("no address", ("0.0.0.0/0", "::/0"), 400),
    ],
)
def test_only_allowed_networks_may_come(address: str, allowed: tuple[str, ...], expected: int) -> None:
    sent = [b"1.0", b"7", b"clients", address.encode(), b"", b"CURVE", KEY]
    assert zap.decide(zap.parse(sent), DOMAINS, zap.networks(allowed)).status == expected


def test_only_listed_keys_may_come_where_there_is_a_list() -> None:
    assert zap.clients_rule(frozenset(), frozenset({USER}))(USER) is Verdict.ADMIT
    assert zap.clients_rule(frozenset(), frozenset())(USER) is Verdict.REFUSE
    assert zap.clients_rule(frozenset({USER}), frozenset({USER}))(USER) is Verdict.REFUSE
