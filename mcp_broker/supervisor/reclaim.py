"""Taking back what a dead process leaves: descendants that escaped its group, its folder, and its record.

The supervisor is a child subreaper: whoever loses its parent below it becomes its child instead of init's, so a
double-forked daemon stays in sight. Whoever descends from the supervisor and belongs to no live child of its own is
a stray, and is killed; a stray that names a live worker in its environment waits for that worker's end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import stat
import time
from typing import TYPE_CHECKING, Final

from mcp_broker import proctable
from mcp_broker.errors import SupervisionError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping
    from pathlib import Path

    from mcp_broker.supervisor.process import Process

#: in the environment of every child: of which state directory it is
INSTANCE_VARIABLE: Final = "MCPB_INSTANCE"

_PR_SET_CHILD_SUBREAPER: Final = 36
#: a folder that defeats us within this time is left, and said so
_REMOVE_S: Final = 5.0
#: SIGKILL takes effect within milliseconds, unless its target is stuck in the kernel
_GONE_S: Final = 1.0


def become_subreaper() -> None:
    """Adopt the orphans among our descendants.

    Raises:
        SupervisionError: the kernel cannot.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise SupervisionError(f"PR_SET_CHILD_SUBREAPER: {os.strerror(ctypes.get_errno())}")


def sweep(alive: Mapping[int, str], bystanders: Container[int]) -> int:
    """Kill and reap strays once.

    Args:
        alive: pid -> name of our own live children; they and what is below them stay.
        bystanders: children that this process had before it became a supervisor.

    Returns:
        How many strays were still there; call again until it is 0.
    """
    # every stray hangs below a child of ours that we do not know; mostly there is none, and /proc may be large
    if not any(pid not in alive and pid not in bystanders for pid in proctable.children(os.getpid())):
        return 0
    table = proctable.read_all()
    below: dict[int, list[proctable.Entry]] = {}
    for entry in table.values():
        below.setdefault(entry.ppid, []).append(entry)
    names = {name.encode() for name in alive.values()}
    found = 0
    queue = [entry for entry in below.get(os.getpid(), ()) if entry.pid not in alive]
    while queue:
        entry = queue.pop()
        if entry.pid in bystanders:
            continue
        if entry.state == "Z":
            if entry.ppid == os.getpid():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(entry.pid, os.WNOHANG)
            continue
        if proctable.environment(entry.pid).get(proctable.WORKER_VARIABLE.encode()) in names:
            continue
        found += 1
        proctable.kill_exactly(entry.pid, entry.starttime)
        queue += below.get(entry.pid, ())
    return found


# -- from one supervisor to the next --------------------------------------------------------------


def record(run_dir: Path, process: Process) -> None:
    """Write down who runs, for a next start that finds us gone."""
    identity = {"pid": process.pid, "starttime": process.starttime, "boot_id": proctable.boot_id()}
    # lost with the machine, like the process: no fsync; without room for it the environment still tells whose it is
    with contextlib.suppress(OSError):
        (run_dir / f"{process.name}.json").write_text(json.dumps(identity))


def forget(run_dir: Path, name: str) -> None:
    """Remove the record of a process that is gone."""
    (run_dir / f"{name}.json").unlink(missing_ok=True)


def remove_leftovers(run_dir: Path, instance: str) -> int:
    """Kill what an earlier supervisor of this state directory left running, and empty its run directory.

    Only call it under the lock. A process counts as left over when its pid, start time and boot are those of a
    record, or when its environment names our instance.

    Returns:
        How many processes were killed.
    """
    targets: dict[int, int] = {}
    for path in run_dir.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            identity = json.loads(path.read_bytes())
            if identity["boot_id"] == proctable.boot_id():
                entry = proctable.read(int(identity["pid"]))
                if entry is not None and entry.starttime == identity["starttime"]:
                    targets[entry.pid] = entry.starttime
    for entry in proctable.read_all().values():
        named = proctable.environment(entry.pid).get(INSTANCE_VARIABLE.encode())
        if named == instance.encode() and entry.pid != os.getpid():
            targets[entry.pid] = entry.starttime
    pidfds = []
    for pid, starttime in targets.items():
        with contextlib.suppress(ProcessLookupError):
            pidfds.append(os.pidfd_open(pid))
        proctable.kill_exactly(pid, starttime)
    deadline = time.monotonic() + _GONE_S
    for pidfd in pidfds:
        select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
        os.close(pidfd)
    for path in list(run_dir.iterdir()):
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink(missing_ok=True)
    return len(targets)


# -- folders --------------------------------------------------------------------------------------


def remove_tree(path: Path) -> bool:
    """Remove a folder that a hostile process may have filled; True when it is gone.

    Never follows a link, never leaves the file system, and needs neither recursion nor many descriptors however
    deep the tree: sub-folders are moved up to the top one before they are emptied.
    """
    deadline = time.monotonic() + _REMOVE_S
    try:
        path.chmod(0o700, follow_symlinks=True)
        top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return not path.exists()
    try:
        device = os.fstat(top).st_dev
        moved = 0
        while time.monotonic() < deadline:
            names = _names_in(top)
            left = len(names)
            for name in names:
                moved, is_gone = _remove_entry(top, name, device, moved)
                left -= is_gone
            if not _names_in(top) or left == len(names):
                break
    finally:
        os.close(top)
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


def _names_in(folder: int) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # it needs a descriptor of its own
        return []


def _remove_entry(top: int, name: str, device: int, moved: int) -> tuple[int, bool]:
    """Remove a file, or move a folder's sub-folders up and remove the folder."""
    try:
        info = os.stat(name, dir_fd=top, follow_symlinks=False)
        if not stat.S_ISDIR(info.st_mode):
            os.unlink(name, dir_fd=top)
            return moved, True
        if info.st_dev != device:
            return moved, False
        # its process is dead, so nobody swaps it for a link between the look and the deed
        os.chmod(name, 0o700, dir_fd=top)
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    except OSError:
        return moved, False
    try:
        for inner in _names_in(folder):
            with contextlib.suppress(OSError):
                info = os.stat(inner, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode) and info.st_dev == device:
                    os.chmod(inner, 0o700, dir_fd=folder)
                    os.rename(inner, f".moved-{moved}", src_dir_fd=folder, dst_dir_fd=top)
                    moved += 1
                else:
                    os.unlink(inner, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        os.rmdir(name, dir_fd=top)
    except OSError:
        return moved, False
    return moved, True
