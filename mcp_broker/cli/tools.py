"""``mcp-broker tools``: what may be called, and how."""

from __future__ import annotations

import os

import click

from mcp_broker.cli import condition, connection, output, schema, settings
from mcp_broker.errors import NotFound

_NAME_WIDTH = 30
#: what an operator may do with one tool
VERBS = (
    *("pause", "resume", "disable", "enable", "stop", "start", "reset", "recover", "isolate", "unregister"),
    "history",
)
#: states that end by themselves
PASSING = frozenset({"pausing", "resuming", "stopping", "starting", "recovering"})


def _complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in connection.tool_names(settings.current(context)) if name.startswith(incomplete)]


@click.command(
    short_help="List tools, or show one with an example call.",
    epilog="""\b
Examples:
  mcp-broker tools
  mcp-broker tools text.word_count
  mcp-broker tools --tag text --json
  mcp-broker tools pause text.word_count --reason maintenance""",
)
@click.argument("name", metavar="[NAME|VERB]", required=False, shell_complete=_complete)
@click.argument("target", metavar="[TOOL]", required=False, shell_complete=_complete)
@click.option("--reason", metavar="TEXT", help="With a VERB: why, for callers and the history.")
@click.option("--capability", metavar="NAME", help="Only tools with this capability.")
@click.option("--tag", metavar="NAME", help="Only tools with this tag.")
@settings.shared("json", "profile", "state-dir")
def tools(
    name: str | None, target: str | None, reason: str | None, capability: str | None, tag: str | None
) -> None:
    """List the tools that you may call; with NAME show its signature, schema and an example call.

    VERBs: pause (calls wait), resume, disable, enable, stop, start, reset (drop state), recover (other processes),
    isolate, unregister, history.
    """
    chosen = settings.current()
    if target is not None:
        _steer(str(name), target, reason, chosen)
        return
    with connection.connected(chosen) as client:
        definitions = client.tools(name, capability, tag)
        if name is not None and not definitions:
            raise NotFound(
                f"there is no tool {name!r}",
                {"did_you_mean": _near(name, client), "hint": chosen.again("tools")},
            )
    for definition in definitions:
        for key in ("parameters", "returns"):
            definition[key] = schema.load(definition.get(key, "{}"))
    definitions.sort(key=lambda definition: str(definition["name"]))
    if chosen.as_json:
        output.document(definitions[0] if name is not None else {"tools": definitions})
    elif name is not None:
        _show(definitions[0], chosen)
    else:
        _list(definitions, chosen)


def _steer(verb: str, tool: str, reason: str | None, chosen: settings.Settings) -> None:
    """Have the broker do something with one tool, and tell how it is then."""
    if verb not in VERBS:
        raise click.UsageError(f"{verb!r} is none of {', '.join(VERBS)}")
    arguments = {"tool": tool} if reason is None or verb == "history" else {"tool": tool, "reason": reason}
    with connection.connected(chosen) as client:
        told: connection.Map = client.call(f"system.tools.{verb}", arguments)
    if chosen.as_json:
        output.document(told)
        return
    lines = condition.told(told, chosen)
    if verb == "history":
        for text in lines:
            output.line(text)
        return
    output.line(lines[0])
    if str(told.get("state")) in PASSING:
        output.note(f"it goes on; {chosen.again(f'tools history {tool}')} tells how far it is")


def _near(name: str, client: connection.ClientLike) -> list[str]:
    import difflib

    known = [str(definition["name"]) for definition in client.tools()]
    return difflib.get_close_matches(name, known, n=3, cutoff=0.5)


def _list(definitions: list[connection.Map], chosen: settings.Settings) -> None:
    if not definitions:
        output.note(f"no tool fits; {chosen.again('status')} says which pools are up")
        return
    width = min(_NAME_WIDTH, max(len(str(definition["name"])) for definition in definitions))
    for definition in definitions:
        summary = (str(definition.get("description") or "").strip().splitlines() or [""])[0]
        state = definition.get("state")
        if state not in {None, "", "ready"}:
            summary = f"[pool {definition.get('pool', '?')}: {state}] {summary}"
        text = f"{definition['name']:<{width}}  {summary}".rstrip()
        output.line(output.cut(text, os.get_terminal_size().columns) if output.is_terminal() else text)
    if output.is_terminal():
        output.note(f"\n{chosen.again('tools NAME')}   shows one with an example call")


def _show(definition: connection.Map, chosen: settings.Settings) -> None:
    name = str(definition["name"])
    parameters, returns = definition["parameters"], definition["returns"]
    output.line(f"{name} {definition.get('version', '')}".rstrip())
    for text in str(definition.get("description") or "").strip().splitlines():
        output.line(f"  {text.strip()}".rstrip())
    output.line()
    output.line(f"Signature: {schema.signature(name, parameters, returns)}")
    for key, part in schema.properties(parameters).items():
        if part.get("description"):
            output.line(f"  {key}: {part['description']}")
    facts = {
        "Pool": definition.get("pool"),
        "Timeout": output.duration(float(definition.get("timeout_s") or 0))
        if definition.get("timeout_s")
        else None,
        "Capabilities": ", ".join(definition.get("capabilities") or ()),
        "Tags": ", ".join(definition.get("tags") or ()),
        "Traits": ", ".join(trait for trait in ("idempotent", "streaming") if definition.get(trait)),
        "Clearance": definition.get("level"),
    }
    output.line("  ".join(f"{key}: {value}" for key, value in facts.items() if value))
    output.line()
    output.line("Arguments (JSON Schema):")
    output.line(output.dumps(parameters, pretty=True))
    output.line()
    output.line(f"Example: {chosen.again(schema.example_call(name, parameters))}")
