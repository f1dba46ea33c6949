"""The supervisor's parts, one at a time, without a supervisor."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from mcp_broker import limits
from mcp_broker.config import BrokerTable
from mcp_broker.core.metering import Level
from mcp_broker.errors import ConfigError, SupervisionError
from mcp_broker.supervisor import certificates, life, reclaim
from mcp_broker.supervisor.certificates import Circumstances, Exceeded, Interrupted
from mcp_broker.supervisor.isolation import probe
from mcp_broker.supervisor.link import Link
from mcp_broker.supervisor.lock import Lock, holder
from mcp_broker.supervisor.poller import Poller, is_readable
from mcp_broker.supervisor.ports import Ports
from mcp_broker.supervisor.process import Exit, Process
from mcp_broker.supervisor.records import Counters, Deaths, Definitions, write_atomically
from mcp_broker.wire import codec, messages, node
from mcp_broker.wire.framing import FrameReader, frame
from mcp_broker.wire.marks import RING
from mcp_broker.wire.structs import replaced
from tests.supervisor.conftest import PATIENCE_S, is_running
from tests.support import descriptors
from tests.support.waiting import wait_for


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller()
    yield poller
    poller.close()


def certificate(worker_id: str) -> node.Certificate:
    return node.Certificate(worker_id=worker_id, pool="p", pid=1, cause="exited with code 1", kind="exit")


# -- the link ---------------------------------------------------------------------------------------


class Ends:
    def __init__(self, poller: Poller) -> None:
        ours, self.theirs = socket.socketpair()
        self.heard: list[node.ToSupervisor] = []
        self.lost: list[str] = []
        self.link = Link(ours, poller, self.heard.append, self.lost.append)


@pytest.fixture
def ends(poller: Poller) -> Iterator[Ends]:
    ends = Ends(poller)
    yield ends
    ends.link.close()
    ends.theirs.close()


def test_messages_arrive_whole_however_they_are_cut(ends: Ends, poller: Poller) -> None:
    stream = frame(codec.encode(node.Serving(7))) + frame(codec.encode(node.Drained(2)))
    for byte in stream:
        ends.theirs.sendall(bytes([byte]))
        poller.turn(PATIENCE_S)
    assert ends.heard == [node.Serving(7), node.Drained(2)]


def test_a_slow_reader_gets_everything_in_order(ends: Ends, poller: Poller) -> None:
    sent = [node.Died(certificate(f"p-{number}")) for number in range(5000)]
    for message in sent:
        ends.link.send(message)
    reader, received = FrameReader(), 0
    while received < len(sent):
        poller.turn(0)
        for body in reader.feed(ends.theirs.recv(65536)):
            assert codec.from_supervisor.decode(body) == sent[received]
            received += 1
    assert ends.lost == []


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (frame(b"\xc1"), "it sent what is no message"),
        (frame(codec.encode(node.Admit(()))), "it sent what is no message"),
        ((limits.NODE_BYTES_MAX + 1).to_bytes(4, "big"), "it sent what is no message"),
        (b"", "it closed its link"),
    ],
)
def test_a_link_that_cannot_be_used_is_lost_once(
    ends: Ends, poller: Poller, stream: bytes, said: str
) -> None:
    ends.theirs.sendall(stream)
    ends.theirs.shutdown(socket.SHUT_WR)
    poller.turn(PATIENCE_S)
    ends.link.send(node.Admit(()))
    assert len(ends.lost) == 1
    assert ends.lost[0].startswith(said)


def test_what_the_dead_said_is_heard_though_something_is_sent_to_them_first(
    ends: Ends, poller: Poller
) -> None:
    ends.link.send(node.Admit(()))
    ends.theirs.sendall(frame(codec.encode(node.Drained(2))))
    # with something unread: the next to send hears of a reset
    ends.theirs.close()
    ends.link.send(node.Admit(()))
    ends.link.send(node.Admit(()))
    assert ends.lost == []
    ends.link.drain()
    assert ends.heard == [node.Drained(2)]
    assert len(ends.lost) == 1


def test_a_word_that_cannot_be_taken_costs_no_other(poller: Poller, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    heard: list[node.ToSupervisor] = []

    def take(message: node.ToSupervisor) -> None:
        if message == node.Serving(7):
            raise LookupError("a bug")
        heard.append(message)

    link = Link(ours, poller, take, lambda _reason: None)
    theirs.sendall(frame(codec.encode(node.Serving(7))) + frame(codec.encode(node.Drained(2))))
    poller.turn(PATIENCE_S)
    assert heard == [node.Drained(2)]
    assert "LookupError: a bug" in caplog.text
    theirs.sendall(frame(codec.encode(node.Serving(7))) + frame(codec.encode(node.Drained(3))))
    theirs.close()
    link.drain()
    assert heard[1:] == [node.Drained(3)], "also where it was the last that was said"
    assert not link.is_open


def test_what_was_said_by_an_end_that_takes_nothing_is_heard(ends: Ends, poller: Poller) -> None:
    large = node.Abandoned((b"i" * 16,) * 500_000)
    for number in range(2):
        ends.theirs.sendall(frame(codec.encode(node.Drained(number))))
        while not ends.lost:
            ends.link.send(large)
        ends.link.send(large)
        poller.turn(PATIENCE_S)
    assert ends.heard == [node.Drained(0), node.Drained(1)]
    ends.theirs.close()
    poller.turn(PATIENCE_S)
    assert ends.lost == ["it takes no messages"]
    assert not ends.link.is_open


# -- lock, ports, records ------------------------------------------------------------------------------


def test_a_descriptor_is_waited_for_whatever_its_number() -> None:
    with descriptors.held():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert ours.fileno() > descriptors.BEYOND_SELECT
            assert not is_readable(ours.fileno(), 0.01)
            theirs.send(b"x")
            assert is_readable(ours.fileno(), 1)
        assert probe.attempt("any", lambda: "done").detail == "done"


def test_a_supervisor_may_hold_as_many_descriptors_as_the_machine_lets_it() -> None:
    script = (
        "import resource; from mcp_broker.confine import rlimits;"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)); rlimits.raise_files();"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE), hard)"
    )
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    soft, hard, before = map(int, told.split())
    assert soft == min(before, limits.DESCRIPTORS_MAX)
    assert hard == before


def test_a_held_lock_names_its_holder_and_a_free_one_nobody(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    lock = Lock(tmp_path)
    assert holder(tmp_path) == os.getpid()
    with pytest.raises(SupervisionError, match=rf"\(pid {os.getpid()}\)"):
        Lock(tmp_path)
    lock.release()
    assert holder(tmp_path) is None
    Lock(tmp_path).release()


def test_ports_are_remembered_and_another_is_taken_when_they_are_gone(tmp_path: Path) -> None:
    first = Ports(BrokerTable(), tmp_path)
    endpoints = (first.client_endpoint, first.worker_endpoint)
    first.close()
    second = Ports(BrokerTable(), tmp_path)
    assert (second.client_endpoint, second.worker_endpoint) == endpoints
    third = Ports(BrokerTable(), tmp_path)
    assert third.client_endpoint not in endpoints
    second.close()
    third.close()


def test_a_port_that_the_configuration_names_must_be_free(tmp_path: Path) -> None:
    taken = Ports(BrokerTable(), tmp_path)
    port = taken.client.getsockname()[1]
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
        Ports(BrokerTable(client_port=port), tmp_path)
    taken.close()


def test_numbers_only_grow_also_after_a_crash(tmp_path: Path) -> None:
    first = Counters(tmp_path)
    used = [first.next_life() for _ in range(3)]
    epoch = first.next_epoch()
    # no close: it crashed
    second = Counters(tmp_path)
    assert second.next_life() > max(used)
    assert second.next_epoch() > epoch
    assert second.instance == first.instance
    second.close()
    assert Counters(tmp_path).next_life() == second.next_life()


def test_a_copy_of_a_state_directory_is_another_instance_and_a_moved_one_is_the_same(tmp_path: Path) -> None:
    original = tmp_path / "state"
    original.mkdir()
    first = Counters(original)
    first.next_epoch()
    shutil.copytree(original, tmp_path / "copy")
    copied = Counters(tmp_path / "copy")
    assert copied.instance != first.instance
    assert copied.next_epoch() == 2
    assert Counters(tmp_path / "copy").instance == copied.instance
    original.rename(tmp_path / "moved")
    assert Counters(tmp_path / "moved").instance == first.instance


def test_deaths_survive_newest_first_and_bounded(tmp_path: Path) -> None:
    deaths = Deaths(tmp_path)
    for number in range(2 * limits.DEATHS_MAX + 5):
        deaths.add(certificate(f"p-{number}"))
    again = Deaths(tmp_path)
    assert again.recent == deaths.recent
    assert len(again.recent) == limits.DEATHS_MAX
    assert again.recent[0].worker_id == f"p-{2 * limits.DEATHS_MAX + 4}"
    assert len((tmp_path / "deaths.jsonl").read_bytes().splitlines()) <= 2 * limits.DEATHS_MAX


def test_calls_that_many_dead_had_started_are_all_told_of_the_newest_of_each_first(tmp_path: Path) -> None:
    deaths = Deaths(tmp_path)
    rings = {
        f"p-{worker}": tuple((worker * RING + number).to_bytes(16, "big") for number in range(RING))
        for worker in range(1000)
    }
    last_words = "x" * limits.STDERR_TAIL_BYTES
    for worker_id, ring in rings.items():
        long = replaced(certificate(worker_id), stderr=last_words, stack=2 * last_words)
        deaths.add(long, ring)
    packed = codec.encode(deaths.told())
    assert len(packed) < limits.NODE_BYTES_MAX
    told = codec.from_supervisor.decode(packed)
    assert isinstance(told, node.Deaths)
    assert sum(map(len, told.started_calls.values())) <= limits.STARTED_MAX
    share = limits.STARTED_MAX // len(rings)
    assert list(told.started_calls) == list(rings), "who died first is first"
    for worker_id, ids in told.started_calls.items():
        assert len(ids) >= share
        assert ids == rings[worker_id][-len(ids) :]
    assert told.started_calls["p-999"] == rings["p-999"], "who died last keeps most"
    assert told.certificates == deaths.recent
    known = [one.worker_id for one in (*told.certificates, *told.others)]
    assert sorted(known) == sorted(rings), "each has its certificate, and one"


def test_of_more_workers_than_there_may_be_those_that_died_last_are_told_of(tmp_path: Path) -> None:
    deaths = Deaths(tmp_path)
    for number in range(limits.WORKERS_MAX + 3):
        deaths.add(certificate(f"p-{number}"), (bytes(16),))
    told = deaths.told()
    assert len(told.started_calls) == limits.WORKERS_MAX
    assert next(iter(told.started_calls)) == "p-3"
    assert len(told.certificates) + len(told.others) == limits.WORKERS_MAX


def test_tools_are_known_to_the_next_supervisor_and_a_torn_file_is_none(tmp_path: Path) -> None:
    assert Definitions(tmp_path).load() == {}
    tools = tuple(
        messages.ToolDefinition(name=name, version="1.0.0", capabilities=("test",))
        for name in ("p.one", "p.two")
    )
    Definitions(tmp_path).save([node.Tools("p", tools), node.Tools("q", tools[:1])])
    assert Definitions(tmp_path).load() == {"p": tools, "q": tools[:1]}
    whole = (tmp_path / "tools.bin").read_bytes()
    (tmp_path / "tools.bin").write_bytes(whole[:-1])
    assert set(Definitions(tmp_path).load()) == {"p"}
    (tmp_path / "tools.bin").write_bytes(b"\0\0\0\1\xc1" + whole)
    assert Definitions(tmp_path).load() == {}


def test_a_torn_line_costs_that_line_only(tmp_path: Path) -> None:
    deaths = Deaths(tmp_path)
    deaths.add(certificate("p-1"))
    with (tmp_path / "deaths.jsonl").open("ab") as file:
        file.write(b'{"worker_id": "p-2", "po')
    Deaths(tmp_path).add(certificate("p-3"))
    assert [one.worker_id for one in Deaths(tmp_path).recent] == ["p-3", "p-1"]


class Disk:
    """Takes a few bytes at a time, as long as it has room."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.write

    def write(self, fd: int, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._write(fd, bytes(data[: min(7, self.room)]))
        self.room -= taken
        return taken


def test_a_file_is_written_whole_though_the_disk_takes_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", Disk(1 << 20).write)
    write_atomically(tmp_path / "file", b"new!" * 100)
    assert (tmp_path / "file").read_bytes() == b"new!" * 100
    deaths = Deaths(tmp_path)
    deaths.add(certificate("p-1"))
    assert Deaths(tmp_path).recent == deaths.recent


def test_a_full_disk_costs_what_was_to_be_written_and_nothing_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old" * 100)
    deaths = Deaths(tmp_path)
    deaths.add(certificate("p-1"))
    disk = Disk(50)
    monkeypatch.setattr(os, "write", disk.write)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", b"new!" * 100)
    assert (tmp_path / "file").read_bytes() == b"old" * 100
    disk.room = 50
    deaths.add(certificate("p-2"))
    disk.room = 1 << 20
    deaths.add(certificate("p-3"))
    assert [one.worker_id for one in Deaths(tmp_path).recent] == ["p-3", "p-1"]


def test_a_record_of_another_release_is_told_to_the_broker_in_words_that_it_takes(tmp_path: Path) -> None:
    Deaths(tmp_path).add(certificate("p-1"))
    records = tmp_path / "deaths.jsonl"
    records.write_text(records.read_text().replace('"kind": "exit"', '"kind": "boredom", "humidity": 3'))
    (kept,) = Deaths(tmp_path).recent
    assert (kept.kind, kept.cause) == ("unknown", "exited with code 1")
    assert codec.from_supervisor.decode(codec.encode(node.Deaths((kept,)))) == node.Deaths((kept,))


def test_every_level_of_use_is_a_pressure_that_the_broker_takes() -> None:
    assert set(life._PRESSURES) == set(Level)
    assert set(life._PRESSURES.values()) == set(get_args(node.Pressure)) - {"unmeasured"}


# -- folders ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_very_deep_folder_is_removed(tmp_path: Path) -> None:
    top = tmp_path / "scratch"
    top.mkdir()
    home = os.open(".", os.O_RDONLY)
    try:
        os.chdir(top)
        for _ in range(3000):
            os.mkdir("d")  # noqa: PTH102 (a path this deep has no absolute name)
            os.chdir("d")
    finally:
        os.fchdir(home)
        os.close(home)
    # what would be left of it, pytest itself could not remove
    assert reclaim.remove_tree(top, 60.0)
    assert not top.exists()


def test_closed_folders_go_and_links_are_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    top = tmp_path / "scratch"
    (top / "closed" / "inner").mkdir(parents=True)
    (top / "closed" / "inner" / "file").touch()
    (top / "link").symlink_to(kept)
    (top / "closed" / "link").symlink_to(kept)
    (top / "closed" / "inner").chmod(0)
    (top / "closed").chmod(0)
    assert reclaim.remove_tree(top)
    assert not top.exists()
    assert (kept / "file").exists()


# -- processes -------------------------------------------------------------------------------------------


def run(poller: Poller, tmp_path: Path, code: str) -> tuple[Process, Exit]:
    ends: list[Exit] = []
    process = Process(
        "p-1",
        [sys.executable, "-c", code],
        env={},
        cwd=tmp_path,
        pass_fds=(),
        poller=poller,
        on_exit=ends.append,
    )
    while not ends:
        poller.turn(PATIENCE_S)
    return process, ends[0]


@pytest.mark.process
def test_the_end_of_standard_error_is_kept_and_a_flood_blocks_nobody(poller: Poller, tmp_path: Path) -> None:
    code = "import sys; sys.stderr.write('x' * 1_000_000 + 'the last words'); sys.exit(4)"
    process, end = run(poller, tmp_path, code)
    assert process.stderr_tail.endswith("the last words")
    assert len(process.stderr_tail) == limits.STDERR_TAIL_BYTES
    assert (end.code, end.signal) == (4, None)
    assert end.max_rss_kib > 1000


@pytest.mark.process
def test_a_group_dies_with_its_leader(poller: Poller, tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('pid', 'w').write(str(child.pid)); os._exit(0)"
    )
    run(poller, tmp_path, code)
    child = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_running(child), what="the end of the group")


