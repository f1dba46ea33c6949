"""The checks of ``doctor``: each looks at one thing by trying it, and says how to mend it."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import socket
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from mcp_broker.cli import connection, output
from mcp_broker.errors import BrokerError

if TYPE_CHECKING:
    from mcp_broker.cli.settings import Settings

Level = Literal["ok", "warn", "fail"]

PYTHON_MIN: Final = (3, 11)
#: before it, faults in what libzmq reads of peers that have proved nothing yet (CVE-2021-20235 and others)
LIBZMQ_MIN: Final = (4, 3, 5)
#: close_range; what the levels need beyond it is tried
KERNEL_MIN: Final = (5, 9)
#: CURVE by libsodium does hundreds of MB/s; by the slow substitute some ten
CURVE_MB_S_MIN: Final = 50.0
FILES_MIN: Final = 1024
TOKEN_DAYS_MIN: Final = 3
#: a descriptor that nobody has
_FD_MAX: Final = 0x7FFF_FFFF
_SAMPLE_BYTES: Final = 64 * 1024
_SAMPLES: Final = 128
_DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found."""

    name: str
    level: Level
    text: str
    mend: str = ""


def perform(run: Callable[[Settings], Check], chosen: Settings) -> Check:
    """Run a check; one that breaks is a failed one."""
    try:
        return run(chosen)
    except Exception as error:  # noqa: BLE001 (a doctor who falls over helps nobody)
        return Check(run.__name__, "fail", f"the check itself failed: {type(error).__name__}: {error}")


def python(_chosen: Settings) -> Check:
    """Check the interpreter."""
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < PYTHON_MIN:
        return Check("python", "fail", text, "install Python 3.11 or newer")
    return Check("python", "ok", text)


def kernel(_chosen: Settings) -> Check:
    """Check what we need of the kernel, by using it."""
    from mcp_broker.confine.kernel import call

    text = f"{platform.system()} {platform.release()}"
    if platform.system() != "Linux":
        return Check("kernel", "fail", text, "mcp-broker runs on Linux only")
    floor = ".".join(map(str, KERNEL_MIN))
    try:
        os.close(os.pidfd_open(os.getpid()))
        os.close(os.memfd_create("mcp-broker-doctor"))
        # an empty range: nothing is closed
        call("close_range", _FD_MAX, _FD_MAX, 0)
    except (OSError, AttributeError) as error:
        return Check(
            "kernel",
            "fail",
            f"{text}: {error}",
            f"use Linux {floor} or newer, and allow pidfd_open, memfd_create and close_range",
        )
    return Check("kernel", "ok", text)


def libzmq(_chosen: Settings) -> Check:
    """Check the version of libzmq and that it has CURVE."""
    import zmq

    text = f"libzmq {zmq.zmq_version()}, pyzmq {zmq.__version__}"
    if zmq.zmq_version_info() < LIBZMQ_MIN:
        return Check("libzmq", "fail", text, "pip install --upgrade pyzmq")
    if not zmq.has("curve"):
        return Check(
            "libzmq",
            "fail",
            f"{text}, without CURVE",
            "pip install --force-reinstall pyzmq (the wheels have it)",
        )
    return Check("libzmq", "ok", f"{text}, CURVE")


def encryption(_chosen: Settings) -> Check:
    """Measure CURVE between two sockets here: libsodium is ten times faster than what may replace it."""
    rate = _curve_rate()
    if rate < CURVE_MB_S_MIN:
        return Check(
            "encryption",
            "warn",
            f"CURVE carries only {rate:.0f} MB/s, as without libsodium",
            "pip install --force-reinstall pyzmq (the wheels have libsodium)",
        )
    return Check("encryption", "ok", f"CURVE carries {rate:.0f} MB/s between two sockets")


def _curve_rate() -> float:
    import zmq

    context = zmq.Context()
    try:
        server, client = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        for side in (server, client):
            side.linger = 0
            side.rcvtimeo = side.sndtimeo = 2000
        server_public, server_secret = zmq.curve_keypair()
        server.curve_server = True
        server.curve_secretkey = server_secret
        port = server.bind_to_random_port("tcp://127.0.0.1")
        client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
        client.curve_serverkey = server_public
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"warm")
        server.recv()
        sample = os.urandom(_SAMPLE_BYTES)
        began = time.perf_counter()
        for _ in range(_SAMPLES):
            client.send(sample)
        for _ in range(_SAMPLES):
            server.recv()
        return _SAMPLES * _SAMPLE_BYTES / 1e6 / (time.perf_counter() - began)
    finally:
        context.destroy(linger=0)


