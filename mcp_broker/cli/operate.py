"""``mcp-broker scale``, ``reload`` and ``drain``: what an operator does with a broker that serves meanwhile."""

from __future__ import annotations

from typing import Any, Final

import click

from mcp_broker import limits
from mcp_broker.cli import connection, output, progress, settings

Map = connection.Map

#: beyond the longest that a worker may take to finish its calls: starting and killing
_TIMEOUT_S: Final = limits.RETIRE_S + 60

_timeout = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="Wait this long for it to be done; it goes on after that.",
)


@click.command(
    short_help="Keep so many workers of a pool.",
    epilog="""\b
Examples:
  mcp-broker scale text 4
  mcp-broker scale text auto""",
)
@click.argument("pool")
@click.argument("workers", metavar="N|auto")
@_timeout
@settings.shared("json", "profile", "state-dir")
def scale(pool: str, workers: str, timeout_s: float) -> None:
    """Start or retire workers of a pool until it has N, and wait for that.

    No call is lost: workers that retire finish theirs first. A pool that was given up is tried again. The number holds
    until the next scale, or a reload that changes the pool; `auto` goes back to what the configuration says.
    """
    arguments: Map = {"pool": pool}
    if workers != "auto":
        if not workers.isdecimal():
            raise click.UsageError(f"{workers!r} is neither a number of workers nor 'auto'")
        arguments["workers"] = int(workers)
    chosen = settings.current()
    done = _ask(chosen, "system.pools.scale", arguments, timeout_s, f"scale {pool}")
    if chosen.as_json:
        output.document(done)
        return
    output.line(f"pool {pool}: {done['ready']} of {done['workers']} workers ready")
    if not done["workers"]:
        output.note(f"its callers are told so; {chosen.again(f'scale {pool} auto')} brings it back")


@click.command(
    short_help="Read the configuration again and follow it.",
    epilog="""\b
Examples:
  mcp-broker reload
  mcp-broker reload text""",
)
@click.argument("pools", nargs=-1, metavar="[POOL]...")
@_timeout
@settings.shared("json", "profile", "state-dir")
def reload(pools: tuple[str, ...], timeout_s: float) -> None:
    """Follow what has changed in the configuration, while calls go on.

    New workers are ready before old ones leave, and no call is lost. A configuration with a fault changes nothing. The
    workers of each POOL are replaced in any case, since their code may have changed. SIGHUP does it too.
    """
    chosen = settings.current()
    done = _ask(chosen, "system.reload", {"pools": list(pools)}, timeout_s, "reload")
    if chosen.as_json:
        output.document(done)
        return
    for text in _reloaded(done):
        output.line(text)


@click.command(
    short_help="Let a pool or worker finish and take no more.",
    epilog="""\b
Examples:
  mcp-broker drain text
  mcp-broker drain text-17""",
)
@click.argument("target", required=False, metavar="[POOL|WORKER]")
@_timeout
@settings.shared("json", "profile", "state-dir")
def drain(target: str | None, timeout_s: float) -> None:
    """Let a pool finish the calls that it has, and take no more; without a name, all pools.

    A WORKER that is drained is replaced: another one is ready before it leaves.
    """
    chosen = settings.current()
    arguments = {} if target is None else {"target": target}
    done = _ask(chosen, "system.drain", arguments, timeout_s, f"drain {target or 'all pools'}")
    if chosen.as_json:
        output.document(done)
        return
    if done["worker"]:
        output.line(f"worker {done['worker']} has finished and is replaced")
        return
    names = [str(pool["pool"]) for pool in done["pools"]]
    output.line(f"drained: {', '.join(names)}; their callers are told so")
    for name in names if target else names[:1]:
        output.note(f"{chosen.again(f'scale {name} auto')} brings {name} back")


def _reloaded(done: Map) -> list[str]:
    """Say what a reload has changed, a line for each kind."""
    ready = {pool["pool"]: f"{pool['pool']} ({pool['ready']} ready)" for pool in done["pools"]}
    kinds = {
        "added": "new",
        "removed": "gone",
        "changed": "replaced",
        "resized": "other sizes or rates",
        "limits": "in force now",
        "at_start": "in force after a restart only (stop, then start)",
    }
    lines = [
        f"{word}: {', '.join(ready.get(name, name) for name in done[kind])}"
        for kind, word in kinds.items()
        if done[kind]
    ]
    return lines or ["nothing is different"]


def _ask(chosen: settings.Settings, tool: str, arguments: Map, timeout_s: float, title: str) -> Map:
    """Have the supervisor do something, with a bar while it does, and return what came of it."""
    with connection.connected(chosen) as client, progress.bar(title) as on_progress:
        future = client.submit(tool, arguments, timeout_s=timeout_s, on_progress=on_progress, priority=0)
        try:
            answer: Any = future.result()
        except KeyboardInterrupt:
            output.note(f"it goes on; {chosen.again('status')} shows how far it is")
            raise
    result: Map = answer
    return result
