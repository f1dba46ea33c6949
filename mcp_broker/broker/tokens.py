"""From a token in HELLO to what its session may do: the seam between auth and the machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from mcp_broker.auth import claims as claims_
from mcp_broker.auth.policy import Deny, Policy
from mcp_broker.wire import messages


class TokenGrant:
    """What one verified token gives (the machines' Grant)."""

    __slots__ = ("_policy", "caller", "expires_at", "priority", "weight")

    def __init__(self, claims: claims_.Claims, expires_at: float) -> None:
        self._policy = Policy.compile(claims)
        self.expires_at = expires_at
        self.weight = claims.weight
        self.priority = claims.priority
        self.caller = messages.Caller(claims.principal, claims.clearance, tuple(claims.scopes), claims.admin)

    def refusal(self, tool: str, level: int) -> str | None:
        """Return why the tool is not covered, or None."""
        decision = self._policy.allows(tool, level)
        # a name that no tool can have is simply not found
        return decision.message if isinstance(decision, Deny) and decision.code == "FORBIDDEN" else None


class TokenVerifier:
    """Verifies tokens against the issuer keys of one broker.

    Args:
        keys: kid -> Ed25519 public key, 32 bytes.
    """

    def __init__(
        self,
        keys: Mapping[str, bytes],
        *,
        issuer: str,
        audience: str,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = {kid: claims_.VerifyKey(public) for kid, public in keys.items()}
        self._issuer = issuer
        self._audience = audience
        self._wall_clock = wall_clock

    def verify(self, token: str, user_id: str, now: float) -> TokenGrant:
        """Verify a token for the key that ZAP vouched for.

        Raises:
            Unauthenticated: with ``details["reason"]`` (the client's fault).
        """
        wall_now = self._wall_clock()
        claims = claims_.verify(
            token,
            self._keys,
            issuer=self._issuer,
            audience=self._audience,
            wall_now=wall_now,
            user_id=user_id,
        )
        return TokenGrant(claims, now + claims.expires_wall - wall_now)
