"""The filter of system calls: a BPF program, built as data so that a test can read and run it.

It is a second wall behind Landlock, uid and namespaces: it takes away the parts of the kernel that a tool has no
business with, most of them ways out of the first wall or with a history of faults. What it refuses fails with EPERM
(sockets: EAFNOSUPPORT), so that programs fall back instead of dying; only a foreign system call interface kills.

`clone3` and `openat2` cannot be looked into (their flags are in memory), so they do not exist here (ENOSYS): libraries
fall back to `clone` and `openat`, whose flags are checked.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from mcp_broker.confine import kernel

#: refused always. Name -> number on x86_64 and aarch64; None: that machine has no such call.
DENIED: Final[Mapping[str, tuple[int | None, int | None]]] = {
    # other namespaces and file systems
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "move_pages": (279, 239), "migrate_pages": (256, 238),
    # large and young parts of the kernel
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "lookup_dcookie": (212, 18),
    # the machine itself
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "syslog": (103, 116), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "vhangup": (153, 58), "nfsservctl": (180, 42), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "uselib": (134, None), "ustat": (136, None), "sysfs": (139, None),
    "_sysctl": (156, None), "create_module": (174, None), "get_kernel_syms": (177, None), "query_module": (178, None),
}  # fmt: skip
#: looked into
LOOKED_INTO: Final[Mapping[str, tuple[int | None, int | None]]] = {
    "socket": (41, 198), "socketpair": (53, 199), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "open": (2, None), "openat": (257, 56), "openat2": (437, 437), "creat": (85, None), "mkdir": (83, None),
    "mkdirat": (258, 34), "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "clone": (56, 220), "clone3": (435, 435), "ioctl": (16, 29), "personality": (135, 92),
}  # fmt: skip
#: where a call that makes a file, or changes one, has its mode
_MODES: Final = {
    "creat": 1, "mkdir": 1, "mkdirat": 2, "mknod": 1, "mknodat": 2, "chmod": 1, "fchmod": 1, "fchmodat": 2,
    "fchmodat2": 2,
}  # fmt: skip
#: where one that may make a file has its flags; its mode comes next
_FLAGS: Final = {"open": 1, "openat": 2}
#: O_CREAT and the bit of O_TMPFILE that is its own: without either the mode means nothing
_MAKES: Final = 0o100 | 0o20000000
#: set-user-id and set-group-id. What a worker makes in a folder of its operator belongs to the operator: a program with
#: these bits would be a way for whoever runs it on the host to become him.
_GIVES_RIGHTS: Final = 0o6000
_COLUMNS: Final = ("x86_64", "aarch64")

#: every CLONE_NEW* flag
_NEW_NAMESPACES: Final = 0x7E02_0000
#: types into, and controls, the terminal that started us
_TERMINAL_REQUESTS: Final = (0x5412, 0x541C)
#: opens a connection without connect(2), past Landlock's rules for ports
_MSG_FASTOPEN: Final = 0x2000_0000
_PERSONALITY_QUERY: Final = 0xFFFF_FFFF
_SOCK_TYPE_MASK: Final = 0xF
_X32_BIT: Final = 0x4000_0000

_ALLOW: Final = 0x7FFF_0000
_KILL: Final = 0x8000_0000
_ERRNO: Final = 0x0005_0000

# BPF: load a word of the data, compare, return
_LD: Final = 0x20
_AND: Final = 0x54
_JEQ: Final = 0x15
_JGE: Final = 0x35
_JSET: Final = 0x45
_RET: Final = 0x06
_NR_AT: Final = 0
_ARCH_AT: Final = 4
_ARGS_AT: Final = 16
_INSTRUCTIONS_MAX: Final = 4096

_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2


class Instruction(NamedTuple):
    """One instruction of classic BPF."""

    code: int
    jt: int
    jf: int
    k: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What the filter leaves open.

    Args:
        unix: sockets of the machine's own kind (AF_UNIX) may be made. Pairs always may.
        tcp: TCP sockets may be made; where they may go is for Landlock.
        network: any socket of the internet families, and the kernel's address tables.
    """

    unix: bool = False
    tcp: bool = False
    network: bool = False


def program(policy: Policy, machine: str | None = None) -> bytes:
    """Return the packed filter, as prctl(2) and bubblewrap take it.

    Raises:
        kernel.Refused: ENOSYS: the numbers of this machine's system calls are not known here.
    """
    return b"".join(struct.pack("<HBBI", *one) for one in instructions(policy, machine))


