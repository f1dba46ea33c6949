"""A process that confines itself, without a broker: in a fork of the test, as a zygote's child would."""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from mcp_broker import confine
from mcp_broker.confine import folders, kernel, rlimits
from mcp_broker.errors import ConfigError
from mcp_broker.wire.confinement import Confinement

IS_ROOT = os.geteuid() == 0
#: nobody's, and of no other run of these tests
UID = 1_950_000_000 + os.getpid()
TCP = "tcp://127.0.0.1:9"

as_root = pytest.mark.skipif(not IS_ROOT, reason="only root has mounts and uids to give")


class Cage:
    """Runs work in a confined child, and returns what it returned, or "ERRNO" of the OSError that it raised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.scratch = folder / "scratch"
        self.scratch.mkdir(mode=0o700)
        if IS_ROOT:
            os.chown(self.scratch, UID, UID)

    def run(
        self, work: Callable[[], object], endpoint: str = TCP, path: tuple[str, ...] = (), **keys: Any
    ) -> Any:
        own = {"uid": UID, "own_mounts": True} if IS_ROOT else {}
        confinement = Confinement(**{"level": "restricted", "network": "none", **own, **keys})
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(
                    theirs, json.dumps(self._in_child(work, confinement, endpoint, path, theirs)).encode()
                )
            finally:
                os._exit(0)
        os.close(theirs)
        with os.fdopen(ours, "rb") as answer:
            said = answer.read()
        _, status = os.waitpid(child, 0)
        return json.loads(said) if said else f"ended with {os.waitstatus_to_exitcode(status)}"

    def _in_child(
        self,
        work: Callable[[], object],
        confinement: Confinement,
        endpoint: str,
        path: tuple[str, ...],
        answer: int,
    ) -> object:
        scratch = str(self.scratch)
        try:
            confine.apply(confinement, scratch=scratch, endpoint=endpoint, path=path, keep=(answer,))
            return work()
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        except BaseException as error:  # noqa: BLE001 (told by the parent)
            return f"{type(error).__name__}: {error}"


@pytest.fixture
def cage(tmp_path: Path) -> Cage:
    # as a zygote has: the library, and no context
    assert zmq.zmq_version_info() >= (4, 3, 4)
    return Cage(tmp_path)


def forks(most: int) -> int:
    """Fork until nothing more comes; return how often it did."""
    children = []
    try:
        for _ in range(most):
            child = os.fork()
            if child == 0:
                signal.pause()
            children.append(child)
    except BlockingIOError:
        pass
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return len(children)


@as_root
def test_a_fork_bomb_ends_at_the_limit_of_the_workers_uid(cage: Cage) -> None:
    assert cage.run(lambda: forks(50), rlimits={"nproc": 20}) == 19


def test_descriptors_end_at_their_limit(cage: Cage) -> None:
    assert cage.run(lambda: [os.dup(0) for _ in range(50)], rlimits={"nofile": 20}) == "EMFILE"


def test_a_file_ends_at_its_limit_also_one_in_memory(cage: Cage) -> None:
    def fill() -> object:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.write(os.memfd_create("x"), b"x" * 4096)
        return os.pwrite(os.memfd_create("x"), b"x" * 4096, 4096)

    assert cage.run(fill, rlimits={"fsize": 4096}) == "EFBIG"


def test_a_limit_that_there_is_not_is_our_fault_and_refused(cage: Cage) -> None:
    said = cage.run(lambda: 1, rlimits={"nonsense": 1})
    assert (
        said
        == "ConfigError: cannot be confined at level restricted: setrlimit nonsense: EINVAL (Invalid argument)"
    )


def test_a_limit_above_the_hard_one_becomes_that(cage: Cage) -> None:
    def nested() -> object:
        rlimits.limit({"nofile": 4000})
        return resource.getrlimit(resource.RLIMIT_NOFILE)

    assert cage.run(nested, rlimits={"nofile": 40}) == [40, 40]


@as_root
def test_a_scratch_folder_in_memory_is_full_at_its_size_and_gone_afterwards(cage: Cage) -> None:
    def fill() -> object:
        assert Path.cwd() == cage.scratch
        with Path("file").open("wb", buffering=0) as file:
            file.writelines(b"x" * 1024 * 1024 for _ in range(3))
        return "no end"

    assert cage.run(fill, scratch_mb=2) == "ENOSPC"
    assert list(cage.scratch.iterdir()) == []


@as_root
def test_shared_memory_is_its_own_and_has_a_size(cage: Cage) -> None:
    def fill() -> object:
        assert list(Path("/dev/shm").iterdir()) == []
        Path("/dev/shm/x").write_bytes(b"x" * 3 * 1024 * 1024)
        return "no end"

    assert cage.run(fill, shm_mb=2) == "ENOSPC"
    assert not Path("/dev/shm/x").exists()


def test_a_hidden_folder_stays_closed_below_an_open_one(cage: Cage) -> None:
    data = cage.folder / "data"
    for name in ("state", "other"):
        (data / name).mkdir(parents=True)
        (data / name / "file").write_text("x")
    keys: dict[str, Any] = {"read": (str(data),), "hidden": (str(data / "state"),)}
    assert cage.run((data / "other" / "file").read_text, **keys) == "x"
    assert cage.run((data / "state" / "file").read_text, **keys) in {"ENOENT", "EACCES"}
    # what is not listed cannot be imported from
    assert cage.run(lambda: sorted(entry.name for entry in data.iterdir()), **keys) == ["other", "state"]


def test_tools_may_stand_beside_the_state_directory_which_stays_closed(cage: Cage) -> None:
    """As in a project's folder that everything was put into."""
    (cage.folder / "state").mkdir()
    (cage.folder / "state" / "key").write_text("secret")
    (cage.folder / "beside_the_state.py").write_text("WORD = 'here'")

    def use() -> object:
        sys.path.insert(0, str(cage.folder))
        word = importlib.import_module("beside_the_state").WORD
        try:
            return word, (cage.folder / "state" / "key").read_text()
        except OSError as error:
            return word, errno.errorcode[error.errno or 0]

    found = cage.run(use, path=(str(cage.folder),), hidden=(str(cage.folder / "state"),))
    assert found in (["here", "ENOENT"], ["here", "EACCES"])


