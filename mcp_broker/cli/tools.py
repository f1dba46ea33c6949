"""``mcp-broker tools``: what may be called, and how; and what an operator does with a tool."""

from __future__ import annotations

import os
from typing import Final

import click
from click.shell_completion import CompletionItem

from mcp_broker.cli import condition, connection, output, schema, settings
from mcp_broker.cli.root import Suggesting
from mcp_broker.errors import NotFound

_NAME_WIDTH = 30
#: what an operator may do with one tool, in the words of the broker's own tools system.tools.VERB
VERBS: Final = {
    "pause": "Let a tool's calls wait; those that run end.",
    "resume": "Let a paused tool's calls go on.",
    "disable": "Take no new calls of a tool; those that were taken go on.",
    "enable": "Have a tool serve again, and forgive what recovery and its breaker hold against it.",
    "stop": "Take no calls of a tool any more, and run its stop hooks.",
    "start": "Run a stopped tool's start hooks, and take its calls again.",
    "reset": "Have a tool's workers drop their state.",
    "recover": "Replace the processes that serve a tool.",
    "isolate": "Give a tool a worker of its own that runs one call at a time.",
    "unregister": "Take a tool out.",
    "history": "Tell a tool's state, breaker, recovery and history.",
}
#: verbs that change nothing, so that there is no reason to give
_READING: Final = frozenset({"history"})
#: the commands as the help has them, so that it fits on one screen
_ROWS: Final = (
    ("show", "its schema and an example call; a name alone does it too"),
    ("pause, resume", "let its calls wait, and go on"),
    ("disable, enable", "take no new calls; serve again, all forgiven"),
    ("stop, start", "take it out of service with its stop hooks, and back in"),
    ("reset, recover", "drop its workers' state; replace its processes"),
    ("isolate, unregister", "give it a worker of its own; take it out"),
    ("history", "its state, breaker, recovery and history"),
)
#: states that end by themselves
PASSING = frozenset({"pausing", "resuming", "stopping", "starting", "recovering"})


def _complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in connection.tool_names(settings.current(context)) if name.startswith(incomplete)]


class _Tools(Suggesting):
    """Its commands, and the tools' names: one alone is shown."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Take a name that is none of a command for a tool's, unless another word follows it."""
        if args[0] in self.commands or (len(args) > 1 and not args[1].startswith("-")):
            return super().resolve_command(ctx, args)
        return "show", self.commands["show"], args

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer commands and tools."""
        names = connection.tool_names(settings.current(ctx))
        tools = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*super().shell_complete(ctx, incomplete), *tools]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's signature)
        """A line for what belongs together."""
        with formatter.section("Commands, each for one TOOL"):
            formatter.write_dl(_ROWS)


@click.group(
    cls=_Tools,
    invoke_without_command=True,
    no_args_is_help=False,
    subcommand_metavar="[TOOL | COMMAND TOOL]",
    short_help="List tools, or show one with an example call.",
    epilog="""\b
Examples:
  mcp-broker tools --tag text --json
  mcp-broker tools text.word_count
  mcp-broker tools pause text.word_count --reason maintenance""",
)
@click.option("--capability", metavar="NAME", help="List only tools with this capability.")
@click.option("--tag", metavar="NAME", help="List only tools with this tag.")
@settings.shared("json", "profile", "state-dir", hidden=True)
@click.pass_context
def tools(context: click.Context, capability: str | None, tag: str | None) -> None:
    """List the tools that you may call; show one, or steer it."""
    if context.invoked_subcommand is not None:
        if capability or tag:
            raise click.UsageError("--capability and --tag are for the list of tools", context)
        return
    chosen = settings.current()
    with connection.connected(chosen) as client:
        definitions = client.tools(None, capability, tag)
    definitions.sort(key=lambda definition: str(definition["name"]))
    if chosen.as_json:
        output.document({"tools": [_with_schemas(definition) for definition in definitions]})
    else:
        _list(definitions, chosen)


@tools.command(
    short_help="Show a tool's signature and schema, and an example call.",
    epilog="""\b
Examples:
  mcp-broker tools show text.word_count
  mcp-broker tools text.word_count""",
)
@click.argument("tool", metavar="TOOL", shell_complete=_complete)
@settings.shared("json", "profile", "state-dir")
def show(tool: str) -> None:
    """Show a tool's signature, its schema and an example call."""
    chosen = settings.current()
    with connection.connected(chosen) as client:
        definitions = client.tools(tool, None, None)
        if not definitions:
            raise NotFound(
                f"there is no tool {tool!r}",
                {"did_you_mean": _near(tool, client), "hint": chosen.again("tools")},
            )
    definition = _with_schemas(definitions[0])
    if chosen.as_json:
        output.document(definition)
    else:
        _show(definition, chosen)


def _verb(verb: str, text: str) -> click.Command:
    """Make the command of a verb."""

    def command(tool: str, reason: str | None = None) -> None:
        _steer(verb, tool, reason, settings.current())

    command.__doc__ = text
    made = settings.shared("json", "profile", "state-dir")(command)
    example = f"  mcp-broker tools {verb} text.word_count"
    if verb not in _READING:
        made = click.option("--reason", metavar="TEXT", help="Why, for callers and the history.")(made)
        example += " --reason maintenance"
    made = click.argument("tool", metavar="TOOL", shell_complete=_complete)(made)
    return click.command(verb, short_help=text, epilog=f"\b\nExample:\n{example}")(made)


for _name, _text in VERBS.items():
    tools.add_command(_verb(_name, _text))


def _steer(verb: str, tool: str, reason: str | None, chosen: settings.Settings) -> None:
    """Have the broker do something with one tool, and tell how it is then."""
    arguments = {"tool": tool} if reason is None else {"tool": tool, "reason": reason}
    with connection.connected(chosen) as client:
        told: connection.Map = client.call(f"system.tools.{verb}", arguments)
    if chosen.as_json:
        output.document(told)
        return
    lines = condition.told(told, chosen)
    if verb in _READING:
        for text in lines:
            output.line(text)
        return
    output.line(lines[0])
    if str(told.get("state")) in PASSING:
        output.note(f"it goes on; {chosen.again(f'tools history {tool}')} tells how far it is")


def _with_schemas(definition: connection.Map) -> connection.Map:
    return {
        **definition,
        **{key: schema.load(definition.get(key, "{}")) for key in ("parameters", "returns")},
    }


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
        output.note(f"\n{chosen.again('tools TOOL')}   shows one with an example call")


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
