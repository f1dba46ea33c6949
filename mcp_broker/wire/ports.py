"""Leased ports, as a supervisor tells of them."""

from __future__ import annotations

from mcp_broker.wire.items import Record


class PortReport(Record, kw_only=True, frozen=True):
    """One port of the range that is not simply available."""

    port: int
    #: reserved, active, draining or closed
    state: str
    host: str = ""
    #: the worker that has it
    owner: str = ""
    #: why it is closed
    reason: str = ""
    #: when it was lent
    since_wall: float = 0.0
    listening: bool = False
    #: now, and since it was lent, as seen once a second
    connections: int = 0
    connections_total: int = 0
    #: towards its clients, and from them, since it was lent
    bytes_out: int = 0
    bytes_in: int = 0
    #: when connections or bytes changed last
    last_wall: float = 0.0