def test_a_scratch_folder_in_a_hidden_one_is_open_and_those_beside_it_are_not(cage: Cage) -> None:
    """As where the tools stand beside the runtime folder."""
    own, other = cage.folder / "run" / "a-1", cage.folder / "run" / "b-2"
    other.mkdir(parents=True)
    (other / "file").write_text("x")
    cage.scratch.rename(own)
    cage.scratch = own
    keys: dict[str, Any] = {"path": (str(cage.folder),), "hidden": (str(cage.folder / "run"),)}
    assert cage.run(lambda: (own / "mine").write_text("mine"), **keys) == 4
    assert cage.run((other / "file").read_text, **keys) in {"ENOENT", "EACCES"}
    assert cage.run(lambda: (other / "file").write_text("y"), **keys) in {"ENOENT", "EACCES"}


def test_a_folder_that_is_not_there_is_named(cage: Cage) -> None:
    gone = str(cage.folder / "gone")
    said = cage.run(lambda: 1, read=(gone,))
    assert said is not None
    assert f"cannot be confined at level restricted: the pool's read names {gone}: ENOENT" in said


def test_a_link_may_be_read_by_its_name_and_by_where_it_leads(cage: Cage) -> None:
    (cage.folder / "real").mkdir()
    (cage.folder / "real" / "file").write_text("x")
    (cage.folder / "link").symlink_to(cage.folder / "real")
    for name in ("link", "real"):
        assert cage.run((cage.folder / name / "file").read_text, read=(str(cage.folder / "link"),)) == "x"


@as_root
def test_a_folder_to_write_in_may_lie_in_one_to_read(cage: Cage) -> None:
    (cage.folder / "data" / "out").mkdir(parents=True)
    keys: dict[str, Any] = {
        "read": (str(cage.folder / "data"),),
        "write": (str(cage.folder / "data" / "out"),),
    }
    assert cage.run(lambda: (cage.folder / "data" / "out" / "x").write_text("x"), **keys) == 1
    assert cage.run(lambda: (cage.folder / "data" / "x").write_text("x"), **keys) == "EROFS"


