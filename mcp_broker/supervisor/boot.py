"""The beginning of a broker: the first message to it, and what is told when it serves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mcp_broker import logs
from mcp_broker.supervisor import events
from mcp_broker.wire import node

if TYPE_CHECKING:
    from pathlib import Path

    from mcp_broker.auth.credentials import Authority
    from mcp_broker.config import LimitsTable
    from mcp_broker.supervisor.broker import BrokerChild
    from mcp_broker.supervisor.ports import Ports


def boot(
    epoch: int, authority: Authority, ports: Ports, limits: LimitsTable, life: tuple[float, str]
) -> node.Boot:
    """Return all that a broker needs to serve.

    Args:
        life: when this life of the supervisor began (seconds since 1970), and what all its brokers have in common.
    """
    started_wall, lineage = life
    return node.Boot(
        epoch=epoch,
        client_fd=ports.client.fileno(),
        worker_fd=ports.worker.fileno(),
        client_endpoint=ports.client_endpoint,
        worker_endpoint=ports.worker_endpoint,
        client_secret=authority.server.secret,
        worker_secret=authority.workers.secret,
        issuer_keys={kid: key.public for kid, key in authority.verify_keys.items()},
        issuer=authority.issuer,
        audience=authority.audience,
        limits={name: value for name, value in limits if value is not None},
        supervisor_pid=os.getpid(),
        started_wall=started_wall,
        lineage=lineage,
        allow=ports.allow,
        client_keys=ports.client_keys,
        log_level=logs.level(),
    )


def serving(ports: Ports, broker: BrokerChild, pools: tuple[str, ...], state_dir: Path) -> events.Serving:
    """Return what is told when a broker answers."""
    return events.Serving(
        client_endpoint=ports.client_endpoint,
        worker_endpoint=ports.worker_endpoint,
        pid=os.getpid(),
        broker_pid=broker.pid,
        epoch=broker.epoch,
        pools=pools,
        state_dir=state_dir,
    )