def test_a_program_that_is_not_there_is_our_error(poller: Poller, tmp_path: Path) -> None:
    with pytest.raises(SupervisionError, match="cannot start /no/such: No such file or directory"):
        Process(
            "p-1", ["/no/such"], env={}, cwd=tmp_path, pass_fds=(), poller=poller, on_exit=lambda _end: None
        )


def test_an_unborn_process_that_is_abandoned_ends_with_its_reason_and_leaves_no_descriptor(
    poller: Poller,
) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    ends: list[Exit] = []
    process = Process.unborn("p-1", poller=poller, on_exit=ends.append)
    assert (process.pid, process.is_alive) == (0, True)
    process.abandon(SupervisionError("nobody could start it"))
    assert (len(ends), process.is_alive) == (1, False)
    assert str(process.failure) == "nobody could start it"
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.process
def test_a_process_that_was_killed_before_it_was_born_dies_at_its_birth(
    poller: Poller, tmp_path: Path
) -> None:
    ends: list[Exit] = []
    births: list[int] = []
    process = Process.unborn("p-1", poller=poller, on_exit=ends.append)
    process.when_born(lambda: births.append(process.pid))
    process.kill()
    process.execute([sys.executable, "-c", "input()"], env={}, cwd=tmp_path, pass_fds=())
    while not ends:
        poller.turn(PATIENCE_S)
    assert ends[0].signal == signal.SIGKILL
    assert births == [process.pid]


