"""Sandboxes as processes: who is in them, how they end, and that their ends are told as they were."""

from __future__ import annotations

import json
import os
import signal
import socket
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import proctable
from mcp_broker.config import PoolTable
from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor.endpoint import Endpoint
from mcp_broker.supervisor.launch import WorkerOrder
from mcp_broker.supervisor.launch.local import LocalLauncher
from mcp_broker.supervisor.launch.sandbox import SandboxedProcess, SandboxLauncher
from mcp_broker.supervisor.poller import Poller
from mcp_broker.supervisor.tether import new_ends
from mcp_broker.wire.confinement import Confinement
from tests.isolation.conftest import IS_ROOT, need_sandbox
from tests.support import descriptors
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from mcp_broker.supervisor.process import Exit

pytestmark = [pytest.mark.process, pytest.mark.slow]

#: of the sandboxes that root makes here
UID = 61_617

PREAMBLE = """
import json, os, signal, socket, sys, time
tether = socket.socket(fileno=int(sys.argv[sys.argv.index("--tether-fd") + 1]))
def tell(what): tether.send(json.dumps(what).encode())
def wait(): tether.recv(1)
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            while True: time.sleep(60)
        os._exit(0)
"""


class Sandbox:
    """A running one, and the test's end of its tether."""

    def __init__(self, process: SandboxedProcess, poller: Poller, tether: socket.socket) -> None:
        self.process = process
        self.poller = poller
        self.tether = tether
        self.end: Exit | None = None

    def turn_until(self, condition: Callable[[], Any], what: str) -> Any:
        def turned() -> Any:
            self.poller.turn(0.01)
            return condition()

        return wait_for(turned, what=what)

    def told(self) -> Any:
        """Return the next thing that the program tells; by then it is known to us."""
        self.tether.settimeout(10)
        told = json.loads(self.tether.recv(65536))
        self.turn_until(lambda: self.process.main_pid != self.process.pid, "the worker's birth is told")
        return told

    def ended(self) -> Exit:
        self.turn_until(lambda: self.end is not None, "the sandbox ends")
        assert self.end is not None
        return self.end

    def inhabitants(self) -> set[int]:
        """Return all processes in it, as they are called out here."""
        below, queue = set(), [self.process.pid]
        while queue:
            found = proctable.children(queue.pop())
            below |= found
            queue += found
        return below


