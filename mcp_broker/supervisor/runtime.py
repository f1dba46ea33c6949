"""The runtime folder: scratch folders, sockets and records of processes that run, for as long as they do.

It stands apart from the state directory (0700, full of keys), since the throwaway uids of confined workers must be able
to pass through it: 0711, so that nobody can list it. The link ``run`` in the state directory leads to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker.errors import ConfigError, SupervisionError

if TYPE_CHECKING:
    from collections.abc import Callable

#: overrides where the runtime folders of all state directories are
VARIABLE: Final = "MCP_BROKER_RUNTIME_DIR"
_MODE: Final = 0o711


class Runtime:
    """The folder of one instance; only one process at a time has it, and holds a lock on it until it ends.

    The lock of the state directory is not enough: a copy of that has one of its own, and a link that leads here.

    Args:
        state_dir: gets the link.
        instance: names the folder, since many state directories share the place.

    Raises:
        ConfigError: it cannot be made, or somebody else could write to it.
        SupervisionError: another supervisor has it.
    """

    def __init__(self, state_dir: Path, instance: str) -> None:
        self._link = state_dir / "run"
        self._locks: list[int] = []
        self.folder = _base() / instance
        _make(self.folder)
        if not self._take(self.folder):
            raise SupervisionError(
                f"another mcp-broker uses the runtime folder {self.folder}: of this state directory under another name,"
                " or of one that this is a copy of",
                {"hint": "stop it, or name another --state-dir"},
            )
        #: folders of earlier lives that are somewhere else, and that nobody uses: what is in them is left over
        self.earlier = [folder for folder in self._earlier() if folder != self.folder and self._take(folder)]

    def _take(self, folder: Path) -> bool:
        """Lock a folder for as long as this process lives; False if another one has it, or we may not."""
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:
            # a file system without locks: the state directory's lock is what there is
            pass
        self._locks.append(fd)
        return True

    def _earlier(self) -> list[Path]:
        if self._link.is_symlink():
            target = self._link.readlink()
            return [target] if target.is_dir() else []
        # versions before 0.2 had the folder itself there
        return [self._link] if self._link.is_dir() else []

    def clear(self, empty: Callable[[Path], int]) -> int:
        """Empty the folder and those of earlier lives, and let the link lead here; return the sum."""
        total = sum(empty(folder) for folder in (*self.earlier, self.folder))
        self.show()
        return total

    def show(self) -> None:
        """Let the link lead here, and drop the folders of earlier lives, which are empty by now."""
        for folder in self.earlier:
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            self._link.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):
            self._link.symlink_to(self.folder)

    def release(self) -> None:
        """Let others have the folders."""
        while self._locks:
            os.close(self._locks.pop())

    def remove(self) -> None:
        """Let go of the folder; what could not be removed from it stays in sight."""
        self.release()
        try:
            self.folder.rmdir()
        except OSError:
            return
        self._link.unlink(missing_ok=True)


def _base() -> Path:
    named = os.environ.get(VARIABLE)
    if named:
        base = Path(named).absolute()
        _make(base)
        return base
    uid = os.geteuid()
    fallback = Path(tempfile.gettempdir()) / f"mcp-broker-{uid}"
    session = os.environ.get("XDG_RUNTIME_DIR")
    first = Path("/run/mcp-broker") if uid == 0 else Path(session or tempfile.gettempdir()) / "mcp-broker"
    if uid != 0 and not session:
        first = fallback
    try:
        _make(first)
    except ConfigError:
        _make(fallback)
        return fallback
    return first


def _make(folder: Path) -> None:
    """Make a folder that everybody may pass and only we may write, or check that it is one."""
    try:
        folder.mkdir(mode=_MODE, parents=True, exist_ok=True)
        found = folder.lstat()
        # a folder for temporary files is open to all: somebody may have been there first
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise ConfigError(
                f"the runtime folder {folder} belongs to uid {found.st_uid}; set {VARIABLE} to a folder of your own"
            )
        if stat.S_IMODE(found.st_mode) != _MODE:
            folder.chmod(_MODE)
    except OSError as error:
        raise ConfigError(
            f"cannot make the runtime folder {folder}: {error.strerror}; set {VARIABLE} to another place"
        ) from error
