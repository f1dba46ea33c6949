"""What is taken back after every worker's end: a list. Who adds something that a worker can leave adds a step.

Each step is a generator that does a little and yields how many seconds it would wait before it goes on (0: none), so
that no step holds up the supervisor. What it cannot do it writes down; it never raises for what a dead worker did.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from mcp_broker import limits, proctable
from mcp_broker.supervisor.reclaim import leftovers, memory, sysv
from mcp_broker.supervisor.reclaim.folders import Removal, printable
from mcp_broker.supervisor.reclaim.strays import Swept, of_uid, sweep

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mcp_broker.supervisor.cgroups import Groups

#: between two looks for processes that were killed but are not gone
_GONE_S: Final = 0.002

#: between two tries of a supervisor that has no descriptor or memory left
_LACKS_S: Final = 0.2

PROCESS: Final = "process"
RESTRICTED: Final = "restricted"
SANDBOXED: Final = "sandboxed"
ALL: Final = frozenset({PROCESS, RESTRICTED, SANDBOXED})
#: levels whose workers may share the IPC of the machine; a sandbox has its own, which ends with it
OF_THE_HOST: Final = frozenset({PROCESS, RESTRICTED})


@dataclass(frozen=True, slots=True)
class Remains:
    """What is known of a dead worker when reclaim begins.

    Args:
        pid: 0: it never lived.
        level: its isolation level.
        prefix: of the names of shared memory and semaphores that are its.
        scratch: its private folder.
        started_wall: when its process was started, seconds since 1970.
        lease: of its own uid, if no other process has it; released in the end.
    """

    worker_id: str
    pool: str
    pid: int
    level: str
    prefix: str
    scratch: Path
    started_wall: float = 0.0
    lease: Lease | None = None

    @property
    def uid(self) -> int | None:
        """Its own uid, None where others have it too."""
        return None if self.lease is None else self.lease.uid


class Lease(Protocol):
    """A uid that was lent to one worker."""

    uid: int

    def release(self) -> None:
        """Let others have it."""


class Site(Protocol):
    """Where reclaim works: the supervisor, as far as a step sees it."""

    run_dir: Path
    #: children that it had before it was a supervisor
    bystanders: set[int]
    #: control groups that can kill, where this machine lets us have them
    groups: Groups | None

    def alive(self) -> Mapping[int, str]:
        """Return our own live children: pid -> name."""

    def release_ports(self, worker_id: str) -> list[int]:
        """Take back the ports that a worker had leased; return their numbers."""


@dataclass(slots=True)
class Tally:
    """What a step did, while it does it."""

    count: int = 0
    bytes: int = 0
    left: list[str] = field(default_factory=list)

    def missed(self, what: str) -> None:
        """Write down what could not be taken back, in text that any message can hold."""
        if len(self.left) < limits.RECLAIM_LEFT_MAX:
            self.left.append(printable(what))


Work = Callable[[Remains, Site, Tally], Iterator[float]]


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of thing that a worker can leave.

    Args:
        name: in records.
        takes_back: for people.
        within_s: afterwards it is given up, and said so.
        levels: where a worker can leave it at all.
    """

    name: str
    takes_back: str
    within_s: float
    levels: frozenset[str]
    work: Work


# -- the work ---------------------------------------------------------------------------------------