@pytest.mark.process
def test_a_process_that_is_no_child_of_ours_is_not_adopted(poller: Poller) -> None:
    process = Process.unborn("p-1", poller=poller, on_exit=lambda _end: None)
    with pytest.raises(SupervisionError, match="process 1 is no child of ours"):
        process.adopt(1)
    process.abandon(None)


def test_processes_are_started_by_the_main_thread_only_since_their_starter_is_their_life(
    poller: Poller, tmp_path: Path
) -> None:
    refused: list[SupervisionError] = []

    def start() -> None:
        with pytest.raises(SupervisionError, match="by the main thread only") as caught:
            Process(
                "p-1",
                [sys.executable, "-c", ""],
                env={},
                cwd=tmp_path,
                pass_fds=(),
                poller=poller,
                on_exit=lambda _end: None,
            )
        refused.append(caught.value)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(refused) == 1


def test_importing_the_supervisor_loads_no_zeromq() -> None:
    code = "import sys, mcp_broker.supervisor; sys.exit('zmq' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- certificates ------------------------------------------------------------------------------------------


def cause(end: Exit, stderr: str = "", module: str = "mine", **known: object) -> tuple[str, str]:
    facts = {"started_seq": 1, "was_ready": True, "is_operators": False, "fault": "", "interrupted": None}
    return certificates._cause(end, Circumstances(**{**facts, **known}), stderr, module)  # type: ignore[arg-type]


