"""Tokens: JWT (RFC 7519, RFC 8725) bound to a CURVE key, issued and verified.

The profile follows RFC 9068 (``typ: at+jwt``) with a confirmation claim (RFC 7800): ``cnf.jkt`` is the
thumbprint (RFC 7638) of the holder's CURVE public key, the form that RFC 9449 gave it. The CURVE
handshake proves possession, so a stolen token is useless under any other key.

=========  ==================================================================================
iss aud    who issued it; for which broker (compared whole, never by part)
sub        the principal, 1 to 256 printable characters
iat nbf    seconds since 1970; not in the future
exp        seconds since 1970; at most ``limits.TOKEN_TTL_S_MAX`` after iat
jti        names this token, for revocation
scope      patterns with one space between (policy.py says what they mean)
cnf        ``{"jkt": thumbprint}``
clearance  optional, 0 to 10; 0 when absent
admin      optional, true or false; true adds the scope pattern ``system.*`` (and nothing else)
weight     optional, 1 to 100; 1 when absent
priority   optional, 0 (high) to 2 (low): the highest class its calls may wait in; 1 when absent
=========  ==================================================================================

EdDSA with Ed25519 (RFC 8037) only: a key has one algorithm, and the header cannot choose another.
PyJWT checks the signature alone. What it would let pass (a missing exp, any typ, duplicate keys, ten
years of life) and what it would ask the clock for is checked here.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn, get_args

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.api_jws import PyJWS

from mcp_broker import limits
from mcp_broker.auth import forms
from mcp_broker.auth.policy import LEVEL_MAX, bad_patterns
from mcp_broker.errors import ConfigError, Unauthenticated
from mcp_broker.ids import UserId

ALGORITHM: Final = "EdDSA"
TYPE: Final = "at+jwt"
REQUIRED: Final = ("iss", "aud", "sub", "exp", "nbf", "iat", "jti", "scope", "cnf")
#: Header members by which a token would bring or fetch its own key, or change what is signed.
FORBIDDEN_HEADERS: Final = frozenset(
    {"jku", "jwk", "x5u", "x5c", "x5t", "x5t#S256", "crit", "b64", "zip", "enc", "cty"}
)
Reason = Literal[
    "malformed",
    "too_long",
    "forbidden_header",
    "wrong_type",
    "wrong_algorithm",
    "unknown_key",
    "bad_signature",
    "missing_claim",
    "bad_claim",
    "bad_scope",
    "wrong_issuer",
    "wrong_audience",
    "lives_too_long",
    "not_yet_valid",
    "expired",
    "bound_to_other_key",
]
#: ``details["reason"]`` of every Unauthenticated that this module raises is one of these
REASONS: Final[frozenset[str]] = frozenset(get_args(Reason))

_JWS: Final = PyJWS(algorithms=[ALGORITHM])


@dataclass(frozen=True, slots=True)
class VerifyKey:
    """The public half of an issuer's key: 32 bytes of Ed25519, which verify EdDSA and nothing else.

    Raises:
        ValueError: not 32 bytes, or not a point of the curve.
    """

    public: bytes
    #: the same, parsed once
    jwk: jwt.PyJWK = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        x = base64.urlsafe_b64encode(self.public).rstrip(b"=").decode("ascii")
        try:
            jwk = jwt.PyJWK({"kty": "OKP", "crv": "Ed25519", "x": x}, algorithm=ALGORITHM)
        except jwt.exceptions.PyJWTError as error:
            raise ValueError(str(error)) from error
        object.__setattr__(self, "jwk", jwk)


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says.

    Attributes:
        principal: who (``sub``).
        scopes: patterns of tool names, as :mod:`mcp_broker.auth.policy` reads them.
        clearance: 0 to 10.
        admin: whether ``system.*`` is covered too.
        issued_wall: seconds since 1970 (``iat``).
        expires_wall: seconds since 1970 (``exp``); turn it into monotonic time once, for a session.
        jti: this token's name, for revocation.
        thumbprint: of the CURVE key that it is bound to.
        audience: the broker that it is for.
        issuer: who vouches.
        weight: its share of a busy pool, 1 to ``limits.WEIGHT_MAX``.
        priority: the highest class in which its calls may wait, 0 to 2.
    """

    principal: str
    scopes: tuple[str, ...]
    clearance: int
    admin: bool
    issued_wall: float
    expires_wall: float
    jti: str
    thumbprint: UserId
    audience: str
    issuer: str
    weight: int = 1
    priority: int = forms.PRIORITY_DEFAULT


# -- issuing ------------------------------------------------------------------------------------


