"""The file that a worker shares with its supervisor: the page of its marks, and the stacks that it writes when asked."""

from __future__ import annotations

import fcntl
import mmap
import os

from mcp_broker import limits
from mcp_broker.wire.marks import FILE_BYTES, MARKS_BYTES, Marks


class Page:
    """The supervisor's end of it, for one life of a worker.

    The file can neither grow nor shrink: a worker that cut it off would kill whoever reads the page (SIGBUS), and one
    that wrote on and on would fill memory.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("mcpb-marks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, FILE_BYTES)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._page = mmap.mmap(self.fd, MARKS_BYTES)
        self._view = memoryview(self._page)
        self.marks = Marks(self._view)

    def clear(self) -> None:
        """Have the stacks that come next written over earlier ones; the worker's end has the same position."""
        os.lseek(self.fd, MARKS_BYTES, os.SEEK_SET)

    @property
    def written(self) -> int:
        """How much of stacks was written since; a line that is not at its end counts as nothing."""
        end = min(os.lseek(self.fd, 0, os.SEEK_CUR), FILE_BYTES)
        return end if end > MARKS_BYTES and os.pread(self.fd, 1, end - 1) == b"\n" else 0

    def stack(self) -> str:
        """Return the stacks that were written since, of a long text the end: the main thread is the last."""
        end = min(os.lseek(self.fd, 0, os.SEEK_CUR), FILE_BYTES)
        start = max(MARKS_BYTES, end - limits.STACK_BYTES_MAX)
        text = os.pread(self.fd, max(0, end - start), start).decode(errors="replace")
        return text.replace("\0", "").strip()

    def close(self) -> None:
        """Let go of it."""
        self.marks.release()
        self._view.release()
        self._page.close()
        os.close(self.fd)
