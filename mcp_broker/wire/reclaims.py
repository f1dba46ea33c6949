"""What was taken back after a worker's end: the reclaim record."""

from __future__ import annotations

from mcp_broker.wire.items import Record


class Taken(Record, kw_only=True, frozen=True):
    """What one step of reclaim took back."""

    #: the step's name: docs/reclaim.md lists them
    step: str
    #: processes killed, files, objects or ports taken back
    count: int = 0
    #: disk space or memory that this gave back
    bytes: int = 0
    #: from its begin to its end, other work in between included
    ms: float = 0.0
    #: what could not be taken back, with the reason; the first few
    left: tuple[str, ...] = ()


class Reclaim(Record, kw_only=True, frozen=True):
    """What was taken back after the end of one worker: its reclaim record."""

    worker_id: str
    pool: str
    pid: int
    #: the isolation level that it ran at, which decides the steps
    level: str
    steps: tuple[Taken, ...] = ()
    #: from its end to the last step's end
    ms: float = 0.0
    wall_at: float = 0.0
