"""The listening sockets: bound once by the supervisor, handed to every broker, on the same ports at every start.

A broker that dies leaves them open, so peers that reconnect wait in the backlog instead of being refused, and
nobody else can take the port meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.errors import ConfigError
from mcp_broker.supervisor.records import write_atomically

if TYPE_CHECKING:
    from mcp_broker.config import BrokerTable

_NAME: Final = "ports.json"


class Ports:
    """Both listening sockets.

    Args:
        table: ``[broker]``; port 0 means the remembered one, and any free one when that is taken.
        state_dir: where ports are remembered.

    Raises:
        ConfigError: an address or port that the configuration names cannot be bound.
    """

    def __init__(self, table: BrokerTable, state_dir: Path) -> None:
        #: who may connect: networks as CIDR, and the only client keys; without any, everybody
        self.allow, self.client_keys = table.allow, table.client_keys
        remembered = _remembered(state_dir)
        self.client = _listen(table.host, table.client_port, remembered.get("client", 0))
        try:
            self.worker = _listen(table.host, table.worker_port, remembered.get("worker", 0))
        except ConfigError:
            self.client.close()
            raise
        ports = {"client": self.client.getsockname()[1], "worker": self.worker.getsockname()[1]}
        if ports != remembered:
            write_atomically(state_dir / _NAME, json.dumps(ports).encode())

    @property
    def client_endpoint(self) -> str:
        """Where clients connect: tcp://ADDRESS:PORT."""
        return _endpoint(self.client)

    @property
    def worker_endpoint(self) -> str:
        """Where workers connect."""
        return _endpoint(self.worker)

    def close(self) -> None:
        """Stop listening."""
        self.client.close()
        self.worker.close()


def _endpoint(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if listener.family is socket.AF_INET6 else f"tcp://{host}:{port}"


def _listen(host: str, port: int, remembered: int) -> socket.socket:
    for candidate in dict.fromkeys((port or remembered, port)):
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        # without it a restart within the minute is refused its own port (TIME_WAIT)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(limits.LISTEN_BACKLOG)
        except OSError as error:
            listener.close()
            if candidate == port:
                raise ConfigError(
                    f"cannot listen on {host} port {port}: {error.strerror}",
                    {"hint": "choose another [broker] host or port; port 0 takes any free one"},
                ) from error
            continue
        # the broker polls before it accepts, but a peer may be gone again by then
        listener.setblocking(False)
        return listener
    raise AssertionError("the last candidate returns or raises")


def _remembered(state_dir: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        ports = json.loads((state_dir / _NAME).read_bytes())
        if isinstance(ports, dict):
            return {
                name: port
                for name, port in ports.items()
                if name in {"client", "worker"} and isinstance(port, int) and 0 < port < 2**16
            }
    return {}
