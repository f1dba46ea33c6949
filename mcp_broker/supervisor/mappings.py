"""Files that processes hold by a mapping, which nothing else in /proc tells of once their descriptors are closed.

Their size is that of the whole file where the kernel tells it (``map_files``, for root); to others it tells no more than
how much is mapped. A process may have tens of thousands of mappings, and each takes the kernel a microsecond: they are
read a bounded part at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from mcp_broker import limits

#: memory that resident sets do not show while nobody maps it, or nobody touches what is mapped
SHARED: Final = ("/memfd:", "/dev/shm/", "/SYSV", "/dev/zero")  # noqa: S108 (looked for, not made)
DELETED: Final = " (deleted)"
#: of these alone nobody makes pages without a look at them, so what is merely mapped is not taken for used
_UNTOLD: Final = "/dev/zero"
#: in a line of any of them
_MARKS: Final = (b" (deleted)", b"/dev/shm/")
_CHUNK_BYTES: Final = 65_536
#: to look at a file costs as much as to read so much
_LOOK_BYTES: Final = 1024

#: device and inode
Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Mapped:
    """One file that is mapped.

    Args:
        path: as the kernel tells it.
        kib: blocks of the file, or of it the largest part that is mapped at a stretch.
    """

    path: str
    kib: float


class Mappings:
    """Reads what a tree of processes maps of memory files, and of files in one folder that have no name any more.

    Args:
        folder: the folder.

    Attributes:
        files: as of the last pass, and what this one has found already.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.files: dict[Key, Mapped] = {}
        self._found: dict[Key, Mapped] = {}
        self._pass: Iterator[int] | None = None

    def look(self, pids: Iterable[int]) -> bool:
        """Read on, up to a bound of bytes; return whether a pass has ended.

        Args:
            pids: whom the next pass reads.
        """
        if self._pass is None:
            self._found = {}
            self._pass = self._read(tuple(pids))
        left = limits.MAPPINGS_BYTES_A_LOOK
        for size in self._pass:
            left -= size
            if left <= 0:
                for key, one in self._found.items():
                    _keep(self.files, key, one)
                return False
        self._pass = None
        self.files = self._found
        return True

    def close(self) -> None:
        """Let go of the file of a pass."""
        if self._pass is not None:
            self._pass.close()  # type: ignore[attr-defined]
            self._pass = None

    def _read(self, pids: Iterable[int]) -> Iterator[int]:
        for pid in pids:
            try:
                fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                rest = b""
                while chunk := os.read(fd, _CHUNK_BYTES):
                    whole, _, rest = (rest + chunk).rpartition(b"\n")
                    taken = self._take(pid, whole) if any(mark in whole for mark in _MARKS) else 0
                    yield len(chunk) + taken * _LOOK_BYTES
            except OSError:
                continue
            finally:
                os.close(fd)

    def _take(self, pid: int, text: bytes) -> int:
        """Take what lines tell; return how many files were looked at."""
        taken = 0
        for line in text.splitlines():
            if not any(mark in line for mark in _MARKS):
                continue
            fields = line.split(None, 5)
            path = os.fsdecode(fields[-1])
            is_deleted = path.endswith(DELETED) and path.startswith(self._folder)
            if len(fields) == 6 and (is_deleted or path.startswith(SHARED)):  # noqa: PLR2004 (the path is the last)
                self._add(pid, fields, path)
                taken += 1
        return taken

    def _add(self, pid: int, fields: list[bytes], path: str) -> None:
        first, last = (int(part, 16) for part in fields[0].split(b"-"))
        # where it has a name, its blocks may be asked for by it, as it is seen there
        named = () if path.endswith(DELETED) else (f"/proc/{pid}/root{path}",)
        for place in (f"/proc/{pid}/map_files/{first:x}-{last:x}", *named):
            try:
                info = _look_at(place)
            except OSError:
                continue
            _keep(self._found, (info.st_dev, info.st_ino), Mapped(path, info.st_blocks / 2))
            return
        if not path.startswith(_UNTOLD):
            major, minor = (int(part, 16) for part in fields[3].split(b":"))
            _keep(
                self._found, (os.makedev(major, minor), int(fields[4])), Mapped(path, (last - first) / 1024)
            )


def _look_at(place: str) -> os.stat_result:
    return os.stat(place)  # noqa: PTH116 (a Path costs more than the call)


def _keep(files: dict[Key, Mapped], key: Key, one: Mapped) -> None:
    known = files.get(key)
    if known is None or known.kib < one.kib:
        files[key] = one
