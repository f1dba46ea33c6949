"""What a supervisor and its broker tell each other about processes and pools: the records in their messages.

They are read through :mod:`mcp_broker.wire.node`. Source: docs/protocol.md, "Node link".
"""

from __future__ import annotations

from typing import Literal

from mcp_broker.wire.items import Record

#: How a process ended. Both ends of these records are of one release, so a kind that is not here does not decode; in the
#: records of another release it is read as "unknown".
DeathKind = Literal[
    "exit",
    "signal",
    "boot_failure",
    "operator",
    "deadline",
    "cancel",
    "silence",
    "hook",
    "limit",
    "violation",
    "unknown",
]
#: how far an interrupt goes, and why it does: each of these is a kind of death, too
Stage = Literal["raise", "term", "kill"]
Why = Literal["deadline", "cancel", "silence", "hook"]
PoolState = Literal["ready", "starting", "degraded", "failed", "stopped", "closing", "closed"]
Pressure = Literal["unmeasured", "normal", "warning", "throttle", "exceeded"]


class Certificate(Record, kw_only=True, frozen=True):
    """Why a process ended: its death certificate."""

    worker_id: str
    pool: str
    pid: int
    #: one sentence for people, "unknown" rather than a guess
    cause: str
    kind: DeathKind
    exit_code: int | None = None
    signal: str | None = None
    #: last call that it had started (a dispatch's seq); 0: none
    started_seq: int = 0
    uptime_s: float = 0.0
    cpu_s: float = 0.0
    max_rss_kib: int = 0
    calls_started: int = 0
    stderr: str = ""
    wall_at: float = 0.0
    #: which limit it exceeded (a key of `[pools.NAME.limits]`), how much that is, and how much it used
    limit: str = ""
    limit_value: float = 0.0
    used: float = 0.0
    #: the kernel killed it, since it was out of memory
    is_oom: bool = False
    #: what its threads were doing when it was about to be killed
    stack: str = ""


class WorkerReport(Record, kw_only=True, frozen=True):
    """One worker as its supervisor sees it."""

    id: str
    pid: int
    state: str
    since_wall: float
    rss_kib: int = 0
    cpu_s: float = 0.0
    #: how close it is to a limit: normal, warning, throttle (it gets no calls) or exceeded; unmeasured before it is ready
    pressure: Pressure = "normal"
    #: the limit of which it uses most, and the share of it
    limit: str = ""
    share: float = 0.0
    #: how its process came to be: "exec" or "zygote"
    start: str = ""
    #: the level that it has: process, restricted or sandboxed; of `auto` also why not the next one
    isolation: str = ""
    isolation_note: str = ""


class PoolReport(Record, kw_only=True, frozen=True):
    """One pool as its supervisor sees it."""

    name: str
    #: closing: what waits is served, and no more is taken
    state: PoolState
    wanted: int
    workers: tuple[WorkerReport, ...] = ()
    reason: str = ""
    restarts: int = 0
    #: calls a second that each of its tools takes, in the long run and at once, as the operator says
    rate_per_s: float | None = None
    burst: int | None = None
    #: how many workers make it ready, and how many it may have; None: as many as are wanted
    least: int | None = None
    most: int | None = None
    #: how many warm workers stand by
    spares: int = 0


class Admitted(Record, kw_only=True, frozen=True):
    """A worker key that the broker may let in, for exactly this worker."""

    thumbprint: str
    worker_id: str
    pool: str
    #: which form of the pool's table it runs; a later one may bring other tools while earlier ones live
    edition: int = 0
    #: its node measures it: it gets no calls before a report tells of its pressure, so that what it holds then is its own
    is_measured: bool = False
    #: it connects when it is told to, and holds nothing until then
    is_spare: bool = False


class PoolDemand(Record, kw_only=True, frozen=True):
    """What is asked of one pool."""

    name: str
    #: calls that wait for a worker
    waiting: int
    #: how long one that comes now is expected to wait; 0: more workers would not help
    wait_s: float
    #: workers that can take calls, and those of them that hold any
    ready: int
    busy: int
