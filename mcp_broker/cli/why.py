"""``mcp-broker why``: why a worker died, or how a call ended, in words that do not guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import click

from mcp_broker.cli import condition, connection, output, settings
from mcp_broker.errors import NotFound, NotReachable

Map = connection.Map

#: what each kind of a certificate means, for people
KINDS: Final[dict[str, str]] = {
    "exit": "the process ended by itself",
    "signal": "a signal that mcp-broker did not send ended it",
    "boot_failure": "it ended before it was ready to serve",
    "operator": "it was stopped on purpose",
    "deadline": "mcp-broker killed it, because its call was past its deadline",
    "cancel": "mcp-broker killed it, because its call was cancelled and did not end",
    "silence": "mcp-broker killed it, because it did not speak to a new broker and nobody waited for its call",
    "hook": "mcp-broker killed it, because a hook of its module did not end",
    "limit": "it exceeded a limit, and was killed for that",
    "violation": "mcp-broker killed it, because it did what no worker does of itself; a tool may have taken it over",
    "unknown": "unknown; nothing that could be observed tells more",
}


#: of a stack, the last lines: the main thread
_STACK_LINES: Final = 40
#: ends of calls that say something of their tool
_TOOLS_OWN: Final = frozenset({"WORKER_LOST", "POISONED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"})


@click.command(
    short_help="Say why a worker died, or how a call, tool or pool is.",
    epilog="""\b
Examples:
  mcp-broker why            the latest death
  mcp-broker why text-3     a worker by its id
  mcp-broker why 4711       a worker by its pid
  mcp-broker why text       a pool, and its latest deaths
  mcp-broker why text.word_count   a tool: state, breaker, recovery""",
)
@click.argument("id_", metavar="[ID]", required=False)
@settings.shared("json", "profile", "state-dir")
def why(id_: str | None) -> None:
    """Say why the worker ID (id or pid) died, how the call ID ended, or how the tool or pool ID is.

    Without ID it tells the latest death. When no broker answers it reads the state directory's own records.
    """
    chosen = settings.current()
    try:
        with connection.connected(chosen) as client:
            record = _asked(client, id_)
    except NotReachable as error:
        recorded = _recorded(chosen.state_dir / "deaths.jsonl", id_)
        if recorded is None:
            raise
        record = recorded
        output.note(f"no broker answers ({error.message}); this is from the records in {chosen.state_dir}")
    if not record.get("found", True):
        raise NotFound(
            f"nothing is known of {id_!r}: no tool, pool, worker, pid or recent call has it",
            {"hint": f"{chosen.again('ps')}; {chosen.again('status')} lists recent deaths"},
        )
    if chosen.as_json:
        output.document(record)
        return
    for text in story(record, chosen):
        output.line(text)


def _asked(client: connection.ClientLike, id_: str | None) -> Map:
    if id_ is not None:
        answer: Map = client.call("system.why", {"id": id_})
        return answer
    deaths = client.call("system.status", {}).get("deaths") or []
    if not deaths:
        return {"found": True, "kind": "none"}
    latest: Map = client.call("system.why", {"id": deaths[0]["worker_id"]})
    # it may have been forgotten between the two questions
    told = isinstance(latest.get("certificate"), dict)
    return latest if told else {"found": True, "kind": "death", "certificate": deaths[0]}


def _recorded(path: Path, id_: str | None) -> Map | None:
    """Return the newest recorded death that fits, ``found: False`` for none, None without records."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for text in reversed(lines):
        try:
            certificate = json.loads(text)
        except ValueError:
            continue  # a line that a crash cut short
        if isinstance(certificate, dict) and (
            id_ is None or id_ in {str(certificate.get("worker_id")), str(certificate.get("pid"))}
        ):
            reclaim = _recorded_reclaim(path.with_name("reclaims.jsonl"), str(certificate.get("worker_id")))
            return {"found": True, "kind": "death", "certificate": certificate, "reclaim": reclaim}
    return {"found": False} if id_ is not None else {"found": True, "kind": "none"}


