"""A tool author's whole work: one typed function. See examples/hello.toml for its pool."""

from __future__ import annotations

from mcp_broker.worker import tool


@tool(name="hello.greet", version="1.0.0", capabilities=("greeting",))
def greet(name: str, times: int = 1) -> str:
    """Greet somebody, as often as wanted."""
    return ", ".join([f"Hello {name}"] * times)
