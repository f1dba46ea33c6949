"""Typed identifiers, so that one kind cannot be passed for another, and their printed forms."""

from __future__ import annotations

from typing import Final, NewType

#: the first frame that a ROUTER gives; chosen by the peer, so never proof of who it is
RoutingId = NewType("RoutingId", bytes)
#: the thumbprint of a CURVE public key, as ZAP vouches for it (base64url of SHA-256, 43 characters)
UserId = NewType("UserId", str)
#: 16 bytes made by the client: 8 random, 2 for a shard, 6 counting
CallId = NewType("CallId", bytes)
#: 16 random bytes made by the broker, to resume a client session
SessionId = NewType("SessionId", bytes)
#: "<pool>-<number of the life>", unique for the life of a supervisor's state directory
WorkerId = NewType("WorkerId", str)
#: dotted lower-case name, "text.word_count"
ToolName = NewType("ToolName", str)

CALL_ID_BYTES: Final = 16
SESSION_ID_BYTES: Final = 16
ROUTING_ID_BYTES: Final = 16


def call_id(prefix: bytes, counter: int, shard: int = 0) -> CallId:
    """Build a call id from a client's random 8-byte prefix and its running number.

    Source: docs/protocol.md, "Identifiers".
    """
    return CallId(prefix + (shard << 48 | counter).to_bytes(8, "big"))
