"""What this machine can do to confine a worker, found out by doing it.

Each primitive is tried in a child of its own that then looks whether the wall stands. Versions and paths prove
nothing: a container may refuse what its kernel has, and a flag may be accepted and ignored.

The children are forked, so this is for a process with one thread: the supervisor before it serves, or the doctor.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mcp_broker import limits, proctable
from mcp_broker.confine import kernel, landlock, mounts, privileges, rlimits, seccomp
from mcp_broker.supervisor.poller import is_readable

#: a child that has not answered by then is stuck, seconds
_PATIENCE_S: Final = 5.0
_ANSWER_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of trying one primitive.

    Args:
        name: of the primitive, see PRIMITIVES.
        works: it was done, and the wall stood.
        detail: what is known of it ("ABI 7"), or the step that failed with its errno.
        errno: of the step that failed; None: it works, or failed without one.
        ms: how long the child took.
    """

    name: str
    works: bool
    detail: str
    errno: int | None
    ms: float

    def __str__(self) -> str:
        return f"{self.name}: {self.detail or ('works' if self.works else 'does not work')}"


class NotHolding(Exception):  # noqa: N818 (a finding, told by probes to this module)
    """The wall was put up without an error, and does not stand."""


def _no_new_privs() -> str:
    privileges.gain_no_more()
    return ""


def _resource_limits() -> str:
    rlimits.limit({"nofile": 16, "core": 0})
    with contextlib.suppress(OSError):
        for _ in range(16):
            os.open("/", os.O_PATH)
        raise NotHolding("17 descriptors under a limit of 16")
    return ""


def _descriptors() -> str:
    # made last, so it has the highest number, and the one that the answer goes by stays
    ours = os.dup(2)
    privileges.close_others(range(ours))
    with contextlib.suppress(OSError):
        os.fstat(ours)
        raise NotHolding("a descriptor stayed open")
    return ""


def _landlock() -> str:
    privileges.gain_no_more()
    version = landlock.restrict(landlock.Rules(read=["/usr"], scoped=False))
    os.close(os.open("/usr", os.O_RDONLY))
    _must_fail(lambda: os.open("/", os.O_RDONLY), "a closed folder can be read")
    return f"ABI {version}"


def _landlock_ports() -> str:
    privileges.gain_no_more()
    version = landlock.restrict(landlock.Rules(connect=(), scoped=False))
    with socket.socket() as one:
        _must_fail(lambda: one.connect(("127.0.0.1", 9)), "a closed port can be reached", errno.EACCES)
    return f"ABI {version}"


def _landlock_scopes() -> str:
    privileges.gain_no_more()
    version = landlock.restrict(landlock.Rules())
    _must_fail(lambda: os.kill(os.getppid(), 0), "another process can be signalled")
    return f"ABI {version}"


def _seccomp() -> str:
    privileges.gain_no_more()
    seccomp.install(seccomp.program(seccomp.Policy()))
    _must_fail(lambda: socket.socket(socket.AF_INET), "a socket can be made", errno.EAFNOSUPPORT)
    _must_fail(lambda: kernel.call("open_tree", 0, b"", 0), "a closed system call can be made", errno.EPERM)
    return ""


def _own_uid() -> str:
    first, _ = uid_range() or limits.UID_RANGES[0]
    privileges.become(first)
    _must_fail(lambda: os.setuid(0), "root can be had again")
    return ""


def _own_mounts() -> str:
    mounts.leave(network=False)
    # the folder for temporary files is covered in this child's sight only
    mounts.enter(mounts.View(("/usr",), (), (), (), tempfile.gettempdir(), 1, None))
    if Path("/root").exists() or not Path("/usr").is_dir():
        raise NotHolding("the host's folders are still there")
    return ""


def _own_network() -> str:
    mounts.leave(network=True)
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        one.listen()
        other.connect(one.getsockname())
    return ""


