"""What a supervisor and its broker or worker say to each other.

Supervisor and broker talk over a socketpair: each message is a 4-byte big-endian length and one msgpack
array ``[kind, fields...]``. A worker gets one :class:`WorkerBoot` by an inherited fd and then speaks the
worker protocol. Source: docs/protocol.md, "Node link".
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from mcp_broker.wire.confinement import Confinement
from mcp_broker.wire.items import Record, ToolDefinition
from mcp_broker.wire.ports import PortReport
from mcp_broker.wire.reclaims import Reclaim
from mcp_broker.wire.reports import (
    Admitted,
    Certificate,
    DeathKind,
    PoolDemand,
    PoolReport,
    PoolState,
    Pressure,
    Stage,
    Why,
    WorkerReport,
)

__all__ = [
    "WHATEVER",
    "Abandoned",
    "Admit",
    "Admitted",
    "Boot",
    "Certificate",
    "Command",
    "Commanded",
    "DeathKind",
    "Deaths",
    "Demand",
    "Died",
    "Drained",
    "FromSupervisor",
    "Interrupt",
    "Isolate",
    "Limits",
    "Listen",
    "NodeMessage",
    "Observe",
    "PoolDemand",
    "PoolReport",
    "PoolState",
    "Pressure",
    "Progressed",
    "Reclaimed",
    "Replace",
    "Report",
    "Retire",
    "Serving",
    "Shutdown",
    "Stage",
    "Standing",
    "Standings",
    "Superseded",
    "ToSupervisor",
    "Tools",
    "Vacant",
    "Why",
    "WorkerBoot",
    "WorkerRefused",
    "WorkerReport",
    "WorkerUp",
]


class NodeMessage(msgspec.Struct, array_like=True, frozen=True):
    """One message of the socketpair; the kind is the tag."""


class Boot(NodeMessage, tag="BOOT", frozen=True):
    """Supervisor, first: all that a broker needs to serve."""

    epoch: int
    #: inherited fds of the bound, listening sockets
    client_fd: int
    worker_fd: int
    #: the addresses that those sockets are bound to, tcp://127.0.0.1:PORT
    client_endpoint: str
    worker_endpoint: str
    #: CURVE secret keys of the two sockets, 32 bytes each
    client_secret: bytes
    worker_secret: bytes
    #: kid -> Ed25519 public key, 32 bytes
    issuer_keys: dict[str, bytes]
    issuer: str
    audience: str
    #: `[limits]` of the configuration, by name
    limits: dict[str, int | float]
    supervisor_pid: int
    started_wall: float
    #: the same for all brokers of one life of the supervisor
    lineage: str = ""
    #: networks that may connect, as CIDR; without any, all
    allow: tuple[str, ...] = ()
    #: thumbprints of the only client keys that may; without any, all that are not revoked
    client_keys: tuple[str, ...] = ()
    #: `[observe] log_level`
    log_level: str = "info"


class Admit(NodeMessage, tag="ADMIT", frozen=True):
    """Supervisor: admitted worker keys; the first one, complete, ends the time of status 300."""

    workers: tuple[Admitted, ...]


class Died(NodeMessage, tag="DIED", frozen=True):
    """Supervisor: a worker process is gone; its key is forgotten with it."""

    certificate: Certificate
    #: ids of the calls that it started last, as far as they are known; the newest is the last
    started_calls: tuple[bytes, ...] = ()


class Listen(NodeMessage, tag="LISTEN", frozen=True):
    """Supervisor, after the worker's ADMIT: an endpoint for this worker alone.

    Its listening socket travels with the message's first byte (SCM_RIGHTS). It is closed some time after DIED.
    """

    worker_id: str
    #: the one key that is let in there, and nowhere else
    thumbprint: str
    #: as the socket is bound, ipc://PATH; no other endpoint has the same
    endpoint: str


class Retire(NodeMessage, tag="RETIRE", frozen=True):
    """Supervisor: give these workers no new calls, and send each away once it holds none; about others nothing."""

    workers: tuple[str, ...]


class Reclaimed(NodeMessage, tag="RECLAIMED", frozen=True):
    """Supervisor, some time after DIED: what a dead worker left is taken back, or known not to be."""

    reclaim: Reclaim


class Tools(NodeMessage, tag="TOOLS", frozen=True):
    """Supervisor, after BOOT: what a pool served under an earlier broker; a worker of it may bring another version."""

    pool: str
    tools: tuple[ToolDefinition, ...]


class Report(NodeMessage, tag="REPORT", frozen=True):
    """Supervisor: what it sees now, sent on every change; ``pools`` replaces the last report."""

    pools: tuple[PoolReport, ...]
    #: leased ports, and those that cannot be
    ports: tuple[PortReport, ...] = ()


class Deaths(NodeMessage, tag="DEATHS", frozen=True):
    """Supervisor, once after BOOT: recent certificates, so that a new broker can still answer `why`."""

    certificates: tuple[Certificate, ...]
    #: of those that died lately, the oldest first: worker id -> ids of the calls that it started last
    started_calls: dict[str, tuple[bytes, ...]] = {}
    #: what was taken back after deaths, newest first
    reclaims: tuple[Reclaim, ...] = ()
    #: of those in ``started_calls`` that are not among the recent, without their last words
    others: tuple[Certificate, ...] = ()


class Command(NodeMessage, tag="COMMAND", frozen=True):
    """Broker: an operator wants something of the supervisor, by a call; PROGRESSED and one COMMANDED answer.

    Doing it twice is doing it once: a broker that died in between may send it again, with another id.
    """

    id: int
    #: of the tool that was called, system.pools.scale
    name: str
    arguments: dict[str, Any]
    #: who it was
    principal: str
    #: for how long anybody waits for the end of it
    timeout_ms: int


class Limits(NodeMessage, tag="LIMITS", frozen=True):
    """Supervisor: the `[limits]` of the configuration are others now."""

    limits: dict[str, int | float]


class Observe(NodeMessage, tag="OBSERVE", frozen=True):
    """Supervisor: the `[observe]` of the configuration is another now."""

    log_level: str


class Demand(NodeMessage, tag="DEMAND", frozen=True):
    """Broker, a few times a second at most: the pools of which something else is asked than was told before.

    After each REPORT, even if there are none: a broker that says nothing hangs.
    """

    pools: tuple[PoolDemand, ...]


class Vacant(NodeMessage, tag="VACANT", frozen=True):
    """Broker: a pool that closes takes no calls, and none waits for it any more."""

    pool: str


class Superseded(NodeMessage, tag="SUPERSEDED", frozen=True):
    """Broker: workers of this edition serve other tools than those of earlier ones, which get no calls any more."""

    pool: str
    edition: int


class Progressed(NodeMessage, tag="PROGRESSED", frozen=True):
    """Supervisor: a command has come so far (0.0 to 1.0, if that is known); also that it is being looked after."""

    id: int
    fraction: float | None
    text: str


class Commanded(NodeMessage, tag="COMMANDED", frozen=True):
    """Supervisor: a command was carried out, or why it was not."""

    id: int
    #: OK, or one of the codes of calls that fail
    code: str
    result: dict[str, Any] = {}
    message: str = ""
    details: dict[str, Any] = {}


class Abandoned(NodeMessage, tag="ABANDONED", frozen=True):
    """Both: calls whose client went away; workers may forget them, and nobody may run them again.

    A broker says so when it gives a session up, the supervisor to the next broker after BOOT.
    """

    call_ids: tuple[bytes, ...]


class Shutdown(NodeMessage, tag="SHUTDOWN", frozen=True):
    """Supervisor: refuse new calls, let running ones end for up to ``drain_s``, then say GOODBYE and exit."""

    drain_s: float


class Serving(NodeMessage, tag="SERVING", frozen=True):
    """Broker: both sockets are open."""

    pid: int


class WorkerUp(NodeMessage, tag="UP", frozen=True):
    """Broker: this worker registered its tools and is ready."""

    worker_id: str
    #: of its pool
    tools: tuple[ToolDefinition, ...]


class WorkerRefused(NodeMessage, tag="REFUSED", frozen=True):
    """Broker: this worker's registration was refused; it will not become ready."""

    worker_id: str
    reason: str


