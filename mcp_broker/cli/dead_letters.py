"""``mcp-broker dead-letters``: the calls that killed worker after worker, and what to do about them."""

from __future__ import annotations

from typing import Any

import click

from mcp_broker.cli import connection, output, settings
from mcp_broker.cli.root import Suggesting

Map = connection.Map

_WIDTH = 100


@click.group(
    "dead-letters",
    cls=Suggesting,
    short_help="Show, retry or drop poisoned calls.",
    epilog="""\b
Examples:
  mcp-broker dead-letters list
  mcp-broker dead-letters show 5f1d
  mcp-broker dead-letters retry 5f1d""",
)
@settings.shared("json", "profile", "state-dir", hidden=True)
def dead_letters() -> None:
    """Look after calls that killed two workers and are not run any more (POISONED).

    They are kept for a day in the broker's memory. ID is a call's id, or the first digits of it.
    """


@dead_letters.command("list", short_help="List them, the oldest first.")
@settings.shared("json", "profile", "state-dir")
def list_() -> None:
    """List the poisoned calls, the oldest first."""
    chosen = settings.current()
    found = _ask(chosen, action="list")["dead_letters"]
    if chosen.as_json:
        output.document({"dead_letters": found})
        return
    if not found:
        output.line("no poisoned calls")
        return
    head = ("CALL", "TOOL", "CALLER", "AGE", "KILLED", "CAUSE")
    rows = [
        (
            letter["call_id"],
            letter["tool"],
            letter["principal"],
            output.duration(letter["age_s"]),
            ", ".join(letter["workers"]),
            letter["cause"],
        )
        for letter in found
    ]
    for text in output.table(head, rows):
        output.line(text)


@dead_letters.command(short_help="Show one: arguments, and why the workers died.")
@click.argument("id_", metavar="ID")
@settings.shared("json", "profile", "state-dir")
def show(id_: str) -> None:
    """Show one poisoned call: its arguments, and the certificates of the workers that it killed."""
    chosen = settings.current()
    letter = _ask(chosen, action="show", id=id_)["dead_letter"]
    if chosen.as_json:
        output.document({**letter, "arguments": _arguments(letter)})
        return
    output.line(f"{letter['call_id']}: {letter['tool']}, called by {letter['principal']}")
    output.line(f"arguments: {output.dumps(output.plain(_arguments(letter)), pretty=False)}")
    for certificate in letter["certificates"]:
        output.line(f"killed {certificate['worker_id']} (pid {certificate['pid']}): {certificate['cause']}")
        for text in certificate["stderr"].splitlines():
            output.line(f"  {output.cut(text, _WIDTH)}")


@dead_letters.command(short_help="Call it again; drop it if that succeeds.")
@click.argument("id_", metavar="ID")
@settings.shared("json", "profile", "state-dir")
def retry(id_: str) -> None:
    """Call the tool again with the same arguments, as yourself, and print the result; drop the letter if it succeeds."""
    chosen = settings.current()
    with connection.connected(chosen) as client:
        letter = client.call("system.dead_letters", {"action": "show", "id": id_})["dead_letter"]
        result = client.call(letter["tool"], _arguments(letter))
        client.call("system.dead_letters", {"action": "drop", "id": letter["call_id"]})
    if chosen.as_json:
        output.document(result)
    else:
        output.result(result)


@dead_letters.command(short_help="Forget one.")
@click.argument("id_", metavar="ID")
@settings.shared("json", "profile", "state-dir")
def drop(id_: str) -> None:
    """Forget one poisoned call."""
    chosen = settings.current()
    letter = _ask(chosen, action="drop", id=id_)["dead_letter"]
    if chosen.as_json:
        output.document({"dropped": letter["call_id"]})
    else:
        output.line(f"dropped {letter['call_id']} ({letter['tool']})")


def _ask(chosen: settings.Settings, **arguments: str) -> Map:
    with connection.connected(chosen) as client:
        answer: Map = client.call("system.dead_letters", arguments)
    return answer


def _arguments(letter: Map) -> dict[str, Any]:
    from mcp_broker.wire import payload

    return payload.unpack_map(letter["arguments"])
