"""Each limit, exceeded by a real tool in a real worker: the caller gets its name, neighbours do not notice."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from mcp_broker.errors import CallError, ResourceExhausted
from mcp_broker.supervisor import cgroups, gauge
from mcp_broker.supervisor.isolation import probe
from mcp_broker.supervisor.isolation.sandbox import try_it
from tests.support.running import Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOOLS = '''
"""Tools that use too much of something."""
import hashlib, mmap, os, re, signal, socket, subprocess, sys, time
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

@tool(name="{pool}.grab")
def grab(mb: int) -> int:
    """Take memory in one go."""
    return len(bytearray(b"x") * (mb << 20))

@tool(name="{pool}.bomb")
def bomb() -> None:
    """Start processes that start processes."""
    while True:
        os.fork()

def page():
    """Find what this worker shares with its supervisor."""
    for path in Path("/proc/self/fd").iterdir():
        if path.is_symlink() and "mcpb-marks" in os.readlink(path):
            return mmap.mmap(int(path.name), 4096)

@tool(name="{pool}.feign_rest")
def feign_rest() -> None:
    """Compute, and say that nothing runs."""
    shared = page()
    shared[16 + 240 * 16 : 16 + 240 * 16 + 8] = shared[:8]
    while True:
        hashlib.sha256(b"x" * 100000).digest()

@tool(name="{pool}.feign_other")
def feign_other() -> None:
    """Hear nothing, and say that another call runs by now."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
    page()[:8] = (2**40).to_bytes(8, sys.byteorder)
    time.sleep(60)

@tool(name="{pool}.open_many", open_files=90)
def open_many(count: int) -> int:
    """Open files, and need to."""
    return len([open(os.devnull) for _ in range(count)])

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
    family = socket.AF_UNIX
    try:
        socket.socket(family).close()
    except OSError:
        # a worker that reaches its broker by a port has this one kind instead
        family = socket.AF_INET
    own = [socket.socket(family) for _ in range(count)]
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