@as_root
def test_what_belongs_to_the_folders_owner_is_the_workers_to_change(cage: Cage) -> None:
    out = cage.folder / "out"
    out.mkdir(mode=0o700)
    (out / "old").write_text("old")
    (out / "old").chmod(0o600)
    os.chown(out, 1234, 1234)
    os.chown(out / "old", 1234, 1234)
    assert cage.run(lambda: (out / "old").write_text("new"), write=(str(out),)) == 3
    assert cage.run(lambda: (out / "new").write_text("new"), write=(str(out),)) == 3
    assert ((out / "old").read_text(), (out / "new").stat().st_uid) == ("new", 1234)


@as_root
def test_folders_of_tools_may_be_closed_to_others(cage: Cage) -> None:
    tools = cage.folder / "tools"
    tools.mkdir(mode=0o700)
    (tools / "file").touch(mode=0o600)
    assert cage.run((tools / "file").read_text, path=(str(tools),)) == ""


@as_root
def test_a_network_of_its_own_has_a_loopback_and_nothing_else(cage: Cage) -> None:
    host = socket.create_server(("127.0.0.1", 0))
    port = host.getsockname()[1]

    def talk() -> object:
        with socket.create_server(("127.0.0.1", 0)) as own, socket.create_connection(own.getsockname()):
            pass
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED

    keys: dict[str, Any] = {"network": "loopback", "own_network": True, "endpoint": "ipc:///run/broker/x"}
    assert cage.run(talk, **keys) is True
    host.close()


def test_tcp_reaches_the_broker_and_no_other_port(cage: Cage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as broker, socket.create_server(("127.0.0.1", 0)) as other:
        ports = (broker.getsockname()[1], other.getsockname()[1])

        def connect(port: int) -> Callable[[], object]:
            return lambda: socket.create_connection(("127.0.0.1", port), 5).close()

        endpoint = f"tcp://127.0.0.1:{ports[0]}"
        assert cage.run(connect(ports[0]), endpoint) is None
        assert cage.run(connect(ports[1]), endpoint) == "EACCES"


def test_fast_open_does_not_reach_another_port_either(cage: Cage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = other.getsockname()

        def sneak() -> object:
            with socket.socket() as one:
                return one.sendto(b"x", 0x20000000, address)

        assert cage.run(sneak) == "EPERM"


def test_a_context_and_its_threads_work_afterwards(cage: Cage) -> None:
    def use() -> object:
        with zmq.Context() as context, context.socket(zmq.PAIR) as left, context.socket(zmq.PAIR) as right:
            left.bind("inproc://x")
            right.connect("inproc://x")
            left.send(b"x")
            return right.recv().decode()

    assert cage.run(use) == "x"


def test_a_full_network_leaves_names_and_addresses_open(cage: Cage) -> None:
    def use() -> object:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM):
            return bool(socket.getaddrinfo("localhost", 80))

    assert cage.run(use, network="full") is True


def test_a_process_with_two_threads_is_not_confined_by_half() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="while it has one thread"):
            confine.apply(Confinement(), scratch="/", endpoint=TCP)
    finally:
        stop.set()
        thread.join()


# -- folders ------------------------------------------------------------------------------------------


def test_a_folder_is_opened_without_what_is_hidden_in_it(tmp_path: Path) -> None:
    for name in ("a/b/c", "a/b/d", "a/e", "f"):
        (tmp_path / name).mkdir(parents=True)
    top = str(tmp_path)
    assert folders.carved(top, []) == (top,)
    assert folders.carved(top, ["/elsewhere"]) == (top,)
    assert folders.carved(top, [f"{top}/a/b/c"]) == (f"{top}/a/b/d", f"{top}/a/e", f"{top}/f")
    assert folders.carved(f"{top}/a", [f"{top}/a"]) == ()


def test_folders_within_others_are_left_out() -> None:
    assert folders.outermost(["/usr/lib", "/usr", "/usrx", "/opt/a"]) == ("/opt/a", "/usr", "/usrx")


def test_the_whole_file_system_is_never_a_folder_to_open() -> None:
    assert folders.existing(["/", "/usr", "/none"])[:1] == ("/usr",)


def test_a_refusal_names_the_step_and_the_errno() -> None:
    assert (
        str(kernel.Refused(errno.EOPNOTSUPP, "landlock")) == "landlock: EOPNOTSUPP (Operation not supported)"
    )
