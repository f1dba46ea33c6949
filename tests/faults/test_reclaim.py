"""Whatever a worker leaves is taken back after its end, told in a record, and nobody else's is touched."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker.errors import CallError, ToolFailed, WorkerLost
from mcp_broker.supervisor.reclaim.sysv import Item, remove
from tests.support.ports import connect, free_span
from tests.support.running import Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_broker import Client

pytestmark = [pytest.mark.process, pytest.mark.slow]

LEVELS = ("process", "restricted", "sandboxed")

TOOLS = '''
"""Tools that leave things behind."""
import ctypes, os, signal, socket, subprocess, sys, time
from collections.abc import Iterator
from multiprocessing import get_context, shared_memory
from pathlib import Path
from mcp_broker.worker import tool, ToolContext

BABY = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
if sys.argv[1] == "daemon":
    if os.fork(): os._exit(0)
    os.setsid()
    if os.fork(): os._exit(0)
Path = sys.argv[2]
with open(Path + ".part", "w") as file: file.write(str(os.getpid()))
os.rename(Path + ".part", Path)
time.sleep(600)
"""

def start(kind: str, path: Path, env: dict[str, str] | None) -> None:
    subprocess.Popen([sys.executable, "-c", BABY, kind, str(path)], env=env)

@tool(name="t.litter")
def litter(context: ToolContext, outside: str, wipes: bool) -> Iterator[dict[str, object]]:
    """Leave processes, shared memory, semaphores and files, and stay."""
    top = context.scratch
    env = {"PATH": os.environ["PATH"]} if wipes else None
    for number in range(4):
        start("child", top / f"child-{number}", env)
    start("daemon", top / "daemon", env)
    # not told to Python's own tracker, which would remove it
    from multiprocessing import resource_tracker
    shm, sem = "", ""
    try:
        memory = shared_memory.SharedMemory(create=True, size=100_000)
        resource_tracker.unregister(memory._name, "shared_memory")
        memory.buf[:] = bytes(100_000)
        lock = get_context("spawn").Lock()
        resource_tracker.unregister(lock._semlock.name, "semaphore")
        shm, sem = memory.name, lock._semlock.name
    except PermissionError:
        pass  # confined by Landlock alone
    sysv = ctypes.CDLL(None).shmget(0, 8192, 0o1600)
    deep = os.open(top, os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d", dir_fd=deep)
        deeper = os.open("d", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = deeper
    many = top / "many"
    many.mkdir()
    for number in range(300):
        (many / str(number)).touch()
    (top / "link").symlink_to(outside)
    (top / "closed" / "inner").mkdir(parents=True)
    (top / "closed" / "inner" / "link").symlink_to(outside)
    try:
        os.link(os.path.join(outside, "file"), top / "hard")
    except OSError:
        pass  # another mount, or another's file
    (top / "closed").chmod(0)
    (top / "hog").write_bytes(bytes(5_000_000))
    names = [f"child-{number}" for number in range(4)] + ["daemon"]
    while not all((top / name).exists() for name in names):
        time.sleep(0.001)
    told = {"pids": [int((top / name).read_text()) for name in names], "shm": shm, "sem": sem,
            "sysv": sysv, "scratch": str(top)}
    yield told
    signal.pause()

kept = []

@tool(name="t.serve")
def serve(context: ToolContext, port: int = 0) -> Iterator[int]:
    """Lease a port, answer one connection, and keep the lease for the next call."""
    lease = context.lease_port(port)
    kept.append(lease)
    yield lease.port
    connection, _ = lease.socket.accept()
    connection.sendall(b"hello from a tool")
    connection.close()

@tool(name="t.once")
def once(context: ToolContext) -> int:
    """Lease a port and give it back."""
    with context.lease_port() as lease:
        return lease.port

@tool(name="t.relisten")
def relisten(context: ToolContext) -> Iterator[int]:
    """Lease a port, give it back, and listen on a copy."""
    with context.lease_port() as lease:
        copy = lease.socket.dup()
    yield lease.port
    while copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        time.sleep(0.001)
    copy.listen()
    signal.pause()

@tool(name="t.pid")
def pid() -> int:
    """Return the worker's pid."""
    return os.getpid()
'''
CONFIG = """
[pools.t]
module = "fault_tools"
path = ["{folder}"]
min = {workers}
isolation = "LEVEL"
NETWORK

[ports]
min = FIRST
max = LAST
"""


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, level: str) -> Iterator[Running]:
    tmp_path = tmp_path_factory.mktemp(level)
    # the folder that the tools are imported from: a confined worker may have a uid of its own
    tmp_path.chmod(0o755)
    first = free_span(3)
    # loopback alone is for who can make networks
    network = "" if level == "process" else f'network = "{"full" if os.geteuid() else "loopback"}"'
    config = CONFIG.replace("LEVEL", level).replace("NETWORK", network)
    config = config.replace("FIRST", str(first)).replace("LAST", str(first + 2))
    with Running(tmp_path, tools=TOOLS, config=config) as broker:
        yield broker


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("kept")
    return tmp_path / "outside"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def worker_of(running: Running) -> tuple[str, int]:
    """Return id and pid, as this machine sees it, of the one worker."""
    (pool,) = running.status()["pools"]
    return pool["workers"][0]["id"], pool["workers"][0]["pid"]


def seen_from_here(inner: list[int], worker: int) -> list[int]:
    """Return the pids, as we see them, of processes whose pids a worker told us."""
    space = Path(f"/proc/{worker}/ns/pid").readlink()
    if space == Path("/proc/self/ns/pid").readlink():
        return inner
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "ns" / "pid").readlink() == space:
                names = (path / "status").read_text().partition("NSpid:")[2].partition("\n")[0].split()
                found += [int(path.name)] * (int(names[-1]) in inner)
        except OSError:  # gone meanwhile
            continue
    return found


def reclaimed(client: Client, pid: int) -> dict[str, Any]:
    """Return the reclaim record of the worker that had this pid, once there is one."""

    def ask() -> Any:
        return client.call("system.why", {"id": str(pid)}).get("reclaim")

    record: dict[str, Any] = wait_for(ask, within_s=30, what="the reclaim record")
    return record


@pytest.mark.parametrize("wipes", [False, True], ids=["named", "unnamed"])
def test_nothing_of_a_killed_worker_is_left_and_the_record_says_what_was(
    running: Running, outside: Path, level: str, wipes: bool
) -> None:
    with running.client() as client:
        name, worker = worker_of(running)
        parts = client.stream("t.litter", {"outside": str(outside), "wipes": wipes}, timeout_s=60)
        told: dict[str, Any] = next(parts)
        pids = seen_from_here(told["pids"], worker)
        assert len(pids) == 5
        # of a daemon without a name, only its control group tells that its worker lives: without one it is swept at once
        is_swept = wipes and os.geteuid() != 0
        assert all(map(is_running, pids[:-1] if is_swept else pids))
        os.kill(worker, 9)
        with pytest.raises(WorkerLost):
            next(parts)
        record = reclaimed(client, worker)
        assert client.call("t.pid") > 0
        assert worker_of(running)[0] != name
    steps = {step["step"]: step for step in record["steps"]}
    assert [step["left"] for step in record["steps"]] == [[]] * len(steps)
    assert not any(map(is_running, pids))
    assert not os.path.lexists(running.state_dir / "run" / name)
    if level != "sandboxed":  # where the end of its namespaces takes all with it
        assert steps["processes"]["count"] >= 1
        assert steps["scratch"]["count"] > 500
        assert steps["scratch"]["bytes"] >= 5_000_000
    assert (outside / "file").read_text() == "kept"
    for name in (told["shm"], f"sem.{told['sem'][1:]}"):
        assert not name.strip("sem.") or not os.path.lexists(f"/dev/shm/{name}")
    if level == "process":
        assert steps["shared memory"]["count"] == 2
        assert steps["shared memory"]["bytes"] >= 100_000
        assert told["sysv"] < 0 or not remove(Item("shm", told["sysv"])), "it is gone already"
    said = running.command("why", str(worker)).stdout
    assert "taken back within" in said
    assert "scratch" in said


def test_what_belongs_to_others_is_left_alone(running: Running, tmp_path: Path) -> None:
    theirs = Path("/dev/shm") / f"psm_{tmp_path.name[-8:]}{os.getpid()}"
    theirs.write_text("theirs")
    try:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
            with running.client() as client:
                assert client.call("t.pid") > 0
                _, worker = worker_of(running)
                os.kill(worker, 9)
                reclaimed(client, worker)
            assert stranger.poll() is None
            stranger.kill()
        assert theirs.exists()
    finally:
        theirs.unlink()


def test_a_worker_that_listens_on_a_port_whose_lease_has_ended_is_killed(running: Running) -> None:
    with running.client() as client:
        parts = client.stream("t.relisten", timeout_s=20)
        port = next(parts)
        with pytest.raises(CallError) as lost:
            list(parts)
    assert f"it listened on port {port}, whose lease had ended" in str(lost.value.details)

    def is_free() -> bool:
        with socket.socket() as anybody:
            try:
                anybody.bind(("127.0.0.1", port))
            except OSError:
                return False
        return True

    wait_for(is_free, what="the port")


def test_a_leased_port_serves_is_shown_and_is_free_after_its_worker(running: Running) -> None:
    with running.client() as client:
        assert client.call("t.once") == client.call("t.once") - 1, "ports are lent in turn"
        name, worker = worker_of(running)
        serving = client.stream("t.serve", timeout_s=30)
        port = next(serving)
        with connect(port) as one:
            assert one.makefile("rb").read() == b"hello from a tool"
        assert list(serving) == []
        ports = wait_for(lambda: client.call("system.status")["ports"], what="the report of the port")
        assert json.loads(running.command("ports", "--json").stdout)["ports"] == ports
        assert [(one["port"], one["state"], one["owner"]) for one in ports] == [(port, "active", name)]
        assert str(port) in running.command("ports").stdout
        with pytest.raises(ToolFailed, match="PortUnavailable"):
            next(client.stream("t.serve", {"port": port}))
        os.kill(worker, 9)
        record = reclaimed(client, worker)
        assert [step["count"] for step in record["steps"] if step["step"] == "ports"] == [1]
        with pytest.raises(ConnectionRefusedError):
            connect(port)
        wait_for(lambda: not client.call("system.status")["ports"], what="the report of none")
        assert running.command("ports").stdout == "no port is leased\n"