def state_dir(chosen: Settings) -> Check:
    """Check that the state directory is ours and closed to others."""
    path = chosen.state_dir
    if not path.exists():
        parent = next(folder for folder in path.parents if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            return Check(
                "state dir", "fail", f"{path} cannot be made: {parent} is not writable", "choose --state-dir"
            )
        return Check("state dir", "ok", f"{path} will be made by the first start")
    found = path.stat()
    if not path.is_dir():
        return Check("state dir", "fail", f"{path} is no directory", "choose another --state-dir")
    if found.st_uid != os.geteuid():
        return Check(
            "state dir", "fail", f"{path} belongs to uid {found.st_uid}", f"run as uid {found.st_uid}"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        mode = f"{stat.S_IMODE(found.st_mode):o}"
        return Check("state dir", "fail", f"{path} has mode {mode}, open to others", f"chmod 700 {path}")
    return Check("state dir", "ok", f"{path}, mode 700")


def secrets(chosen: Settings) -> Check:
    """Check the modes of keys and profiles."""
    folders = [chosen.state_dir / name for name in ("keys", "clients")]
    files = [
        path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*")) if path.is_file()
    ]
    loose = [path for path in files if path.suffix != ".pub" and stat.S_IMODE(path.stat().st_mode) & 0o077]
    if loose:
        named = " ".join(str(path) for path in loose[:3])
        return Check(
            "secrets", "fail", f"{len(loose)} key or profile files are open to others", f"chmod 600 {named}"
        )
    return Check("secrets", "ok", f"{len(files)} files, none open to others" if files else "none yet")


def _holder(chosen: Settings) -> int | None:
    from mcp_broker.supervisor.lock import holder

    return holder(chosen.state_dir)


def lock(chosen: Settings) -> Check:
    """Say who holds the state directory."""
    pid = _holder(chosen)
    return Check("lock", "ok", "free" if pid is None else f"held by the running broker, pid {pid}")


def ports(chosen: Settings) -> Check:
    """Check that the address of the profile answers when a broker runs, and is free when none does."""
    if not chosen.profile.exists():
        return Check("ports", "ok", "free ones are chosen by the first start")
    from mcp_broker.auth.profile import load_profile

    endpoint = load_profile(chosen.profile).endpoints[0]
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    running = _holder(chosen) is not None
    if running or host not in {"127.0.0.1", "localhost"}:
        if connection.listens(endpoint):
            return Check("ports", "ok", f"{endpoint} answers")
        level: Level = "fail" if running else "warn"
        return Check("ports", level, f"nothing answers at {endpoint}", chosen.again("start"))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            return Check(
                "ports",
                "fail",
                f"{endpoint} is taken: {error.strerror}",
                f"find who holds it: ss -ltnp 'sport = :{port}'",
            )
    return Check("ports", "ok", f"{endpoint} is free; no broker runs")


def profile(chosen: Settings) -> Check:
    """Check that the profile can be used and its token lives."""
    path, issue = chosen.profile, chosen.again("credentials issue NAME")
    if not path.exists():
        return Check("profile", "warn", f"there is none at {path}", chosen.again("start"))
    try:
        from mcp_broker.auth.profile import load_profile

        expires = load_profile(path).expires.timestamp()
    except BrokerError as error:
        return Check("profile", "fail", error.message, error.hint or issue)
    left = expires - time.time()
    if left <= 0:
        return Check(
            "profile",
            "fail",
            f"the token of {path} expired {output.ago(expires)}",
            f"restart the broker, or {issue}",
        )
    if left < TOKEN_DAYS_MIN * _DAY_S:
        return Check(
            "profile",
            "warn",
            f"the token of {path} ends in {output.duration(left)}",
            f"restart the broker, or {issue}",
        )
    return Check("profile", "ok", f"{path}, token good for {output.duration(left)}")


def files(_chosen: Settings) -> Check:
    """Check how many files a process may open."""
    # a start raises the soft limit by itself
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES_MIN:
        return Check(
            "open files", "warn", f"only {hard} allowed", f"raise the hard limit (ulimit -Hn) to {FILES_MIN}"
        )
    return Check("open files", "ok", "unlimited" if hard == resource.RLIM_INFINITY else f"{hard} allowed")


def libraries(_chosen: Settings) -> Check:
    """Check for the optional libraries of the shipped tools."""
    absent = [name for name in ("duckdb", "Bio") if importlib.util.find_spec(name) is None]
    if absent:
        return Check(
            "libraries",
            "warn",
            f"not installed: {', '.join(absent)}; those tools stay away",
            "pip install 'mcp-broker[tools]'",
        )
    return Check("libraries", "ok", "duckdb, Bio")


CHECKS: Final[tuple[Callable[[Settings], Check], ...]] = (
    python,
    kernel,
    libzmq,
    encryption,
    state_dir,
    secrets,
    lock,
    ports,
    profile,
    files,
    libraries,
)
