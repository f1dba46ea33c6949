"""Throwaway uids: one for each confined worker's life, where the supervisor is root.

Two workers with one uid could read each other's environment and memory, and the kernel counts processes per uid. A lease
is held machine-wide, since several supervisors may run: as an abstract socket's name, which goes with its holder however
that ends. A uid that still has a process, as after a fork that nobody has swept yet, is not given out again.
"""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Final

from mcp_broker.errors import SupervisionError

_LOCK: Final = "\0mcp-broker-uid-{}"
#: files whose rows name uids that are somebody's: name, place of the first one, place of the count (None: it is one)
_TAKEN_IN: Final = (
    ("/etc/passwd", 2, None),
    ("/etc/group", 2, None),
    ("/etc/subuid", 1, 2),
    ("/etc/subgid", 1, 2),
)


class Lease:
    """A uid, and the gid of the same number, until it is released."""

    def __init__(self, uid: int, lock: socket.socket) -> None:
        self.uid = uid
        self._lock = lock

    def release(self) -> None:
        """Give it back; releasing twice is harmless."""
        self._lock.close()


class Uids:
    """Hands uids out, each as late as possible after its last use.

    Args:
        first: of the range.
        count: of uids in it.
    """

    def __init__(self, first: int, count: int) -> None:
        self._first = first
        self._count = count
        taken = [span for file, at, size in _TAKEN_IN for span in _spans(Path(file), at, size)]
        self._taken = [span for span in taken if span.start < first + count and span.stop > first]
        # supervisors that start at once should not try the same ones in the same order
        self._next = random.randrange(count)  # noqa: S311 (spreads, and hides nothing)

    def lease(self) -> Lease:
        """Return a uid that nobody has.

        Raises:
            SupervisionError: there is none left.
        """
        for _ in range(self._count):
            uid = self._first + self._next
            self._next = (self._next + 1) % self._count
            if any(uid in span for span in self._taken) or has_processes(uid):
                continue
            lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                lock.bind(_LOCK.format(uid))
            except OSError:
                lock.close()
                continue
            return Lease(uid, lock)
        last = self._first + self._count - 1
        raise SupervisionError(f"no uid from {self._first} to {last} is free for a worker")


def has_processes(uid: int) -> bool:
    """Tell whether any process runs as this uid: one system call, however many there are."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True


def _spans(file: Path, at: int, size: int | None) -> list[range]:
    """Return the uids that a file's rows give to somebody. Read as it is: a directory service could take its time."""
    try:
        rows = [row.split(":") for row in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return []
    spans = []
    for row in rows:
        try:
            first = int(row[at])
            spans.append(range(first, first + (1 if size is None else int(row[size]))))
        except (ValueError, IndexError):
            continue
    return spans
