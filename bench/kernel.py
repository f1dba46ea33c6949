"""What the kernel says about a process and about the machine, from /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
#: fields of /proc/PID/stat after the name's closing bracket: utime and stime (proc(5), 14 and 15), rss (24)
_UTIME: Final = 11
_RSS: Final = 21
#: columns of the first line of /proc/stat: user nice system idle iowait irq softirq steal
_STEAL: Final = 7
_COLUMNS: Final = 8


class Sample(NamedTuple):
    """A process at an instant: CPU seconds since its start, and resident bytes now."""

    cpu_s: float
    rss_bytes: int


def sample(pid: int) -> Sample:
    """Read a process; its CPU time counts in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[_UTIME]) + int(fields[_UTIME + 1])
    return Sample(ticks / _TICKS_PER_S, int(fields[_RSS]) * _PAGE_BYTES)


class Machine(NamedTuple):
    """CPU ticks of the whole machine so far: all of them, and those that a hypervisor gave to others."""

    total: int
    stolen: int

    def stolen_since(self, before: Machine) -> float:
        """Return the stolen share since an earlier reading, 0 to 1."""
        total = self.total - before.total
        return (self.stolen - before.stolen) / total if total else 0.0


def machine() -> Machine:
    """Read the machine's CPU ticks."""
    columns = [int(column) for column in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return Machine(sum(columns[:_COLUMNS]), columns[_STEAL])


def cpu_model() -> str:
    """Return the processor's name, for the report."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"
