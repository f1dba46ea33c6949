"""What a supervisor tells whoever started it: facts for people, in the order in which they happen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mcp_broker.wire.node import Certificate


@dataclass(frozen=True, slots=True)
class Serving:
    """The broker answers; also sent when a restarted one answers again (its epoch is higher)."""

    client_endpoint: str
    worker_endpoint: str
    pid: int
    broker_pid: int
    epoch: int
    pools: tuple[str, ...]
    state_dir: Path


@dataclass(frozen=True, slots=True)
class PoolReady:
    """All wanted workers of a pool are ready; ``tools`` are the names that they registered."""

    pool: str
    workers: int
    tools: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PoolFailed:
    """A process of the pool is given up; the rest goes on."""

    pool: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """A worker process ended that nobody had told to stop."""

    certificate: Certificate


@dataclass(frozen=True, slots=True)
class BrokerDied:
    """The broker process ended; it is started again."""

    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The configuration was read again, and is followed; ``changes`` says in one line what is different."""

    changes: str


@dataclass(frozen=True, slots=True)
class ReloadFailed:
    """The configuration was read again since a signal came, and cannot be taken; the one before stays."""

    reason: str


@dataclass(frozen=True, slots=True)
class Draining:
    """Told to stop: no new calls, running ones have this long."""

    drain_s: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """Every process is gone."""


Event = (
    Serving | PoolReady | PoolFailed | WorkerDied | BrokerDied | Reloaded | ReloadFailed | Draining | Stopped
)  # fmt: skip
