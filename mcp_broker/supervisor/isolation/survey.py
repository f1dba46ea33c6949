"""What this machine can do, for people: each primitive with what it is for, and the levels that follow from it."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mcp_broker.config import PoolTable
from mcp_broker.supervisor import cgroups
from mcp_broker.supervisor.isolation import plan, probe
from mcp_broker.supervisor.isolation.sandbox import try_it
from mcp_broker.supervisor.poller import is_readable

#: from the order to the end of whom a control group kills, seconds
_GONE_S: Final = 2.0

#: primitive -> what it is needed for
PURPOSES: Final[Mapping[str, str]] = {
    "no_new_privs": "every level: no program gains rights",
    "resource_limits": "every level: files, core dumps",
    "descriptors": "every level: only its own descriptors (close_range)",
    "seccomp": "restricted: system calls",
    "landlock": "restricted: files",
    "landlock_ports": "restricted, not as root: no network but the broker's port",
    "landlock_scopes": "restricted: abstract sockets, signals",
    "own_uid": "restricted and sandboxed, as root: a uid for each worker",
    "own_mounts": "restricted, as root: its own view of the files",
    "own_network": "network = loopback at restricted, as root",
    "sandbox": "sandboxed: namespaces by bubblewrap",
    "group_kill": "reclaim: who left his parent is killed at once, else by a search",
}
LEVELS: Final = ("process", "restricted", "sandboxed")


@dataclass(frozen=True, slots=True)
class Finding:
    """One primitive.

    Args:
        detail: what is known of it, or why it does not work.
        errno: of the step that failed, where there is one.
        ms: how long trying took.
        purpose: what it is needed for.
    """

    name: str
    works: bool
    detail: str
    errno: int | None
    ms: float
    purpose: str


@dataclass(frozen=True, slots=True)
class Level:
    """One level, for this user on this machine.

    Args:
        reason: why it cannot be had; "" when it can.
    """

    name: str
    is_there: bool
    reason: str


def _group_kill() -> str:
    groups = cgroups.open_groups(f"doctor-{secrets.token_hex(4)}")
    if groups is None:
        raise probe.NotHolding("no control groups of version 2 that can be written and can kill")
    group = groups.of("one")
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        group.make()
        group.add(child)
        if not group.kill():
            raise probe.NotHolding("cgroup.kill cannot be written")
        pidfd = os.pidfd_open(child)
        if not is_readable(pidfd, _GONE_S):
            raise probe.NotHolding("who was in the group lives")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        group.remove()
        groups.close()
    return str(groups.top.path.parent)


#: everything that is tried
TRIED: Final[Mapping[str, Callable[[], str]]] = {
    **probe.PRIMITIVES,
    "sandbox": try_it,
    "group_kill": _group_kill,
}


def look() -> tuple[list[Finding], list[Level]]:
    """Try everything: a third of a second. For a process with one thread: it forks."""
    probes = probe.probe(TRIED)
    findings = [
        Finding(one.name, one.works, one.detail, one.errno, one.ms, PURPOSES[one.name])
        for one in probes.values()
    ]
    return findings, [level(name, probes, is_root=os.geteuid() == 0) for name in LEVELS]


def level(name: str, probes: Mapping[str, probe.Probe], *, is_root: bool) -> Level:
    """Tell whether a pool that demands this level, and nothing special, gets it."""
    try:
        plan.walls(PoolTable(module="any", isolation=name), probes, is_root=is_root)  # type: ignore[arg-type]
    except plan.Unattainable as error:
        return Level(name, is_there=False, reason=error.message.removesuffix("; see `mcp-broker doctor`"))
    return Level(name, is_there=True, reason="")
