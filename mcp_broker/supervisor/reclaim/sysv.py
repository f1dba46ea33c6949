"""System V shared memory, semaphores and message queues, which outlive whoever made them: ids in a table of the kernel.

Whose they are is told by their owner where a worker has a uid of its own. Without one only shared memory names the
process that made it; a semaphore set or a queue that was made at level ``process`` is left alone, since it may be
anybody's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_IPC_RMID: Final = 0
_TABLES: Final = Path("/proc/sysvipc")


@dataclass(frozen=True, slots=True)
class Item:
    """One of them.

    Args:
        kind: "shm", "sem" or "msg".
        size: bytes that it holds; 0 where the table does not tell.
    """

    kind: str
    id: int
    size: int = 0


def made_by(pid: int, since_wall: float, uid: int | None) -> list[Item]:
    """Return what a dead process made.

    Args:
        pid: its pid; 0: none.
        since_wall: when it was started, seconds since 1970: what an earlier process of this pid made is not its.
        uid: its own uid, if it had one that nobody else has: then all that is this uid's.
    """
    found = []
    for kind, id_column in (("shm", "shmid"), ("sem", "semid"), ("msg", "msqid")):
        for row in _rows(kind):
            size = row.get("size", row.get("cbytes", 0))
            if (uid is not None and row["cuid"] == uid) or (
                kind == "shm"
                and pid
                and row["cpid"] == pid
                # whole seconds, rounded down
                and row["ctime"] >= int(since_wall)
                and not row["nattch"]
            ):
                found.append(Item(kind, row[id_column], size))
    return found


def _rows(kind: str) -> list[dict[str, int]]:
    try:
        head, *lines = (_TABLES / kind).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # a kernel without them
        return []
    columns = head.split()
    # the permissions are octal, and nobody needs them
    return [
        {name: int(cell) for name, cell in zip(columns, line.split(), strict=False) if name != "perms"}
        for line in lines
    ]


def remove(item: Item) -> bool:
    """Remove one; False when it is not ours to remove."""
    libc = ctypes.CDLL(None, use_errno=True)
    if item.kind == "shm":
        return bool(libc.shmctl(item.id, _IPC_RMID, None) == 0)
    if item.kind == "sem":
        return bool(libc.semctl(item.id, 0, _IPC_RMID) == 0)
    return bool(libc.msgctl(item.id, _IPC_RMID, None) == 0)
