"""Workers that are forked from a zygote: as if each had been executed, whatever becomes of the zygote."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mcp_broker import proctable
from tests.supervisor.conftest import Node, Start, is_running, of_instance
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.process, pytest.mark.slow]


def zygotes(node: Node) -> list[int]:
    """Return the supervisor's zygotes, told by what they name themselves."""
    found = []
    for pid in proctable.children(node.pid):
        name = proctable.environment(pid).get(b"MCPB_WORKER", b"")
        if name.startswith(b"zygote-") and is_running(pid):
            found.append(pid)
    return found


def zygote_of(node: Node) -> int:
    return int(wait_for(lambda: zygotes(node), what="a zygote")[0])


def fds_of(pid: int) -> list[str]:
    return sorted(os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir())  # noqa: PTH115 (no path)


def seen_by_a_worker(start: Start, tmp_path: Path, how: str) -> dict[str, Any]:
    path = tmp_path / f"seen-{how}"
    # a name that is longer than the zygote's own
    pool = "a_pool_with_a_name.that_is_long"
    node = start(pools={pool: {"environment": str(path)}}, state=how, how=how, keys='env = { FRUIT = "fig" }')
    node.event("PoolReady")
    seen: dict[str, Any] = json.loads(path.read_text())
    worker = node.worker(pool)
    assert (worker["pid"], worker["start"]) == (seen["pid"], how)
    assert seen.pop("sid") == seen["pid"]
    assert seen.pop("ppid") == node.pid
    assert proctable.environment(seen["pid"])[b"MCPB_WORKER"] == worker["id"].encode()
    instance = json.loads((node.state_dir / "counters.json").read_text())["instance"]
    for key in ("cwd", "env", "fds"):
        seen[key] = json.loads(
            json.dumps(seen[key])
            .replace(str(node.state_dir), "STATE")
            .replace(worker["id"], "ID")
            .replace(instance, "INSTANCE")
        )
    seen["fds"] = sorted(file.split(":")[0] for file in seen["fds"])
    del seen["pid"], seen["random"]
    return seen


def test_a_forked_worker_sees_exactly_what_an_executed_one_sees(start: Start, tmp_path: Path) -> None:
    executed = seen_by_a_worker(start, tmp_path, "exec")
    forked = seen_by_a_worker(start, tmp_path, "zygote")
    assert forked == executed
    # Python's mmap keeps a descriptor of its own
    assert forked["fds"] == ["/dev/null", "/memfd", "/memfd", "pipe", "pipe", "socket"]


def test_forked_workers_draw_other_random_numbers(start: Start, tmp_path: Path) -> None:
    pools = {name: {"environment": str(tmp_path / name)} for name in ("left", "right")}
    node = start(pools=pools, how="zygote")
    for _ in pools:
        node.event("PoolReady")
    left, right = (json.loads((tmp_path / name).read_text()) for name in pools)
    assert left["random"] != right["random"]
    assert len(zygotes(node)) == 1, "one for all pools of one interpreter and environment"


def test_a_forked_worker_that_dies_is_told_with_its_cause_and_followed_by_another(start: Start) -> None:
    node = start({"started_seq": 41}, how="zygote")
    node.event("PoolReady")
    zygote = zygote_of(node)
    wait_for(lambda: fds_of(node.pid) == fds_of(node.pid), what="quiet")
    before = len(fds_of(node.pid)), len(fds_of(zygote))
    for _ in range(4):
        worker = node.worker()
        os.kill(worker["pid"], signal.SIGKILL)
        certificate = node.event("WorkerDied")["certificate"]
        assert (certificate["worker_id"], certificate["pid"]) == (worker["id"], worker["pid"])
        assert (certificate["kind"], certificate["signal"]) == ("signal", "SIGKILL")
        node.event("PoolReady")
        assert node.worker()["start"] == "zygote"
    assert zygotes(node) == [zygote]
    wait_for(
        lambda: (len(fds_of(node.pid)), len(fds_of(zygote))) == before, what="no descriptor is left open"
    )
    assert node.stop() == 0
    assert of_instance(node.state_dir) == []
    assert list(node.runtime_dir.iterdir()) == []


def test_a_forked_worker_that_cannot_start_ends_its_pool_with_its_reason(start: Start) -> None:
    says = "mcp-broker worker: pool fake: cannot import fake: No module named 'nowhere'"
    node = start({"boot_exit": 3, "says": says}, how="zygote")
    assert node.event("PoolFailed")["reason"] == "cannot import fake: No module named 'nowhere'"


def test_a_zygote_that_is_killed_harms_no_worker_and_is_replaced(start: Start) -> None:
    node = start({"started_seq": 1}, how="zygote")
    node.event("PoolReady")
    worker, zygote = node.worker(), zygote_of(node)
    os.kill(zygote, signal.SIGKILL)
    # at once, so that the next worker finds it dying, dead or on its way up
    os.kill(worker["pid"], signal.SIGKILL)
    node.event("PoolReady")
    wait_for(lambda: zygotes(node) not in ([], [zygote]), what="another zygote")
    os.kill(node.worker()["pid"], signal.SIGKILL)
    node.event("PoolReady")
    wait_for(lambda: node.worker()["start"] == "zygote", what="a worker of the new zygote")
    assert sum(event["event"] == "WorkerDied" for event in node.events) == 2, "nobody else died"


