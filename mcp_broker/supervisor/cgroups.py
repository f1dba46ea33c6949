"""Control groups, in whichever hierarchies this machine mounts and lets us write.

Machines differ: one unified hierarchy, several of the first generation, or both (then the second one may have no
controller, and still kills and freezes). What there is stands in mountinfo, and whether it may be used shows when it
is tried; no path is taken for granted. Every process may be gone, and every folder refused, at any moment.

Each supervisor makes one folder of its own below the group that it runs in, ``mcpb-INSTANCE``, and in it one group a
worker.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PREFIX: Final = "mcpb-"
#: an empty group this old is not just about to get its first process
_ABANDONED_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy.

    Args:
        own: the folder of the group that this process is in.
        controllers: what it can limit: "memory", "pids" …; kill and freeze of the second generation need none.
        is_v2: of the second generation.
    """

    own: Path
    controllers: frozenset[str]
    is_v2: bool


def hierarchies(proc: Path = Path("/proc/self")) -> list[Hierarchy]:
    """Return the hierarchies that this process sees, none when it sees no control groups at all."""
    try:
        mounts = (proc / "mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        groups = (proc / "cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    #: "" for the second generation, else each controller -> the group that we are in
    ours: dict[str, str] = {}
    for line in groups:
        _, controllers, path = line.split(":", 2)
        ours.update(dict.fromkeys(controllers.split(","), path))
    found = []
    for line in mounts:
        left, _, right = line.partition(" - ")
        kind = right.split()[0] if right else ""
        if kind not in {"cgroup", "cgroup2"}:
            continue
        root, mounted_at = left.split()[3:5]
        mount = Path(mounted_at.encode().decode("unicode_escape"))
        if kind == "cgroup2":
            own = _below(mount, root, ours.get("", "/"))
            found.append(Hierarchy(own, frozenset(_read(own / "cgroup.controllers").split()), is_v2=True))
            continue
        options = frozenset(right.split()[-1].split(","))
        served = options & ours.keys()
        if served:
            found.append(Hierarchy(_below(mount, root, ours[min(served)]), served, is_v2=False))
    return found


def _below(mount: Path, root: str, group: str) -> Path:
    # in a container the mount shows only what is below its root
    inner = group.removeprefix(root) if root != "/" else group
    return mount / inner.lstrip("/")


class Group:
    """One control group: a folder.

    Args:
        path: where it is, or will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def make(self) -> None:
        """Make the folder; it may exist.

        Raises:
            OSError: we may not (EACCES, EROFS), or the hierarchy has no room for it.
        """
        self.path.mkdir(parents=True, exist_ok=True)

    def add(self, pid: int) -> None:
        """Move a process here; what it starts from now on is here too.

        Raises:
            OSError: we may not, or it is gone (ESRCH).
        """
        self.write("cgroup.procs", str(pid))

    def write(self, name: str, value: str) -> None:
        """Write one of its files.

        Raises:
            OSError: there is no such file, or the kernel refuses the value.
        """
        # one write, whose error is seen: a buffered file swallows it when it is closed
        fd = os.open(self.path / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    def read(self, name: str) -> str:
        """Return the text of one of its files, "" when it cannot be read."""
        return _read(self.path / name)

    @property
    def exists(self) -> bool:
        """The folder is there."""
        return self.path.is_dir()

    def pids(self) -> list[int]:
        """Return the processes in it and in the groups below it."""
        found = [int(pid) for pid in self.read("cgroup.procs").split()]
        for below in self.below():
            found += below.pids()
        return found

    def below(self) -> list[Group]:
        """Return the groups directly below it."""
        try:
            return [Group(path) for path in self.path.iterdir() if path.is_dir()]
        except OSError:
            return []

    def kill(self) -> bool:
        """SIGKILL all in it and below it, whatever they fork meanwhile; False where the kernel cannot (before 5.14)."""
        try:
            self.write("cgroup.kill", "1")
        except OSError:
            return False
        return True

    def remove(self) -> bool:
        """Remove it with the groups below it; False while something is in them (a zombie counts)."""
        for below in self.below():
            below.remove()
        with contextlib.suppress(OSError):
            self.path.rmdir()
        return not self.exists


class Groups:
    """The groups of one supervisor in one hierarchy.

    Args:
        top: the supervisor's folder.
    """

    def __init__(self, top: Group) -> None:
        self.top = top

    def of(self, worker_id: str) -> Group:
        """Return a worker's group, which may not exist."""
        return Group(self.top.path / worker_id)

    def close(self) -> None:
        """Remove what is empty."""
        self.top.remove()


def name_of(instance: str) -> str:
    """Return the name of a supervisor's folder."""
    return f"{_PREFIX}{instance}"


def open_groups(instance: str, controller: str | None = None) -> Groups | None:
    """Return where groups with this controller can be made, or such as kill (None); None where there is no such place.

    Args:
        instance: names the supervisor's folder, which is made.
        controller: "memory", "pids" …; None: the hierarchy of the second generation, if it can kill.
    """
    for hierarchy in hierarchies():
        if not hierarchy.is_v2 if controller is None else controller not in hierarchy.controllers:
            continue
        top = Group(hierarchy.own / name_of(instance))
        try:
            top.make()
        except OSError:
            continue
        if controller is None and not (top.path / "cgroup.kill").exists():
            top.remove()
            continue
        _remove_abandoned(hierarchy.own)
        return Groups(top)
    return None


def _remove_abandoned(own: Path) -> None:
    """Remove what supervisors that were killed, and whose state directories nobody serves again, left: empty groups.

    A supervisor without workers may lose its own so; it makes it anew.
    """
    made_before = time.time() - _ABANDONED_S
    with contextlib.suppress(OSError):
        for path in own.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < made_before:
                    Group(path).remove()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
