"""Who may finish a CURVE handshake: ZAP 1.0 (https://rfc.zeromq.org/spec/27/), as values.

A request is the frames after the envelope's empty delimiter::

    version "1.0" | request id | domain | address | identity | mechanism | credentials ...

and a reply::

    version "1.0" | request id | status code | status text | user id | metadata

The identity field is the *server's*, so ZAP cannot vouch for a routing id. What it vouches for is the
user id: the thumbprint of the peer's CURVE key, which libzmq then attaches to every frame of that peer.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

from mcp_broker.errors import MalformedFrame
from mcp_broker.ids import UserId

VERSION: Final = b"1.0"
MECHANISM: Final = "CURVE"
KEY_BYTES: Final = 32
#: RFC 27: version, request id, domain, address, identity and mechanism come before the credentials
HEAD_FRAMES: Final = 6
#: PLAIN has two credentials, the most of any mechanism; we take one
CREDENTIALS_MAX: Final = 2
#: every field of a ZMTP 3.1 command that ends up here has a one-byte length
FIELD_BYTES_MAX: Final = 255


def jwk_thumbprint(curve: str, public: bytes) -> str:
    """Return the RFC 7638 thumbprint of an octet key pair's public half (RFC 8037, "OKP").

    Args:
        curve: "X25519" for CURVE keys, "Ed25519" for signing keys.
        public: the 32 bytes of the public key.

    Returns:
        43 characters: base64url without padding of SHA-256 over the canonical JWK.

    Raises:
        ValueError: the key is not 32 bytes long (the caller's fault).
    """
    if len(public) != KEY_BYTES:
        msg = f"a public key has {KEY_BYTES} bytes, this one has {len(public)}"
        raise ValueError(msg)
    # RFC 7638 section 3: the required members only, in lexicographic order, without whitespace
    jwk = f'{{"crv":"{curve}","kty":"OKP","x":"{_base64url(public)}"}}'
    return _base64url(hashlib.sha256(jwk.encode("ascii")).digest())


def thumbprint(public_key: bytes) -> UserId:
    """Return the user id of a CURVE public key (32 bytes): the thumbprint of its X25519 JWK.

    Raises:
        ValueError: the key is not 32 bytes long.
    """
    return UserId(jwk_thumbprint("X25519", public_key))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


class ZapError(MalformedFrame):
    """The frames are no ZAP 1.0 request.

    libzmq itself sends them, so this is our own bug or a stranger on the inproc endpoint.
    ``request_id`` is set when it could be read: then :func:`error_reply` can answer.
    """

    def __init__(self, message: str, request_id: bytes | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


@dataclass(frozen=True, slots=True)
class ZapRequest:
    """A request to vouch for a peer.

    Attributes:
        request_id: to be sent back; at most 255 bytes.
        domain: which of our sockets asks.
        address: the peer's IP address as text; empty for ipc.
        identity: the asking socket's own routing id, no statement about the peer.
        mechanism: "NULL", "PLAIN", "CURVE" or whatever was sent.
        credentials: one frame of 32 bytes for CURVE; of no certain shape otherwise.
    """

    request_id: bytes
    domain: str
    address: str
    identity: bytes
    mechanism: str
    credentials: tuple[bytes, ...]


class Verdict(Enum):
    """What a domain's rule says about a thumbprint."""

    ADMIT = "admit"
    #: not known yet: the peer tries again by itself
    RETRY = "retry"
    #: libzmq's client gives up for good
    REFUSE = "refuse"


#: A rule answers from memory, at once: ZAP requests are served one after the other, so a rule that
#: waits holds up every handshake.
Rule = Callable[[UserId], Verdict]


@dataclass(frozen=True, slots=True)
class ZapReply:
    """The answer to a request.

    Attributes:
        request_id: the request's.
        status: 200 admitted, 300 try again, 400 refused, 500 the handler failed.
        text: why, in a few ASCII words; for our own logs, since libzmq does not tell the peer.
        user_id: the thumbprint that libzmq attaches to each frame; empty unless 200.
    """

    request_id: bytes
    status: int
    text: str
    user_id: UserId | Literal[""] = ""

    @property
    def admitted(self) -> bool:
        """Whether the handshake goes on."""
        return self.status == 200  # noqa: PLR2004 (RFC 27's "success")


def parse(frames: Sequence[bytes]) -> ZapRequest:
    """Read a request.

    Args:
        frames: those after the envelope, version first.

    Raises:
        ZapError: wrong number of frames, another version, a field too long or not ASCII.
    """
    if not HEAD_FRAMES <= len(frames) <= HEAD_FRAMES + CREDENTIALS_MAX:
        msg = f"a ZAP request has {HEAD_FRAMES} to {HEAD_FRAMES + CREDENTIALS_MAX} frames, not {len(frames)}"
        raise ZapError(msg)
    version, request_id, domain, address, identity, mechanism, *credentials = frames
    if len(request_id) > FIELD_BYTES_MAX:
        raise ZapError("the ZAP request id is too long")
    if version != VERSION:
        raise ZapError("the ZAP version is not 1.0", request_id)
    if any(len(field) > FIELD_BYTES_MAX for field in frames):
        raise ZapError("a ZAP field is longer than 255 bytes", request_id)
    try:
        texts = [field.decode("ascii") for field in (domain, address, mechanism)]
    except UnicodeDecodeError:
        raise ZapError("a ZAP field that should be text is not ASCII", request_id) from None
    return ZapRequest(request_id, texts[0], texts[1], identity, texts[2], tuple(credentials))


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Read networks in CIDR form.

    Raises:
        ValueError: one is no network (the operator's fault).
    """
    return tuple(ipaddress.ip_network(text) for text in texts)


def is_within(address: str, allowed: Sequence[Network]) -> bool:
    """Tell whether an address, as ZAP gives it, is in one of these networks; without any, and without address, it is.

    What has no address comes by a file (ipc), whose mode says who may.
    """
    if not allowed or not address:
        return True
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    # a socket that listens for both families sees IPv4 peers so
    plain = found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found
    return any(plain in network for network in allowed)


#: says of a peer that its address is in none of the allowed networks
NOT_HERE: Final = "this address is in none of the allowed networks"


def decide(request: ZapRequest, domains: Mapping[str, Rule], allowed: Sequence[Network] = ()) -> ZapReply:
    """Answer a request.

    Args:
        request: what libzmq asks.
        domains: one rule a ZAP domain; a domain that is not in it admits nobody.
        allowed: networks that may come; without any, all.

    Returns:
        200 with the thumbprint, 300 (the peer tries again) or 400 (it gives up). Never raises for
        anything that a peer can send.
    """
    rule = domains.get(request.domain)
    if rule is None:
        return ZapReply(request.request_id, 400, "unknown domain")
    if not is_within(request.address, allowed):
        return ZapReply(request.request_id, 400, NOT_HERE)
    if request.mechanism != MECHANISM:
        return ZapReply(request.request_id, 400, "the mechanism must be CURVE")
    if len(request.credentials) != 1 or len(request.credentials[0]) != KEY_BYTES:
        return ZapReply(request.request_id, 400, "the CURVE credential must be one key of 32 bytes")
    user_id = thumbprint(request.credentials[0])
    verdict = rule(user_id)
    if verdict is Verdict.ADMIT:
        return ZapReply(request.request_id, 200, "OK", user_id)
    if verdict is Verdict.RETRY:
        return ZapReply(request.request_id, 300, "admission is not complete yet")
    return ZapReply(request.request_id, 400, "this key is not admitted")


def error_reply(error: ZapError) -> ZapReply | None:
    """Answer a request that could not be read; None when not even its id could be."""
    return None if error.request_id is None else ZapReply(error.request_id, 500, "malformed request")


def reply_frames(reply: ZapReply) -> list[bytes]:
    """Return the six frames of a reply, to be sent behind the request's envelope."""
    return [
        VERSION,
        reply.request_id,
        str(reply.status).encode("ascii"),
        reply.text.encode("ascii"),
        reply.user_id.encode("ascii"),
        b"",
    ]


def clients_rule(revoked: Container[UserId], only: Container[UserId] | None = None) -> Rule:
    """Admit every CURVE key that is not revoked: what a client may do is for its token to say.

    Args:
        revoked: asked anew at each handshake, so it may change.
        only: the keys that may come at all; None: any.
    """

    def rule(user_id: UserId) -> Verdict:
        is_listed = only is None or user_id in only
        return Verdict.ADMIT if is_listed and user_id not in revoked else Verdict.REFUSE

    return rule


def workers_rule(admitted: Container[UserId], is_complete: Callable[[], bool]) -> Rule:
    """Admit the keys that supervisors minted.

    A stranger is told to try again while some node has yet to send its table, for libzmq's client
    never tries again after a 400: a worker that outlived a broker would be lost.

    Args:
        admitted: thumbprints of living workers and nodes; asked anew at each handshake.
        is_complete: whether every known node has sent its table.
    """

    def rule(user_id: UserId) -> Verdict:
        if user_id in admitted:
            return Verdict.ADMIT
        return Verdict.REFUSE if is_complete() else Verdict.RETRY

    return rule