#: the number of no call: a worker is to end whatever it runs
WHATEVER: Final = 0


class Interrupt(NodeMessage, tag="INTERRUPT", frozen=True):
    """Broker: end the worker's call ``seq``, or :data:`WHATEVER` it runs.

    The stage "raise" is a signal that raises in the tool, if that call still runs. ``why`` is for the certificate.
    """

    worker_id: str
    seq: int
    stage: Stage
    why: Why


class Replace(NodeMessage, tag="REPLACE", frozen=True):
    """Broker: have another process take the place of this worker's, ready first; ``why`` is for people."""

    worker_id: str
    why: str


class Isolate(NodeMessage, tag="ISOLATE", frozen=True):
    """Broker: have a pool POOL~TOOL with one worker of the pool's module that runs one call at a time, or no more."""

    pool: str
    tool: str
    wanted: bool


class Standing(Record, kw_only=True, frozen=True):
    """Where a tool was left that does not simply serve; told to a broker that follows another."""

    tool: str
    #: of :class:`mcp_broker.core.lifecycle.State`, in lower case; "": it serves
    state: str = ""
    reason: str = ""
    by_operator: bool = False
    #: it had a worker of its own, or was to get one
    apart: bool = False


class Standings(NodeMessage, tag="STANDINGS", frozen=True):
    """Broker, on every change: all tools that do not simply serve. Supervisor, after BOOT: what the last broker said."""

    tools: tuple[Standing, ...]


