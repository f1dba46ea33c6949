"""The tables of the configuration file, as frozen and validated values.

docs/configuration.md is made of them: of each field's type, default and bounds, and of the text before it (``#:``).
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from mcp_broker import limits

Port = Annotated[int, Field(ge=0, le=65535)]
RatePerS = Annotated[float, Field(gt=0, le=limits.RATE_MAX, strict=False)]
SecretName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Burst = Annotated[int, Field(ge=1, le=limits.RATE_MAX)]


# of a table with a field `limits`, which hides the module in its annotations
Workers = Annotated[int, Field(ge=0, le=limits.WORKERS_MAX)]
Concurrency = Annotated[int, Field(ge=1, le=limits.WORKER_DEPTH_MAX)]


def _address(text: str) -> str:
    ipaddress.ip_address(text)
    return text


def _network(text: str) -> str:
    ipaddress.ip_network(text)
    return text


#: an IP address, and networks as CIDR: their own errors say what is wrong
Address = Annotated[str, AfterValidator(_address)]
Networks = Annotated[
    tuple[Annotated[str, AfterValidator(_network)], ...], Field(strict=False, max_length=limits.NETWORKS_MAX)
]


#: of a CURVE key: 43 characters of base64url
Thumbprint = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]


class Table(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class BrokerTable(Table):
    """``[broker]``: where it listens."""

    #: an address, not a name: nothing is looked up. `0.0.0.0` serves other machines
    host: str = "127.0.0.1"
    #: where clients connect; 0: any free port, then the same one at every start
    client_port: Port = 0
    #: where workers connect that have no address of their own; 0 as with clients
    worker_port: Port = 0
    #: networks from which clients and workers may connect, as CIDR; without any everybody who can reach the address
    allow: Networks = ()
    #: thumbprints of the only client keys that may connect; without any, every key that its token names
    client_keys: Annotated[tuple[Thumbprint, ...], Field(strict=False)] = ()


class PortsTable(Table):
    """``[ports]``: what workers may lease for servers of their own; see docs/reclaim.md."""

    #: the first port of the range
    min: Annotated[int, Field(ge=1024, le=65535)] = limits.PORT_MIN
    #: the last port of the range
    max: Annotated[int, Field(ge=1024, le=65535)] = limits.PORT_MAX
    #: ports of the range that are never lent
    reserved: Annotated[tuple[int, ...], Field(strict=False)] = ()
    #: the address that they are bound to
    host: Address = "127.0.0.1"
    #: networks that may connect, as CIDR; without any everybody who can reach the address
    allow: Networks = ()
    #: ports that one worker may have at a time
    per_worker: Annotated[int, Field(ge=0, le=1024)] = limits.PORTS_PER_WORKER

    @model_validator(mode="after")
    def _know_the_range(self) -> PortsTable:
        if self.max < self.min:
            raise ValueError(f"max = {self.max} is below min = {self.min}")
        outside = [port for port in self.reserved if not self.min <= port <= self.max]
        if outside:
            raise ValueError(f"reserved lists {outside[0]}, which is not within {self.min} to {self.max}")
        if len(set(self.reserved)) == self.max - self.min + 1:
            raise ValueError("reserved lists every port of the range, so none could be lent")
        return self


class LimitsTable(Table):
    """``[limits]``: bounds of the whole, see :mod:`mcp_broker.limits` for the rest."""

    #: how long running calls may take to end when the supervisor is told to stop, seconds
    drain_s: Annotated[float, Field(ge=0, le=3600, strict=False)] = limits.DRAIN_S
    #: how long a worker process may take from its start to its being ready, seconds
    start_s: Annotated[float, Field(gt=0, le=3600, strict=False)] = 30.0
    #: how long a worker that is replaced, or of a pool that shrinks, may take to finish its calls, seconds
    retire_s: Annotated[float, Field(ge=0, le=86_400, strict=False)] = limits.RETIRE_S
    #: deaths of a pool's processes (before they are ready, or idle) within the period that are answered by a restart;
    #: one more ends the pool
    restarts: Annotated[int, Field(ge=0, le=1000)] = 5
    #: the period in which `restarts` counts deaths, seconds
    restart_period_s: Annotated[float, Field(gt=0, le=86_400, strict=False)] = 60.0
    #: calls a second that a principal may make, over all its sessions and tools; more get `RATE_LIMITED`. Without it as
    #: many as it likes
    rate_per_s: RatePerS | None = None
    #: of these, calls at once after a pause; one second's calls if absent
    burst: Burst | None = None
    #: tools that are served, all pools together
    tools: Annotated[int, Field(ge=1, le=limits.TOOLS_MAX)] = limits.TOOLS_MAX
    #: calls that workers hold at a time, all pools together; others wait; without it as many as workers take
    executions: Annotated[int, Field(ge=1, le=limits.CONCURRENCY_MAX)] | None = None

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> LimitsTable:
        return _checked_burst(self)


class StateTable(Table):
    """``[state]``: where things are kept."""

    #: the state directory, when neither the command line nor the environment names one
    dir: str | None = None


class ObserveTable(Table):
    """``[observe]``: what is logged."""

    #: the least important that the log tells of supervisor, broker and workers
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    #: lines for people, or a JSON object a line
    log_format: Literal["text", "json"] = "text"


class PoolLimits(Table):
    """``[pools.NAME.limits]``: what one worker may use; docs/limits.md tells how each is measured."""

    #: MiB of growth above the worker's resident memory when it was ready
    memory_mb: Annotated[int, Field(ge=1, le=limits.MEMORY_MB_MAX)] = limits.MEMORY_MB
    #: CPU seconds of a call, with the processes that it starts
    cpu_s: Annotated[float, Field(gt=0, le=limits.CPU_S_MAX, strict=False)] = limits.CPU_S
    #: descriptors of each process, above what the worker held when it was ready
    open_files: Annotated[int, Field(ge=1, le=limits.OPEN_FILES_MAX)] = limits.OPEN_FILES
    #: sockets of all its processes, above what the worker held when it was ready
    connections: Annotated[int, Field(ge=0, le=limits.CONNECTIONS_MAX)] = limits.CONNECTIONS
    #: processes below it
    processes: Annotated[int, Field(ge=0, le=limits.PROCESSES_MAX)] = limits.PROCESSES
    #: MiB of files in its private folder
    scratch_mb: Annotated[int, Field(ge=1, le=limits.SCRATCH_MB_MAX)] = limits.SCRATCH_MB
    #: memory, CPU, files and connections follow what is used, up to the most that may be configured
    adaptive: bool = False
    #: calls after which another worker takes its place, at the latest
    recycle_calls: Annotated[int, Field(ge=1)] | None = None
    #: MiB of resident memory at which another worker takes its place
    recycle_rss_mb: Annotated[int, Field(ge=1)] | None = None
    #: seconds of life after which another worker takes its place, at the latest
    recycle_age_s: Annotated[float, Field(ge=1, strict=False)] | None = None


class PoolTable(Table):
    """``[pools.NAME]``: workers of one kind."""

    #: the module that defines the tools, as it is imported: `my_tools`, `package.tools`
    module: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
    #: folders to import it from, ahead of what is installed; relative to the file
    path: tuple[str, ...] = ()
    #: another interpreter, which has this package installed; relative to the file. The supervisor's own if absent
    python: str | None = None
    #: processes that are kept ready
    min: Workers = 1
    #: to so many it grows by itself; as many as `min` if absent
    max: Workers | None = None
    #: a wait for a worker that makes it grow, seconds
    grow_wait_s: Annotated[float, Field(ge=0, le=3600, strict=False)] = limits.GROW_WAIT_S
    #: how long a worker fewer must have done for it to shrink by one, seconds
    shrink_after_s: Annotated[float, Field(gt=0, le=86_400, strict=False)] = limits.SHRINK_AFTER_S
    #: processes besides these whose tools are imported, and that take over at once when one dies
    spare: Workers = 0
    #: calls that one process runs at a time, where its tools are `async def`
    concurrency: Concurrency = 1
    #: a floor: what it cannot have here, it does not start with; `auto` takes the best that works, and says which
    isolation: Literal["process", "restricted", "sandboxed", "auto"] = "process"
    #: folders and files that it may read, besides Python and its own code; relative to the file
    read: tuple[str, ...] = ()
    #: folders and files that it may read and write, besides its scratch folder; relative to the file
    write: tuple[str, ...] = ()
    #: what it reaches besides the broker; without it, `none` at the levels that can, and `full` at `process`
    network: Literal["none", "loopback", "full"] | None = None
    #: name = file that only its owner can read; relative to the file. Tools find them in `context.secrets`
    secrets: dict[SecretName, str] = {}
    #: how a process is started: forked from one that has imported what every worker imports, or executed anew
    start: Literal["zygote", "exec"] = "zygote"
    #: calls a second that each of its tools takes, all callers together, in place of what the tool itself says
    rate_per_s: RatePerS | None = None
    #: of these, calls at once after a pause; one second's calls if absent
    burst: Burst | None = None
    #: handed to the tools unchanged, as `context.options`
    options: dict[str, Any] = {}
    #: what one of its workers may use: the table below
    limits: PoolLimits = PoolLimits()
    #: added to the worker's environment, which has of yours only `PATH`, `LD_LIBRARY_PATH`, `PYTHONPATH`, the language and
    #: the time zone; no name that begins with `MCPB_`
    env: dict[str, str] = {}

    @model_validator(mode="after")
    def _know_what_we_cannot(self) -> PoolTable:
        if self.isolation == "process":
            for key, is_bound in (
                ("read", bool(self.read)),
                ("write", bool(self.write)),
                ("network", self.network not in {None, "full"}),
            ):
                if is_bound:
                    raise ValueError(
                        f"{key} cannot be enforced at isolation = 'process'; use 'restricted', or remove it"
                    )
        for name in self.env:
            if name.startswith("MCPB_"):
                raise ValueError(f"env may not set {name!r}: names with MCPB_ are ours")
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max = {self.max} is below min = {self.min}")
        return _checked_burst(self)


T = TypeVar("T", LimitsTable, PoolTable)


def _checked_burst(table: T) -> T:
    if table.burst is not None and table.rate_per_s is None:
        raise ValueError("burst says nothing without rate_per_s; set both or neither")
    return table


class Config(Table):
    """The whole file."""

    broker: BrokerTable = BrokerTable()
    limits: LimitsTable = LimitsTable()
    state: StateTable = StateTable()
    observe: ObserveTable = ObserveTable()
    ports: PortsTable = PortsTable()
    #: without any pool in the file: the shipped tools
    pools: dict[str, PoolTable] = {}
