"""A tool that tries what a hostile one would, and reports what came of it. Its pool's PREFIX names it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcp_broker.worker import ToolContext, tool

_libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"


def syscall(number: int, *arguments: int) -> int:
    done = int(_libc.syscall(number, *map(ctypes.c_long, arguments)))
    if done < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return done


def in_child(work: Callable[[], object]) -> None:
    """Do it in a child, whom it may change, and raise what it raised."""
    child = os.fork()
    if child == 0:
        number = 255
        with contextlib.suppress(BaseException):
            try:
                work()
                number = 0
            except OSError as error:
                number = error.errno or 254
        os._exit(number)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise OSError(0, f"killed by {-code}")
    if code:
        raise OSError(code, os.strerror(code))


def other(pids: list[int]) -> int:
    return next(pid for pid in pids if pid != os.getpid())


def connect(family: int, address: Any, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(family, kind) as one:
        one.connect(tuple(address) if isinstance(address, list) else address)


def trace() -> None:
    """Trace a child of one's own: PTRACE_SEIZE."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        syscall(101 if X86 else 117, 0x4206, child, 0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def write(path: str) -> None:
    file = Path(path) / f"mcpb-hostile-{os.getpid()}"
    file.write_text("x")
    file.unlink()


def give_rights(path: str) -> None:
    """Make a program that gives its owner's rights to whoever runs it."""
    file = Path(path) / f"mcpb-suid-{os.getpid()}"
    file.write_text("x")
    try:
        file.chmod(0o4755)
    finally:
        file.unlink()


def mounting() -> None:
    if _libc.mount(b"none", b"/proc", b"tmpfs", 0, None) < 0:
        raise OSError(ctypes.get_errno(), "mount")


def as_root() -> None:
    os.setresuid(0, 0, 0)


def program() -> None:
    subprocess.run(["/bin/true"], check=True)


def raw_socket() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 1):
        pass


def packet_socket() -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW):
        pass


def pair() -> None:
    for one in socket.socketpair():
        one.close()


def new_mounts() -> None:
    syscall(272 if X86 else 97, 0x20000)
    mounting()


def foreign_call() -> None:
    """Make a system call by the interface of 32-bit programs: int 0x80, getpid."""
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ctypes.CFUNCTYPE(ctypes.c_int)(address)()


def descriptors() -> list[str]:
    """Return what is open beside standard streams and what a worker of ours needs."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            known = ("pipe:", "socket:", "anon_inode:", "/dev/null", "/memfd:mcpb-", "/proc/")
            if not target.startswith(known):
                found.append(target)
    return found


ATTEMPTS: dict[str, Callable[[Any], object]] = {
    "read": lambda path: Path(path).read_bytes(),
    "list": lambda path: list(Path(path).iterdir()),
    "write": write,
    "make a set-user-id program": give_rights,
    "run a program": lambda _: program(),
    "connect by TCP": lambda address: connect(socket.AF_INET, address),
    "connect by UDP": lambda address: connect(socket.AF_INET, address, socket.SOCK_DGRAM),
    "connect to a socket file": lambda path: connect(socket.AF_UNIX, path),
    "connect to an abstract socket": lambda name: connect(socket.AF_UNIX, "\0" + name),
    "listen on a port": lambda _: socket.socket().bind(("127.0.0.1", 0)),
    "open a packet socket": lambda _: packet_socket(),
    "open a raw socket": lambda _: raw_socket(),
    "make a pair of sockets": lambda _: pair(),
    "signal": lambda pid: os.kill(pid, 0),
    "read a sibling's environment": lambda pids: Path(f"/proc/{other(pids)}/environ").read_bytes(),
    "open a sibling's memory": lambda pids: Path(f"/proc/{other(pids)}/mem").open("rb").close(),
    "trace": lambda _: trace(),
    "make a user namespace": lambda _: in_child(lambda: syscall(272 if X86 else 97, 0x10000000)),
    "make a network namespace": lambda _: in_child(lambda: syscall(272 if X86 else 97, 0x40000000)),
    "mount": lambda _: in_child(new_mounts),
    "set up io_uring": lambda _: syscall(425, 1, ctypes.addressof(ctypes.create_string_buffer(120))),
    "load a BPF program": lambda _: syscall(321 if X86 else 280, 0, 0, 0),
    "use keyrings": lambda _: syscall(250 if X86 else 219, 0, -3, 1),
    "handle page faults": lambda _: os.close(syscall(323 if X86 else 282, 1)),
    "become root again": lambda _: in_child(as_root),
    "make a foreign system call": lambda _: in_child(foreign_call),
    "use POSIX semaphores": lambda _: __import__("multiprocessing").get_context("spawn").Lock(),
    "use threads": lambda _: __import__("threading").Thread(target=int).start(),
}


@tool(name=f"{os.environ.get('PREFIX', 'h')}.attempt", idempotent=True)
def attempt(what: str, argument: object = None) -> str:
    """Try one thing; "done", or the name of the errno, or what else stopped it."""
    try:
        ATTEMPTS[what](argument)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


@tool(name=f"{os.environ.get('PREFIX', 'h')}.self")
def whoami(context: ToolContext) -> dict[str, object]:
    """Tell what it sees of itself."""
    status = dict(
        row.split(":\t", 1) for row in Path("/proc/self/status").read_text().splitlines() if ":\t" in row
    )
    seen = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {
        "pid": os.getpid(),
        "uid": os.getuid(),
        "status": {
            key: status[key] for key in ("Uid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Groups")
        },
        "oom": int(Path("/proc/self/oom_score_adj").read_text()),
        "scratch": str(context.scratch),
        "home": os.environ["HOME"],
        "tmp": os.environ["TMPDIR"],
        "cwd": str(Path.cwd()),
        "secrets": dict(context.secrets),
        "environment": dict(os.environ),
        "arguments": sys.argv,
        "descriptors": descriptors(),
        "others": sorted(set(seen) - {os.getpid()}),
        "core": __import__("resource").getrlimit(4)[0],
    }


@tool(name=f"{os.environ.get('PREFIX', 'h')}.make")
def make(path: str) -> int:
    """Make a file and leave it; return the uid that it has here."""
    Path(path).write_text("made")
    return Path(path).stat().st_uid
