"""Landlock: a process takes rights to files, ports, abstract sockets and signals away from itself, for ever.

What is not allowed by a rule is refused with EACCES (files, ports) or EPERM (sockets, signals). Unprivileged;
inherited by children. The kernel's version of it, the ABI, says what it can restrict: what it cannot stays open, so
whoever relies on something asks :func:`abi` first. Descriptors that are open already are not affected.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mcp_broker.confine import kernel

# rights to files, in the order of their bits
_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_REFER: Final = 1 << 13
_TRUNCATE: Final = 1 << 14
_IOCTL_DEV: Final = 1 << 15
_READ: Final = _EXECUTE | _READ_FILE | _READ_DIR
#: what makes sense for a file that is no folder
_OF_FILES: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
#: the first ABI restricts the bits 0 to 12; each of these versions added one
_ADDED: Final = ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV))

_CONNECT_TCP: Final = 1 << 1
_NET: Final = (1 << 0) | _CONNECT_TCP
NET_ABI: Final = 4

_ABSTRACT_UNIX: Final = 1 << 0
_SIGNALS: Final = 1 << 1
SCOPE_ABI: Final = 6

_CREATE_VERSION: Final = 1
_RULE_PATH: Final = 1
_RULE_PORT: Final = 2


@dataclass(frozen=True, slots=True)
class Rules:
    """What stays allowed.

    Args:
        read: folders and files; their programs may be run.
        listed: folders in which, and below which, names may be listed.
        write: folders and files that may also be written, made and removed.
        devices: files that may be read, written, and controlled by ioctl.
        connect: TCP ports to which connections may be made, and nothing else of TCP; None: TCP is not restricted.
        scoped: no abstract sockets, and signals to processes under the same restriction only.
    """

    read: Iterable[str] = ()
    listed: Iterable[str] = ()
    write: Iterable[str] = ()
    devices: Iterable[str] = ()
    connect: Iterable[int] | None = None
    scoped: bool = True


def abi() -> int:
    """Return the kernel's version of Landlock.

    Raises:
        kernel.Refused: ENOSYS: it is older; EOPNOTSUPP: switched off at boot; EPERM: something forbids the question.
    """
    return kernel.call("landlock_create_ruleset", None, 0, _CREATE_VERSION)


def file_rights(version: int) -> int:
    """Return the rights to files that an ABI can restrict."""
    return (1 << 13) - 1 | sum(bit for since, bit in _ADDED if version >= since)


def ruleset(rules: Rules, version: int) -> bytes:
    """Return the packed attribute of a rule set: what it restricts."""
    files = struct.pack("<Q", file_rights(version))
    if version < NET_ABI:
        return files
    net = struct.pack("<Q", 0 if rules.connect is None else _NET)
    if version < SCOPE_ABI:
        return files + net
    return files + net + struct.pack("<Q", _ABSTRACT_UNIX | _SIGNALS if rules.scoped else 0)


def restrict(rules: Rules) -> int:
    """Restrict this thread, and all that it starts, to the rules; return the ABI.

    Raises:
        kernel.Refused: the kernel cannot, or cannot all of it (EOPNOTSUPP for what its ABI lacks).
        OSError: a path of the rules cannot be opened.
    """
    version = abi()
    if rules.connect is not None and version < NET_ABI:
        raise kernel.Refused(95, f"landlock rules for ports (ABI {version}, and they need {NET_ABI})")
    if rules.scoped and version < SCOPE_ABI:
        raise kernel.Refused(95, f"landlock scopes (ABI {version}, and they need {SCOPE_ABI})")
    attribute = ruleset(rules, version)
    handle = kernel.call("landlock_create_ruleset", attribute, len(attribute), 0)
    try:
        everything = file_rights(version)
        for path in rules.read:
            _allow(handle, path, _READ)
        for path in rules.listed:
            _allow(handle, path, _READ_DIR)
        # all but control of devices, of which there are none to make
        for path in rules.write:
            _allow(handle, path, everything & ~_IOCTL_DEV)
        for path in rules.devices:
            _allow(handle, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV) & everything)
        for port in rules.connect or ():
            rule = struct.pack("<QQ", _CONNECT_TCP, port)
            kernel.call("landlock_add_rule", handle, _RULE_PORT, rule, 0)
        kernel.call("landlock_restrict_self", handle, 0)
    finally:
        os.close(handle)
    return version


def _allow(handle: int, path: str, rights: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= _OF_FILES
        # packed: a 64-bit mask and a 32-bit descriptor
        rule = struct.pack("<Qi", rights, opened)
        kernel.call("landlock_add_rule", handle, _RULE_PATH, rule, 0)
    finally:
        os.close(opened)
