"""Death certificates: the truth about why a worker ended, and "unknown" rather than a guess."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_broker.wire.node import Certificate

if TYPE_CHECKING:
    from mcp_broker.supervisor.process import Exit, Process
    from mcp_broker.wire.node import DeathKind, Stage, Why

#: a worker's exit code for "the module of the tools cannot be imported": another start would end the same way
IMPORT_FAILED: Final = 3

_MISSING_MODULE: Final = re.compile(r"No module named '([\w.]+)'")
#: how a worker begins its last words; the pool is named by whoever quotes them
_WORKER_SAYS: Final = "mcp-broker worker: "
_POOL_SAYS: Final = re.compile(r"^pool \S+: ")
_SHIPPED: Final = "mcp_broker_workers."
#: limit -> what was measured of it, and its unit, for people
_USED: Final = {
    "memory_mb": ("MB of memory above what it held when it was ready", 0),
    "cpu_s": ("s of CPU in one call", 1),
    "open_files": ("open files", 0),
    "connections": ("connections", 0),
    "processes": ("processes", 0),
    "scratch_mb": ("MB in its scratch folder", 0),
}
_WHY: Final[dict[Why, str]] = {
    "deadline": "its call was past its deadline",
    "cancel": "its call was cancelled",
    "silence": "it had not spoken to the broker that replaced another, and nobody waited for its call",
    "hook": "a hook that it was to run did not end",
}


#: kinds of certificates whose worker was asked for its stacks
_STUCK: Final = frozenset({*_WHY, "limit"})


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The broker's last word about a call of this worker."""

    seq: int
    stage: Stage
    why: Why


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A limit that was found exceeded, how much it is, and how much was used, in the unit of its name."""

    limit: str
    value: float
    used: float

    @property
    def sentence(self) -> str:
        """Say it for people."""
        what, digits = _USED.get(self.limit, (self.limit, 1))
        return f"it used {self.used:.{digits}f} {what}, and its limit {self.limit} is {self.value:g}"


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the supervisor knew when a worker died.

    Args:
        started_seq: the last call that it had started; 0: none.
        was_ready: it had registered.
        is_operators: it was told to stop.
        fault: why we stopped it although it was wanted, or "".
        violation: what it did that no worker of ours does, for which it was killed, or "".
        exceeded: the limit that it was killed for.
        is_oom: the kernel killed it, or what it had started, since its memory was all used.
        stack: what its threads were doing before it was killed.
        retired: why it was told to finish and go, or "".
    """

    started_seq: int
    was_ready: bool
    is_operators: bool
    fault: str
    interrupted: Interrupted | None
    violation: str = ""
    exceeded: Exceeded | None = None
    is_oom: bool = False
    stack: str = ""
    retired: str = ""


def certify(process: Process, pool: str, module: str, end: Exit, known: Circumstances) -> Certificate:
    """Write the certificate of a worker that was just reaped."""
    stderr = process.stderr_tail
    kind, cause = _cause(end, known, stderr, module)
    exceeded = known.exceeded if kind == "limit" else None
    return Certificate(
        worker_id=process.name,
        pool=pool,
        pid=process.main_pid,
        cause=cause,
        kind=kind,
        exit_code=end.code,
        signal=end.signal_name if end.signal is not None else None,
        started_seq=known.started_seq,
        uptime_s=round(time.monotonic() - process.started_at, 3),
        cpu_s=round(end.cpu_s, 3),
        max_rss_kib=end.max_rss_kib,
        calls_started=known.started_seq,
        stderr=stderr,
        wall_at=time.time(),
        limit="" if exceeded is None else exceeded.limit,
        limit_value=0.0 if exceeded is None else exceeded.value,
        used=0.0 if exceeded is None else round(exceeded.used, 3),
        is_oom=known.is_oom,
        # asked for and not needed after all: the call ended, and the worker died of something else
        stack=known.stack if kind in _STUCK else "",
    )


def _cause(end: Exit, known: Circumstances, stderr: str, module: str) -> tuple[DeathKind, str]:
    how = _how(end)
    ours = _our_doing(end, known, how)
    if ours is not None:
        return ours
    if not known.was_ready:
        return "boot_failure", f"could not start: {boot_reason(stderr, module) or how}"
    if end.signal == signal.SIGKILL:
        return "signal", f"{how}, which mcp-broker did not send: an operator, or the kernel out of memory"
    return ("exit" if end.signal is None else "signal"), how


def _our_doing(end: Exit, known: Circumstances, how: str) -> tuple[DeathKind, str] | None:
    """Return kind and cause of a death that we wanted, the strongest reason first."""
    if known.violation:
        return "violation", f"stopped because {known.violation} ({how})"
    if known.is_operators and known.retired:
        return "operator", f"retired: {known.retired} ({how})"
    if known.is_operators:
        return "operator", f"stopped by the operator ({how})"
    if known.fault:
        return "boot_failure", f"{known.fault} ({how})"
    if known.exceeded is not None:
        by = "the kernel, out of memory" if known.is_oom else how
        return "limit", f"{known.exceeded.sentence} ({by})"
    stopped = known.interrupted
    if stopped is not None and (stopped.stage != "raise" or end.signal == signal.SIGUSR1):
        return stopped.why, f"stopped because {_WHY[stopped.why]} ({how})"
    return None


def _how(end: Exit) -> str:
    if end.signal is not None:
        return f"killed by {end.signal_name}"
    return f"exited with code {end.code}"


def boot_reason(stderr: str, module: str) -> str:
    """Return the sentence that says why a process could not start: its last line, or what to install."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if not lines:
        return ""
    last = lines[-1].removeprefix(_WORKER_SAYS)
    last = _POOL_SAYS.sub("", last)[:500]
    missing = _MISSING_MODULE.search(last)
    if missing is not None and module.startswith(_SHIPPED) and not missing[1].startswith("mcp_broker"):
        return f"needs the package {missing[1]!r}: pip install 'mcp-broker[tools]'"
    return last
