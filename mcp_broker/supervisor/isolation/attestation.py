"""What the kernel says of a worker: whether it really stands behind the walls that it was to put up.

Read by the supervisor from /proc, not believed from the worker. Landlock leaves no trace there; that it works is what
the probe has shown, and a worker whose Landlock fails ends itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker import proctable

if TYPE_CHECKING:
    from mcp_broker.wire.confinement import Confinement


#: /proc/PID/status, "Seccomp": a filter is in force
_FILTERED: Final = "2"


def fault(pid: int, confinement: Confinement, *, is_filtered: bool = True) -> str:
    """Return what a worker lacks of its confinement, one sentence; "" when it lacks nothing.

    Args:
        pid: of a process that has not been reaped, so that it is still that one.
        is_filtered: it has had the time to put up its own filter of system calls.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        # it is gone: somebody else tells how
        return ""
    found = dict(row.split(":\t", 1) for row in text.splitlines() if ":\t" in row)
    if not is_filtered:
        found["Seccomp"] = _FILTERED
    lacks = next(_faults(pid, found, confinement), "")
    # what has ended has no namespaces any more: somebody else tells how
    return "" if _has_ended(pid) else lacks


def _has_ended(pid: int) -> bool:
    entry = proctable.read(pid)
    return entry is None or entry.state in {"Z", "X"}


def _faults(pid: int, found: dict[str, str], confinement: Confinement) -> Iterator[str]:
    level = confinement.level
    if found.get("NoNewPrivs") != "1":
        yield f"it may gain privileges (NoNewPrivs {found.get('NoNewPrivs')}), which level {level} forbids"
    if level == "process":
        return
    if found.get("Seccomp") != _FILTERED:
        yield f"no filter of system calls holds it (Seccomp {found.get('Seccomp')}), which level {level} demands"
    if confinement.uid is not None:
        uids = {*found.get("Uid", "").split(), *found.get("Gid", "").split()}
        if uids != {str(confinement.uid)}:
            yield f"it runs as uid {found.get('Uid', '?').split()[0]} and was to be uid {confinement.uid}"
    capabilities = {name: found.get(name, "") for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")}
    if confinement.uid is not None:
        capabilities["CapBnd"] = found.get("CapBnd", "")
    for name, value in capabilities.items():
        if value.strip("0"):
            yield f"it has capabilities ({name} {value})"
    is_alone = level == "sandboxed"
    owned = {
        "mnt": confinement.own_mounts,
        "net": confinement.own_network,
        **dict.fromkeys(("user", "pid", "ipc", "uts"), is_alone),
    }
    for space in (space for space, is_own in owned.items() if is_own):
        found_there = _namespace(pid, space)
        if not found_there:
            yield f"its {space} namespace cannot be seen"
        elif found_there == _namespace(os.getpid(), space):
            yield f"it shares our {space} namespace"


def _namespace(pid: int, space: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/{space}").readlink())
    except OSError:
        return ""
