"""Removing a folder that a hostile process may have filled, in slices: a million files must not hold up its supervisor.

Never follows a link, never leaves the mount, and needs neither recursion nor many descriptors however deep the tree:
sub-folders are moved up to the top one before they are emptied. A file of many gigabytes is cut down in parts before
it goes, since the kernel frees what a file held while its caller waits.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.supervisor.process import SHORTAGES

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

_PATH_ONLY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LISTED: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Removal:
    """The removal of one folder, on its way.

    Args:
        path: the folder; its parent is ours, so that it cannot be exchanged for something else.

    Attributes:
        files: what was removed so far: files, links, folders.
        bytes: disk space that this gave back.
        left: what could not be removed, with the reason; the first few.
        lacks: nothing of the folder defeats us, but a descriptor or memory that we lack for now.
    """

    def __init__(self, path: Path) -> None:
        self.files = 0
        self.bytes = 0
        self.left: list[str] = []
        self.lacks = False
        self._path = path
        self._moved = 0
        self._mount: bytes = b""
        # names that nothing in the folder has: its owner is dead
        self._token = secrets.token_hex(8)
        self._work = self._remove()

    def go_on(self, until: float) -> bool:
        """Work until that instant of the monotonic clock; True when there is nothing left to try."""
        return all(time.monotonic() < until for _ in self._work)

    def steps(self) -> Generator[None, None, None]:
        """Return the same work step by step, each of well under a millisecond."""
        return self._work

    @property
    def is_gone(self) -> bool:
        """The folder is not there any more."""
        return not os.path.lexists(self._path)

    def close(self) -> None:
        """Stop here."""
        self._work.close()

    # -- the work ------------------------------------------------------------------------------------

    def _remove(self) -> Generator[None, None, None]:
        try:
            top = self._opened(str(self._path), None)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            # no folder any more, but a link or a file in its place
            self._unlinked(str(self._path), None)
            return
        except OSError as error:
            self._missed(self._path.name, error)
            return
        try:
            while True:
                before = self.files + self._moved
                self.left.clear()
                try:
                    yield from self._emptied(top)
                except OSError as error:  # a listing needs a descriptor of its own
                    self._missed(self._path.name, error)
                if self.files + self._moved == before:
                    break
        finally:
            os.close(top)
        try:
            self._path.rmdir()
            self.files += 1
        except OSError as error:
            self._missed(self._path.name, error)

    def _emptied(self, top: int) -> Generator[None, None, None]:
        """Go through the top folder once."""
        with os.scandir(top) as entries:
            for entry in entries:
                yield
                if not entry.is_dir(follow_symlinks=False):
                    yield from self._freed(entry.name, top)
                    continue
                try:
                    inner = self._opened(entry.name, top)
                except OSError as error:
                    self._missed(entry.name, error)
                    continue
                try:
                    yield from self._flattened(inner, top)
                finally:
                    os.close(inner)
                try:
                    os.rmdir(entry.name, dir_fd=top)
                    self.files += 1
                except OSError as error:
                    self._missed(entry.name, error)

    def _flattened(self, folder: int, top: int) -> Generator[None, None, None]:
        """Remove a folder's files, and move its folders up."""
        with os.scandir(folder) as entries:
            for entry in entries:
                yield
                if not entry.is_dir(follow_symlinks=False):
                    yield from self._freed(entry.name, folder)
                    continue
                try:
                    self._move_up(entry.name, folder, top)
                except OSError as error:
                    self._missed(entry.name, error)

    def _move_up(self, name: str, folder: int, top: int) -> None:
        moved = f".{self._token}-{self._moved}"
        try:
            os.rename(name, moved, src_dir_fd=folder, dst_dir_fd=top)
        except PermissionError:
            # it must be ours to write before it may be moved: its ".." changes
            os.close(self._opened(name, folder))
            os.rename(name, moved, src_dir_fd=folder, dst_dir_fd=top)
        self._moved += 1

    def _opened(self, name: str, folder: int | None) -> int:
        """Open a folder for listing whatever its mode is, and never a link, nor what is mounted there."""
        handle = os.open(name, _PATH_ONLY, dir_fd=folder)
        try:
            mount = _mount_of(handle)
            if folder is None:
                self._mount = mount
            elif mount != self._mount:
                raise OSError("something else is mounted there")
            # by way of the descriptor: between two looks at a name it may become another's
            same = f"/proc/self/fd/{handle}"
            with contextlib.suppress(PermissionError):
                if os.fstat(handle).st_mode & 0o700 != 0o700:  # noqa: PLR2004 (as ls shows them)
                    os.chmod(same, 0o700)  # noqa: PTH101 (a path object for each folder costs as much as the call)
            return os.open(same, _LISTED)
        finally:
            os.close(handle)

    def _freed(self, name: str, folder: int) -> Generator[None, None, None]:
        """Remove a file; one that holds much is cut down first."""
        try:
            info = os.stat(name, dir_fd=folder, follow_symlinks=False)
            held = info.st_blocks * 512 if info.st_nlink == 1 else 0
            if held > limits.FREE_BYTES_MAX and stat.S_ISREG(info.st_mode):
                yield from self._cut(name, folder, info.st_size)
        except OSError:
            held = 0
        if self._unlinked(name, folder):
            self.bytes += held

    @staticmethod
    def _cut(name: str, folder: int, size: int) -> Generator[None, None, None]:
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(name, flags, dir_fd=folder)
        try:
            while size > limits.FREE_BYTES_MAX:
                size -= limits.FREE_BYTES_MAX
                os.ftruncate(file, size)
                yield
        finally:
            os.close(file)

    def _unlinked(self, name: str, folder: int | None) -> bool:
        try:
            os.unlink(name, dir_fd=folder)
        except OSError as error:
            self._missed(name, error)
            return False
        self.files += 1
        return True

    def _missed(self, name: str, error: OSError) -> None:
        self.lacks |= error.errno in SHORTAGES
        if len(self.left) < limits.RECLAIM_LEFT_MAX:
            self.left.append(f"{printable(name[:100])}: {error.strerror or error}")


def printable(text: str) -> str:
    """Return text that a message can hold: bytes of a file's name that are not UTF-8 are written as such."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def remove_tree(path: Path, within_s: float = 5.0) -> bool:
    """Remove a folder at once; True when it is gone, False when it defeats us or the time is over."""
    removal = Removal(path)
    removal.go_on(time.monotonic() + within_s)
    removal.close()
    return removal.is_gone


def _mount_of(fd: int) -> bytes:
    """Return the id of the mount that a descriptor is on: a bind mount has the device of what it shows."""
    handle = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(handle, 4096)
    finally:
        os.close(handle)
    return text.partition(b"mnt_id:")[2].split()[0]
