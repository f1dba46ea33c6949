"""A user namespace in which every uid means what it means outside, and below which no other can be made.

Made by root, for sandboxes whose first process is to change its uid: whoever is in it has no right over anything
outside it, and nobody gets rights by making one of his own.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

from mcp_broker.confine import kernel

_NEW_USER: Final = 0x1000_0000
_EVERY_ID: Final = "0 0 4294967295\n"
_BELOW: Final = "/proc/sys/user/max_user_namespaces"


def closed() -> int:
    """Make one; return its descriptor, which keeps it. For a process with one thread: it forks.

    Raises:
        kernel.Refused: the kernel does not let us make it, map it, or close it.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    mapped_read, mapped_write = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        # or it would wait for itself
        os.close(mapped_write)
        _be_its_first(theirs, mapped_read)
    os.close(theirs)
    os.close(mapped_read)
    try:
        _hear(ours, "unshare (user namespace)")
        step = "uid_map"
        try:
            for name in ("uid_map", "gid_map"):
                step = name
                Path(f"/proc/{child}/{name}").write_text(_EVERY_ID, encoding="ascii")
        except OSError as error:
            raise kernel.Refused(error.errno or 0, step) from error
        os.write(mapped_write, b"1")
        _hear(ours, _BELOW)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ours)
        # it ends when nobody can tell it to go on
        os.close(mapped_write)
        os.waitpid(child, 0)


def _hear(source: int, step: str) -> None:
    """Wait for the child's next word, which is an errno, 0 when it did the step."""
    said = os.read(source, 1)
    number = said[0] if said else errno.ECHILD
    if number:
        raise kernel.Refused(number, step)


def _be_its_first(to: int, mapped: int) -> None:
    """Make the namespace, wait for its map, and allow none below; the parent holds it by then."""
    with contextlib.suppress(BaseException):
        try:
            kernel.unshare(_NEW_USER)
            os.write(to, b"\0")
            os.read(mapped, 1)
            fd = os.open(_BELOW, os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, b"0")
            os.write(to, b"\0")
            os.read(mapped, 1)
        except OSError as error:
            os.write(to, bytes([error.errno or errno.EIO]))
    os._exit(0)