class Drained(NodeMessage, tag="DRAINED", frozen=True):
    """Broker: no calls are left (or the time for them is over); it exits now."""

    unfinished: int


FromSupervisor = (
    Boot | Admit | Listen | Died | Retire | Reclaimed | Report | Deaths | Tools | Limits | Observe | Standings
    | Progressed | Commanded | Abandoned | Shutdown
)  # fmt: skip
ToSupervisor = (
    Serving | WorkerUp | WorkerRefused | Interrupt | Demand | Vacant | Superseded | Replace | Isolate | Standings
    | Command | Abandoned | Drained
)  # fmt: skip


class WorkerBoot(Record, kw_only=True, frozen=True):
    """What a supervisor hands a worker by an inherited fd (never by argv or environment)."""

    worker_id: str
    pool: str
    #: tcp://127.0.0.1:PORT of the worker socket
    endpoint: str
    #: the worker socket's CURVE public key, 32 bytes
    server_public: bytes
    public: bytes
    secret: bytes
    #: the module that defines the tools, and folders to import it from
    module: str
    path: tuple[str, ...] = ()
    concurrency: int = 1
    #: handed to the tools unchanged
    options: dict[str, Any] = {}
    #: fd of the page of :mod:`mcp_broker.wire.marks`, shared with the supervisor
    marks_fd: int
    #: private writable folder of this worker
    scratch: str
    #: it says WARM when its tools are imported, and connects to the broker when it is told to GO
    is_spare: bool = False
    #: what it does to itself before it imports the module
    confinement: Confinement = Confinement()
    #: name -> content, for the tools; read by the supervisor for this one start
    secrets: dict[str, str] = {}
    #: how the names of shared memory and semaphores begin that it makes; "": as Python likes
    shared_prefix: str = ""
    #: `[pools.NAME.limits]`, by name: what it tells of them, and the descriptors that it may open from READY on
    limits: dict[str, float] = {}
    #: of these, the ones that the operator has configured: no tool asks for more
    fixed_limits: tuple[str, ...] = ()
    #: `[observe] log_level` when it started
    log_level: str = "info"
