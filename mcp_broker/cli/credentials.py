"""``mcp-broker credentials``: profiles for clients, made and listed without a running broker."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mcp_broker import limits
from mcp_broker.auth.places import profile_in
from mcp_broker.cli import output, settings
from mcp_broker.cli.root import Suggesting
from mcp_broker.errors import NotReachable

if TYPE_CHECKING:
    from mcp_broker.auth.credentials import ListedProfile


@click.group(
    cls=Suggesting,
    short_help="Issue and list client profiles.",
    epilog="""\b
Examples:
  mcp-broker credentials issue alice --allow 'text.*' --ttl 30d
  mcp-broker credentials list""",
)
@settings.shared("json", "state-dir", hidden=True)
def credentials() -> None:
    """Issue and list client profiles: files that say where the broker is and what their holder may call."""


@credentials.command(
    short_help="Make a profile.",
    epilog="""\b
Examples:
  mcp-broker credentials issue alice --allow 'text.*' --ttl 30d
  mcp-broker credentials issue ops --allow '*' --deny 'sql.*' --admin""",
)
@click.argument("name")
@click.option(
    "--allow", multiple=True, required=True, metavar="PATTERN", help="Tools it may call; repeatable."
)
@click.option("--deny", multiple=True, metavar="PATTERN", help="Tools it may not call; wins. Repeatable.")
@click.option("--ttl", default="30d", show_default=True, help="Life: 45s, 90m, 12h, 30d; at most 90d.")
@click.option("--clearance", type=click.IntRange(0, 10), default=0, show_default=True, help="Level of tools.")
@click.option("--admin", is_flag=True, help="May also run the broker: system.*")
@click.option(
    "--weight",
    type=click.IntRange(1, limits.WEIGHT_MAX),
    default=1,
    show_default=True,
    help="Its share of a busy pool.",
)
@click.option(
    "--priority",
    type=click.Choice(settings.PRIORITIES),
    default="normal",
    show_default=True,
    help="Highest for its calls.",
)
@click.option("--out", metavar="FILE", help="Write it here instead of the state directory.")
@settings.shared("json", "state-dir")
def issue(
    name: str,
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    ttl: str,
    clearance: int,
    admin: bool,
    weight: int,
    priority: str,
    out: str | None,
) -> None:
    """Make a profile for NAME: a key pair, and a token bound to it. The file holds secrets; its mode is 0600."""
    from mcp_broker.auth.credentials import Authority, parse_ttl

    chosen = settings.current()
    ttl_s = parse_ttl(ttl)
    authority = Authority.open(chosen.state_dir, create=False)
    scopes = [*allow, *(pattern if pattern.startswith("!") else f"!{pattern}" for pattern in deny)]
    path = authority.issue_profile(
        name,
        scopes=scopes,
        ttl_s=ttl_s,
        endpoints=_endpoints(chosen),
        clearance=clearance,
        admin=admin,
        weight=weight,
        priority=settings.PRIORITIES.index(priority),
        path=Path(out).expanduser().absolute() if out else None,
    )
    if chosen.as_json:
        expires = time.time() + ttl_s
        output.document({"name": name, "path": str(path), "scopes": scopes, "expires": int(expires)})
        return
    output.line(str(path))
    trial = settings.Settings(profile_given=str(path)).again("tools")
    output.note(f"{name} may call {' '.join(scopes)} for {ttl}. Try: {trial}")


def _endpoints(chosen: settings.Settings) -> tuple[str, ...]:
    """Return where the broker answers, as its own default profile knows."""
    from mcp_broker.auth.profile import load_profile

    path = profile_in(chosen.state_dir)
    try:
        return load_profile(path).endpoints
    except NotReachable:
        raise NotReachable(
            f"nothing in {chosen.state_dir} says where the broker listens, since none has started there",
            {"hint": chosen.again("start")},
        ) from None


@credentials.command(
    "list",
    short_help="List the profiles of the state directory.",
    epilog="""\b
Example:
  mcp-broker credentials list --json""",
)
@settings.shared("json", "state-dir")
def list_() -> None:
    """List names, principals, scopes and expiry of the profiles in the state directory; never a secret."""
    from mcp_broker.auth.credentials import Authority

    chosen = settings.current()
    found = Authority.open(chosen.state_dir, create=False).list_profiles()
    if chosen.as_json:
        output.document({"profiles": [_record(profile) for profile in found]})
        return
    rows = [_row(profile) for profile in found]
    for text in output.table(("NAME", "PRINCIPAL", "EXPIRES", "CLEARANCE", "SCOPE"), rows, width=_width()):
        output.line(text)


def _width() -> int:
    return os.get_terminal_size().columns if output.is_terminal() else 0


def _record(listed: ListedProfile) -> dict[str, Any]:
    claims = listed.claims
    return {
        "name": listed.name,
        "path": str(listed.path),
        "principal": claims.principal if claims else listed.profile.principal if listed.profile else None,
        "scopes": list(claims.scopes) if claims else None,
        "clearance": claims.clearance if claims else None,
        "admin": claims.admin if claims else None,
        "weight": claims.weight if claims else None,
        "priority": settings.PRIORITIES[claims.priority] if claims else None,
        "expires": claims.expires_wall if claims else None,
        "problem": listed.problem,
    }


def _row(listed: ListedProfile) -> tuple[str, ...]:
    claims = listed.claims
    if claims is None:
        return (listed.name, "-", "-", "-", f"cannot be used: {listed.problem}")
    left = claims.expires_wall - time.time()
    expires = f"in {output.duration(left)}" if left > 0 else f"expired {output.ago(claims.expires_wall)}"
    scope = " ".join((*claims.scopes, *(("system.*",) if claims.admin else ())))
    return (listed.name, claims.principal, expires, str(claims.clearance), scope)
