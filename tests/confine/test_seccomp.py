"""The filter of system calls, run instruction by instruction on data, for both machines."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from mcp_broker.confine import kernel, seccomp
from mcp_broker.confine.seccomp import DENIED, LOOKED_INTO, Policy

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, NO_FAMILY, NO_CALL = ERRNO | errno.EPERM, ERRNO | errno.EAFNOSUPPORT, ERRNO | errno.ENOSYS
MACHINES = ("x86_64", "aarch64")
#: any system call that a program cannot do without: read, and exit_group
PLAIN = {"x86_64": (0, 231), "aarch64": (63, 94)}
STREAM, DGRAM, NONBLOCK = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_NONBLOCK


def run(packed: bytes, number: int, *arguments: int, arch: int) -> int:
    """Do what the kernel does with a filter and one system call."""
    data = struct.pack("<iIQ", number, arch, 0) + struct.pack("<6Q", *arguments, *[0] * (6 - len(arguments)))
    program = list(struct.iter_unpack("<HBBI", packed))
    at, accumulator = 0, 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        if code == 0x20:  # load
            accumulator = int.from_bytes(data[k : k + 4], "little")
        elif code == 0x54:  # and
            accumulator &= k
        elif code == 0x06:  # return
            return int(k)
        else:
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[code]
            at += jt if holds else jf


def verdict(name: str | int, *arguments: int, policy: Policy | None = None, machine: str = "x86_64") -> int:
    column = MACHINES.index(machine)
    number = name if isinstance(name, int) else {**DENIED, **LOOKED_INTO}[name][column]
    assert number is not None
    packed = seccomp.program(policy or Policy(), machine)
    return run(packed, number, *arguments, arch=kernel.ARCHITECTURES[machine])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", DENIED)
def test_what_is_denied_fails_with_eperm(name: str, machine: str) -> None:
    if DENIED[name][MACHINES.index(machine)] is not None:
        assert verdict(name, machine=machine) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_what_every_program_does_is_allowed(machine: str) -> None:
    assert {verdict(number, machine=machine) for number in PLAIN[machine]} == {ALLOW}


def test_another_machines_calls_and_x32_kill() -> None:
    packed = seccomp.program(Policy(), "x86_64")
    i386 = 0x40000003
    assert run(packed, 1, arch=i386) == KILL
    assert run(packed, 0x40000000 | 1, arch=kernel.ARCHITECTURES["x86_64"]) == KILL
    assert run(seccomp.program(Policy(), "aarch64"), 0, arch=kernel.ARCHITECTURES["x86_64"]) == KILL


def test_a_machine_whose_numbers_are_not_known_is_refused_loudly() -> None:
    with pytest.raises(kernel.Refused, match=r"no system call numbers for riscv64\W+ENOSYS"):
        seccomp.program(Policy(), "riscv64")


SOCKETS = [
    # policy, family, type, protocol, verdict
    (Policy(), socket.AF_UNIX, STREAM, 0, NO_FAMILY),
    (Policy(), socket.AF_INET, STREAM, 0, NO_FAMILY),
    (Policy(unix=True), socket.AF_UNIX, STREAM | NONBLOCK, 0, ALLOW),
    (Policy(unix=True), socket.AF_INET, STREAM, 0, NO_FAMILY),
    (Policy(tcp=True), socket.AF_INET, STREAM | NONBLOCK, 0, ALLOW),
    (Policy(tcp=True), socket.AF_INET6, STREAM, socket.IPPROTO_TCP, ALLOW),
    (Policy(tcp=True), socket.AF_UNIX, STREAM, 0, NO_FAMILY),
    (Policy(tcp=True), socket.AF_INET, DGRAM, 0, NO_FAMILY),
    (Policy(tcp=True), socket.AF_INET, socket.SOCK_RAW, 0, NO_FAMILY),
    (Policy(tcp=True), socket.AF_INET, STREAM, 262, NO_FAMILY),  # MPTCP
    (Policy(tcp=True), socket.AF_INET, STREAM, 132, NO_FAMILY),  # SCTP
    (Policy(tcp=True), socket.AF_NETLINK, DGRAM, 0, NO_FAMILY),
    (Policy(network=True), socket.AF_INET, DGRAM, 0, ALLOW),
    (Policy(network=True), socket.AF_NETLINK, socket.SOCK_RAW, 0, ALLOW),
    (Policy(network=True), socket.AF_UNIX, STREAM, 0, ALLOW),
    (Policy(network=True), socket.AF_PACKET, STREAM, 0, NO_FAMILY),
    (Policy(network=True), 38, STREAM, 0, NO_FAMILY),  # AF_ALG
    (Policy(network=True), 40, STREAM, 0, NO_FAMILY),  # AF_VSOCK
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("policy", "family", "kind", "protocol", "expected"), SOCKETS)
def test_sockets_are_of_the_families_that_are_open(
    policy: Policy, family: int, kind: int, protocol: int, expected: int, machine: str
) -> None:
    assert verdict("socket", family, kind, protocol, policy=policy, machine=machine) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("clone", (0x11,), ALLOW),  # fork
        ("clone", (0x3D0F00,), ALLOW),  # a thread
        ("clone", (0x10000011,), EPERM),  # a user namespace
        ("clone", (0x40000011,), EPERM),  # a network namespace
        ("clone3", (0,), NO_CALL),
        ("socketpair", (socket.AF_UNIX, STREAM), ALLOW),
        ("socketpair", (30, STREAM), NO_FAMILY),  # TIPC
        ("sendto", (3, 0, 0, 0x4000), ALLOW),
        ("sendto", (3, 0, 0, 0x20004000), EPERM),  # TCP fast open goes round connect
        ("sendmsg", (3, 0, 0x20000000), EPERM),
        ("sendmmsg", (3, 0, 0, 0x20000000), EPERM),
        ("ioctl", (0, 0x5401), ALLOW),
        ("ioctl", (0, 0x5412), EPERM),  # types into a terminal
        ("ioctl", (0, 0xFFFFFFFF_00005412), EPERM),  # the kernel looks at 32 bits only
        ("openat2", (0,), NO_CALL),
        ("openat", (0, 0, 0o102, 0o644), ALLOW),
        ("openat", (0, 0, 0o102, 0o4755), EPERM),  # makes a program that gives its owner's rights
        ("openat", (0, 0, 0o102, 0o2755), EPERM),
        ("openat", (0, 0, 0o2, 0o4755), ALLOW),  # makes nothing: the mode is whatever was there
        ("openat", (0, 0, 0o20200002, 0o4755), EPERM),  # O_TMPFILE
        ("fchmod", (3, 0o755), ALLOW),
        ("fchmod", (3, 0o4755), EPERM),
        ("fchmodat", (0, 0, 0o1777), ALLOW),
        ("fchmodat", (0, 0, 0o2755), EPERM),
        ("fchmodat2", (0, 0, 0o4755, 0), EPERM),
        ("mkdirat", (0, 0, 0o700), ALLOW),
        ("mkdirat", (0, 0, 0o2700), EPERM),
        ("mknodat", (0, 0, 0o104755), EPERM),
        ("personality", (0xFFFFFFFF,), ALLOW),
        ("personality", (0x0040000,), EPERM),
    ],
)
def test_flags_decide_where_a_call_is_needed_and_dangerous(
    name: str, arguments: tuple[int, ...], expected: int
) -> None:
    assert {verdict(name, *arguments, machine=machine) for machine in MACHINES} == {expected}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("open", (0, 0o102, 0o4755), EPERM),
        ("open", (0, 0o102, 0o755), ALLOW),
        ("open", (0, 0, 0o4755), ALLOW),
        ("creat", (0, 0o4755), EPERM),
        ("chmod", (0, 0o4755), EPERM),
        ("chmod", (0, 0o755), ALLOW),
        ("mkdir", (0, 0o2755), EPERM),
        ("mknod", (0, 0o104755), EPERM),
    ],
)
def test_the_older_calls_of_x86_are_looked_into_likewise(
    name: str, arguments: tuple[int, ...], expected: int
) -> None:
    assert verdict(name, *arguments) == expected