def _recorded_reclaim(path: Path, worker_id: str) -> Map | None:
    """Return what was taken back after a worker's death, None when no record tells."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for text in reversed(lines):
        try:
            record = json.loads(text)
        except ValueError:
            continue  # a line that a crash cut short
        if isinstance(record, dict) and record.get("worker_id") == worker_id:
            return record
    return None


def certificate_of(record: Map) -> Map | None:
    """Return the death certificate in an answer of ``system.why``, wherever it stands in it."""
    inner = record.get("certificate")
    if isinstance(inner, dict):
        return inner
    return record if "cause" in record and "worker_id" in record else None


def story(record: Map, chosen: settings.Settings) -> list[str]:
    """Tell an answer in lines for people."""
    if record.get("kind") == "none":
        return ["no worker has died"]
    if record.get("kind") == "tool":
        return condition.told(record, chosen)
    if record.get("kind") == "pool":
        return _pool(record, chosen)
    lines = _call(record, chosen) if record.get("kind") == "call" else []
    certificate = certificate_of(record)
    if certificate is not None:
        lines += _death(certificate)
        for call in record.get("calls") or ():
            lines.append(f"  ran        {call.get('tool')}, call {call.get('call_id')}: {call.get('code')}")
        if "reclaim" in record:
            lines += _reclaimed(record.get("reclaim"))
    elif record.get("kind") == "worker":
        lines += [
            f"worker {record.get('id', '?')} of pool {record.get('pool', '?')} lives: {record.get('state', '?')}"
        ]
    return lines


def _reclaimed(reclaim: Map | None) -> list[str]:
    """Tell what was taken back after a death, a line a step that found something."""
    if reclaim is None:
        return ["  taken back: not known; it goes on, or its record is gone"]
    steps = [step for step in reclaim.get("steps", ()) if step.get("count") or step.get("left")]
    lines = [
        f"  taken back within {float(reclaim.get('ms') or 0):.0f} ms{'' if steps else ': nothing was left'}"
    ]
    for step in steps:
        held = f", {output.mebibytes(step['bytes'] / 1024)} MB" if step.get("bytes") else ""
        lines.append(f"    {step.get('step', '?'):<14} {step.get('count', 0)}{held} ({step.get('ms', 0)} ms)")
        lines += [f"      could not: {what}" for what in step.get("left", ())]
    return lines


def _pool(record: Map, chosen: settings.Settings) -> list[str]:
    """Tell how a pool is, which of its tools do not simply serve, and its latest deaths."""
    workers = f"{record.get('ready', 0)} of {record.get('min', 0)} workers ready"
    lines = [
        f"pool {record.get('name', '?')}: {record.get('state', '?')}, {workers}, {record.get('restarts', 0)} restarts"
    ]
    if record.get("reason"):
        lines.append(f"  why        {record['reason']}")
    for troubled in record.get("troubled") or ():
        lines += [f"  {text}" for text in condition.told(troubled, chosen)]
    for certificate in record.get("deaths") or ():
        lines += [f"  {text}" for text in _death(certificate)[:2]]
    if not record.get("deaths"):
        lines.append("  none of its workers has died of late")
    if record.get("state") in {"failed", "closed"}:
        command = f"scale {record.get('name')} auto"
        lines.append(f"  next       {chosen.again(command)}")
    return lines


def _call(record: Map, chosen: settings.Settings) -> list[str]:
    call_id = record.get("call_id", "?")
    name = call_id.hex() if isinstance(call_id, bytes) else str(call_id)
    head = (
        f"call {name} of {record.get('tool', '?')}: {record.get('code') or record.get('state') or 'unknown'}"
    )
    lines = [
        head,
        *_rest({key: value for key, value in record.items() if key not in {"call_id", "tool", "code"}}),
    ]
    if record.get("code") in _TOOLS_OWN:
        command = f"why {record.get('tool')}"
        lines.append(f"  next           {chosen.again(command)}")
    return lines


def _rest(record: Map) -> list[str]:
    hidden = {"found", "kind", "certificate", "id", "worker_id"}
    return [
        f"  {key.replace('_', ' '):<14} {output.plain(value)}"
        for key, value in record.items()
        if key not in hidden and value not in (None, "", [], {})
    ]


def _death(certificate: Map) -> list[str]:
    kind = str(certificate.get("kind") or "unknown")
    signal, code = certificate.get("signal"), certificate.get("exit_code")
    facts = {
        "why": f"{certificate.get('cause') or 'unknown'}",
        "kind": f"{kind}: {KINDS.get(kind, 'a kind that this version does not know')}",
        "signal": signal or "none",
        "exit code": code if code is not None else "none, it did not exit by itself" if signal else "unknown",
        "lived": f"{output.duration(float(certificate.get('uptime_s') or 0))}, "
        f"{certificate.get('calls_started', 0)} calls started",
        "used": f"{float(certificate.get('cpu_s') or 0):.1f} s of CPU, "
        f"{output.mebibytes(float(certificate.get('max_rss_kib') or 0))} MB at most",
    }
    head = (
        f"worker {certificate.get('worker_id', '?')} of pool {certificate.get('pool', '?')} "
        f"(pid {certificate.get('pid', '?')}) died {output.ago(float(certificate.get('wall_at') or 0))}"
    )
    lines = [head]
    lines += [f"  {key:<10} {value}" for key, value in facts.items() if value is not None]
    if certificate.get("limit"):
        used, allowed = (float(certificate.get(key) or 0) for key in ("used", "limit_value"))
        lines.append(f"  {'limit':<10} {certificate['limit']} = {allowed:g}, used {used:g}")
    stack = str(certificate.get("stack") or "").rstrip()
    if stack:
        lines += ["  what it was doing:", *(f"    {text}" for text in stack.splitlines()[-_STACK_LINES:])]
    stderr = str(certificate.get("stderr") or "").rstrip()
    if stderr:
        lines += ["  last standard error:", *(f"    {text}" for text in stderr.splitlines()[-12:])]
    return lines