def instructions(policy: Policy, machine: str | None = None) -> list[Instruction]:
    """Return the filter, instruction by instruction."""
    machine = machine or kernel.machine()
    if machine not in _COLUMNS:
        raise kernel.Refused(errno.ENOSYS, f"seccomp (no system call numbers for {machine})")
    column = _COLUMNS.index(machine)
    number = {name: row[column] for name, row in {**DENIED, **LOOKED_INTO}.items()}
    made = [
        _load(_ARCH_AT),
        Instruction(_JEQ, 1, 0, kernel.ARCHITECTURES[machine]),
        _give(_KILL),
        _load(_NR_AT),
    ]
    if machine == "x86_64":
        made += [Instruction(_JGE, 0, 1, _X32_BIT), _give(_KILL)]
    for name in DENIED:
        made += _on(number[name], [_refuse(errno.EPERM)])
    for name in ("clone3", "openat2"):
        made += _on(number[name], [_refuse(errno.ENOSYS)])
    made += _on(number["clone"], [_argument(0), *_refuse_bits(_NEW_NAMESPACES), _give(_ALLOW)])
    made += _on(number["socket"], _sockets(policy))
    made += _on(number["socketpair"], [_argument(0), *_pass(socket.AF_UNIX), _refuse(errno.EAFNOSUPPORT)])
    for name, at in (("sendto", 3), ("sendmsg", 2), ("sendmmsg", 3)):
        made += _on(number[name], [_argument(at), *_refuse_bits(_MSG_FASTOPEN), _give(_ALLOW)])
    for name, at in _MODES.items():
        made += _on(number[name], [_argument(at), *_refuse_bits(_GIVES_RIGHTS), _give(_ALLOW)])
    for name, at in _FLAGS.items():
        check = [_argument(at + 1), *_refuse_bits(_GIVES_RIGHTS)]
        making = Instruction(_JSET, 0, len(check), _MAKES)
        made += _on(number[name], [_argument(at), making, *check, _give(_ALLOW)])
    requests = [part for request in _TERMINAL_REQUESTS for part in _unless_equal(request, errno.EPERM)]
    made += _on(number["ioctl"], [_argument(1), *requests, _give(_ALLOW)])
    made += _on(
        number["personality"],
        [_argument(0), *_pass(0), *_pass(_PERSONALITY_QUERY), _refuse(errno.EPERM)],
    )
    made.append(_give(_ALLOW))
    return made


def _sockets(policy: Policy) -> list[Instruction]:
    body = [_argument(0)]
    if policy.unix or policy.network:
        body += _pass(socket.AF_UNIX)
    if policy.network:
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
            body += _pass(family)
    elif policy.tcp:
        # TCP alone: other kinds of streams (MPTCP, SCTP, SMC) are not seen by Landlock
        check = [
            _argument(1),
            Instruction(_AND, 0, 0, _SOCK_TYPE_MASK),
            Instruction(_JEQ, 0, 5, socket.SOCK_STREAM),
            _argument(2),
            *_pass(0),
            *_pass(socket.IPPROTO_TCP),
        ]
        body += [
            Instruction(_JEQ, 1, 0, socket.AF_INET),
            Instruction(_JEQ, 0, len(check), socket.AF_INET6),
            *check,
        ]
    return [*body, _refuse(errno.EAFNOSUPPORT)]


def _on(number: int | None, body: Sequence[Instruction]) -> list[Instruction]:
    """Run the body, which ends with a verdict, for one system call only."""
    if number is None:
        return []
    return [Instruction(_JEQ, 0, len(body), number), *body]


def _load(offset: int) -> Instruction:
    return Instruction(_LD, 0, 0, offset)


def _argument(index: int) -> Instruction:
    """Load an argument's lower half; both machines are little-endian, and what we look at has 32 bits."""
    return _load(_ARGS_AT + 8 * index)


def _give(verdict: int) -> Instruction:
    return Instruction(_RET, 0, 0, verdict)


def _refuse(number: int) -> Instruction:
    return _give(_ERRNO | number)


def _pass(value: int) -> Iterable[Instruction]:
    return (Instruction(_JEQ, 0, 1, value), _give(_ALLOW))


def _unless_equal(value: int, number: int) -> Iterable[Instruction]:
    return (Instruction(_JEQ, 0, 1, value), _refuse(number))


def _refuse_bits(bits: int) -> Iterable[Instruction]:
    return (Instruction(_JSET, 0, 1, bits), _refuse(errno.EPERM))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(packed: bytes) -> None:
    """Put this thread, and all that it starts, under a filter, for ever; no-new-privs must be set.

    Raises:
        kernel.Refused: the kernel has no filters (EINVAL), or does not let us (EACCES).
    """
    count = len(packed) // 8
    if count > _INSTRUCTIONS_MAX:
        raise kernel.Refused(errno.E2BIG, "seccomp")
    described = bytes(_Program(count, packed))
    kernel.prctl("seccomp", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described)
