"""How much a worker's private folder holds, counted a little at a time: its owner may be hostile, and we never block."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from mcp_broker import limits


class Scratch:
    """Counts one folder, over and over.

    Links are not followed, other file systems not entered. A pass may take many looks; what it has counted so far is
    told as soon as it is more than the last pass found.

    Args:
        path: the folder.

    Attributes:
        kib: as far as it is known.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.kib = 0.0
        self._counted = 0.0
        self._pass: Iterator[None] | None = None

    def look(self) -> bool:
        """Count on, up to a bound of entries; return whether a pass has ended."""
        if self._pass is None:
            self._counted = 0.0
            self._pass = self._count()
        for _ in range(limits.SCRATCH_ENTRIES_A_LOOK):
            if next(self._pass, self) is self:
                self._pass = None
                self.kib = self._counted
                return True
        self.kib = max(self.kib, self._counted)
        return False

    def close(self) -> None:
        """Let go of the folders of a pass."""
        if self._pass is not None:
            self._pass.close()  # type: ignore[attr-defined]
            self._pass = None

    def _count(self) -> Iterator[None]:
        try:
            top = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return
        yield from self._count_in(top, os.fstat(top).st_dev, 1)

    def _count_in(self, folder: int, device: int, depth: int) -> Iterator[None]:
        """Count one folder and what is below it; its descriptor is closed in the end."""
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = self._add(entry.name, folder, device)
                    yield
                    # what hides deeper is not looked for
                    if is_folder and depth < limits.SCRATCH_DEPTH_MAX:
                        below = _opened(entry.name, folder)
                        if below is not None:
                            yield from self._count_in(below, device, depth + 1)
        except OSError:
            return
        finally:
            os.close(folder)

    def _add(self, name: str, folder: int, device: int) -> bool:
        """Count one entry; return whether it is a folder to look into."""
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        self._counted += max(info.st_blocks / 2, limits.SCRATCH_ENTRY_KIB)
        return stat.S_ISDIR(info.st_mode) and info.st_dev == device


def _opened(name: str, folder: int) -> int | None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=folder)
    except OSError:
        return None
