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
from mcp_broker.wire.reclaims import Reclaim


class Certificate(Record, kw_only=True, frozen=True):
    """Why a process ended: its death certificate."""

    worker_id: str
    pool: str
    pid: int
    #: one sentence for people, "unknown" rather than a guess
    cause: str
    #: closed set: exit, signal, boot_failure, operator, deadline, cancel, limit, violation, unknown
    kind: str
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
    pressure: str = "normal"
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
    #: ready, starting, degraded, failed, stopped; closing: what waits is served, and no more is taken; closed
    state: str
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


class Deaths(NodeMessage, tag="DEATHS", frozen=True):
    """Supervisor, once after BOOT: recent certificates, so that a new broker can still answer `why`."""

    certificates: tuple[Certificate, ...]
    #: of those that died lately: worker id -> ids of the calls that it started last
    started_calls: dict[str, tuple[bytes, ...]] = {}
    #: what was taken back after deaths, newest first
    reclaims: tuple[Reclaim, ...] = ()


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


class Demand(NodeMessage, tag="DEMAND", frozen=True):
    """Broker, a few times a second at most: the pools of which something else is asked than was told before."""

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

    ``stage`` is "raise" (a signal that raises in the tool, if that call still runs), "term" or "kill".
    ``why`` is "deadline", "cancel" or "silence", for the certificate.
    """

    worker_id: str
    seq: int
    stage: str
    why: str


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
    #: of :class:`mcp_broker.core.lifecycle.State`, in lower case
    state: str
    reason: str = ""
    by_operator: bool = False


class Standings(NodeMessage, tag="STANDINGS", frozen=True):
    """Broker, on every change: all tools that do not simply serve. Supervisor, after BOOT: what the last broker said."""

    tools: tuple[Standing, ...]


class Drained(NodeMessage, tag="DRAINED", frozen=True):
    """Broker: no calls are left (or the time for them is over); it exits now."""

    unfinished: int


FromSupervisor = (
    Boot | Admit | Listen | Died | Retire | Reclaimed | Report | Deaths | Tools | Limits | Standings
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
