"""System calls that Python has no name for, by number, with errors that name the call."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
from collections.abc import Mapping
from typing import Final

#: machine -> what it calls its system call interface in seccomp (AUDIT_ARCH_*)
ARCHITECTURES: Final[Mapping[str, int]] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

#: system calls by name. Those from 424 on have the same number everywhere.
NUMBERS: Final[Mapping[str, int]] = {
    "open_tree": 428,
    "move_mount": 429,
    "close_range": 436,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}
#: those before 424 that we call by number
OLD_NUMBERS: Final[Mapping[str, Mapping[str, int]]] = {
    "x86_64": {"pivot_root": 155, "capset": 126},
    "aarch64": {"pivot_root": 41, "capset": 91},
}

#: of what our callers pass: numbers, bytes (a pointer to them), and NULL
Argument = int | bytes | None

_PR_SET_PDEATHSIG: Final = 1
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Refused(OSError):  # noqa: N818 (a fact about the kernel; its errno says which)
    """The kernel refused a step of a confinement.

    Args:
        number: errno.
        step: what was tried: "unshare", "landlock_restrict_self", "mount /proc".
    """

    def __init__(self, number: int, step: str) -> None:
        super().__init__(number, os.strerror(number))
        self.step = step

    def __str__(self) -> str:
        # one number has two names, and this is the one that manuals use
        named = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP"}
        return f"{self.step}: {named.get(self.errno or 0, self.errno)} ({self.strerror})"


def machine() -> str:
    """Return the machine's name; every 64-bit one whose numbers we know is in ARCHITECTURES."""
    return platform.machine()


def call(name: str, *arguments: Argument) -> int:
    """Do a system call by number.

    Raises:
        Refused: it failed, or this machine's number is not known (ENOSYS).
    """
    number = NUMBERS.get(name) or OLD_NUMBERS.get(machine(), {}).get(name)
    if number is None:
        raise Refused(errno.ENOSYS, name)
    return _checked(name, _libc.syscall(ctypes.c_long(number), *map(_passed, arguments)))


def prctl(name: str, option: int, *arguments: Argument) -> int:
    """Change what this process is; ``name`` is for the error."""
    passed = [*map(_passed, arguments), *[ctypes.c_ulong(0)] * (4 - len(arguments))]
    return _checked(name, _libc.prctl(ctypes.c_int(option), *passed))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends. A change of the uid undoes it.

    Args:
        parent: the parent's pid as it should be; another one means that it ended before the kernel knew.
    """
    prctl("pdeathsig", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def unshare(flags: int) -> None:
    """Leave namespaces for new ones."""
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount a file system, or change a mount that is there."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    step = f"mount {kind or 'again'} on {target}"
    _checked(step, _libc.mount(*encoded, ctypes.c_ulong(flags), os.fsencode(options)))


def umount(target: str, flags: int) -> None:
    """Take a mount away."""
    _checked(f"umount {target}", _libc.umount2(os.fsencode(target), ctypes.c_int(flags)))


def _passed(argument: Argument) -> ctypes.c_void_p | ctypes.c_ulong | bytes | None:
    return ctypes.c_ulong(argument & 0xFFFF_FFFF_FFFF_FFFF) if isinstance(argument, int) else argument


def _checked(step: str, returned: int) -> int:
    if returned < 0:
        raise Refused(ctypes.get_errno(), step)
    return returned
