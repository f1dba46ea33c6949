"""Reading /proc: who descends from whom, since when, and at what cost. Every process may be gone at any moment."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: in the environment of every child of a supervisor, and of what that starts: which worker it is
WORKER_VARIABLE: Final = "MCPB_WORKER"

_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
_PAGE_KIB: Final = os.sysconf("SC_PAGE_SIZE") // 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One process, as its stat file tells.

    Args:
        state: one letter; Z is a zombie.
        starttime: clock ticks since boot; with the pid it names one process of this boot.
        rss_kib: resident memory, KiB.
        cpu_s: user and system time, seconds.
    """

    pid: int
    ppid: int
    state: str
    starttime: int
    rss_kib: int
    cpu_s: float


def read(pid: int) -> Entry | None:
    """Return the entry of one process, None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # the name, in parentheses, may hold spaces and parentheses of its own
    fields = text[text.rindex(")") + 2 :].split()
    return Entry(
        pid=pid,
        state=fields[0],
        ppid=int(fields[1]),
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND,
        starttime=int(fields[19]),
        rss_kib=int(fields[21]) * _PAGE_KIB,
    )


def read_all() -> dict[int, Entry]:
    """Return every process, by pid; none when there is no descriptor left to look with."""
    try:
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    except OSError:
        return {}
    return {entry.pid: entry for pid in pids if (entry := read(pid)) is not None}


def children(pid: int) -> set[int]:
    """Return the pids of a process's children."""
    found: set[int] = set()
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found.update(map(int, (task / "children").read_text(encoding="ascii").split()))
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN, or a thread that just ended
        return {entry.pid for entry in read_all().values() if entry.ppid == pid}
    return found


def environment(pid: int) -> dict[bytes, bytes]:
    """Return the environment that a process was started with, empty when it is gone or not ours to see."""
    try:
        block = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in block.split(b"\0") if entry)
    return {name: value for name, _, value in pairs}


def signal_exactly(pid: int, starttime: int, number: int) -> None:
    """Signal the process that had this pid and start time, and no later one of the same pid."""
    # gone, not ours, or no descriptor left: whoever wants it gone looks again
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        try:
            # checked after the descriptor is ours: from here on it cannot become another process
            entry = read(pid)
            if entry is not None and entry.starttime == starttime:
                signal.pidfd_send_signal(pidfd, number)
        finally:
            os.close(pidfd)


def kill_exactly(pid: int, starttime: int) -> None:
    """SIGKILL the process that had this pid and start time, and no later one of the same pid."""
    signal_exactly(pid, starttime, signal.SIGKILL)


def ticks_at(monotonic_ns: int) -> int:
    """Return what an :class:`Entry` of a process started at this instant says as its ``starttime``."""
    since_boot_ns = monotonic_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
    return since_boot_ns * _TICKS_A_SECOND // 1_000_000_000


def boot_id() -> str:
    """Return what tells this boot of the machine from every other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