def hide(fd: int, mb: int = 4) -> None:
    """Take room for a file, and hold it by a mapping that nobody touches, without descriptor or name."""
    import ctypes
    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    os.posix_fallocate(fd, 0, mb << 20)
    libc.mmap(None, mb << 20, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    time.sleep(0.01)

@tool(name="{pool}.map_removed")
def map_removed(context: ToolContext, mb: int) -> int:
    """Fill the scratch folder with files that have no name any more."""
    for _ in range(mb // 4):
        fd = os.open(context.scratch / "x", os.O_RDWR | os.O_CREAT)
        os.unlink(context.scratch / "x")
        hide(fd)
    return mb

@tool(name="{pool}.map_memory")
def map_memory(mb: int) -> int:
    """Fill memory with files that no process has open."""
    for _ in range(mb // 4):
        hide(os.memfd_create("x"))
    return mb
'''

POOL = """
[pools.{pool}]
module = "tools_{pool}"
path = ["{folder}/tools"]
isolation = "{level}"

[pools.{pool}.limits]
memory_mb = 60
cpu_s = 0.4
open_files = 20
connections = 8
processes = 6
scratch_mb = 30
"""


#: runs a start as on a machine where no control group can be made; the words after it name the usual program
UNGROUPED = """
import sys
from mcp_broker.supervisor import cgroups
cgroups.hierarchies = lambda *_: []
from mcp_broker.cli import main
del sys.argv[1:4]
main()
"""


def text_of(folder: Path, **levels: str) -> str:
    # a worker with a uid of its own has to read it
    (folder / "tools").mkdir(mode=0o755)
    for pool in levels:
        (folder / "tools" / f"tools_{pool}.py").write_text(TOOLS.replace("{pool}", pool))
    pools = (POOL.replace("{pool}", pool).replace("{level}", level) for pool, level in levels.items())
    return "".join(pools).replace("{folder}", str(folder))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("limits")
    with Running(folder, config=text_of(folder, greedy="process", modest="process")) as started:
        yield started


@pytest.fixture(scope="module")
def ungrouped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("ungrouped")
    config = text_of(folder, greedy="process", modest="process")
    with Running(folder, config=config, prefix=(sys.executable, "-c", UNGROUPED)) as started:
        yield started


def confined(folder: Path, level: str, *primitives: str) -> Iterator[Running]:
    for name in primitives:
        tried = probe.attempt(name, {**probe.PRIMITIVES, "sandbox": try_it}[name])
        if not tried.works:
            pytest.skip(f"`{level}` is refused on this machine: {name}: {tried.detail}")
    with Running(folder, config=text_of(folder, greedy=level, modest="process")) as started:
        yield started


@pytest.fixture(scope="module")
def restricted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from confined(tmp_path_factory.mktemp("restricted"), "restricted", "landlock", "seccomp")


@pytest.fixture(scope="module")
def sandboxed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from confined(tmp_path_factory.mktemp("sandboxed"), "sandboxed", "landlock", "seccomp", "sandbox")


def refusal(running: Running, tool: str, **arguments: Any) -> CallError:
    with running.client() as client, pytest.raises(CallError) as refused:
        client.call(tool, arguments, timeout_s=25)
    return refused.value


MEMORY = [
    ("memory", {"mb": 300}, "memory_mb"),
    ("memory_file", {"mb": 300}, "memory_mb"),
    ("child_memory", {"mb": 300}, "memory_mb"),
    ("map_memory", {"mb": 800}, "memory_mb"),
]
CPU: list[tuple[str, dict[str, Any], str]] = [
    ("spin", {}, "cpu_s"),
    ("match", {}, "cpu_s"),
    ("child_spin", {}, "cpu_s"),
    ("feign_rest", {}, "cpu_s"),
]
OTHERS = [
    ("connect", {"count": 12, "seconds": 20}, "connections"),
    ("start", {"count": 12, "seconds": 20}, "processes"),
    ("write", {"mb": 200}, "scratch_mb"),
    ("map_removed", {"mb": 800}, "scratch_mb"),
]


@pytest.mark.parametrize(("tool", "arguments", "limit"), [*MEMORY, *CPU, *OTHERS])
def test_a_call_that_exceeds_a_limit_is_killed_and_says_which(
    running: Running, tool: str, arguments: dict[str, Any], limit: str
) -> None:
    check(running, tool, arguments, limit)


@pytest.mark.parametrize(("tool", "arguments", "limit"), [*MEMORY[1:], OTHERS[1]])
def test_without_control_groups_limits_are_measured_all_the_same(
    ungrouped: Running, tool: str, arguments: dict[str, Any], limit: str
) -> None:
    check(ungrouped, tool, arguments, limit)


@pytest.mark.parametrize(("tool", "arguments", "limit"), [MEMORY[1], CPU[1], *OTHERS])
def test_a_restricted_worker_has_the_same_limits(
    restricted: Running, tool: str, arguments: dict[str, Any], limit: str
) -> None:
    check(restricted, tool, arguments, limit)


@pytest.mark.parametrize(("tool", "arguments", "limit"), [MEMORY[1], CPU[1], *OTHERS[1:]])
def test_a_sandboxed_worker_has_the_same_limits(
    sandboxed: Running, tool: str, arguments: dict[str, Any], limit: str
) -> None:
    check(sandboxed, tool, arguments, limit)


def test_a_tool_that_claims_that_another_call_runs_is_killed_for_its_deadline_all_the_same(
    running: Running,
) -> None:
    with running.client() as client:

        def workers() -> set[str]:
            pools = client.call("system.status", {})["pools"]
            return {one["id"] for pool in pools if pool["name"] == "modest" for one in pool["workers"]}

        before = workers()
        with pytest.raises(CallError) as late:
            client.call("modest.feign_other", {}, timeout_s=0.5)
        assert late.value.code == "DEADLINE_EXCEEDED"
        wait_for(lambda: workers() and not workers() & before, what="another worker has taken its place")
        assert client.call("modest.echo", {"value": 1}, timeout_s=10) == 1
        certificate = client.call("system.why", {"id": before.pop()})["certificate"]
    assert certificate["kind"] == "deadline"


def check(running: Running, tool: str, arguments: dict[str, Any], limit: str) -> None:
    """Exceed a limit while a neighbour of another pool calls on."""
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
    try:
        error = refusal(running, f"greedy.{tool}", **arguments)
    finally:
        over.set()
        thread.join()
    assert isinstance(error, ResourceExhausted), (error.code, error.message)
    details = error.details
    assert details["limit"] == limit
    assert details["used"] >= details["limit_value"] > 0
    certificate = details["certificate"]
    assert (certificate["kind"], certificate["limit"]) == ("limit", limit)
    # what the kernel kills it kills without asking
    assert certificate["is_oom"] or f"in {tool}" in certificate["stack"]
    assert sorted(waits)[len(waits) // 2] < 0.1, "the neighbour's calls go on"
    with running.client() as client:
        assert client.call("greedy.echo", {"value": 2}, timeout_s=10) == 2, "another worker is there"


def test_why_tells_the_limit_and_what_the_worker_was_doing(running: Running) -> None:
    error = refusal(running, "greedy.match")
    said = running.command("why", error.details["certificate"]["worker_id"]).stdout
    assert "limit      cpu_s = 0.4, used 0." in said
    assert "ran        greedy.match, call " in said
    assert "in match" in said


@pytest.mark.parametrize("where", ["running", "restricted"])
def test_files_beyond_the_limit_cannot_be_opened_and_the_worker_lives(
    where: str, request: pytest.FixtureRequest
) -> None:
    broker: Running = request.getfixturevalue(where)
    error = refusal(broker, "greedy.files", count=100)
    assert (error.code, error.details["limit"]) == ("RESOURCE_EXHAUSTED", "open_files")
    assert error.details["limit_value"] == 20
    assert error.details["type"] == "OSError"
    assert "certificate" not in error.details


def test_what_takes_a_gigabyte_in_one_go_ends_at_the_wall(running: Running) -> None:
    error = refusal(running, "greedy.grab", mb=1024)
    assert (error.code, error.details["limit"]) == ("RESOURCE_EXHAUSTED", "memory_mb")


def test_a_fork_bomb_ends_at_the_wall_and_nothing_of_it_is_left(running: Running) -> None:
    groups = cgroups.open_groups("limits-test", "pids")
    if groups is None:
        pytest.skip("no control group can be made here, so nothing would stop it")
    groups.close()
    error = refusal(running, "greedy.bomb")
    # every process takes some memory, too
    assert error.code == "RESOURCE_EXHAUSTED"
    assert error.details["limit"] in {"processes", "memory_mb"}
    # the worker itself may meet the wall first: then it answers, and is killed only if it is above its limit still
    with running.client() as client:

        def is_alone() -> bool:
            pools = client.call("system.status", {})["pools"]
            workers = {one["pid"] for pool in pools if pool["name"] == "greedy" for one in pool["workers"]}
            ours = psutil.Process(running.process.pid).children(recursive=True)
            return (
                workers
                == {one.pid for one in ours if gauge.of_worker(one.pid).startswith("greedy-")}
                != set()
            )

        wait_for(is_alone, what="the end of all that it started")
        assert client.call("greedy.echo", {"value": 3}, timeout_s=10) == 3


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


def test_a_worker_is_replaced_after_its_calls_and_no_call_notices(tmp_path: Path) -> None:
    config = text_of(tmp_path, young="process").replace(
        "[pools.young.limits]", "[pools.young.limits]\nrecycle_calls = 5"
    )
    with Running(tmp_path, config=config) as running, running.client() as client:

        def workers() -> set[str]:
            pool = next(one for one in client.call("system.status", {})["pools"] if one["name"] == "young")
            return {worker["id"] for worker in pool["workers"]}

        seen: set[str] = set()

        def are_three() -> bool:
            assert client.call("young.echo", {"value": 1}, timeout_s=10) == 1
            seen.update(workers())
            return len(seen) >= 3

        wait_for(are_three, within_s=20, what="the third worker")
        assert client.call("system.status", {})["calls"]["failed"] == {}


def test_a_tool_that_asks_for_more_files_gets_them(tmp_path: Path) -> None:
    config = text_of(tmp_path, asks="process").replace("open_files = 20", "")
    with Running(tmp_path, config=config) as running, running.client() as client:
        assert client.call("asks.open_many", {"count": 85}, timeout_s=10) == 85
        error = refusal(running, "asks.open_many", count=150)
        assert (error.details["limit"], error.details["limit_value"]) == ("open_files", 90)
