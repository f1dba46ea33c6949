"""A worker's own address: a folder with one listening socket in it, which the broker serves.

A confined worker reaches its broker by it, across network namespaces, and sees no other worker's. What makes it private
is the folder, its owner and the file's mode; what is said is under CURVE all the same.

The socket is bound by way of the folder's descriptor: a path in a socket's name has at most 107 bytes, and a state
directory may be anywhere.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.errors import SupervisionError

if TYPE_CHECKING:
    from pathlib import Path

#: sun_path has 108 bytes, and libzmq wants a final 0. See unix(7).
PATH_BYTES_MAX: Final = 107


class Endpoint:
    """Listens from its making to its closing, so that connections wait while there is no broker.

    Args:
        folder: made here (0700), in the worker's scratch folder, with which it goes.
        name: of the socket in it; no other endpoint of this supervisor may have it.
        owner: uid and gid of the worker; None: the supervisor's own.

    Raises:
        SupervisionError: it cannot be made.
    """

    def __init__(self, folder: Path, name: str, owner: tuple[int, int] | None = None) -> None:
        self.folder = folder
        self.name = name
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            folder.mkdir(mode=0o700)
            descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self._listener.bind(f"/proc/self/fd/{descriptor}/{name}")
            finally:
                os.close(descriptor)
            path = folder / name
            path.chmod(0o600)
            if owner is not None:
                os.chown(path, *owner)
                os.chown(folder, *owner)
            self._listener.listen(limits.LISTEN_BACKLOG)
        except OSError as error:
            self._listener.close()
            raise SupervisionError(f"cannot listen in {folder}: {error.strerror or error}") from error
        # the broker polls before it accepts, but a peer may be gone again by then
        self._listener.setblocking(False)

    @property
    def address(self) -> str:
        """What the broker binds: the socket's own name."""
        return f"ipc://{self._listener.getsockname()}"

    @property
    def path(self) -> str:
        """Where a worker connects that sees the folder where it is.

        Raises:
            SupervisionError: the path is longer than a socket's may be.
        """
        path = str(self.folder / self.name)
        if len(os.fsencode(path)) > PATH_BYTES_MAX:
            raise SupervisionError(
                f"the path {path} has {len(os.fsencode(path))} bytes, a socket's has at most {PATH_BYTES_MAX};"
                " choose a shorter --state-dir"
            )
        return f"ipc://{path}"

    def fileno(self) -> int:
        """Return the listening socket's descriptor."""
        return self._listener.fileno()

    def close(self) -> None:
        """Stop listening. What is at the path now is the worker's: it may have put anything there, a link for instance."""
        self._listener.close()