def _must_fail(attempt: Callable[[], object], otherwise: str, number: int | None = None) -> None:
    try:
        attempt()
    except OSError as error:
        if number is None or error.errno == number:
            return
        raise NotHolding(f"{otherwise} as far as {errno.errorcode.get(error.errno or 0)} goes") from error
    raise NotHolding(otherwise)


#: primitive -> what tries it in a child; returns what is worth knowing of it
PRIMITIVES: Final[Mapping[str, Callable[[], str]]] = {
    "no_new_privs": _no_new_privs,
    "resource_limits": _resource_limits,
    "descriptors": _descriptors,
    "landlock": _landlock,
    "landlock_ports": _landlock_ports,
    "landlock_scopes": _landlock_scopes,
    "seccomp": _seccomp,
    "own_uid": _own_uid,
    "own_mounts": _own_mounts,
    "own_network": _own_network,
}


def uid_range() -> tuple[int, int] | None:
    """Return the first uid, and the number, of a range for throwaway uids that is mapped here; None: there is none."""
    with contextlib.suppress(OSError, ValueError):
        rows = Path("/proc/self/uid_map").read_text(encoding="ascii").split("\n")
        mapped = [tuple(map(int, row.split())) for row in rows if row.strip()]
        for first, count in limits.UID_RANGES:
            if any(inside <= first and first + count <= inside + size for inside, _, size in mapped):
                return first, count
    return None


def attempt(name: str, work: Callable[[], str]) -> Probe:
    """Try one primitive in a child."""
    began = time.perf_counter()
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        _answer(theirs, work)
    os.close(theirs)
    answer = b""
    if is_readable(ours, _PATIENCE_S):
        answer = os.read(ours, _ANSWER_BYTES_MAX)
    os.close(ours)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    ms = round((time.perf_counter() - began) * 1000, 2)
    if not answer:
        ended = os.waitstatus_to_exitcode(status)
        return Probe(name, works=False, detail=f"its child ended with {ended}", errno=None, ms=ms)
    works, detail, number = json.loads(answer)
    return Probe(name, works=works, detail=detail, errno=number, ms=ms)


def _answer(to: int, work: Callable[[], str]) -> None:
    """Do the work in the child, say what came of it, and end."""
    try:
        found: tuple[bool, str, int | None] = (True, work(), None)
    except OSError as error:
        found = (False, str(error), error.errno)
    except BaseException as error:  # noqa: BLE001 (the child must end here, whatever happens)
        found = (False, str(error) or type(error).__name__, None)
    with contextlib.suppress(OSError):
        os.write(to, json.dumps(found).encode())
    os._exit(0)


def probe(primitives: Mapping[str, Callable[[], str]] = PRIMITIVES) -> dict[str, Probe]:
    """Try every primitive, one after the other; 1 to 10 ms each."""
    return {name: attempt(name, work) for name, work in primitives.items()}


# -- remembered -------------------------------------------------------------------------------------


def place() -> dict[str, str | int]:
    """Return what a result holds for: this boot of this machine's kernel, and this user."""
    return {"boot_id": proctable.boot_id(), "kernel": platform.release(), "uid": os.geteuid()}


def remembered(file: Path, primitives: Mapping[str, Callable[[], str]] = PRIMITIVES) -> dict[str, Probe]:
    """Return what was found here before, as far as it works, and try the rest.

    What did not work is tried again: somebody may have mended it.
    """
    known: dict[str, Probe] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(file.read_bytes())
        if saved["place"] == place():
            known = {one["name"]: Probe(**one) for one in saved["probes"] if one["works"]}
    missing = {name: work for name, work in primitives.items() if name not in known}
    found = {**known, **probe(missing)}
    if missing:
        part = file.with_name(file.name + ".part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps({"place": place(), "probes": [asdict(one) for one in found.values()]}))
            part.replace(file)
    return {name: found[name] for name in primitives}
