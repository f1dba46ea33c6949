"""What a worker and all below it hold and have used, read from /proc. Every process may be gone at any moment.

Cheap things are read each time: memory and CPU, three small files a process. Descriptors are looked at more rarely. What
only an exact look tells (memory that processes share counts once) is asked for when the cheap figure, which is never
too low, comes near the limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker import proctable
from mcp_broker.core.metering import Sample
from mcp_broker.supervisor.mappings import DELETED, SHARED, Mappings
from mcp_broker.supervisor.scratch import Scratch

if TYPE_CHECKING:
    from mcp_broker.supervisor.mappings import Key, Mapped
    from mcp_broker.supervisor.quota import Quota

_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
_PAGE_KIB: Final = os.sysconf("SC_PAGE_SIZE") / 1024
#: standard input, output and error: every process has them
_STANDARD: Final = 3


@dataclass(frozen=True, slots=True)
class Files:
    """What a tree's descriptors and mappings hold.

    Args:
        most: descriptors of the process with most of them, above those that every process has, or the worker had.
        sockets: inodes.
        shared_kib: memory files, whether they are mapped or not.
        deleted_kib: files in the scratch folder that have no name any more.
    """

    most: int
    sockets: int
    shared_kib: float
    deleted_kib: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What the tree costs, as its stat files tell.

    Args:
        rss_kib: memory that processes share counts once for each.
        size_kib: of their address spaces.
    """

    rss_kib: float
    cpu_s: float
    size_kib: float = 0.0


class Gauge:
    """Reads one worker.

    Args:
        pid: of the worker.
        scratch: its private folder.

    Attributes:
        pids: of the worker and all below it, as of the last look.
        quota: the groups that it is in, once it is; they tell exactly who belongs to it.
    """

    def __init__(self, pid: int, scratch: Path) -> None:
        self.quota: Quota | None = None
        self._pid = pid
        self._folder = str(scratch)
        self.scratch = Scratch(scratch)
        self._mappings = Mappings(self._folder)
        #: of the address spaces, since mappings were read
        self._least_kib = 0.0
        self._own_files = 0
        self.files = Files(0, 0, 0.0, 0.0)
        self.cost = Cost(0.0, 0.0)
        self.processes = 0
        self.pids = [pid]
        #: when it was ready: as the cheap figure and as the exact one tell it, and memory files of both
        self._ready_kib = 0.0
        self._ready_pss_kib: float | None = None
        self._ready_shared_kib = 0.0
        self._charged_kib = 0.0

    def ready(self) -> Sample:
        """Read what it holds before its first call; from then on its descriptors count above that."""
        self.look()
        self._own_files = self.look_at_files()
        self.files = replace(self.files, most=0)
        shares = self._shares(self.pids)
        self._ready_pss_kib = None if shares is None else shares[0]
        self._ready_shared_kib = self.files.shared_kib
        self._ready_kib = self.cost.rss_kib + self.files.shared_kib
        return self.sample()

    def look(self, adopted: Callable[[], Iterable[int]] = tuple) -> list[int]:
        """Read memory and CPU of the tree; return its processes.

        Args:
            adopted: finds processes that lost their parent and say that they are this worker's.
        """
        members = None if self.quota is None else self.quota.members()
        # whoever may write the groups may also leave them, and a child may have escaped when the worker entered
        pids = tree(self._pid, (*adopted(), *(members or ())))
        rss_kib = cpu_s = size_kib = 0.0
        for pid in pids:
            cost = read(pid)
            if cost is not None:
                rss_kib += cost.rss_kib
                cpu_s += cost.cpu_s
                size_kib += cost.size_kib
        # what a process used that has ended unreaped is not seen any more, but was used
        self.cost = Cost(rss_kib, max(self.cost.cpu_s, cpu_s), size_kib)
        self.processes = len(pids) - 1
        self.pids = pids
        return pids

    def look_at_shared(self) -> None:
        """Ask the groups for files in memory that were charged since it was ready, whether they are open or not."""
        if self.quota is not None:
            self._charged_kib = self.quota.shared_kib

    def look_at_files(self, *, rarely: bool = True) -> int:
        """Read the tree's descriptors; return how many the worker itself has.

        Args:
            rarely: read its mappings, too, which costs ten times as much. If not, that is done only when more is mapped.
        """
        own = most = 0
        sockets: set[str] = set()
        shared, deleted = Sizes(), Sizes()
        for pid in self.pids:
            links = descriptors(pid)
            if pid == self._pid:
                own = len(links)
                most = max(most, own - self._own_files)
            else:
                most = max(most, len(links) - _STANDARD)
            for path, link in links:
                if link.startswith("socket:"):
                    sockets.add(link)
                elif link.startswith(SHARED):
                    shared.add_open(path, link)
                elif link.endswith(DELETED) and link.startswith(self._folder):
                    deleted.add_open(path, link)
        if rarely or self.cost.size_kib > self._least_kib:
            self._mappings.look(self.pids)
            self._least_kib = self.cost.size_kib
        self._least_kib = min(self._least_kib, self.cost.size_kib)
        for key, one in self._mappings.files.items():
            (shared if one.path.startswith(SHARED) else deleted).add_mapped(key, one)
        shared_kib = max(shared.total, self._ready_shared_kib + self._charged_kib)
        self.files = Files(most, len(sockets), shared_kib, deleted.total)
        return own

    def close(self) -> None:
        """Let go of what is half read."""
        self.scratch.close()
        self._mappings.close()

    def sample(self, *, with_files: bool = True, exactly: bool = False) -> Sample:
        """Make a sample of what was looked at.

        Args:
            with_files: its descriptors were looked at, too.
            exactly: count what processes share once.
        """
        files = self.files
        return Sample(
            memory_mb=(self.exact_kib() if exactly else self.cost.rss_kib + files.shared_kib) / 1024,
            cpu_s=self.cost.cpu_s,
            processes=self.processes,
            open_files=files.most if with_files else None,
            connections=files.sockets if with_files else None,
            scratch_mb=(self.scratch.kib + files.deleted_kib) / 1024,
        )

    @property
    def is_exact(self) -> bool:
        """Nothing is shared that the cheap figure counts twice."""
        return self.processes == 0 and self.files.shared_kib <= self._ready_shared_kib

    def exact_kib(self) -> float:
        """Return the tree's memory with what is shared counted once, on the scale of the cheap figure.

        That scale has the whole of what the worker held when it was ready, also the part that it shares with others.
        """
        cheap = self.cost.rss_kib + self.files.shared_kib
        shares = self._shares(self.pids)
        if shares is None or self._ready_pss_kib is None:
            return cheap
        pss_kib, mapped_kib = shares
        unmapped_kib = max(0.0, self.files.shared_kib - self._ready_shared_kib - mapped_kib)
        return min(cheap, self._ready_kib + pss_kib - self._ready_pss_kib + unmapped_kib)

    @staticmethod
    def _shares(pids: Iterable[int]) -> tuple[float, float] | None:
        """Return the tree's proportional memory, and of it the memory files, KiB; None if it cannot be read."""
        total = mapped = 0.0
        for pid in pids:
            text = _text(f"/proc/{pid}/smaps_rollup")
            if not text:
                cost = read(pid)
                if cost is not None and cost.rss_kib:
                    return None
                # it has ended, whether its parent knows or not
                continue
            for line in text.splitlines():
                if line.startswith(b"Pss:"):
                    total += float(line.split()[1])
                elif line.startswith(b"Pss_Shmem:"):
                    mapped += float(line.split()[1])
        return total, mapped


