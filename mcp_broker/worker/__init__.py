"""All that a tool author imports: ``from mcp_broker.worker import on, tool, ToolContext``.

The errors among them are those that a tool may raise itself (see :func:`tool`), and those of leasing a port.
"""

from __future__ import annotations

from mcp_broker.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    PortDenied,
    PortError,
    PortInvalid,
    PortsExhausted,
    PortUnavailable,
    ResourceExhausted,
)
from mcp_broker.worker.bytestream import ByteStream
from mcp_broker.worker.context import ToolCaller, ToolContext
from mcp_broker.worker.hooks import on
from mcp_broker.worker.leases import LeasedPort
from mcp_broker.worker.tool import Tool, tool

__all__ = [
    "ByteStream",
    "Cancelled",
    "DeadlineExceeded",
    "InvalidArgument",
    "LeasedPort",
    "NotFound",
    "PayloadTooLarge",
    "PortDenied",
    "PortError",
    "PortInvalid",
    "PortUnavailable",
    "PortsExhausted",
    "ResourceExhausted",
    "Tool",
    "ToolCaller",
    "ToolContext",
    "on",
    "tool",
]
