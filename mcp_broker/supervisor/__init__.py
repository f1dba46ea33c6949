"""The supervisor: starts, watches and stops the broker and the workers of one state directory."""

from mcp_broker.supervisor.events import (
    BrokerDied,
    Draining,
    Event,
    PoolFailed,
    PoolReady,
    Serving,
    Stopped,
    WorkerDied,
)
from mcp_broker.supervisor.lock import holder
from mcp_broker.supervisor.loop import Supervisor

__all__ = [
    "BrokerDied",
    "Draining",
    "Event",
    "PoolFailed",
    "PoolReady",
    "Serving",
    "Stopped",
    "Supervisor",
    "WorkerDied",
    "holder",
]