class Sizes:
    """How large files are that may be open and mapped, several times: each counts once."""

    def __init__(self) -> None:
        self._kib: dict[Key, float] = {}
        #: what is open -> which files have this path
        self._open: dict[str, list[Key]] = {}

    @property
    def total(self) -> float:
        """KiB."""
        return sum(self._kib.values())

    def add_open(self, path: str, link: str) -> None:
        """Count what a descriptor leads to."""
        try:
            info = os.stat(path)  # noqa: PTH116 (a Path costs more than the call)
        except OSError:
            return
        key = (info.st_dev, info.st_ino)
        self._kib[key] = info.st_blocks / 2
        self._open.setdefault(link, []).append(key)

    def add_mapped(self, key: Key, one: Mapped) -> None:
        """Count what is mapped, unless it is open, too."""
        # file systems in layers give a file one device where it is mapped and another where it is looked at
        if key not in self._kib and all(device == key[0] for device, _ in self._open.get(one.path, ())):
            self._kib[key] = one.kib


def tree(pid: int, adopted: Iterable[int] = ()) -> list[int]:
    """Return a process, and all that descend from it or from those that are adopted, the process first."""
    found = list(dict.fromkeys((pid, *adopted)))
    seen = set(found)
    for parent in found:  # grows meanwhile
        for child in children(parent):
            if child not in seen:
                seen.add(child)
                found.append(child)
    return found


def children(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 (a Path each costs more than all)
    except OSError:
        return []
    found: list[int] = []
    for task in tasks:
        text = _text(f"/proc/{pid}/task/{task}/children")
        if text is None:
            # a thread that just ended, or a kernel without CONFIG_PROC_CHILDREN
            continue
        if text:
            found += map(int, text.split())
    return found


def descriptors(pid: int) -> list[tuple[str, str]]:
    """Return the open descriptors of a process: path in /proc and what it leads to."""
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)  # noqa: PTH208 (the same)
    except OSError:
        return []
    found = []
    for name in names:
        path = f"{folder}/{name}"
        try:
            found.append((path, os.readlink(path)))  # noqa: PTH115 (the same)
        except OSError:
            continue
    return found


def read(pid: int) -> Cost | None:
    """Return what one process costs, with the children that it has reaped; None when it is gone."""
    text = _text(f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    if fields[0] == b"Z":
        # it holds nothing any more, and its time is its parent's when it is reaped
        return Cost(0.0, 0.0)
    cpu_s = sum(map(int, fields[11:15])) / _TICKS_A_SECOND
    return Cost(int(fields[21]) * _PAGE_KIB, cpu_s, int(fields[20]) / 1024)


def of_worker(pid: int) -> str:
    """Return the worker that a process says it belongs to, "" if it does not say."""
    return proctable.environment(pid).get(proctable.WORKER_VARIABLE.encode(), b"").decode(errors="replace")


def _text(path: str) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, 65536)
    except OSError:
        return None
    finally:
        os.close(fd)
