"""The client's session as a pure machine: what may be said when, and what becomes of every call.

No sockets, clocks, threads or randomness: instants, random bytes and jitter come as arguments.
"""

from __future__ import annotations

from mcp_broker.client.session.calls import CallBook, Packed
from mcp_broker.client.session.machine import ClientSession
from mcp_broker.client.session.pending import Ended, PendingCall, Stage, Wishes, shrunk
from mcp_broker.client.session.table import TABLE, Cell, Event, State
from mcp_broker.client.session.uploads import Upload

__all__ = [
    "TABLE",
    "CallBook",
    "Cell",
    "ClientSession",
    "Ended",
    "Event",
    "Packed",
    "PendingCall",
    "Stage",
    "State",
    "Upload",
    "Wishes",
    "shrunk",
]
