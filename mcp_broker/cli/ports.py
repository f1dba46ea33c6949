"""``mcp-broker ports``: which ports workers have leased, and what goes through them."""

from __future__ import annotations

import time

import click

from mcp_broker.cli import connection, output, settings, status

Map = connection.Map


@click.command(
    short_help="List leased ports and their connections.",
    epilog="""\b
Examples:
  mcp-broker ports
  mcp-broker ports --json""",
)
@settings.shared("json", "profile", "state-dir")
def ports() -> None:
    """List every port of the range that is not simply available: owner, state, connections, bytes.

    Tools lease ports by `context.lease_port()`, from the range of `[ports]`.
    """
    chosen = settings.current()
    listed = status.fetch(chosen).get("ports", [])
    if chosen.as_json:
        output.document({"ports": listed})
        return
    for text in table(listed):
        output.line(text)


def table(listed: list[Map]) -> list[str]:
    """Return a line a port."""
    if not listed:
        return ["no port is leased"]
    head = ("PORT", "STATE", "WORKER", "CONNS", "SEEN", "KB IN", "KB OUT", "LAST", "REASON")
    now = time.time()
    rows = [
        (
            f"{port.get('host', '')}:{port.get('port', '?')}",
            port.get("state", "?"),
            port.get("owner") or "-",
            port.get("connections", 0),
            port.get("connections_total", 0),
            f"{(port.get('bytes_in') or 0) / 1024:.0f}",
            f"{(port.get('bytes_out') or 0) / 1024:.0f}",
            output.duration(now - port["last_wall"]) if port.get("last_wall") else "-",
            port.get("reason", ""),
        )
        for port in listed
    ]
    return output.table(head, rows, width=status.WIDTH)
