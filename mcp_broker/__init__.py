"""mcp-broker: tools for agents and pipelines in isolated, supervised worker processes.

The names below load on first use, so that importing the package costs nothing: the supervisor and the command
line must not load ZeroMQ.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcp_broker.client.aio import AsyncClient
    from mcp_broker.client.awaitables import AsyncCallFuture, AsyncPartStream
    from mcp_broker.client.executor import ToolExecutor
    from mcp_broker.client.future import CallFuture
    from mcp_broker.client.options import CallOptions
    from mcp_broker.client.progress import OnProgress
    from mcp_broker.client.stream import PartStream
    from mcp_broker.client.sync import Client
    from mcp_broker.errors import (
        BrokerError,
        BrokerLost,
        CallError,
        Cancelled,
        ClientClosed,
        ConfigError,
        CredentialError,
        DeadlineExceeded,
        Forbidden,
        Internal,
        InvalidArgument,
        NotFound,
        NotReachable,
        Overloaded,
        PayloadTooLarge,
        Poisoned,
        RateLimited,
        ResourceExhausted,
        ToolFailed,
        Unauthenticated,
        Unavailable,
        UnsupportedVersion,
        WorkerLost,
        WrongProcess,
    )
    from mcp_broker.wire.messages import Priority, Usage

__all__ = [
    "AsyncCallFuture",
    "AsyncClient",
    "AsyncPartStream",
    "BrokerError",
    "BrokerLost",
    "CallError",
    "CallFuture",
    "CallOptions",
    "Cancelled",
    "Client",
    "ClientClosed",
    "ConfigError",
    "CredentialError",
    "DeadlineExceeded",
    "Forbidden",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "NotReachable",
    "OnProgress",
    "Overloaded",
    "PartStream",
    "PayloadTooLarge",
    "Poisoned",
    "Priority",
    "RateLimited",
    "ResourceExhausted",
    "ToolExecutor",
    "ToolFailed",
    "Unauthenticated",
    "Unavailable",
    "UnsupportedVersion",
    "Usage",
    "WorkerLost",
    "WrongProcess",
    "__version__",
]

#: the names that do not come from mcp_broker.errors
_HOMES = {
    "AsyncCallFuture": "mcp_broker.client.awaitables",
    "AsyncClient": "mcp_broker.client.aio",
    "AsyncPartStream": "mcp_broker.client.awaitables",
    "CallFuture": "mcp_broker.client.future",
    "CallOptions": "mcp_broker.client.options",
    "Client": "mcp_broker.client.sync",
    "OnProgress": "mcp_broker.client.progress",
    "PartStream": "mcp_broker.client.stream",
    "Priority": "mcp_broker.wire.messages",
    "ToolExecutor": "mcp_broker.client.executor",
    "Usage": "mcp_broker.wire.messages",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any public name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        value: Any = _version()
    else:
        value = getattr(import_module(_HOMES.get(name, "mcp_broker.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 (slow, and rarely asked for)

    try:
        return version("mcp-broker")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"
