"""What a child writes: a full pipe would block it, so both of its pipes are read as they fill, and kept only in part."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from mcp_broker import limits, logs

if TYPE_CHECKING:
    from mcp_broker.supervisor.poller import Poller

_log = logging.getLogger("mcp_broker.supervisor.output")

_READ_BYTES: Final = 64 * 1024
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
        *lines, self._line = (self._line + chunk).split(b"\n")
        self._keep(b"".join(self._emit(line) + b"\n" for line in lines))
        if len(self._line) > limits.LOG_LINE_BYTES_MAX:
            self._keep(self._emit(self._line))
            self._line = b""
        return True

    def _keep(self, said: bytes) -> None:
        self._tail = (self._tail + said)[-limits.STDERR_TAIL_BYTES :]

    @property
    def tail(self) -> bytes:
        """The last that it wrote; of its records the text."""
        return (self._tail + self._line)[-limits.STDERR_TAIL_BYTES :]

    def _emit(self, line: bytes) -> bytes:
        """Log a line; return what the tail keeps of it."""
        record = logs.parse(line) if self._holds_records else None
        if record is not None:
            # in this order: who wrote is ours to say
            fields = {**record.fields, "source": self._name}
            _log.log(record.level, "%s", record.event, extra={logs.FIELDS: fields})
            return f"{record.event}\n{record.fields.get('traceback', '')}".rstrip().encode(errors="replace")
        if _log.isEnabledFor(self._level):
            text = line[: limits.LOG_LINE_BYTES_MAX].decode(errors="replace").rstrip()
            if text:
                _log.log(self._level, "%s", text, extra={logs.FIELDS: {"source": self._name}})
        return line

    def _end(self) -> None:
        if self._fd is not None:
            self._poller.remove(self._fd)
            os.close(self._fd)
            self._fd = None
            self._keep(self._emit(self._line))
            self._line = b""

    def close(self) -> None:
        """Take what the dead process left in the pipe, then let go of it."""
        for _ in range(_LAST_READS_MAX):
            if not self._read():
                break
        self._end()
