"""Processes below us that belong to no live worker: what outlived its worker, or lost its parent.

The supervisor is a child subreaper: whoever loses its parent below it becomes its child instead of init's, so a
double-forked daemon stays in sight. Whoever descends from the supervisor and belongs to no live child of its own is
a stray, and is killed. To whom a stray belongs is told by its control group where workers have one of their own, which
nobody leaves unnoticed; else by its environment, in which it may have written anything: what names a live worker waits
for that worker's end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker import proctable
from mcp_broker.errors import SupervisionError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

_PR_SET_CHILD_SUBREAPER: Final = 36
#: looks for processes that were forked while others were being stopped; each round finds a part of the last one's
_FREEZES_MAX: Final = 20

#: pid and start time: one process of this boot
Identity = tuple[int, int]


def become_subreaper() -> None:
    """Adopt the orphans among our descendants.

    Raises:
        SupervisionError: the kernel cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise SupervisionError(f"PR_SET_CHILD_SUBREAPER: {os.strerror(ctypes.get_errno())}")


@dataclass(slots=True)
class Swept:
    """What one sweep found.

    Args:
        left: strays that were there, and were killed just now.
        reaped: strays that had been killed before, and are gone for good.
    """

    left: set[Identity] = field(default_factory=set)
    reaped: set[Identity] = field(default_factory=set)

    def __bool__(self) -> bool:
        """Tell whether to look once more: the killed take a moment to go, and may have forked."""
        return bool(self.left)


def sweep(alive: Mapping[int, str], bystanders: Container[int], top: Path | None = None) -> Swept:
    """Kill and reap strays once.

    Args:
        alive: pid -> name of our own live children; they and what is below them stay.
        bystanders: children that this process had before it became a supervisor.
        top: the folder that holds a control group a worker, named by it; None where workers have none.

    Returns:
        What was there; call again until it is false.
    """
    swept = Swept()
    # every stray hangs below a child of ours that we do not know; mostly there is none, and /proc may be large
    if not any(pid not in alive and pid not in bystanders for pid in proctable.children(os.getpid())):
        return swept
    names = frozenset(alive.values())
    # stopped first: what is stopped cannot fork, and nothing can refuse to be
    for _ in range(_FREEZES_MAX):
        found = _find(alive, bystanders, names, top, swept)
        new = found - swept.left
        swept.left |= found
        if not new:
            break
        for pid, starttime in new:
            proctable.signal_exactly(pid, starttime, signal.SIGSTOP)
    for pid, starttime in swept.left:
        proctable.signal_exactly(pid, starttime, signal.SIGKILL)
    return swept


def _find(
    alive: Mapping[int, str],
    bystanders: Container[int],
    names: frozenset[str],
    top: Path | None,
    swept: Swept,
) -> set[Identity]:
    """Return the strays that live; the dead ones among our children are reaped."""
    below: dict[int, list[proctable.Entry]] = {}
    for entry in proctable.read_all().values():
        below.setdefault(entry.ppid, []).append(entry)
    found = set()
    queue = [entry for entry in below.get(os.getpid(), ()) if entry.pid not in alive]
    while queue:
        entry = queue.pop()
        if entry.pid in bystanders:
            continue
        if entry.state == "Z":
            if entry.ppid == os.getpid():
                _reap(entry, swept)
            continue
        if _owner(entry.pid, top) in names:
            continue
        found.add((entry.pid, entry.starttime))
        queue += below.get(entry.pid, ())
    return found


def of_uid(uid: int) -> set[Identity]:
    """Return the processes that run as a uid, whoever their parents are."""
    try:
        # one system call tells that there is none, which is what there mostly is
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return set()
    found = set()
    for entry in proctable.read_all().values():
        with contextlib.suppress(OSError, IndexError, ValueError):
            # not the owner of its folder: that is root's for a process that hides its memory
            status = Path(f"/proc/{entry.pid}/status").read_bytes()
            if int(status.partition(b"\nUid:")[2].split()[0]) == uid and entry.state != "Z":
                found.add((entry.pid, entry.starttime))
    return found


def _reap(entry: proctable.Entry, swept: Swept) -> None:
    with contextlib.suppress(ChildProcessError):
        pid, status = os.waitpid(entry.pid, os.WNOHANG)
        if pid and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            swept.reaped.add((entry.pid, entry.starttime))


def _owner(pid: int, top: Path | None) -> str:
    """Return the worker that a process belongs to, "" when nothing tells."""
    if top is not None:
        with contextlib.suppress(OSError):
            for line in (
                Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii", errors="replace").splitlines()
            ):
                path = Path(line.split(":", 2)[2])
                if path.parent.name == top.name:
                    return path.name
    return proctable.environment(pid).get(proctable.WORKER_VARIABLE.encode(), b"").decode(errors="replace")
