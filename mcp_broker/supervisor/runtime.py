"""The runtime folder: scratch folders, sockets and records of processes that run, for as long as they do.

It stands apart from the state directory (0700, full of keys), since the throwaway uids of confined workers must be able
to pass through it: 0711, so that nobody can list it. The link ``run`` in the state directory leads to it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

#: overrides where the runtime folders of all state directories are
VARIABLE: Final = "MCP_BROKER_RUNTIME_DIR"
_MODE: Final = 0o711


class Runtime:
    """The folder of one instance; only one process at a time has it, the one that holds the state directory's lock.

    Args:
        state_dir: gets the link.
        instance: names the folder, since many state directories share the place.

    Raises:
        ConfigError: it cannot be made, or somebody else could write to it.
    """

    def __init__(self, state_dir: Path, instance: str) -> None:
        self._link = state_dir / "run"
        #: folders of earlier lives that are somewhere else: what is in them is left over
        self.earlier = self._earlier()
        self.folder = _base() / instance
        _make(self.folder)
        if self.folder in self.earlier:
            self.earlier.remove(self.folder)

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

    def remove(self) -> None:
        """Let go of the folder; what could not be removed from it stays in sight."""
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
