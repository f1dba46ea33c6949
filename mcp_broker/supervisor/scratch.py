"""How much a worker's private folder holds, counted a little at a time: its owner may be hostile, and we never block."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mcp_broker import limits

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scratch:
    """Counts one folder, over and over.

    Links are not followed, other file systems not entered. A pass may take many looks; what it has counted so far is
    told as soon as it is more than the last pass found. Between two looks it holds the folder that it is in the middle
    of, and none of those above: those are opened again from the top.

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
        #: the folders that were opened last, from the top down, by name; for the time of a look
        self._opened: list[tuple[str, int]] = []

    def look(self) -> bool:
        """Count on, up to a bound of entries; return whether a pass has ended."""
        if self._pass is None:
            self._counted = 0.0
            self._pass = self._count()
        try:
            for _ in range(limits.SCRATCH_ENTRIES_A_LOOK):
                if next(self._pass, self) is self:
                    self._pass = None
                    self.kib = self._counted
                    return True
        finally:
            self._let_go(0)
        self.kib = max(self.kib, self._counted)
        return False

    def close(self) -> None:
        """Let go of the folder of a pass."""
        if self._pass is not None:
            self._pass.close()  # type: ignore[attr-defined]
            self._pass = None

    def _count(self) -> Iterator[None]:
        """Count folder by folder, the innermost first."""
        way: tuple[str, ...] = ()
        #: at each level of the way: folders that are to be counted yet
        left: list[list[str]] = []
        device: int | None = None
        while True:
            found: list[str] = []
            folder = self._reach(way)
            if folder is not None:
                try:
                    device = os.fstat(folder).st_dev if device is None else device
                    with os.scandir(folder) as entries:
                        for entry in entries:
                            is_folder = self._add(entry.name, folder, device)
                            # what hides deeper is not looked for
                            if is_folder and len(way) + 1 < limits.SCRATCH_DEPTH_MAX:
                                found.append(entry.name)
                            yield
                except OSError:
                    # what was found of it is counted
                    pass
                finally:
                    os.close(folder)
            left.append(found)
            while left and not left[-1]:
                left.pop()
            if not left:
                return
            way = (*way[: len(left) - 1], left[-1].pop())

    def _reach(self, way: tuple[str, ...]) -> int | None:
        """Open the folder at the end of a way; None where there is none any more."""
        names = (str(self._path), *way)
        shared = 0
        while shared < min(len(names), len(self._opened)) and self._opened[shared][0] == names[shared]:
            shared += 1
        self._let_go(shared)
        try:
            for name in names[shared:]:
                above = self._opened[-1][1] if self._opened else None
                self._opened.append((name, os.open(name, _FOLDER, dir_fd=above)))
            return os.dup(self._opened[-1][1])
        except OSError:
            return None

    def _let_go(self, kept: int) -> None:
        while len(self._opened) > kept:
            os.close(self._opened.pop()[1])

    def _add(self, name: str, folder: int, device: int) -> bool:
        """Count one entry; return whether it is a folder to look into."""
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        self._counted += max(info.st_blocks / 2, limits.SCRATCH_ENTRY_KIB)
        return stat.S_ISDIR(info.st_mode) and info.st_dev == device
