"""What the kernel itself holds a worker to, where this machine lets us: control groups, and limits of a process.

The supervisor measures and kills; this is the wall behind it, for what is faster than a look: a fork bomb, a gigabyte in
an instant. A worker enters its groups when it is ready. What it held before stays charged elsewhere, so a group's memory
is just the growth that counts.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.core.metering import LIMITS
from mcp_broker.supervisor import cgroups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mcp_broker.config import PoolTable
    from mcp_broker.core.metering import Bounds
    from mcp_broker.supervisor.cgroups import Group, Groups

_log = logging.getLogger("mcp_broker.supervisor")

_MIB: Final = 1024 * 1024
#: of a list of processes: thousands of them
_PROCS_BYTES: Final = 65536
#: a process may start others while it is moved in; what is in the group starts them there
_ROUNDS_MAX: Final = 20
#: file of the first generation, file of the second
_MEMORY_MAX: Final = ("memory.limit_in_bytes", "memory.max")
_MEMORY_PEAK: Final = ("memory.max_usage_in_bytes", "memory.peak")
_OOM: Final = ("memory.oom_control", "memory.events")


def rlimits(table: PoolTable, *, is_confined: bool, has_own_uid: bool) -> dict[str, int]:
    """Return the limits of the process itself; descriptors are limited by the worker when it is ready.

    Never the address space: what maps 800 MB may use 90.

    Args:
        is_confined: it writes nowhere but where it is told.
        has_own_uid: the kernel counts the processes of a uid, and root's not at all.
    """
    values = {"core": 0}
    if is_confined and not table.write:
        # of one file, also in memory, where measuring comes first; where it may write elsewhere, files may be as
        # large as they like
        values["fsize"] = max(table.limits.scratch_mb, 4 * table.limits.memory_mb) * _MIB
    if has_own_uid:
        values["nproc"] = tasks(table.limits.processes)
    return values


def told(table: PoolTable) -> dict[str, float]:
    """Return what a worker is told of its limits; where they follow what is used, the most that they may become."""
    values = {limit: float(getattr(table.limits, limit)) for limit in LIMITS}
    if table.limits.adaptive:
        values["open_files"] = max(values["open_files"], limits.OPEN_FILES_MAX)
    return values


def tasks(processes: float) -> int:
    """Return how many processes and threads a worker may have, all together."""
    return (int(processes) + 1) * limits.TASKS_A_PROCESS


class Quota:
    """The groups of one life of a worker.

    Args:
        memory: None where memory cannot be limited.
        pids: None where processes cannot be.
    """

    def __init__(self, memory: Group | None, pids: Group | None) -> None:
        self._memory = memory
        self._pids = pids
        #: set when it is known which groups take processes
        self._procs: str | None = None
        self._generation = 0 if memory is None else int((memory.path / _MEMORY_MAX[1]).exists())

    def take_in(self, tree: Callable[[], Iterable[int]]) -> None:
        """Move processes in, and what they start meanwhile; a group that not even the first one may enter is given up.

        Args:
            tree: finds them; asked until there is none that is not in the groups yet.
        """
        known: set[int] = set()
        for _ in range(_ROUNDS_MAX):
            new = [pid for pid in tree() if pid not in known]
            for pid in new:
                self._memory = _entered(self._memory, pid, is_first=not known)
                self._pids = _entered(self._pids, pid, is_first=not known)
                known.add(pid)
            if not new:
                break
        group = self._pids or self._memory
        self._procs = None if group is None else str(group.path / "cgroup.procs")

    def hold_to(self, bounds: Bounds) -> None:
        """Set what the kernel allows."""
        if self._memory is not None:
            slack_mb = max(bounds.memory_mb * limits.MEMORY_SLACK_SHARE, limits.MEMORY_SLACK_MB_MIN)
            _write(
                self._memory, _MEMORY_MAX[self._generation], str(int((bounds.memory_mb + slack_mb) * _MIB))
            )
        if self._pids is not None:
            _write(self._pids, "pids.max", str(tasks(bounds.processes)))

    def members(self) -> list[int] | None:
        """Return the processes of the worker, whoever their parent is; None where no group tells."""
        if self._procs is None:
            return None
        try:
            fd = os.open(self._procs, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return []
        try:
            return [int(pid) for pid in os.read(fd, _PROCS_BYTES).split()]
        except OSError:
            return []
        finally:
            os.close(fd)

    @property
    def oom_kills(self) -> int:
        """How often the kernel has killed in here since all memory was used."""
        if self._memory is None:
            return 0
        return _number(self._memory.read(_OOM[self._generation]), "oom_kill")

    @property
    def peak_mb(self) -> float:
        """The most memory that was ever charged here."""
        if self._memory is None:
            return 0.0
        text = self._memory.read(_MEMORY_PEAK[self._generation]).strip()
        return int(text) / _MIB if text.isdigit() else 0.0

    @property
    def shared_kib(self) -> float:
        """Files in memory, also those that nobody maps or has open."""
        if self._memory is None:
            return 0.0
        name = ("total_shmem", "shmem")[self._generation]
        return _number(self._memory.read("memory.stat"), name) / 1024

    def close(self) -> bool:
        """Remove the groups; False while something is in them (a zombie counts)."""
        left = [group for group in (self._memory, self._pids) if group is not None and not group.remove()]
        return not left


class Quotas:
    """The groups of all workers of a node.

    Args:
        instance: names the supervisor's folder.
    """

    def __init__(self, instance: str) -> None:
        self._memory = cgroups.open_groups(instance, "memory")
        self._pids = cgroups.open_groups(instance, "pids")
        for groups in (self._memory, self._pids):
            if groups is not None:
                # a supervisor that was killed left them
                for group in groups.top.below():
                    group.remove()
        #: of lives that have ended, and still have a zombie in them
        self._left: list[Quota] = []

    def enter(self, worker_id: str, tree: Callable[[], Iterable[int]], bounds: Bounds) -> Quota:
        """Put a worker's processes into groups of its own, as far as there are any.

        Args:
            tree: finds them, the worker first; asked more than once.
        """
        self.tidy()
        quota = Quota(
            _made(self._memory, worker_id, _MEMORY_MAX), _made(self._pids, worker_id, ("pids.max",))
        )
        quota.take_in(tree)
        quota.hold_to(bounds)
        return quota

    def leave(self, quota: Quota) -> None:
        """Take back the groups of a life that has ended."""
        self._left.append(quota)

    def tidy(self) -> None:
        """Remove what can be removed by now."""
        self._left = [quota for quota in self._left if not quota.close()]

    def close(self) -> None:
        """Leave nothing behind."""
        self.tidy()
        for groups in (self._memory, self._pids):
            if groups is not None:
                groups.close()


def _made(groups: Groups | None, worker_id: str, files: Iterable[str]) -> Group | None:
    """Make a worker's group; None where that cannot be done."""
    if groups is None:
        return None
    group = groups.of(worker_id)
    try:
        # an empty folder may have been taken for abandoned
        groups.top.make()
        group.make()
    except OSError as error:
        _log.debug("no control group for %s: %s", worker_id, error)
        return None
    if not any((group.path / name).exists() for name in files):
        # of the second generation, and nobody handed the controller down
        group.remove()
        return None
    return group


def _entered(group: Group | None, pid: int, *, is_first: bool) -> Group | None:
    """Move a process into a group; return the group, or None where not even the first one may enter it."""
    if group is None:
        return None
    try:
        group.add(pid)
    except ProcessLookupError:
        # it has ended meanwhile: a short-lived child is no reason to do without walls
        pass
    except OSError as error:
        _log.debug("process %d does not enter %s: %s", pid, group.path, error)
        if is_first:
            group.remove()
            return None
    return group


def _write(group: Group, name: str, value: str) -> None:
    try:
        group.write(name, value)
    except OSError as error:
        _log.debug("%s of %s: %s", name, group.path.name, error)


def _number(text: str, name: str) -> int:
    """Return the value of a line "name value"."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0
