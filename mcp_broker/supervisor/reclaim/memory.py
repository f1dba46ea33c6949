"""POSIX shared memory and named semaphores, which outlive whoever made them: files of one folder.

Whose they are is told by their owner where a worker has a uid of its own, else by their name: Python's
``multiprocessing`` gives what it makes in a worker a prefix of that worker (:mod:`mcp_broker.worker.sharing`). What
bears neither is left alone, since it may be anybody's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker import limits

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER: Final = Path("/dev/shm")  # noqa: S108 (where glibc keeps them)
#: glibc's own, before the name of a semaphore
_SEMAPHORE: Final = "sem."


def prefix(instance: str, worker_id: str | None = None) -> str:
    """Return how the names of what a worker makes begin, or of what any worker of a state directory makes."""
    return f"mcpb-{instance}-" if worker_id is None else f"mcpb-{instance}-{worker_id}-"


def names(prefix: str, uid: int | None = None) -> list[str]:
    """Return the names of files that begin so (a semaphore's after ``sem.``), or that a uid owns."""
    try:
        with os.scandir(FOLDER) as entries:
            return [entry.name for entry in entries if _is_named(entry.name, prefix) or _owner(entry) == uid]
    except OSError:  # a machine without it
        return []


def _is_named(name: str, prefix: str) -> bool:
    return name.removeprefix(_SEMAPHORE).startswith(prefix)


def _owner(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_uid
    except OSError:  # gone meanwhile
        return -1


def freeing(name: str) -> Iterator[int]:
    """Remove a file in steps that free so much at most; yields the bytes that each gave back.

    Raises:
        OSError: it cannot be removed.
    """
    path = FOLDER / name
    info = path.lstat()
    held = info.st_blocks * 512
    if held > limits.FREE_BYTES_MAX:
        size = info.st_size
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while size > limits.FREE_BYTES_MAX:
                size -= limits.FREE_BYTES_MAX
                os.ftruncate(fd, size)
                yield limits.FREE_BYTES_MAX
                held = max(0, held - limits.FREE_BYTES_MAX)
        finally:
            os.close(fd)
    path.unlink()
    yield held


def remove(name: str) -> bool:
    """Remove a file at once; False when it cannot be."""
    try:
        for _ in freeing(name):
            pass
    except OSError:
        return False
    return True
