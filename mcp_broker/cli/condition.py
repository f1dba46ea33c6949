"""A tool's condition in words: its state, its breaker, what recovery did, its history, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_broker.cli import output

if TYPE_CHECKING:
    from mcp_broker.cli.connection import Map
    from mcp_broker.cli.settings import Settings

#: of its history, so many lines are shown; --json has all
_LINES: Final = 12
#: what a state does to calls, for people
_CALLS: Final = {
    "accept": "are taken",
    "wait": "are taken, and wait",
    "refuse": "are refused; those that were taken go on",
    "end": "are refused, and those that waited were ended",
}
#: state -> the command that leads on
_NEXT: Final = {
    "paused": "resume",
    "pausing": "resume",
    "stopped": "start",
    "inactive": "enable",
    "error": "enable",
    "unregistered": "enable",
}


def told(condition: Map, chosen: Settings) -> list[str]:
    """Tell a tool's condition in lines."""
    name, state = str(condition.get("tool", "?")), str(condition.get("state", "?"))
    lines = [f"tool {name}: {state} for {output.duration(float(condition.get('since_s') or 0))}"]
    if condition.get("reason"):
        lines.append(f"  why        {condition['reason']}")
    lines.append(f"  calls      {_CALLS.get(str(condition.get('calls')), '?')}")
    if condition.get("isolated"):
        lines.append(
            "  worker     one of its own, which runs one call at a time and may use half of what others may"
        )
    lines += _breaker(condition.get("breaker"))
    lines += _ladder(condition.get("ladder"))
    history = list(condition.get("history") or ())
    if history:
        lines.append("  history:")
        lines += [_change(change) for change in history[-_LINES:]]
    lines += _next(name, state, condition, chosen)
    return lines


def _breaker(breaker: Map | None) -> list[str]:
    if breaker is None:
        return ["  breaker    closed; nothing has failed of late"]
    state = str(breaker.get("state", "?")).replace("_", " ")
    text = f"  breaker    {state}; {breaker.get('failures', 0)} of the last {breaker.get('calls', 0)} calls failed"
    if breaker.get("retry_after_s"):
        text += f"; one call may try in {float(breaker['retry_after_s']):.1f} s"
    return [text]


def _ladder(ladder: Map | None) -> list[str]:
    if ladder is None:
        return ["  recovery   nothing had to be recovered"]
    tried, recovered = int(ladder.get("tried") or 0), int(ladder.get("recovered") or 0)
    share = f"; {recovered} of {tried} steps helped" if tried else ""
    lines = [
        f"  recovery   at step {ladder.get('position') or 'none'}, {ladder.get('in_a_row', 0)} failures in a row{share}"
    ]
    for failure in ladder.get("failures") or ():
        used = failure.get("resources") or {}
        cost = ""
        if used:
            peak, cpu = output.mebibytes(float(used.get("max_rss_kib") or 0)), float(used.get("cpu_s") or 0)
            cost = f" ({used.get('worker', '?')}: {peak} MB, {cpu:.1f} s of CPU)"
        lines.append(f"    {_ago(failure)}  {failure.get('cause', '?')}: {failure.get('text', '')}{cost}")
    for attempt in ladder.get("attempts") or ():
        took = "" if attempt.get("duration_s") is None else f" after {float(attempt['duration_s']):.2f} s"
        failed = f"; {attempt['error']}" if attempt.get("error") else ""
        lines.append(
            f"    {_ago(attempt)}  {attempt.get('step', '?')} for a {attempt.get('cause', '?')}: "
            f"{attempt.get('outcome', '?')}{took}{failed}"
        )
    return lines


def _change(change: Map) -> str:
    text = f"    {_ago(change)}  {change.get('before', '?')} -> {change.get('after', '?')} ({change.get('event', '?')})"
    return f"{text}: {change['error']}" if change.get("error") else text


def _ago(record: Map) -> str:
    return f"{output.duration(float(record.get('age_s') or 0)):>7} ago"


def _next(name: str, state: str, condition: Map, chosen: Settings) -> list[str]:
    verb = _NEXT.get(state)
    if verb is None and condition.get("isolated"):
        verb = "enable"
    if verb is None:
        return []
    return [f"  next       {chosen.again(f'tools {verb} {name}')}"]