def issue(  # noqa: PLR0913 (a token has this many claims, and they go by name)
    seed: bytes,
    *,
    kid: str,
    principal: str,
    scopes: Iterable[str],
    thumbprint: str,
    audience: str,
    issuer: str,
    ttl_s: float,
    wall_now: float,
    jti: str,
    clearance: int = 0,
    admin: bool = False,
    weight: int = 1,
    priority: int = forms.PRIORITY_DEFAULT,
) -> str:
    """Make a token.

    Args:
        seed: the issuer's Ed25519 secret, 32 bytes (RFC 8032).
        kid: the name under which verifiers know its public half.
        principal: who it is for, 1 to 256 printable characters.
        scopes: at least one pattern.
        thumbprint: of the holder's CURVE public key.
        audience: the broker that may accept it.
        issuer: who vouches; the verifier expects the same text.
        ttl_s: life in seconds, up to ``limits.TOKEN_TTL_S_MAX``; a fraction is rounded up.
        wall_now: seconds since 1970, from the caller's clock.
        jti: a name that no other token has.
        clearance: 0 to 10.
        admin: adds the scope ``system.*``.
        weight: 1 to ``limits.WEIGHT_MAX``.
        priority: 0 to 2.

    Returns:
        The compact form, ASCII.

    Raises:
        ConfigError: an argument that no verifier would accept; the operator's fault.
    """
    wanted = tuple(scopes)
    if not 0 < ttl_s <= limits.TOKEN_TTL_S_MAX:
        days = limits.TOKEN_TTL_S_MAX // 86_400
        msg = f"a token lives for more than 0 seconds and at most {days} days, not {ttl_s:g} s"
        raise ConfigError(msg, {"hint": f"choose a life of up to {days}d"})
    if not forms.is_printable(principal, forms.PRINCIPAL_CHARS_MAX):
        raise ConfigError(f"a principal has 1 to {forms.PRINCIPAL_CHARS_MAX} printable characters")
    if not wanted or (bad := bad_patterns(wanted)):
        hint = "write at least one pattern, like text.word_count, text.*, * or !sql.*"
        why = f"{', '.join(map(repr, bad))} cannot be used" if wanted else "the scope is empty"
        raise ConfigError(f"{why}; {hint}", {"hint": hint})
    if not forms.is_level(clearance):
        raise ConfigError(f"a clearance is a whole number from 0 to {LEVEL_MAX}, not {clearance!r}")
    if not forms.is_weight(weight):
        raise ConfigError(f"a weight is a whole number from 1 to {limits.WEIGHT_MAX}, not {weight!r}")
    if not forms.is_priority(priority):
        raise ConfigError(f"a priority is 0 (high), 1 (normal) or 2 (low), not {priority!r}")
    issued = int(wall_now)
    payload = {
        "iss": issuer,
        "aud": audience,
        "sub": principal,
        "iat": issued,
        "nbf": issued,
        "exp": issued + math.ceil(ttl_s),
        "jti": jti,
        "scope": " ".join(wanted),
        "cnf": {"jkt": thumbprint},
        "clearance": clearance,
        "admin": admin,
        # what is as usual needs no word
        **({"weight": weight} if weight != 1 else {}),
        **({"priority": priority} if priority != forms.PRIORITY_DEFAULT else {}),
    }
    token = _JWS.encode(
        json.dumps(payload, separators=(",", ":")).encode("utf-8"),
        Ed25519PrivateKey.from_private_bytes(seed),
        algorithm=ALGORITHM,
        headers={"typ": TYPE, "kid": kid},
    )
    if len(token) > limits.TOKEN_BYTES_MAX:
        raise ConfigError(
            f"the token would have {len(token)} bytes, more than {limits.TOKEN_BYTES_MAX}",
            {"hint": "use fewer patterns, with wildcards"},
        )
    return token


# -- verifying ----------------------------------------------------------------------------------