Make = Callable[..., Sandbox]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Start a program in a sandbox."""
    need_sandbox()
    poller = Poller()
    started: list[Sandbox] = []
    tools = tmp_path / "tools"
    tools.mkdir()
    launcher = SandboxLauncher(LocalLauncher(), (str(tools / "program.py"),))

    def begin(program: str, **confinement: Any) -> Sandbox:
        (tools / "program.py").write_text(PREAMBLE + textwrap.dedent(program))
        name = f"w-{len(started)}"
        scratch = tmp_path / name
        scratch.mkdir(mode=0o700)
        uid = UID if IS_ROOT else None
        endpoint = Endpoint(scratch / ".broker", name, None if uid is None else (uid, uid))
        if uid is not None:
            os.chown(scratch, uid, uid)
        ours, theirs = new_ends()
        order = WorkerOrder(
            worker_id=name,
            instance="of-a-test",
            pool=PoolTable(module="program", path=(str(tools),)),
            boot=b"",
            pass_fds=(),
            tether_fd=theirs.fileno(),
            scratch=scratch,
            confinement=Confinement(
                level="sandboxed",
                uid=uid,
                endpoint_folder=str(endpoint.folder),
                **{"network": "none", **confinement},
            ),
        )

        def exited(end: Exit) -> None:
            sandbox.end = end

        try:
            process = launcher.launch_worker(order, poller, exited)
        except SupervisionError:
            ours.close()
            raise
        finally:
            theirs.close()
            endpoint.close()
        assert isinstance(process, SandboxedProcess)
        sandbox = Sandbox(process, poller, ours)
        started.append(sandbox)
        return sandbox

    yield begin
    for sandbox in started:
        if sandbox.end is None:
            for _ in range(2):
                sandbox.process.kill()
            sandbox.ended()
        sandbox.tether.close()
    launcher.stop()
    poller.close()


def is_gone(pid: int) -> bool:
    entry = proctable.read(pid)
    return entry is None or entry.state == "Z"


def survivors(pids: set[int]) -> set[int]:
    return {pid for pid in pids if not is_gone(pid)}


def test_a_sandbox_starts_and_its_end_is_told_also_by_who_holds_a_thousand_descriptors(make: Make) -> None:
    with descriptors.held():
        assert make("sys.exit(3)").ended().code == 3


def test_an_exit_with_137_and_a_kill_are_told_apart(make: Make) -> None:
    # bubblewrap itself says 137 of both
    exited = make("sys.exit(137)").ended()
    assert (exited.code, exited.signal) == (137, None)
    killed = make("os.kill(os.getpid(), signal.SIGKILL)").ended()
    assert (killed.code, killed.signal) == (None, signal.SIGKILL)
    stopped = make("os.abort()").ended()
    assert (stopped.code, stopped.signal_name) == (None, "SIGABRT")


def test_an_end_tells_what_the_worker_cost(make: Make) -> None:
    sandbox = make(
        "began = time.process_time()\nx = b'x' * (64 << 20)\nwhile time.process_time() - began < 0.2: pass"
    )
    end = sandbox.ended()
    assert end.code == 0
    assert end.cpu_s >= 0.2
    assert end.max_rss_kib > 64 << 10


def test_an_exception_and_a_text_as_exit_code_end_as_in_any_interpreter(make: Make) -> None:
    raised = make("raise ValueError('no way')")
    assert raised.ended().code == 1
    assert "ValueError: no way" in raised.process.stderr_tail
    said = make("sys.exit('enough')")
    assert said.ended().code == 1
    assert said.process.stderr_tail.strip().endswith("enough")


def test_signals_reach_the_worker_and_nobody_else(make: Make) -> None:
    sandbox = make("""
        signal.signal(signal.SIGUSR1, lambda *_: tell("interrupted"))
        tell(os.getpid())
        wait()
    """)
    assert sandbox.told() != sandbox.process.main_pid
    sandbox.process.signal(signal.SIGUSR1)
    assert sandbox.told() == "interrupted"
    sandbox.process.signal(signal.SIGTERM)
    assert sandbox.ended().signal == signal.SIGTERM


def test_sigterm_to_the_first_process_is_the_workers(make: Make) -> None:
    sandbox = make("tell('up')\nwait()")
    sandbox.told()
    first = proctable.read(sandbox.process.main_pid)
    assert first is not None
    os.kill(first.ppid, signal.SIGTERM)
    assert sandbox.ended().signal == signal.SIGTERM


def test_nobody_survives_a_killed_worker_be_it_a_daemon_that_ignores_all(make: Make) -> None:
    sandbox = make("""
        for _ in range(4):
            if os.fork() == 0: time.sleep(60)
        daemon()
        tell("up")
        wait()
    """)
    sandbox.told()
    # the first process, the worker, its children, and the daemon
    sandbox.turn_until(lambda: len(survivors(sandbox.inhabitants())) == 7, "all are there")
    inhabitants = sandbox.inhabitants()
    (daemon,) = sandbox.process.orphans()
    assert daemon in inhabitants
    sandbox.process.kill()
    assert sandbox.ended().signal == signal.SIGKILL
    assert survivors(inhabitants) == set(), "by the time that its end is told"


def test_nobody_survives_a_worker_that_ends_by_itself(make: Make) -> None:
    sandbox = make("daemon()\ntell('up')\nwait()\nsys.exit(3)")
    sandbox.told()
    sandbox.turn_until(sandbox.process.orphans, "the daemon is adopted")
    inhabitants = sandbox.inhabitants()
    sandbox.tether.send(b"x")
    assert sandbox.ended().code == 3
    assert survivors(inhabitants) == set()


@pytest.mark.parametrize("whom", ["bubblewrap", "the first process"])
def test_nobody_survives_a_killed_sandbox_and_the_certificate_says_so(make: Make, whom: str) -> None:
    sandbox = make("daemon()\ntell('up')\nwait()")
    sandbox.told()
    sandbox.turn_until(sandbox.process.orphans, "the daemon is adopted")
    inhabitants = sandbox.inhabitants()
    entry = proctable.read(sandbox.process.main_pid)
    assert entry is not None
    os.kill(sandbox.process.pid if whom == "bubblewrap" else entry.ppid, signal.SIGKILL)
    assert sandbox.ended().signal == signal.SIGKILL
    wait_for(lambda: not survivors(inhabitants), what="everybody being gone", within_s=1.0)


def test_a_stopped_worker_can_be_killed(make: Make) -> None:
    sandbox = make("tell('up')\nos.kill(os.getpid(), signal.SIGSTOP)")
    sandbox.told()
    sandbox.process.kill()
    assert sandbox.ended().signal == signal.SIGKILL


def test_killed_before_it_is_born_it_never_runs(make: Make) -> None:
    sandbox = make("tell('up')\nwait()")
    sandbox.process.kill()
    assert sandbox.ended().signal == signal.SIGKILL
    assert not survivors(sandbox.inhabitants())


def test_the_first_process_cannot_be_read_stopped_or_ended_from_inside(make: Make) -> None:
    sandbox = make("""
        told = {}
        for what, attempt in {
            "memory": lambda: open("/proc/1/mem", "rb"),
            "descriptors": lambda: os.listdir("/proc/1/fd"),
            "environment": lambda: open("/proc/1/environ", "rb").read(),
            "root": lambda: os.listdir("/proc/1/root"),
        }.items():
            try:
                attempt()
                told[what] = "done"
            except OSError as error:
                told[what] = error.errno
        for number in (signal.SIGKILL, signal.SIGSTOP):
            os.kill(1, number)
        tell(told)
        wait()
        sys.exit(5)
    """)
    assert set(sandbox.told().values()) <= {1, 13}
    sandbox.tether.send(b"x")
    assert sandbox.ended().code == 5, "and still it tells the end"


def test_a_missing_folder_is_named_before_anything_starts(make: Make, tmp_path: Path) -> None:
    if not IS_ROOT:
        pytest.skip("an ordinary user hears it from bubblewrap, see the next test")
    with pytest.raises(SupervisionError, match=r"cannot make a sandbox: .*No such file"):
        make("pass", read=(str(tmp_path / "missing"),))


def test_a_sandbox_that_cannot_be_made_ends_in_bubblewraps_own_words(make: Make, tmp_path: Path) -> None:
    if IS_ROOT:
        pytest.skip("as root the folder is missed before bubblewrap is started")
    sandbox = make("pass", read=(str(tmp_path / "missing"),))
    assert sandbox.ended().code == 1
    assert "Can't find source path" in sandbox.process.stderr_tail


def test_descriptors_of_ours_do_not_get_in_and_the_first_process_keeps_none(make: Make) -> None:
    sandbox = make("tell(sorted(int(fd) for fd in os.listdir('/proc/self/fd')))\nwait()")
    held = sandbox.told()
    # standard streams, its tether and its boot record; the namespace's, and the one that reads the folder
    assert len(held) <= 7
    if not IS_ROOT:
        # nobody but root looks into the first process, not even who started it
        return
    first = proctable.read(sandbox.process.main_pid)
    assert first is not None
    links = [str(path.readlink()) for path in Path(f"/proc/{first.ppid}/fd").iterdir()]
    # standard streams, its status socket and its wake-up pipe
    assert len(links) == 6


def test_memory_files_of_a_sandbox_have_a_size(make: Make) -> None:
    sandbox = make("""
        told = {}
        for folder in ("/tmp", "/dev/shm"):
            try:
                with open(folder + "/file", "wb") as file:
                    for _ in range(80): file.write(bytes(1 << 20))
                told[folder] = "done"
            except OSError as error:
                told[folder] = error.errno
        tell(told)
        wait()
    """)
    assert sandbox.told() == {"/tmp": 28, "/dev/shm": 28}


def test_a_scratch_in_memory_has_the_size_that_it_is_given(make: Make) -> None:
    sandbox = make(
        """
        tell([os.stat(".").st_uid == os.getuid(), oct(os.stat(".").st_mode & 0o777)])
        try:
            with open("file", "wb") as file:
                for _ in range(8): file.write(bytes(1 << 20))
            tell("done")
        except OSError as error:
            tell(error.errno)
        wait()
        """,
        scratch_mb=4,
    )
    assert sandbox.told() == [True, "0o700"]
    assert sandbox.told() == 28


@pytest.mark.parametrize("network", ["none", "loopback", "full"])
def test_a_network_is_its_own_unless_it_is_to_be_the_hosts(make: Make, network: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host:
        port = host.getsockname()[1]
        sandbox = make(
            f"""
            own = socket.create_server(("127.0.0.1", 0))
            socket.create_connection(own.getsockname()).close()
            try:
                socket.create_connection(("127.0.0.1", {port})).close()
                reached = True
            except OSError:
                reached = False
            tell([reached, sorted(name for _, name in socket.if_nameindex())])
            wait()
            """,
            network=network,
        )
        reached, interfaces = sandbox.told()
    assert reached is (network == "full")
    if network != "full":
        assert interfaces == ["lo"]


def test_pids_and_shared_memory_of_a_sandbox_are_its_own(make: Make) -> None:
    sandbox = make("""
        from multiprocessing.shared_memory import SharedMemory
        segment = SharedMemory(create=True, size=4096)
        tell([os.getpid(), os.getppid(), segment.name])
        wait()
    """)
    pid, parent, name = sandbox.told()
    assert (pid, parent) == (2, 1)
    assert not Path("/dev/shm", name).exists()
    status = Path(f"/proc/{sandbox.process.main_pid}/status").read_text()
    depth = status.partition("NSpid:")[2].splitlines()[0].split()
    assert depth == [str(sandbox.process.main_pid), "2"]
    began = time.monotonic()
    sandbox.process.kill()
    sandbox.ended()
    assert time.monotonic() - began < 5
