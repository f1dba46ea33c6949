"""``mcp-broker call``: one call, its result on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, TypedDict

import click

from mcp_broker.cli import connection, output, progress, schema, settings


class CallSettings(TypedDict):
    """What the command's options say of the call."""

    timeout_s: float | None
    priority: int


def _complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in connection.tool_names(settings.current(context)) if name.startswith(incomplete)]


@click.command(
    short_help="Call a tool.",
    epilog="""\b
Examples:
  mcp-broker call text.word_count '{"text": "a b a"}'
  mcp-broker call text.word_count text="a b a" top=1
  mcp-broker call text.word_count - < arguments.json""",
)
@click.argument("tool", shell_complete=_complete)
@click.argument("arguments", nargs=-1, metavar="[JSON | KEY=VALUE ...]")
@click.option("--stream", is_flag=True, help="Print each part as a line of JSON when it comes.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="End the call after this long; 30 unless said.",
)
@click.option(
    "--priority",
    type=click.Choice(settings.PRIORITIES),
    default="normal",
    metavar="CLASS",
    help="Where calls wait: high, normal or low.",
)
@click.option("--raw", is_flag=True, help="Print text and bytes as they are, not as JSON.")
@settings.shared("json", "profile", "state-dir")
def call(
    tool: str, arguments: tuple[str, ...], stream: bool, timeout_s: float | None, priority: str, raw: bool
) -> None:
    """Call TOOL and print its result as JSON (bytes as base64).

    KEY=VALUE is read by the tool's schema: text stays text, a repeated key makes a list. Ctrl-C cancels the call.
    Where standard error is a terminal, a bar shows the tool's progress.
    """
    chosen = settings.current()
    given = _read_arguments(arguments)
    options: CallSettings = {"timeout_s": timeout_s, "priority": settings.PRIORITIES.index(priority)}
    with connection.connected(chosen) as client:
        if isinstance(given, list):
            given = schema.read_pairs(given, _parameters(client, tool))
        if stream:
            for part in _parts(client, tool, given, options):
                _print(part, raw=raw, as_json=True)
        else:
            _print(_result(client, tool, given, options), raw=raw, as_json=chosen.as_json)


def _read_arguments(arguments: tuple[str, ...]) -> dict[str, Any] | list[tuple[str, str]]:
    """Return the arguments, or the pairs that wait for a schema.

    Raises:
        click.UsageError: neither JSON nor pairs.
    """
    if not arguments:
        return {}
    if arguments == ("-",):
        return _object(sys.stdin.read())
    if len(arguments) == 1 and arguments[0].lstrip().startswith(("{", "[")):
        return _object(arguments[0])
    pairs = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key or not equals:
            raise click.UsageError(
                f"{argument!r} is neither KEY=VALUE nor one JSON object", click.get_current_context()
            )
        pairs.append((key, value))
    return pairs


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"the arguments are not JSON: {error}", click.get_current_context()) from None
    if not isinstance(value, dict):
        raise click.UsageError("the arguments must be one JSON object", click.get_current_context())
    return value


def _parameters(client: connection.ClientLike, tool: str) -> schema.Schema:
    """Return the tool's schema; empty for an unknown tool, whose call then fails with the right error."""
    for definition in client.tools(name=tool):
        return schema.load(definition.get("parameters", {}))
    return {}


def _result(
    client: connection.ClientLike, tool: str, arguments: dict[str, Any], options: CallSettings
) -> object:
    with progress.bar(tool) as on_progress:
        future = client.submit(tool, arguments, on_progress=on_progress, **options)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


def _parts(
    client: connection.ClientLike, tool: str, arguments: dict[str, Any], options: CallSettings
) -> Iterator[object]:
    with progress.bar(tool, among_lines=True) as on_progress:
        parts = client.stream(tool, arguments, on_progress=on_progress, **options)
        try:
            yield from parts
        finally:
            # ends the call at its worker too when we leave early (Ctrl-C, a closed pipe)
            close = getattr(parts, "close", None)
            if close is not None:
                close()


def _print(value: object, *, raw: bool, as_json: bool) -> None:
    if raw and isinstance(value, bytes):
        sys.stdout.buffer.write(value)
        sys.stdout.buffer.flush()
    elif raw and isinstance(value, str):
        output.line(value)
    elif as_json:
        output.line(output.dumps(value, pretty=False))
    else:
        output.result(value)
