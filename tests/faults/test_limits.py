"""Each limit, exceeded by a real tool in a real worker: the caller gets its name, neighbours do not notice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker.errors import CallError, ResourceExhausted
from tests.support.running import Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOOLS = '''
"""Tools that use too much of something."""
import hashlib, mmap, os, re, socket, subprocess, sys, time
from pathlib import Path
from mcp_broker.worker import tool, ToolContext

kept = []

@tool(name="{pool}.echo")
def echo(value: object = None) -> object:
    """Return the value."""
    return value

@tool(name="{pool}.memory", idempotent=True)
def memory(mb: int, pause_s: float = 0.002) -> int:
    """Take memory, a MiB at a time, and let go of it."""
    own = []
    for _ in range(mb):
        own.append(bytearray(os.urandom(1024)) * 1024)
        time.sleep(pause_s)
    return len(own)

@tool(name="{pool}.leak")
def leak(mb: int) -> int:
    """Take memory and keep it."""
    kept.append(bytearray(b"x") * (mb << 20))
    return len(kept)

@tool(name="{pool}.memory_file")
def memory_file(mb: int) -> int:
    """Write into a file in memory that nobody maps."""
    fd = os.memfd_create("tool")
    for _ in range(mb):
        os.write(fd, b"x" * (1 << 20))
        time.sleep(0.002)
    return os.fstat(fd).st_size

@tool(name="{pool}.child_memory")
def child_memory(mb: int) -> int:
    """Have a child process take memory."""
    code = "import time\\nown = []\\nfor _ in range(%d):\\n    own.append(bytearray(b'x') * (1 << 20))\\n    time.sleep(0.002)"
    return subprocess.run([sys.executable, "-c", code % mb]).returncode

@tool(name="{pool}.spin")
def spin() -> None:
    """Use a CPU, in Python."""
    while True:
        pass

@tool(name="{pool}.match")
def match() -> None:
    """Use a CPU, in C code that never lets go of the interpreter."""
    re.match(r"(a+)+$", "a" * 64 + "b")

@tool(name="{pool}.child_spin")
def child_spin() -> int:
    """Have a child process use a CPU."""
    return subprocess.run([sys.executable, "-c", "while True: pass"]).returncode

@tool(name="{pool}.files")
def files(count: int) -> int:
    """Open files."""
    return len([open(os.devnull) for _ in range(count)])

@tool(name="{pool}.connect")
def connect(count: int, seconds: float) -> int:
    """Open sockets and keep them for a while."""
    own = [socket.socket() for _ in range(count)]
    time.sleep(seconds)
    return len(own)

@tool(name="{pool}.start")
def start(count: int, seconds: float) -> int:
    """Start processes and wait for a while."""
    own = [subprocess.Popen(["sleep", "60"]) for _ in range(count)]
    time.sleep(seconds)
    for one in own:
        one.kill()
    return len([one.wait() for one in own])

@tool(name="{pool}.write")
def write(context: ToolContext, mb: int) -> int:
    """Fill the scratch folder."""
    for number in range(mb):
        (context.scratch / str(number)).write_bytes(b"x" * (1 << 20))
        time.sleep(0.002)
    return mb
'''

POOL = """
[pools.{pool}]
module = "tools_{pool}"
path = ["{folder}"]

[pools.{pool}.limits]
memory_mb = 60
cpu_s = 0.6
open_files = 20
connections = 8
processes = 6
scratch_mb = 30
"""


def text_of(folder: Path, *pools: str) -> str:
    for pool in pools:
        (folder / f"tools_{pool}.py").write_text(TOOLS.replace("{pool}", pool))
    return "".join(POOL.replace("{pool}", pool) for pool in pools)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("limits")
    config = text_of(folder, "greedy", "modest")
    with Running(folder, config=config.replace("{folder}", str(folder))) as started:
        yield started


def refusal(running: Running, tool: str, **arguments: Any) -> CallError:
    with running.client() as client, pytest.raises(CallError) as refused:
        client.call(tool, arguments, timeout_s=25)
    return refused.value


@pytest.mark.parametrize(
    ("tool", "arguments", "limit"),
    [
        ("memory", {"mb": 300}, "memory_mb"),
        ("memory_file", {"mb": 300}, "memory_mb"),
        ("child_memory", {"mb": 300}, "memory_mb"),
        ("spin", {}, "cpu_s"),
        ("match", {}, "cpu_s"),
        ("child_spin", {}, "cpu_s"),
        ("connect", {"count": 12, "seconds": 20}, "connections"),
        ("start", {"count": 12, "seconds": 20}, "processes"),
        ("write", {"mb": 200}, "scratch_mb"),
    ],
)
def test_a_call_that_exceeds_a_limit_is_killed_and_says_which(
    running: Running, tool: str, arguments: dict[str, Any], limit: str
) -> None:
    waits: list[float] = []
    over = threading.Event()

    def neighbour() -> None:
        with running.client() as client:
            while not over.is_set():
                begun = time.monotonic()
                client.call("modest.echo", {"value": 1}, timeout_s=5)
                waits.append(time.monotonic() - begun)
                over.wait(0.01)

    thread = threading.Thread(target=neighbour)
    thread.start()
    error = refusal(running, f"greedy.{tool}", **arguments)
    over.set()
    thread.join()
    assert isinstance(error, ResourceExhausted), (error.code, error.message)
    details = error.details
    assert details["limit"] == limit
    assert details["used"] >= details["limit_value"] > 0
    certificate = details["certificate"]
    assert (certificate["kind"], certificate["limit"]) == ("limit", limit)
    assert f"in {tool}" in certificate["stack"]
    assert sorted(waits)[len(waits) // 2] < 0.05, "the neighbour's calls go on"
    with running.client() as client:
        assert client.call("greedy.echo", {"value": 2}, timeout_s=10) == 2, "another worker is there"
    assert f"limit      {limit}" in running.command("why", certificate["worker_id"]).stdout


def test_what_stays_below_its_limits_is_left_alone(running: Running) -> None:
    with running.client() as client:
        before = client.call("system.status", {})["deaths"]
        assert client.call("greedy.memory", {"mb": 40}, timeout_s=10) == 40
        assert client.call("greedy.connect", {"count": 8, "seconds": 0.3}, timeout_s=10) == 8
        assert client.call("greedy.start", {"count": 6, "seconds": 0.3}, timeout_s=10) == 6
        assert client.call("greedy.write", {"mb": 20}, timeout_s=10) == 20
        assert client.call("system.status", {})["deaths"] == before


def test_a_worker_that_does_not_let_go_of_memory_gets_no_calls_and_is_replaced(running: Running) -> None:
    with running.client() as client:

        def worker() -> dict[str, Any]:
            pools = client.call("system.status", {})["pools"]
            found: dict[str, Any] = next(p for p in pools if p["name"] == "modest")["workers"][0]
            return found

        before = worker()
        assert client.call("modest.leak", {"mb": 58}, timeout_s=10) == 1
        throttled = wait_for(lambda: (now := worker())["pressure"] == "throttle" and now, what="the level")
        assert (throttled["id"], throttled["limit"]) == (before["id"], "memory_mb")
        begun = time.monotonic()
        assert client.call("modest.leak", {"mb": 1}, timeout_s=10) == 1, "it waits for another one"
        assert time.monotonic() - begun > 0.5
        assert worker()["id"] != before["id"]
