"""Taking privileges away from this process: uid, capabilities, descriptors, and the way back to any of them.

Traps: a change of uid clears the death signal, so that is set last; it also makes the process undumpable, which
closes its own /proc files to its own children, so that is undone (nobody else has this uid).
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from mcp_broker.confine import kernel

_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
#: far above the last one; the kernel says EINVAL at its own end
_CAPABILITIES_MAX: Final = 64
_CAPABILITY_VERSION: Final = 0x20080522
_STANDARD: Final = (0, 1, 2)
_FD_MAX: Final = 0x7FFF_FFFF


def gain_no_more() -> None:
    """No program that this process runs gains rights, whatever bits it has: PR_SET_NO_NEW_PRIVS."""
    kernel.prctl("no_new_privs", _PR_SET_NO_NEW_PRIVS, 1)


def close_others(keep: Iterable[int]) -> None:
    """Close every descriptor except standard input, output, error and these."""
    kept = sorted({fd for fd in keep if fd > _STANDARD[-1]})
    first = _STANDARD[-1] + 1
    try:
        for fd in kept:
            if fd > first:
                kernel.call("close_range", first, fd - 1, 0)
            first = fd + 1
        kernel.call("close_range", first, _FD_MAX, 0)
    except kernel.Refused as error:
        if error.errno != errno.ENOSYS:
            raise
        _close_one_by_one({*_STANDARD, *kept})


def _close_one_by_one(keep: set[int]) -> None:
    """Close what /proc lists, on a kernel before 5.9; nobody else opens anything meanwhile."""
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd not in keep:
            # that of the listing itself is gone
            with contextlib.suppress(OSError):
                os.close(fd)


def become(uid: int) -> None:
    """Take a uid, and the gid of the same number, for good, with no other group and no capability.

    Raises:
        kernel.Refused: we are not root, or the uid is not mapped here (EINVAL).
    """
    drop_capabilities()
    step = "setgroups"
    try:
        os.setgroups([])
        step = f"setresgid {uid}"
        os.setresgid(uid, uid, uid)
        step = f"setresuid {uid}"
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise kernel.Refused(error.errno or 0, step) from error
    _set_capabilities_none()
    kernel.prctl("dumpable", _PR_SET_DUMPABLE, 1)


def drop_capabilities() -> None:
    """Empty the bounding and the ambient set, so that no program brings a capability back."""
    for number in range(_CAPABILITIES_MAX):
        try:
            kernel.prctl("capbset_read", _PR_CAPBSET_READ, number)
        except kernel.Refused:
            break
        kernel.prctl("capbset_drop", _PR_CAPBSET_DROP, number)
    kernel.prctl("cap_ambient", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def _set_capabilities_none() -> None:
    # version and pid (0: this one); three sets of 64 bits, all empty
    kernel.call("capset", struct.pack("<Ii", _CAPABILITY_VERSION, 0), bytes(24))


def prefer_as_victim(score: int) -> None:
    """Have the kernel choose this process rather than others when memory ends; raising needs no right."""
    # a file that is written late would swallow the error: os.write says it at once
    with contextlib.suppress(OSError):
        fd = os.open(Path("/proc/self/oom_score_adj"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(score).encode())
        finally:
            os.close(fd)
