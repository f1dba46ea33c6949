"""All that a tool author imports: ``from mcp_broker.worker import on, tool, ToolContext``."""

from __future__ import annotations

from mcp_broker.worker.bytestream import ByteStream
from mcp_broker.worker.context import ToolCaller, ToolContext
from mcp_broker.worker.hooks import on
from mcp_broker.worker.leases import LeasedPort
from mcp_broker.worker.tool import Tool, tool

__all__ = ["ByteStream", "LeasedPort", "Tool", "ToolCaller", "ToolContext", "on", "tool"]
