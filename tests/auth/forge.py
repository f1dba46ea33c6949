"""An issuer, a holder and a way to sign anything at all as that issuer."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nacl.signing

from mcp_broker.auth import claims
from mcp_broker.auth.claims import Claims, VerifyKey
from mcp_broker.auth.zap import thumbprint

if TYPE_CHECKING:
    from mcp_broker.auth.keys import IssuerKey

NOW = 1_800_000_000.0
AUDIENCE = "mcp-broker:here"
HOLDER = thumbprint(b"h" * 32)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True)
class Forge:
    """Signs what the issuer itself would never sign."""

    key: IssuerKey

    @property
    def header(self) -> dict[str, Any]:
        return {"alg": "EdDSA", "typ": "at+jwt", "kid": self.key.kid}

    @property
    def payload(self) -> dict[str, Any]:
        return {
            "iss": AUDIENCE,
            "aud": AUDIENCE,
            "sub": "ada",
            "iat": NOW,
            "nbf": NOW,
            "exp": NOW + 3600,
            "jti": "1",
            "scope": "text.*",
            "cnf": {"jkt": HOLDER},
        }

    def sign_raw(self, header: bytes, payload: bytes) -> str:
        signed = f"{b64(header)}.{b64(payload)}"
        return f"{signed}.{b64(nacl.signing.SigningKey(self.key.seed).sign(signed.encode()).signature)}"

    def sign(self, payload: dict[str, Any] | None = None, header: dict[str, Any] | None = None) -> str:
        """Sign the good payload and header with these changes; None as a value takes a member away."""
        parts = [{**self.header, **(header or {})}, {**self.payload, **(payload or {})}]
        kept = [{name: value for name, value in part.items() if value is not None} for part in parts]
        return self.sign_raw(json.dumps(kept[0]).encode(), json.dumps(kept[1]).encode())

    def verify(self, token: str, *, user_id: str = HOLDER, wall_now: float = NOW, **other: str) -> Claims:
        expected = {"audience": AUDIENCE, "issuer": AUDIENCE, **other}
        keys = {self.key.kid: VerifyKey(self.key.public)}
        return claims.verify(token, keys, wall_now=wall_now, user_id=user_id, **expected)
