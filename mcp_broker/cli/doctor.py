"""``mcp-broker doctor``: what could keep a broker from running here, each with its mend."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

import click

from mcp_broker.cli import failures, output, settings

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
    """Check Python, kernel, libzmq, state directory, lock, ports, profile, limits and libraries.

    Exits 1 when a check fails; a warning does not count.
    """
    from mcp_broker.cli import checkup

    chosen = settings.current()
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
        output.document({"ok": not failed, "checks": [asdict(check) for check in checks]})
    if failed:
        output.note(f"failed: {', '.join(failed)}")
    return failures.FAILED if failed else failures.DONE