def test_a_zygote_that_hangs_is_replaced_and_its_worker_started_without_it(start: Start) -> None:
    node = start({"started_seq": 1}, how="zygote")
    node.event("PoolReady")
    zygote = zygote_of(node)
    os.kill(zygote, signal.SIGSTOP)
    os.kill(node.worker()["pid"], signal.SIGKILL)
    node.event("WorkerDied")
    node.event("PoolReady")
    assert node.worker()["start"] == "exec"
    wait_for(lambda: zygotes(node) not in ([], [zygote]), what="another zygote")


def test_a_stop_does_not_wait_for_a_worker_that_was_never_born(start: Start) -> None:
    node = start({"started_seq": 1}, how="zygote")
    node.event("PoolReady")
    os.kill(zygote_of(node), signal.SIGSTOP)
    os.kill(node.worker()["pid"], signal.SIGKILL)
    node.event("WorkerDied")
    begun = time.monotonic()
    assert node.stop() == 0
    assert time.monotonic() - begun < 5
    assert of_instance(node.state_dir) == []


def test_without_a_zygote_that_can_start_workers_start_all_the_same(start: Start) -> None:
    node = start(how="zygote", keys='env = { TRY = "no zygote" }')
    node.event("PoolReady")
    assert node.worker()["start"] == "exec"
    log = Path(node._log.name)
    wait_for(lambda: "no room for a zygote here" in log.read_text(), what="the reason")


@pytest.mark.parametrize("left", [0, 6])
def test_a_supervisor_with_few_descriptors_left_goes_on_when_it_has_more(start: Start, left: int) -> None:
    node = start({"started_seq": 1}, how="zygote")
    node.event("PoolReady")
    worker = node.worker()
    before = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
    few = len(fds_of(node.pid)) + left
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (few, before[1]))
    os.kill(worker["pid"], signal.SIGKILL)
    node.event("WorkerDied")
    is_whole = False
    with contextlib.suppress(AssertionError):
        node.event("PoolReady", timeout_s=0.3)
        is_whole = True
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, before)
    if not is_whole:
        node.event("PoolReady")
    assert node.stop() == 0
    assert of_instance(node.state_dir) == []


@pytest.mark.parametrize("loss", ["lose the zygote", "lose the one in between"])
def test_a_worker_that_was_forked_and_is_not_known_never_runs(
    start: Start, tmp_path: Path, loss: str
) -> None:
    path = tmp_path / "seen"
    keys = f'env = {{ TRY = "{loss}" }}'
    node = start({"environment": str(path)}, how="zygote", keys=keys)
    node.event("PoolReady")
    worker = node.worker()
    assert worker["start"] == "exec"
    assert json.loads(path.read_text())["pid"] == worker["pid"], "it alone ran"

    def others() -> set[int]:
        broker = next(event["broker_pid"] for event in node.events if event["event"] == "Serving")
        return set(of_instance(node.state_dir)) - {worker["pid"], broker, *zygotes(node)}

    wait_for(lambda: not others(), what="the end of whoever was forked")
    told = [one["workers"] for one in node.order() if one["kind"] == "ADMIT"]
    assert told == [[worker["id"]]], "one life, one key"


def kill_within_a_birth(node: Node) -> None:
    node.event("PoolReady")
    os.kill(node.worker()["pid"], signal.SIGKILL)
    time.sleep(random.uniform(0, 0.008))  # the point in time is what is tried
    node.popen.kill()
    node.popen.wait()
    wait_for(lambda: not of_instance(node.state_dir), what="the end of all", within_s=1.0)


def test_nothing_lives_a_second_after_the_supervisor_was_killed_in_the_middle_of_forks(start: Start) -> None:
    for number in range(4):
        kill_within_a_birth(start({"started_seq": 1}, how="zygote", state=f"state-{number}"))


def test_the_next_start_removes_a_zygote_that_was_left(start: Start) -> None:
    node = start(how="zygote")
    node.event("PoolReady")
    zygote = zygote_of(node)
    # neither death signal nor end of file reach one that is stopped, before it is continued
    os.kill(zygote, signal.SIGSTOP)
    node.popen.kill()
    node.popen.wait()
    again = start(how="zygote")
    again.event("PoolReady")
    assert not is_running(zygote)
    assert zygotes(again) != [zygote]


def test_a_process_shows_the_name_that_it_took() -> None:
    code = (
        "import os, sys\n"
        "from mcp_broker.worker.process_title import ProcessTitle\n"
        "plate = ProcessTitle('WHO')\n"
        "plate.show(['first'], 'a')\n"
        "plate.show(['one', 'two'], 'text-1')\n"
        "print(os.getpid(), flush=True)\n"
        "input()\n"
    )
    env = {"FIRST": "1", "WHO": "x" * 20, "LAST": "2"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as named:
        assert named.stdout is not None
        assert int(named.stdout.readline()) == named.pid
        assert proctable.environment(named.pid) == {b"FIRST": b"1", b"WHO": b"text-1", b"LAST": b"2"}
        assert Path(f"/proc/{named.pid}/cmdline").read_bytes().rstrip(b"\0") == b"one\0two"
        named.communicate(b"\n")
