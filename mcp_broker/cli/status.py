"""``mcp-broker status`` and ``ps``: the whole broker in 24 lines of 80 columns, and its workers."""

from __future__ import annotations

import time
from typing import Final

import click

from mcp_broker.cli import connection, failures, output, settings

Map = connection.Map

WIDTH: Final = 79
HEIGHT: Final = 23
_DEATHS_SHOWN: Final = 3
_ALWAYS_SHOWN: Final = frozenset({"accepted", "in_flight", "queued", "succeeded", "failed"})


@click.command(
    short_help="Say how broker and pools are; 0 when all are ready.",
    epilog="""\b
Examples:
  mcp-broker status
  mcp-broker status --json | python -m json.tool""",
)
@settings.shared("json", "profile", "state-dir")
def status() -> int:
    """Show version, pools, workers, calls and recent deaths.

    Exits 0 only when every pool has its `min` of ready workers, else 1 and says what is missing.
    """
    chosen = settings.current()
    report = fetch(chosen)
    lacking = missing(report)
    if chosen.as_json:
        output.document({**report, "ready": not lacking, "missing": lacking})
    else:
        for text in page(report):
            output.line(text)
        if output.is_terminal():
            output.note(f"{chosen.again('ps')} lists all workers, {chosen.again('why ID')} tells of a death")
    for text in lacking:
        output.note(f"not ready: {text}")
    return failures.FAILED if lacking else failures.DONE


@click.command(
    short_help="List the worker processes.",
    epilog="""\b
Example:
  mcp-broker ps""",
)
@settings.shared("json", "profile", "state-dir")
def ps() -> None:
    """List every worker: pool, pid, state, calls running and served, memory, CPU time, age."""
    chosen = settings.current()
    report = fetch(chosen)
    if chosen.as_json:
        rows = [{"pool": pool["name"], **worker} for pool in report["pools"] for worker in pool["workers"]]
        output.document({"workers": rows})
        return
    for text in workers_table(report):
        output.line(text)


def fetch(chosen: settings.Settings) -> Map:
    """Ask the broker for its status."""
    with connection.connected(chosen) as client:
        report: Map = client.call("system.status", {})
    return report


def missing(report: Map) -> list[str]:
    """Say, a line a pool, which pools have fewer ready workers than they need."""
    lines = []
    if report.get("state") not in {None, "serving"}:
        lines.append(f"the broker is {report['state']}")
    for pool in report.get("pools", []):
        if pool.get("ready", 0) < pool.get("min", 0):
            reason = f": {pool['reason']}" if pool.get("reason") else ""
            lines.append(
                f"pool {pool['name']} is {pool.get('state', 'unknown')}, {pool.get('ready', 0)} of {pool['min']} "
                f"workers ready{reason}"
            )
    return lines


def page(report: Map) -> list[str]:
    """Return the whole status, at most HEIGHT lines of WIDTH columns."""
    lines = _head(report)
    deaths = _deaths(report)
    workers = workers_table(report)
    names = [str(name) for pool in report.get("pools", []) for name in pool.get("tools", ())]
    tools = _wrapped(f"Tools ({len(names)}): {', '.join(sorted(names)) or 'none'}")
    room = HEIGHT - len(lines) - len(deaths) - len(tools) - 3
    if len(workers) > room:
        hidden = len(workers) - room + 1
        workers = [*workers[: room - 1], f"… and {hidden} more workers"]
    return [output.cut(text, WIDTH) for text in [*lines, "", *workers, "", *tools, "", *deaths]]


def _head(report: Map) -> list[str]:
    calls = report.get("calls", {})
    endpoints = report.get("endpoints", {})
    # outcomes by code, where the broker tells them apart
    numbers = {key: sum(value.values()) if isinstance(value, dict) else value for key, value in calls.items()}
    counted = ", ".join(
        f"{number} {key.replace('_', ' ')}"
        for key, number in numbers.items()
        if number or key in _ALWAYS_SHOWN
    )
    first = (
        f"mcp-broker {report.get('version', '?')}  {report.get('state', '?')}  "
        f"up {output.duration(uptime_s(report))}  "
        f"broker pid {report.get('broker', {}).get('pid', '?')}  "
        f"supervisor pid {report.get('supervisor', {}).get('pid', '?')}"
    )
    return [
        first,
        f"clients {endpoints.get('clients', '?')}  sessions {report.get('sessions', '?')}",
        f"calls: {counted or 'none yet'}",
    ]


def uptime_s(report: Map) -> float:
    """Return for how long the broker serves, seconds."""
    started = float(report.get("started_wall") or 0)
    return time.time() - started if started else 0.0


def workers_table(report: Map) -> list[str]:
    """Return a line a worker; a pool without any has a line that says why."""
    head = ("POOL", "WORKER", "PID", "STATE", "RUNS", "CALLS", "MB", "CPU s", "AGE")
    rows: list[tuple[object, ...]] = []
    now = time.time()
    for pool in report.get("pools", []):
        workers = pool.get("workers", ())
        rows += [
            (
                pool["name"],
                worker["id"],
                worker["pid"],
                worker["state"],
                worker.get("in_flight", 0),
                worker.get("served", 0),
                f"{worker.get('rss_mb') or 0:.0f}",
                f"{worker.get('cpu_s') or 0:.1f}",
                output.duration(now - worker["since_wall"]) if worker.get("since_wall") else "-",
            )
            for worker in workers
        ]
        if not workers:
            rows.append((pool["name"], "-", "-", pool.get("state", "?"), "-", "-", "-", "-", "-"))
    return output.table(head, rows, width=WIDTH)


def _deaths(report: Map) -> list[str]:
    deaths = report.get("deaths") or []
    if not deaths:
        return ["Recent deaths: none"]
    lines = [f"Recent deaths ({len(deaths)}):"]
    for death in deaths[:_DEATHS_SHOWN]:
        when = output.ago(float(death.get("wall_at") or 0))
        lines.append(
            f"  {when}: {death.get('worker_id', '?')} (pid {death.get('pid', '?')}): {death.get('cause', 'unknown')}"
        )
    return lines


def _wrapped(text: str) -> list[str]:
    import textwrap

    lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return lines if len(lines) <= 3 else [*lines[:2], output.cut(lines[2], WIDTH - 1) + "…"]  # noqa: PLR2004 (a fold of the page)