def exited(code: int) -> Exit:
    return Exit(code, None, 0.0, 0)


def signalled(number: int) -> Exit:
    return Exit(None, number, 0.0, 0)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (cause(exited(7)), ("exit", "exited with code 7")),
        (cause(signalled(11)), ("signal", "killed by SIGSEGV")),
        (cause(signalled(60)), ("signal", "killed by signal 60")),
        (cause(exited(0), is_operators=True), ("operator", "stopped by the operator (exited with code 0)")),
        (
            cause(signalled(9), interrupted=Interrupted(1, "kill", "cancel")),
            ("cancel", "stopped because its call was cancelled (killed by SIGKILL)"),
        ),
        (
            cause(signalled(11), interrupted=Interrupted(1, "raise", "cancel")),
            ("signal", "killed by SIGSEGV"),
        ),
        (
            cause(signalled(9), exceeded=Exceeded("memory_mb", 100, 130.4)),
            (
                "limit",
                f"{Exceeded('memory_mb', 100, 130.4).sentence} (killed by SIGKILL)",
            ),
        ),
        (
            cause(signalled(9), exceeded=Exceeded("cpu_s", 2.5, 2.6), is_oom=True),
            (
                "limit",
                "it used 2.6 s of CPU in one call, and its limit cpu_s is 2.5 (the kernel, out of memory)",
            ),
        ),
        (
            cause(exited(1), "Traceback\nValueError: no\n", was_ready=False),
            ("boot_failure", "could not start: ValueError: no"),
        ),
        (cause(exited(1), was_ready=False), ("boot_failure", "could not start: exited with code 1")),
        (
            cause(
                exited(3),
                "mcp-broker worker: pool sql: cannot import it: No module named 'duckdb'",
                "mcp_broker_workers.sql",
                was_ready=False,
            ),
            ("boot_failure", "could not start: needs the package 'duckdb': pip install 'mcp-broker[tools]'"),
        ),
    ],
)
def test_a_certificate_says_what_is_known(found: tuple[str, str], expected: tuple[str, str]) -> None:
    assert found == expected


def test_a_kill_that_we_did_not_send_is_not_explained_away() -> None:
    kind, said = cause(signalled(9))
    assert kind == "signal"
    assert said.startswith("killed by SIGKILL, which mcp-broker did not send")
