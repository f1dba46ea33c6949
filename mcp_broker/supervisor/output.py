"""What a child writes: a full pipe would block it, so both of its pipes are read as they fill, and kept only in part."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Final

from mcp_broker import limits

if TYPE_CHECKING:
    from mcp_broker.supervisor.poller import Poller

_log = logging.getLogger("mcp_broker.supervisor.output")

_READ_BYTES: Final = 64 * 1024
#: What is read of a dead process's pipes: a grandchild may hold them open and write for ever.
_LAST_READS_MAX: Final = 16
_LINE_BYTES_MAX: Final = 4096


class Output:
    """One output pipe of a child: its lines are logged, its end is kept.

    Args:
        name: who writes, for the log.
        fd: our end of the pipe; it becomes non-blocking and belongs to this object.
        level: of the log records.
    """

    def __init__(self, name: str, fd: int, poller: Poller, level: int) -> None:
        os.set_blocking(fd, False)
        self._name = name
        self._fd: int | None = fd
        self._poller = poller
        self._level = level
        self._line = b""
        self.tail = b""
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
        self.tail = (self.tail + chunk)[-limits.STDERR_TAIL_BYTES :]
        if _log.isEnabledFor(self._level):
            *lines, self._line = (self._line + chunk).split(b"\n")
            for line in lines:
                self._emit(line)
            if len(self._line) > _LINE_BYTES_MAX:
                self._emit(self._line)
                self._line = b""
        return True

    def _emit(self, line: bytes) -> None:
        text = line[:_LINE_BYTES_MAX].decode(errors="replace").rstrip()
        if text:
            _log.log(self._level, "%s: %s", self._name, text)

    def _end(self) -> None:
        if self._fd is not None:
            self._poller.remove(self._fd)
            os.close(self._fd)
            self._fd = None
            self._emit(self._line)

    def close(self) -> None:
        """Take what the dead process left in the pipe, then let go of it."""
        for _ in range(_LAST_READS_MAX):
            if not self._read():
                break
        self._end()
