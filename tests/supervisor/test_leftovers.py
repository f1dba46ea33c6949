"""What may be left of a process: nothing, however it or its supervisor ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp_broker import proctable
from mcp_broker.supervisor import cgroups, reclaim
from mcp_broker.supervisor.reclaim import memory
from tests.supervisor.conftest import Start, is_running, of_instance
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.process, pytest.mark.slow]


def daemon_of(path: Path) -> int:
    return int(wait_for(lambda: path.exists() and path.read_text(), what="the daemon's pid"))


def test_a_double_forked_daemon_goes_with_its_worker(start: Start, tmp_path: Path) -> None:
    node = start({"daemon": str(tmp_path / "daemon"), "started_seq": 1})
    node.event("PoolReady")
    daemon = daemon_of(tmp_path / "daemon")
    worker = node.worker()
    assert is_running(daemon)
    os.kill(worker["pid"], signal.SIGKILL)
    node.event("WorkerDied")
    wait_for(lambda: not is_running(daemon), what="the end of the daemon", within_s=2)


def test_a_daemon_of_a_live_worker_is_left_alone(start: Start, tmp_path: Path) -> None:
    node = start(pools={"quiet": {"daemon": str(tmp_path / "daemon")}, "loud": {"started_seq": 1}})
    for _ in range(2):
        node.event("PoolReady")
    daemon = daemon_of(tmp_path / "daemon")
    wait_for(lambda: proctable.read(daemon).ppid == node.pid, what="the adoption")  # type: ignore[union-attr]
    os.kill(node.worker("loud")["pid"], signal.SIGKILL)
    node.event("PoolReady", pool="loud")
    # the sweep of that death is over when the next death's is
    os.kill(node.worker("loud")["pid"], signal.SIGKILL)
    node.event("PoolReady", pool="loud")
    assert is_running(daemon)
    assert node.stop() == 0
    assert not is_running(daemon)


def test_nothing_lives_a_second_after_the_supervisor_was_killed(start: Start) -> None:
    node = start(pools={"left": {}, "right": {}, "third": {}})
    for _ in range(3):
        node.event("PoolReady")
    assert len(of_instance(node.state_dir)) == 4
    node.popen.kill()
    node.popen.wait()
    wait_for(lambda: not of_instance(node.state_dir), what="the end of all", within_s=1.0)


def test_the_tether_alone_ends_a_worker_without_death_signal(start: Start) -> None:
    node = start({"deaf": True})
    node.event("PoolReady")
    worker = node.worker()
    node.popen.kill()
    wait_for(lambda: not is_running(worker["pid"]), what="the end of the worker", within_s=1.0)


def test_the_death_signal_alone_ends_a_worker_that_has_not_come_to_ask_for_it(start: Start) -> None:
    node = start({"untethered": True})
    node.event("PoolReady")
    worker = node.worker()
    node.popen.kill()
    wait_for(lambda: not is_running(worker["pid"]), what="the end of the worker", within_s=1.0)


def test_the_next_start_removes_what_a_killed_supervisor_left(start: Start, tmp_path: Path) -> None:
    node = start({"daemon": str(tmp_path / "daemon")})
    node.event("PoolReady")
    daemon = daemon_of(tmp_path / "daemon")
    left = node.worker()["id"]
    node.popen.kill()
    node.popen.wait()
    assert is_running(daemon), "neither tether nor death signal reaches it"
    assert (node.state_dir / "run" / left).is_dir()
    again = start()
    again.event("PoolReady")
    assert not is_running(daemon)
    assert not (node.state_dir / "run" / left).exists()
    assert not (node.state_dir / "run" / f"{left}.json").exists()


def test_the_next_start_touches_no_process_that_only_has_a_recorded_pid(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "state" / "run"
    run_dir.mkdir(parents=True, mode=0o700)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        entry = proctable.read(stranger.pid)
        assert entry is not None
        identity = {"pid": stranger.pid, "starttime": entry.starttime, "boot_id": proctable.boot_id()}
        for name, wrong in (("old-1", {"starttime": entry.starttime - 1}), ("old-2", {"boot_id": "another"})):
            (run_dir / f"{name}.json").write_text(json.dumps({**identity, **wrong}))
        node = start()
        node.event("PoolReady")
        assert is_running(stranger.pid)
        assert node.stop() == 0
        assert is_running(stranger.pid)
        stranger.kill()


def test_the_next_start_kills_a_recorded_process_of_this_boot(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "state" / "run"
    run_dir.mkdir(parents=True, mode=0o700)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as left:
        entry = proctable.read(left.pid)
        assert entry is not None
        identity = {"pid": left.pid, "starttime": entry.starttime, "boot_id": proctable.boot_id()}
        (run_dir / "old-1.json").write_text(json.dumps(identity))
        start().event("PoolReady")
        assert left.wait(5) == -signal.SIGKILL


def test_a_copy_of_a_state_directory_leaves_the_originals_processes_and_folders_alone(
    start: Start, tmp_path: Path
) -> None:
    node = start()
    node.event("PoolReady")
    worker = node.worker()
    scratch = (node.state_dir / "run").resolve() / worker["id"]
    shutil.copytree(node.state_dir, tmp_path / "copied", symlinks=True)
    copy = start(state="copied")
    copy.event("PoolReady")
    assert node.worker()["pid"] == worker["pid"]
    assert is_running(worker["pid"])
    assert scratch.is_dir()
    assert (copy.state_dir / "run").resolve() != (node.state_dir / "run").resolve()
    assert copy.stop() == 0
    assert node.worker()["pid"] == worker["pid"]
    assert scratch.is_dir()


def test_the_next_start_removes_shared_memory_of_a_killed_one_and_no_others(
    start: Start, tmp_path: Path
) -> None:
    node = start()
    node.event("PoolReady")
    instance = json.loads((node.state_dir / "counters.json").read_text())["instance"]
    node.popen.kill()
    node.popen.wait()
    ours = [
        memory.FOLDER / f"mcpb-{instance}-fake-1-psm_x",
        memory.FOLDER / f"sem.mcpb-{instance}-fake-1-mp-y",
    ]
    theirs = memory.FOLDER / f"mcpb-{'0' * 16}-{tmp_path.name[-8:]}"
    try:
        for path in (*ours, theirs):
            path.touch()
        start().event("PoolReady")
        assert not any(path.exists() for path in ours)
        assert theirs.exists()
    finally:
        for path in (*ours, theirs):
            path.unlink(missing_ok=True)


def test_the_next_start_ends_who_hides_its_environment_where_groups_can_be_killed(
    start: Start, tmp_path: Path
) -> None:
    node = start({"daemon": str(tmp_path / "daemon"), "wipes": True})
    node.event("PoolReady")
    daemon = daemon_of(tmp_path / "daemon")
    assert proctable.environment(daemon).get(b"MCPB_INSTANCE") is None
    has_group = (
        f"mcpb-{json.loads((node.state_dir / 'counters.json').read_text())['instance']}"
        in Path(f"/proc/{daemon}/cgroup").read_text()
    )
    node.popen.kill()
    node.popen.wait()
    assert is_running(daemon)
    start().event("PoolReady")
    if not has_group:
        os.kill(daemon, signal.SIGKILL)
        pytest.skip("this machine or this user has no control groups that can kill")
    assert not is_running(daemon)


@pytest.fixture
def elsewhere() -> Iterator[cgroups.Group]:
    """A control group that this process is not in, as another login session has one."""
    opened = cgroups.open_groups("elsewhere")
    if opened is None:
        pytest.skip("this machine or this user has no control groups that can kill")
    opened.close()
    group = cgroups.Group(opened.top.path.parent / f"session-{os.getpid()}")
    group.make()
    yield group
    group.kill()
    wait_for(group.remove, what="the end of the group")


@pytest.mark.parametrize("instance", ["abc", "another"])
def test_groups_of_a_supervisor_that_ran_in_another_one_are_found_where_it_wrote_them_down(
    elsewhere: cgroups.Group, tmp_path: Path, instance: str
) -> None:
    groups = cgroups.Groups(cgroups.Group(elsewhere.path / cgroups.name_of(instance)))
    left = groups.of("old-1")
    left.make()
    with subprocess.Popen(["sleep", "60"], env={}) as hidden:
        left.add(hidden.pid)
        reclaim.record_groups(tmp_path, groups)
        assert reclaim.remove_leftovers(tmp_path, "abc") == (instance == "abc")
        if instance == "abc":
            assert hidden.wait(5) == -signal.SIGKILL
        else:
            assert is_running(hidden.pid), "whatever stands there, nothing but a group of ours is killed"
            hidden.kill()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_sees_none_of_our_environment_files_or_terminal(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "seen"
    node = start(
        {"environment": str(path)}, env={"AWS_SECRET_ACCESS_KEY": "x"}, keys='env = { FRUIT = "fig" }'
    )
    node.event("PoolReady")
    seen = json.loads(path.read_text())
    scratch = node.state_dir / "run" / node.worker()["id"]
    assert seen["cwd"] == seen["env"]["HOME"] == seen["env"]["TMPDIR"] == str(scratch.resolve())
    assert scratch.stat().st_mode & 0o777 == 0o700
    assert seen["env"]["FRUIT"] == "fig"
    assert "AWS_SECRET_ACCESS_KEY" not in seen["env"]
    assert seen["umask"] == 0o077
    assert seen["sid"] == seen["pid"]
    kinds = sorted(file.split(":")[0] for file in seen["fds"] if "marks" not in file)
    assert kinds == ["/dev/null", "pipe", "pipe", "socket"], "neither lock, link nor listening sockets"


def test_no_secret_key_stands_in_arguments_or_environment(start: Start) -> None:
    node = start()
    node.event("PoolReady")
    for pid in of_instance(node.state_dir):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert all(len(argument) < 40 or b"/" in argument for argument in arguments)


def test_a_child_that_ended_by_itself_is_reaped(start: Start, tmp_path: Path) -> None:
    node = start({"daemon": str(tmp_path / "daemon")})
    node.event("PoolReady")
    daemon = daemon_of(tmp_path / "daemon")
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{daemon}").exists(), what="the reaping", within_s=5)