def _processes(remains: Remains, site: Site, tally: Tally) -> Iterator[float]:
    if not remains.pid:
        return
    killed: set[tuple[int, int]] = set()
    group = None if site.groups is None else site.groups.of(remains.worker_id)
    if group is not None and group.exists:
        # at once and whole, whatever they fork meanwhile; the sweep below then only buries them
        tally.count = len(group.pids())
        group.kill()
    buried = 0
    swept = Swept(left={(0, 0)})
    try:
        while swept or swept.reaped or (group is not None and group.pids()):
            swept = sweep(
                site.alive(), site.bystanders, None if site.groups is None else site.groups.top.path
            )
            killed |= swept.left
            buried += len(swept.reaped - killed)
            if swept:
                yield _GONE_S
            else:
                yield 0.0
                break
        while remains.uid is not None and (owned := of_uid(remains.uid)):
            for pid, starttime in owned:
                proctable.kill_exactly(pid, starttime)
            killed |= owned
            sweep(site.alive(), site.bystanders, None if site.groups is None else site.groups.top.path)
            yield _GONE_S
        while group is not None and group.exists and not group.remove():
            sweep(site.alive(), site.bystanders, None if site.groups is None else site.groups.top.path)
            yield _GONE_S
    finally:
        tally.count = max(tally.count, len(killed) + buried)
        for pid, _ in swept.left - {(0, 0)}:
            tally.missed(f"process {pid}: still there after SIGKILL")


def _shared_memory(remains: Remains, site: Site, tally: Tally) -> Iterator[float]:
    del site
    for name in memory.names(remains.prefix, remains.uid):
        try:
            for freed in memory.freeing(name):
                tally.bytes += freed
                yield 0.0
            tally.count += 1
        except FileNotFoundError:
            continue
        except OSError as error:
            tally.missed(f"{memory.FOLDER / name}: {error.strerror}")


def _sysv(remains: Remains, site: Site, tally: Tally) -> Iterator[float]:
    del site
    for item in sysv.made_by(remains.pid, remains.started_wall, remains.uid):
        if sysv.remove(item):
            tally.count += 1
            tally.bytes += item.size
        else:
            tally.missed(f"{item.kind} {item.id}")
        yield 0.0


def _ports(remains: Remains, site: Site, tally: Tally) -> Iterator[float]:
    tally.count = len(site.release_ports(remains.worker_id))
    yield 0.0


def _scratch(remains: Remains, site: Site, tally: Tally) -> Iterator[float]:
    del site
    yield from _removed(remains.scratch, tally)


def _removed(path: Path, tally: Tally) -> Iterator[float]:
    removal = Removal(path)
    files, held = tally.count, tally.bytes
    try:
        for _ in removal.steps():
            yield 0.0
        while removal.lacks:
            # of a machine that has nothing left for now: what we lack comes back
            yield _LACKS_S
            files, held = files + removal.files, held + removal.bytes
            removal = Removal(path)
            for _ in removal.steps():
                yield 0.0
    finally:
        removal.close()
        tally.count, tally.bytes = files + removal.files, held + removal.bytes
        for what in removal.left:
            tally.missed(what)


def _uid(remains: Remains, site: Site, tally: Tally) -> Iterator[float]:
    del site
    if remains.lease is not None:
        remains.lease.release()
        tally.count = 1
    yield 0.0


def _record(remains: Remains, site: Site, tally: Tally) -> Iterator[float]:
    path = site.run_dir / f"{remains.worker_id}.json"
    tally.count = int(os.path.lexists(path))
    with contextlib.suppress(OSError):
        leftovers.forget(site.run_dir, remains.worker_id)
    yield 0.0


#: In order: nobody may be left to make new things when those are taken back. Calls in flight are no step: the broker
#: ends them at the news of the death, before any of this begins.
STEPS: Final = (
    Step("processes", "whatever the worker started, and what that started", 2.0, ALL, _processes),
    Step("ports", "leased ports", 1.0, ALL, _ports),
    Step("shared memory", "POSIX shared memory and named semaphores", 10.0, OF_THE_HOST, _shared_memory),
    Step("system v", "System V shared memory, semaphores, queues", 1.0, OF_THE_HOST, _sysv),
    Step("scratch", "the private folder, which is HOME and TMPDIR", 600.0, ALL, _scratch),
    Step("uid", "the uid that was lent to it", 1.0, ALL, _uid),
    Step("record", "the note for a next start", 1.0, ALL, _record),
)
