"""What a child writes: a full pipe would block it, so both of its pipes are read as they fill, and kept only in part.

A child may be hostile, or print in a loop: of each stream so many lines a second are logged, the others only counted.
"""

from __future__ import annotations

import logging
import math
import os
import time
from typing import TYPE_CHECKING, Final

from mcp_broker import limits, logs
from mcp_broker.core.bucket import Bucket, Rate

if TYPE_CHECKING:
    from mcp_broker.supervisor.poller import Poller

_log = logging.getLogger("mcp_broker.supervisor.output")

_READ_BYTES: Final = 64 * 1024
_RATE: Final = Rate(limits.OUTPUT_LINES_PER_S, limits.OUTPUT_LINES_BURST)
#: how often it is told how many lines were dropped
_TOLD_S: Final = 1.0
#: holds as much of a dropped text as the tail may need, and the whole of its first record
_DROPPED_BYTES: Final = limits.STDERR_TAIL_BYTES + limits.LOG_LINE_BYTES_MAX
#: What is read of a dead process's pipes: a grandchild may hold them open and write for ever.
_LAST_READS_MAX: Final = 16


class Output:
    """One output pipe of a child: its lines are logged, its end is kept.

    Args:
        name: who writes, for the log.
        fd: our end of the pipe; it becomes non-blocking and belongs to this object.
        level: of the log records.
        holds_records: some of the lines are records of the child's own log, with levels of their own.
    """

    def __init__(
        self, name: str, fd: int, poller: Poller, level: int, *, holds_records: bool = False
    ) -> None:
        os.set_blocking(fd, False)
        self._name = name
        self._fd: int | None = fd
        self._poller = poller
        self._level = level
        self._holds_records = holds_records
        self._line = b""
        self._tail = b""
        self._bucket = Bucket(_RATE)
        self._dropped = 0
        self._told_at = -math.inf
        poller.add(fd, self._ready)

    def _ready(self, _events: int) -> None:
        self._read()

    def _read(self) -> bool:
        """Take what is there, one chunk at most; False at its end."""
        if self._fd is None:
            return False
        try:
            chunk = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._end()
            return False
        self._take(self._line + chunk)
        return True

    def _take(self, data: bytes) -> None:
        """Log the lines that come slowly enough; none of the others costs more than its bytes."""
        now = time.monotonic()
        pieces = data.split(b"\n", _RATE.burst)
        logged = 0
        while logged < len(pieces) - 1 and self._may_log(now):
            self._keep(self._emit(pieces[logged]) + b"\n")
            logged += 1
        ended, newline, self._line = b"\n".join(pieces[logged:]).rpartition(b"\n")
        if newline:
            self._drop(ended, ended.count(b"\n") + 1)
        if len(self._line) > limits.LOG_LINE_BYTES_MAX:
            line, self._line = self._line, b""
            if self._may_log(now):
                self._keep(self._emit(line))
            else:
                self._drop(line, 1)
        if now >= self._told_at + _TOLD_S:
            self._tell_dropped(now)

    def _may_log(self, now: float) -> bool:
        if self._bucket.wait_s(now):
            return False
        self._bucket.take(now)
        return True

    def _drop(self, text: bytes, lines: int) -> None:
        """Keep what the tail needs of lines that are not logged."""
        end = text[-_DROPPED_BYTES:]
        # line by line only where there may be a record
        parts = end.split(b"\n") if self._holds_records and b"{" in end else [end]
        self._keep(b"".join(self._said(part)[0] + b"\n" for part in parts))
        if self._holds_records or _log.isEnabledFor(self._level):
            self._dropped += lines

    def _tell_dropped(self, now: float) -> None:
        if self._dropped:
            said = "%d lines are not in this log: it writes more than %g a second"
            extra = {logs.FIELDS: {"source": self._name}}
            _log.warning(said, self._dropped, limits.OUTPUT_LINES_PER_S, extra=extra)
            self._dropped, self._told_at = 0, now

    def _keep(self, said: bytes) -> None:
        self._tail = (self._tail + said)[-limits.STDERR_TAIL_BYTES :]

    @property
    def tail(self) -> bytes:
        """The last that it wrote; of its records the text."""
        return (self._tail + self._line)[-limits.STDERR_TAIL_BYTES :]

    def _emit(self, line: bytes) -> bytes:
        """Log a line; return what the tail keeps of it."""
        said, record = self._said(line)
        if record is not None:
            # in this order: who wrote is ours to say
            fields = {**record.fields, "source": self._name}
            _log.log(record.level, "%s", record.event, extra={logs.FIELDS: fields})
        elif _log.isEnabledFor(self._level):
            text = line[: limits.LOG_LINE_BYTES_MAX].decode(errors="replace").rstrip()
            if text:
                _log.log(self._level, "%s", text, extra={logs.FIELDS: {"source": self._name}})
        return said

    def _said(self, line: bytes) -> tuple[bytes, logs.Line | None]:
        """Return what the tail keeps of a line, and the record that it is, if it is one."""
        record = logs.parse(line) if self._holds_records else None
        if record is None:
            return line, None
        text = f"{record.event}\n{record.fields.get('traceback', '')}"
        return text.rstrip().encode(errors="replace"), record

    def _end(self) -> None:
        if self._fd is not None:
            self._poller.remove(self._fd)
            os.close(self._fd)
            self._fd = None
            self._keep(self._emit(self._line))
            self._line = b""
            self._tell_dropped(time.monotonic())

    def close(self) -> None:
        """Take what the dead process left in the pipe, then let go of it."""
        for _ in range(_LAST_READS_MAX):
            if not self._read():
                break
        self._end()
