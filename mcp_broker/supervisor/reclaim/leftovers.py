"""From one supervisor to the next: who runs is written down, and what a dead one left is taken back.

A process is known by pid, start time and boot: a bare pid may be anybody's by now.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker import proctable
from mcp_broker.supervisor import cgroups
from mcp_broker.supervisor.poller import is_readable
from mcp_broker.supervisor.reclaim import memory
from mcp_broker.supervisor.reclaim.folders import remove_tree

if TYPE_CHECKING:
    from mcp_broker.supervisor.process import Process

#: in the environment of every child: of which state directory it is
INSTANCE_VARIABLE: Final = "MCPB_INSTANCE"

#: in the runtime folder: where our control groups are
_GROUPS: Final = "groups"

#: SIGKILL takes effect within milliseconds, unless its target is stuck in the kernel
_GONE_S: Final = 1.0
#: a process forks while the others are killed
_ROUNDS_MAX: Final = 20


def record(run_dir: Path, process: Process) -> None:
    """Write down who runs, for a next start that finds us gone."""
    identity = {"pid": process.pid, "starttime": process.starttime, "boot_id": proctable.boot_id()}
    # lost with the machine, like the process: no fsync; without room for it the environment still tells whose it is
    with contextlib.suppress(OSError):
        (run_dir / f"{process.name}.json").write_text(json.dumps(identity))


def forget(run_dir: Path, name: str) -> None:
    """Remove the record of a process that is gone."""
    (run_dir / f"{name}.json").unlink(missing_ok=True)


def record_groups(run_dir: Path, groups: cgroups.Groups) -> None:
    """Write down where our control groups are, for a next start that runs in another group than we do."""
    with contextlib.suppress(OSError):
        (run_dir / _GROUPS).write_text(str(groups.top.path))


def _groups(run_dir: Path, instance: str) -> list[cgroups.Groups]:
    """Return where an earlier supervisor's control groups may be."""
    here = cgroups.open_groups(instance)
    found = [] if here is None else [here]
    with contextlib.suppress(OSError, ValueError):
        top = Path((run_dir / _GROUPS).read_text())
        # nothing but a group of ours is killed, whatever stands there
        is_ours = top.name == cgroups.name_of(instance) and (top / "cgroup.procs").exists()
        if is_ours and all(top != groups.top.path for groups in found):
            found.append(cgroups.Groups(cgroups.Group(top)))
    return found


def remove_leftovers(run_dir: Path, instance: str) -> int:
    """Kill what an earlier supervisor of this state directory left running, and remove what it left behind.

    Only call it under the lock. A process counts as left over when its pid, start time and boot are those of a
    record, when it is in one of our control groups, when its environment names our instance, or when it descends from
    such a one.

    Returns:
        How many processes were killed.
    """
    killed: set[tuple[int, int]] = set()
    every = _groups(run_dir, instance)
    deadline = time.monotonic() + _GONE_S
    for _ in range(_ROUNDS_MAX):
        targets = _left_over(run_dir, instance, every)
        if not targets:
            break
        killed |= targets.items()
        _kill(targets, every, deadline)
    for groups in every:
        groups.close()
    for name in memory.names(memory.prefix(instance)):
        memory.remove(name)
    for path in list(run_dir.iterdir()):
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    return len(killed)


def _left_over(run_dir: Path, instance: str, every: list[cgroups.Groups]) -> dict[int, int]:
    """Return the living processes of an earlier supervisor: pid -> start time."""
    table = {pid: entry for pid, entry in proctable.read_all().items() if entry.state != "Z"}
    targets: dict[int, int] = {}
    for path in run_dir.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            identity = json.loads(path.read_bytes())
            if identity["boot_id"] == proctable.boot_id():
                entry = table.get(int(identity["pid"]))
                if entry is not None and entry.starttime == identity["starttime"]:
                    targets[entry.pid] = entry.starttime
    for pid in (pid for groups in every for pid in groups.top.pids()):
        if pid in table:
            targets[pid] = table[pid].starttime
    for entry in table.values():
        named = proctable.environment(entry.pid).get(INSTANCE_VARIABLE.encode())
        if named == instance.encode():
            targets[entry.pid] = entry.starttime
    # a child has its parent's variables, unless it dropped them
    grown = True
    while grown:
        more = {
            entry.pid: entry.starttime
            for entry in table.values()
            if entry.ppid in targets and entry.pid not in targets
        }
        targets.update(more)
        grown = bool(more)
    targets.pop(os.getpid(), None)
    return targets


def _kill(targets: dict[int, int], every: list[cgroups.Groups], deadline: float) -> None:
    for groups in every:
        groups.top.kill()
    pidfds = []
    for pid, starttime in targets.items():
        with contextlib.suppress(OSError):
            pidfds.append(os.pidfd_open(pid))
        proctable.kill_exactly(pid, starttime)
    for pidfd in pidfds:
        is_readable(pidfd, deadline - time.monotonic())
        os.close(pidfd)
