"""Tokens: what is issued verifies, and nothing else does."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import nacl.signing
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker import limits
from mcp_broker.auth import claims
from mcp_broker.auth.claims import VerifyKey
from mcp_broker.auth.keys import IssuerKey
from mcp_broker.auth.policy import ALLOWED, Policy
from mcp_broker.auth.zap import thumbprint
from mcp_broker.errors import ConfigError, Unauthenticated
from tests.auth.forge import AUDIENCE, HOLDER, NOW, Forge, b64

DAY = 86_400


@pytest.fixture(scope="session")
def forge() -> Forge:
    return Forge(IssuerKey(b"i" * 32))


def issue(forge: Forge, **changes: Any) -> str:
    good: dict[str, Any] = {
        "principal": "ada",
        "scopes": ["text.*", "!text.secret"],
        "thumbprint": HOLDER,
        "audience": AUDIENCE,
        "issuer": AUDIENCE,
        "ttl_s": 3600,
        "wall_now": NOW,
        "jti": "1",
    }
    return claims.issue(forge.key.seed, kid=forge.key.kid, **{**good, **changes})


def reason(forge: Forge, token: str, **how: Any) -> str:
    with pytest.raises(Unauthenticated) as caught:
        forge.verify(token, **how)
    error = caught.value
    assert error.details["reason"] in claims.REASONS
    assert not error.retryable
    # what is refused is not repeated: it ends in logs
    assert not token or len(token) < 20 or token not in f"{error} {error.details}"
    return str(error.details["reason"])


# -- what verifies


def test_issued_token_verifies_to_its_claims(forge: Forge) -> None:
    said = forge.verify(issue(forge, clearance=7, admin=True))
    assert (said.principal, said.scopes) == ("ada", ("text.*", "!text.secret"))
    assert (said.clearance, said.admin, said.jti) == (7, True, "1")
    assert (said.issued_wall, said.expires_wall) == (NOW, NOW + 3600)
    assert (said.thumbprint, said.audience, said.issuer) == (HOLDER, AUDIENCE, AUDIENCE)


def test_verified_claims_make_a_policy(forge: Forge) -> None:
    policy = Policy.compile(forge.verify(issue(forge, clearance=1)))
    assert policy.allows("text.x", 1) is ALLOWED
    assert policy.allows("text.secret") is not ALLOWED


def test_clearance_and_admin_are_nothing_unless_said(forge: Forge) -> None:
    said = forge.verify(forge.sign())
    assert (said.clearance, said.admin) == (0, False)


def test_weight_and_priority_are_as_usual_unless_said(forge: Forge) -> None:
    said = forge.verify(forge.sign())
    assert (said.weight, said.priority) == (1, 1)
    said = forge.verify(issue(forge, weight=5, priority=0))
    assert (said.weight, said.priority) == (5, 0)


def test_list_of_audiences_is_as_good_as_its_members(forge: Forge) -> None:
    assert forge.verify(forge.sign({"aud": ["elsewhere", AUDIENCE]})).audience == AUDIENCE
    assert reason(forge, forge.sign({"aud": ["elsewhere"]})) == "wrong_audience"


def test_old_key_verifies_beside_the_new_one_each_under_its_own_name(forge: Forge) -> None:
    old, new = forge.key, IssuerKey(b"n" * 32)
    keys = {old.kid: VerifyKey(old.public), new.kid: VerifyKey(new.public)}
    expected: dict[str, Any] = {
        "audience": AUDIENCE, "issuer": AUDIENCE, "wall_now": NOW, "user_id": HOLDER,
    }  # fmt: skip
    assert claims.verify(issue(forge), keys, **expected).principal == "ada"
    assert claims.verify(issue(Forge(new)), keys, **expected).principal == "ada"
    with pytest.raises(Unauthenticated):
        claims.verify(forge.sign(header={"kid": new.kid}), keys, **expected)


# -- attack 7: the token of another


def test_stolen_token_is_useless_under_another_valid_key(forge: Forge) -> None:
    assert reason(forge, issue(forge), user_id=thumbprint(b"t" * 32)) == "bound_to_other_key"


@pytest.mark.parametrize("user_id", ["", HOLDER[:-1], HOLDER + "A", HOLDER.swapcase(), "\ud800", "é" * 43])
def test_user_id_is_compared_whole(forge: Forge, user_id: str) -> None:
    assert reason(forge, issue(forge), user_id=user_id) == "bound_to_other_key"


# -- attack 8: the algorithm


def public_key_spellings(key: IssuerKey) -> dict[str, bytes]:
    public = Ed25519PublicKey.from_public_bytes(key.public)
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return {
        "pem": pem,
        "pem_spaced": b"\n " + pem.replace(b"\n", b"\r\n") + b"\t",
        "pem_stripped": pem.strip(),
        "openssh": public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "jwk": json.dumps({"kty": "OKP", "crv": "Ed25519", "x": b64(key.public)}).encode(),
        "raw": key.public,
    }


@pytest.mark.parametrize("spelling", ["pem", "pem_spaced", "pem_stripped", "openssh", "der", "jwk", "raw"])
def test_public_key_is_no_hmac_secret(forge: Forge, spelling: str) -> None:
    secret = public_key_spellings(forge.key)[spelling]
    for alg in ("HS256", "EdDSA"):
        head = b64(json.dumps({**forge.header, "alg": alg}).encode())
        signed = f"{head}.{b64(json.dumps(forge.payload).encode())}"
        mac = hmac.digest(secret, signed.encode(), hashlib.sha256)
        assert reason(forge, f"{signed}.{b64(mac)}") in {"wrong_algorithm", "bad_signature"}


@pytest.mark.parametrize(
    "alg", ["none", "None", "NONE", "", "eddsa", "EdDSA ", "HS256", "ES256", "RS256", "Ed448"]
)
def test_header_cannot_choose_the_algorithm(forge: Forge, alg: str) -> None:
    token = forge.sign(header={"alg": alg})
    assert reason(forge, token) == "wrong_algorithm"
    assert reason(forge, token.rpartition(".")[0] + ".") == "wrong_algorithm"


@pytest.mark.parametrize("alg", [None, 1, ["EdDSA"], {"EdDSA": 1}])
def test_algorithm_must_be_said_as_text(forge: Forge, alg: object) -> None:
    assert reason(forge, forge.sign(header={"alg": alg})) == "wrong_algorithm"


def test_missing_or_foreign_signature_is_refused(forge: Forge) -> None:
    token = issue(forge)
    unsigned = token.rpartition(".")[0]
    assert reason(forge, f"{unsigned}.") == "bad_signature"
    other = nacl.signing.SigningKey(b"o" * 32).sign(unsigned.encode()).signature
    assert reason(forge, f"{unsigned}.{b64(other)}") == "bad_signature"
    swapped = issue(forge, principal="eve").split(".")
    assert reason(forge, ".".join([swapped[0], swapped[1], token.split(".")[2]])) == "bad_signature"


def test_verify_key_is_32_bytes_of_ed25519() -> None:
    for public in (b"", b"x" * 31, b"x" * 33):
        with pytest.raises(ValueError, match=r"."):
            VerifyKey(public)


# -- attack 9: what PyJWT alone would let pass


@pytest.mark.parametrize("name", claims.REQUIRED)
def test_every_required_claim_is_required(forge: Forge, name: str) -> None:
    assert reason(forge, forge.sign({name: None})) == "missing_claim"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"exp": NOW + limits.TOKEN_TTL_S_MAX + 1}, "lives_too_long"),
        ({"exp": NOW + 3650 * DAY}, "lives_too_long"),
        ({"iat": NOW - 10, "exp": NOW + limits.TOKEN_TTL_S_MAX}, "lives_too_long"),
        ({"nbf": NOW + limits.TOKEN_LEEWAY_S + 1}, "not_yet_valid"),
        ({"iat": NOW + limits.TOKEN_LEEWAY_S + 1}, "not_yet_valid"),
        ({"exp": NOW - limits.TOKEN_LEEWAY_S}, "expired"),
        ({"exp": 0}, "expired"),
        ({"exp": "tomorrow"}, "bad_claim"),
        ({"exp": True}, "bad_claim"),
        ({"exp": -1}, "bad_claim"),
        ({"exp": 10**400}, "bad_claim"),
        ({"nbf": [NOW]}, "bad_claim"),
        ({"iat": {}}, "bad_claim"),
        ({"sub": ""}, "bad_claim"),
        ({"sub": "a\nb"}, "bad_claim"),
        ({"sub": "\ud800"}, "bad_claim"),
        ({"sub": "a" * 257}, "bad_claim"),
        ({"sub": 1}, "bad_claim"),
        ({"jti": ""}, "bad_claim"),
        ({"jti": "j" * 129}, "bad_claim"),
        ({"iss": [AUDIENCE]}, "bad_claim"),
        ({"aud": []}, "bad_claim"),
        ({"aud": [AUDIENCE, 1]}, "bad_claim"),
        ({"aud": {AUDIENCE: 1}}, "bad_claim"),
        ({"cnf": HOLDER}, "bad_claim"),
        ({"cnf": {}}, "bad_claim"),
        ({"cnf": {"jkt": ""}}, "bad_claim"),
        ({"cnf": {"jkt": [HOLDER]}}, "bad_claim"),
        ({"cnf": {"jkt": "é" * 43}}, "bad_claim"),
        ({"cnf": {"x5t#S256": HOLDER}}, "bad_claim"),
        ({"clearance": 11}, "bad_claim"),
        ({"clearance": -1}, "bad_claim"),
        ({"clearance": 1.0}, "bad_claim"),
        ({"clearance": True}, "bad_claim"),
        ({"clearance": "10"}, "bad_claim"),
        ({"weight": 0}, "bad_claim"),
        ({"weight": 101}, "bad_claim"),
        ({"weight": 1.5}, "bad_claim"),
        ({"priority": 3}, "bad_claim"),
        ({"priority": -1}, "bad_claim"),
        ({"priority": True}, "bad_claim"),
        ({"admin": 1}, "bad_claim"),
        ({"admin": "true"}, "bad_claim"),
        ({"scope": ["text.*"]}, "bad_claim"),
        ({"scope": ""}, "bad_scope"),
        ({"scope": "text.*  sql.*"}, "bad_scope"),
        ({"scope": " text.*"}, "bad_scope"),
        ({"scope": "text.*\tsql.*"}, "bad_scope"),
        ({"scope": "te*"}, "bad_scope"),
        ({"scope": "*.status"}, "bad_scope"),
    ],
)
def test_claim_out_of_form_is_refused(forge: Forge, changes: dict[str, Any], expected: str) -> None:
    assert reason(forge, forge.sign(changes)) == expected


@pytest.mark.parametrize("typ", ["JWT", "jwt", "AT+JWT", "application/at+jwt", "", None, 1, ["at+jwt"]])
def test_other_types_of_token_are_refused(forge: Forge, typ: object) -> None:
    assert reason(forge, forge.sign(header={"typ": typ})) == "wrong_type"


@pytest.mark.parametrize("kid", ["", "unknown", None, 1, ["kid"], {"kid": 1}, "../issuer.key", "\0"])
def test_unknown_key_is_refused(forge: Forge, kid: object) -> None:
    assert reason(forge, forge.sign(header={"kid": kid})) == "unknown_key"


@pytest.mark.parametrize("name", sorted(claims.FORBIDDEN_HEADERS))
def test_header_cannot_bring_keys_or_extensions(forge: Forge, name: str) -> None:
    assert reason(forge, forge.sign(header={name: "https://evil.example/keys"})) == "forbidden_header"


def test_key_inside_the_token_is_not_used(forge: Forge) -> None:
    evil = Forge(IssuerKey(b"e" * 32))
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": b64(evil.key.public)}
    assert reason(forge, evil.sign(header={"jwk": jwk, "kid": forge.key.kid})) == "forbidden_header"
    assert reason(forge, evil.sign(header={"kid": forge.key.kid})) == "bad_signature"


def test_duplicate_names_are_refused_at_any_depth(forge: Forge) -> None:
    header, payload = json.dumps(forge.header), json.dumps(forge.payload)
    twice = (
        (header, payload[:-1] + ', "sub": "eve"}'),
        (header[:-1] + ', "alg": "EdDSA"}', payload),
        (header, payload.replace('{"jkt"', '{"jkt": "x", "jkt"')),
        (header, payload[:-1] + ', "s\\u0075b": "eve"}'),
    )
    for head, body in twice:
        assert reason(forge, forge.sign_raw(head.encode(), body.encode())) == "malformed"


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b'"text"', b"1", b"null", b'{"exp": NaN}', b'{"exp": Infinity}', b"\xff", b"{}{}",
     b"[" * 5000, b'{"a":' * 1000, b'{"exp": ' + b"9" * 5000 + b"}", "{}".encode("utf-16")],
    ids=lambda payload: repr(payload[:16]),
)  # fmt: skip
def test_payload_that_is_no_json_object_is_refused(forge: Forge, payload: bytes) -> None:
    assert reason(forge, forge.sign_raw(json.dumps(forge.header).encode(), payload)) == "malformed"
    assert reason(forge, forge.sign_raw(payload, json.dumps(forge.payload).encode())) == "malformed"


@pytest.mark.parametrize(
    "token", ["", ".", "..", "...", "a.b", "a.b.c.d", "é.é.é", "\ud800", "a b.c.d", "A.A.A"]
)
def test_text_that_is_no_token_is_refused(forge: Forge, token: str) -> None:
    assert reason(forge, token) == "malformed"


def test_token_has_one_spelling(forge: Forge) -> None:
    token = issue(forge)
    head, body, signature = token.split(".")
    padded = base64.urlsafe_b64encode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))).decode()
    # 64 bytes leave four bits of the last character unused
    stray = signature[:-1] + chr(ord(signature[-1]) + 1)
    spellings = [f" {token}", f"{token}\n", f"{token}=", f"{token}==", f"{head}.{body}.{stray}"]
    if padded != body:
        spellings.append(f"{head}.{padded}.{signature}")
    for spelling in spellings:
        assert reason(forge, spelling) == "malformed"


def test_token_past_its_bound_is_refused_unread(forge: Forge) -> None:
    assert reason(forge, "a" * (limits.TOKEN_BYTES_MAX + 1)) == "too_long"
    assert reason(forge, forge.sign({"padding": "p" * limits.TOKEN_BYTES_MAX})) == "too_long"


# -- attack 10: the token of another broker


@pytest.mark.parametrize(
    "other", [AUDIENCE[:-1], AUDIENCE + "x", AUDIENCE.upper(), "", AUDIENCE + "/", "mcp-broker:"]
)
def test_audience_and_issuer_are_compared_whole(forge: Forge, other: str) -> None:
    assert reason(forge, forge.sign({"aud": other})) == "wrong_audience"
    assert reason(forge, forge.sign({"iss": other})) == "wrong_issuer"
    assert reason(forge, issue(forge), audience=other) == "wrong_audience"
    assert reason(forge, issue(forge), issuer=other) == "wrong_issuer"


# -- time


def test_token_holds_from_leeway_before_to_leeway_after_its_life(forge: Forge) -> None:
    token, leeway = issue(forge), limits.TOKEN_LEEWAY_S
    assert forge.verify(token, wall_now=NOW - leeway).jti == "1"
    assert forge.verify(token, wall_now=NOW + 3600 + leeway - 0.001).jti == "1"
    assert reason(forge, token, wall_now=NOW - leeway - 0.001) == "not_yet_valid"
    assert reason(forge, token, wall_now=NOW + 3600 + leeway) == "expired"


def test_clock_that_shows_nothing_refuses(forge: Forge) -> None:
    assert reason(forge, issue(forge), wall_now=float("nan")) == "not_yet_valid"


def test_machine_clock_has_no_say(forge: Forge) -> None:
    # 1970 and 2286: PyJWT's own check would refuse both
    for wall in (1_000.0, 9_999_999_999.0):
        assert forge.verify(issue(forge, wall_now=wall), wall_now=wall).issued_wall == wall


# -- issuing


@pytest.mark.parametrize(
    "changes",
    [
        {"ttl_s": 0},
        {"ttl_s": -1},
        {"ttl_s": limits.TOKEN_TTL_S_MAX + 1},
        {"ttl_s": float("nan")},
        {"principal": ""},
        {"principal": "a\nb"},
        {"scopes": []},
        {"scopes": ["te*"]},
        {"scopes": ["text.* sql.*"]},
        {"clearance": 11},
        {"clearance": True},
        {"weight": 0},
        {"weight": 101},
        {"priority": 3},
        {"scopes": [f"tool{number}.*" for number in range(1000)]},
    ],
    ids=str,
)
def test_token_that_no_broker_would_take_is_not_issued(forge: Forge, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        issue(forge, **changes)


def test_longest_life_verifies(forge: Forge) -> None:
    token = issue(forge, ttl_s=limits.TOKEN_TTL_S_MAX, wall_now=NOW + 0.9)
    assert forge.verify(token).expires_wall == NOW + limits.TOKEN_TTL_S_MAX


# -- any text whatever


def verifies_or_refuses(forge: Forge, token: str) -> None:
    refused = None
    try:
        forge.verify(token)
    except Unauthenticated as error:
        refused = error
    assert refused is None or refused.details["reason"] in claims.REASONS


@given(token=st.text())
def test_any_text_is_claims_or_unauthenticated(forge: Forge, token: str) -> None:
    verifies_or_refuses(forge, token)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    payload=st.dictionaries(
        st.sampled_from([*claims.REQUIRED, "clearance", "admin", "weight", "priority"]), JSON, max_size=4
    ),
    header=st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "x"]), JSON, max_size=1),
)
def test_any_signed_json_is_claims_or_unauthenticated(
    forge: Forge, payload: dict[str, Any], header: dict[str, Any]
) -> None:
    verifies_or_refuses(forge, forge.sign(payload, header))


@given(data=st.data())
def test_token_with_one_character_changed_is_refused(forge: Forge, data: st.DataObject) -> None:
    token = issue(forge)
    place = data.draw(st.integers(0, len(token) - 1))
    character = data.draw(st.characters().filter(lambda drawn: drawn != token[place]))
    reason(forge, token[:place] + character + token[place + 1 :])
