"""The tool that the benchmark calls: the smallest that validates its argument and returns it."""

from __future__ import annotations

from mcp_broker.worker import tool


@tool(name="bench.echo", version="1.0.0")
def echo(blob: bytes) -> bytes:
    """Return what came."""
    return blob