def verify(
    token: str,
    keys: Mapping[str, VerifyKey],
    *,
    audience: str,
    issuer: str,
    wall_now: float,
    user_id: str,
) -> Claims:
    """Check a token whole, once a session: about 0.2 ms, nearly all of it the signature.

    Args:
        token: as the peer sent it.
        keys: by kid; the only keys that count, whatever the token's header says.
        audience: ours.
        issuer: the one that we trust.
        wall_now: seconds since 1970, from the caller's clock.
        user_id: the thumbprint that ZAP vouches for on the connection that the token came by.

    Raises:
        Unauthenticated: with ``details["reason"]`` out of :data:`REASONS`, and never a part of the token.
            The peer's fault, or its issuer's; any str whatever ends here or as Claims.
    """
    header, payload = _open(token)
    _check_header(header)
    kid = header.get("kid")
    key = keys.get(kid) if isinstance(kid, str) else None
    if key is None:
        _refuse("unknown_key", "the token was signed by a key that this broker does not know")
    try:
        # algorithms= on top of the key's own: two locks, since this door has been forced before
        _JWS.decode_complete(token, key.jwk, algorithms=[ALGORITHM])
    except jwt.exceptions.PyJWTError:
        _refuse("bad_signature", "the token's signature is wrong")
    for name, fits in forms.FORMS.items():
        if name in payload:
            if not fits(payload[name]):
                _refuse("bad_claim", f"the token's {name} is not of the right form")
        elif name in REQUIRED:
            _refuse("missing_claim", f"the token has no {name}")
    if payload["iss"] != issuer:
        _refuse("wrong_issuer", "the token was issued by somebody else")
    # compared whole; a list is as good as its members (RFC 7519, section 4.1.3)
    if audience not in (payload["aud"] if isinstance(payload["aud"], list) else [payload["aud"]]):
        _refuse("wrong_audience", "the token is for another broker")
    _check_time(payload, wall_now)
    scopes = tuple(payload["scope"].split(" "))
    if bad_patterns(scopes):
        _refuse("bad_scope", "the token's scope is not a list of patterns")
    jkt: str = payload["cnf"]["jkt"]
    if not hmac.compare_digest(jkt.encode("ascii"), user_id.encode("utf-8", "replace")):
        _refuse("bound_to_other_key", "the token is bound to another key than this connection's")
    return Claims(
        principal=payload["sub"],
        scopes=scopes,
        clearance=payload.get("clearance", 0),
        admin=payload.get("admin", False),
        issued_wall=float(payload["iat"]),
        expires_wall=float(payload["exp"]),
        jti=payload["jti"],
        thumbprint=UserId(jkt),
        audience=audience,
        issuer=issuer,
        weight=payload.get("weight", 1),
        priority=payload.get("priority", forms.PRIORITY_DEFAULT),
    )


_HINTS: Final[dict[str, str]] = {
    "expired": "issue a new profile with `mcp-broker credentials issue`; `mcp-broker start` renews the default",
    "not_yet_valid": "compare the clocks of this machine and the one that issued the token",
    "bound_to_other_key": "use the key pair and the token of one and the same profile",
    "wrong_audience": "use a profile that was made by this broker",
    "wrong_issuer": "use a profile that was made by this broker",
    "unknown_key": "use a profile that was made by this broker",
}


def _refuse(reason: Reason, message: str) -> NoReturn:
    details: dict[str, str] = {"reason": reason}
    if reason in _HINTS:
        details["hint"] = _HINTS[reason]
    raise Unauthenticated(message, details) from None


def _open(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the token apart; nothing of it is believed yet."""
    if len(token) > limits.TOKEN_BYTES_MAX:
        _refuse("too_long", f"the token has more than {limits.TOKEN_BYTES_MAX} bytes")
    segments = token.split(".")
    if len(segments) != 3:  # noqa: PLR2004 (RFC 7515: header.payload.signature)
        _refuse("malformed", "the token does not have three parts")
    decoded = [_segment(segment) for segment in segments]
    return _object(decoded[0]), _object(decoded[1])


def _segment(text: str) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        _refuse("malformed", "a part of the token is not base64url")
    # one spelling a token: padding, "+/" and stray bits are refused (RFC 7515, section 2)
    if base64.urlsafe_b64encode(data).rstrip(b"=") != text.encode("ascii"):
        _refuse("malformed", "a part of the token is not base64url")
    return data


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        _refuse("malformed", "a part of the token is not a JSON object with distinct names")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    # two readers of {"sub": "a", "sub": "b"} may see two principals (RFC 8725, section 2.4)
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate name")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _check_header(header: Mapping[str, Any]) -> None:
    if FORBIDDEN_HEADERS & header.keys():
        _refuse("forbidden_header", "the token's header may not bring keys or extensions")
    if header.get("typ") != TYPE:
        _refuse("wrong_type", f"the token's type is not {TYPE}")
    if header.get("alg") != ALGORITHM:
        _refuse("wrong_algorithm", f"the token's algorithm is not {ALGORITHM}")


def _check_time(payload: Mapping[str, Any], wall_now: float) -> None:
    leeway = limits.TOKEN_LEEWAY_S
    if payload["exp"] - payload["iat"] > limits.TOKEN_TTL_S_MAX:
        _refuse("lives_too_long", f"the token lives for more than {limits.TOKEN_TTL_S_MAX // 86_400} days")
    # written so that a wall_now of NaN refuses
    if not (payload["nbf"] <= wall_now + leeway and payload["iat"] <= wall_now + leeway):
        _refuse("not_yet_valid", "the token is not valid yet")
    if not payload["exp"] > wall_now - leeway:
        _refuse("expired", "the token has expired")
