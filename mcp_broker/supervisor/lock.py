"""One supervisor a state directory: a lock on a file that also says who holds it."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Final

from mcp_broker.errors import SupervisionError

_NAME: Final = "lock"
_TRIES: Final = 5
_TRY_S: Final = 0.01


class Lock:
    """The held lock of a state directory. The kernel frees it when its holder dies, however it dies.

    Raises:
        SupervisionError: another supervisor holds it; ``details["pid"]`` says which.
    """

    def __init__(self, state_dir: Path) -> None:
        path = state_dir / _NAME
        # close-on-exec matters: a child that inherits the descriptor would hold the lock after our death
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not self._take():
            os.close(self._fd)
            pid = holder(state_dir)
            who = "another mcp-broker" if pid is None else f"another mcp-broker (pid {pid})"
            raise SupervisionError(
                f"{who} already serves {state_dir}",
                {
                    "pid": pid,
                    "state_dir": str(state_dir),
                    "hint": "use it, stop it, or name another --state-dir",
                },
            )
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def _take(self) -> bool:
        for _ in range(_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # perhaps somebody only looks who holds it (holder below), which takes microseconds
                time.sleep(_TRY_S)
            else:
                return True
        return False

    def release(self) -> None:
        """Free the lock. The file stays: to remove it would race with the next holder."""
        os.ftruncate(self._fd, 0)
        os.close(self._fd)


def holder(state_dir: Path) -> int | None:
    """Return the pid of the supervisor that serves this state directory, None when there is none."""
    try:
        fd = os.open(state_dir / _NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(fd, 32, 0).strip()
            return int(text) if text.isdigit() else None
        return None
    finally:
        os.close(fd)
