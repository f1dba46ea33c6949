"""``mcp-broker demo``: the whole thing once, in a directory that is gone afterwards."""

from __future__ import annotations

import click

from mcp_broker.cli import output, settings


@click.command(
    short_help="Show everything once, in a temporary directory.",
    epilog="""\b
Example:
  mcp-broker demo""",
)
@settings.shared("json")
def demo() -> int:
    """Start a broker with the shipped tools on free ports, call them, crash a worker, and clean up.

    Needs the tools' libraries: pip install 'mcp-broker[tools]'. Exits 0 only when every step went as it should.
    """
    from mcp_broker.demo import run

    chosen = settings.current()
    summary = run(to_stderr=chosen.as_json, debug=chosen.debug)
    if chosen.as_json:
        output.document(summary)
    return 0 if summary["ok"] else 1
