"""``mcp-broker doctor``: what could keep a broker from running here, each with its mend."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from mcp_broker.cli import failures, output, settings

if TYPE_CHECKING:
    from mcp_broker.supervisor.isolation.survey import Finding, Level

_MARKS: Final = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
_COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(
    short_help="Check this machine and the state directory.",
    epilog="""\b
Examples:
  mcp-broker doctor
  mcp-broker doctor --json --state-dir /srv/broker""",
)
@settings.shared("json", "profile", "state-dir")
def doctor() -> int:
    """Check Python, kernel, libzmq, state directory, lock, ports, profile, limits, libraries, and isolation.

    Exits 1 when a check fails; a warning does not count, and neither does an isolation level that this machine lacks: a
    pool that demands it is refused then.
    """
    from mcp_broker.cli import checkup
    from mcp_broker.supervisor.isolation import survey

    chosen = settings.current()
    # before anything that may start a thread
    findings, levels = survey.look()
    checks = []
    for run in checkup.CHECKS:
        check = checkup.perform(run, chosen)
        checks.append(check)
        if not chosen.as_json:
            mark = _MARKS[check.level]
            if output.colour_wanted():
                mark = click.style(mark, fg=_COLOURS[check.level])
            output.line(f"{mark}  {check.name:<14} {check.text}")
            if check.mend:
                output.line(f"      {'':<14} mend: {check.mend}")
    failed = [check.name for check in checks if check.level == "fail"]
    if chosen.as_json:
        isolation = {
            "primitives": [asdict(one) for one in findings],
            "levels": [asdict(one) for one in levels],
        }
        output.document(
            {"ok": not failed, "checks": [asdict(check) for check in checks], "isolation": isolation}
        )
    else:
        _show_isolation(findings, levels)
    if failed:
        output.note(f"failed: {', '.join(failed)}")
    return failures.FAILED if failed else failures.DONE


def _show_isolation(findings: list[Finding], levels: list[Level]) -> None:
    """Print what was tried, and which levels a pool can have."""
    output.line()
    output.line("isolation, each primitive tried just now:")
    rows = [("works" if one.works else "no", one.name, f"{one.ms:.1f}", one.purpose) for one in findings]
    head, *lines = output.table(("", "primitive", "ms", "needed for"), rows)
    output.line(f"  {head}")
    for one, text in zip(findings, lines, strict=True):
        output.line(f"  {text}")
        if one.detail:
            output.line(f"         {one.detail}")
    for level in levels:
        output.line(f"level {level.name:<10} {'can be had' if level.is_there else 'no: ' + level.reason}")
