"""What a dead worker leaves, one kind at a time, without a supervisor."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp_broker import limits
from mcp_broker.supervisor import cgroups, reclaim
from mcp_broker.supervisor.reclaim import memory, sysv
from mcp_broker.supervisor.reclaim.folders import Removal
from mcp_broker.supervisor.reclaim.reclaimer import Reclaimer
from mcp_broker.supervisor.reclaim.steps import ALL, STEPS, Remains, Step, Tally, Work
from mcp_broker.wire import codec, node
from mcp_broker.wire.reclaims import Reclaim, Taken


def remains(tmp_path: Path, worker_id: str = "t-1") -> Remains:
    return Remains(worker_id, "t", 0, "process", f"mcpb-0-{worker_id}-", tmp_path / worker_id)


class Place:
    """A supervisor without processes."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.bystanders: set[int] = set()
        self.groups: cgroups.Groups | None = None

    def alive(self) -> dict[int, str]:
        return {}

    def release_ports(self, worker_id: str) -> list[int]:
        assert worker_id
        return [4711]


# -- the list -------------------------------------------------------------------------------------------


def test_every_step_has_a_name_of_its_own_and_says_what_it_takes_back_and_for_how_long() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(step.takes_back and step.within_s > 0 and step.levels <= ALL for step in STEPS)
    assert STEPS[0].name == "processes", "who lives makes new things while the others are taken back"
    assert STEPS[-1].name == "record", "until then a next start must know of it"


def run(tmp_path: Path, steps: dict[str, Work], within_s: float = 5.0, *others: str) -> list[Reclaim]:
    done: list[Reclaim] = []
    listed = [Step(name, "something", within_s, ALL, work) for name, work in steps.items()]
    reclaimer = Reclaimer(Place(tmp_path), done.append, listed)
    for worker_id in ("t-1", *others):
        reclaimer.begin(remains(tmp_path, worker_id))
    reclaimer.finish(5.0)
    assert reclaimer.deadline() is None
    return done


def finds(count: int) -> Work:
    def work(_remains: Remains, _site: object, tally: Tally) -> Iterator[float]:
        for _ in range(count):
            tally.count += 1
            yield 0.0

    return work


def test_a_record_names_each_step_in_order_with_what_it_found(tmp_path: Path) -> None:
    (record,) = run(tmp_path, {"one": finds(2), "none": finds(0), "three": finds(3)})
    assert [(taken.step, taken.count) for taken in record.steps] == [("one", 2), ("none", 0), ("three", 3)]
    assert (record.worker_id, record.pool, record.level) == ("t-1", "t", "process")


def test_a_step_that_does_not_end_is_given_up_and_the_next_ones_are_done(tmp_path: Path) -> None:
    def endless(_remains: Remains, _site: object, _tally: Tally) -> Iterator[float]:
        while True:
            yield 0.001

    (record,) = run(tmp_path, {"endless": endless, "last": finds(1)}, 0.02)
    assert record.steps[0].left == ("not finished within 0.02 s",)
    assert record.steps[1].count == 1


def test_a_bug_in_a_step_costs_that_step_only(tmp_path: Path) -> None:
    def broken(_remains: Remains, _site: object, _tally: Tally) -> Iterator[float]:
        yield 0.0
        raise ValueError("no such thing")

    (record,) = run(tmp_path, {"broken": broken, "last": finds(1)})
    assert record.steps[0].left == ("ValueError: no such thing",)
    assert record.steps[1].count == 1


def test_a_long_reclaim_does_not_hold_up_another(tmp_path: Path) -> None:
    def work(remains: Remains, _site: object, tally: Tally) -> Iterator[float]:
        for _ in range(200_000 if remains.worker_id == "t-1" else 1):
            tally.count += 1
            yield 0.0

    assert [record.worker_id for record in run(tmp_path, {"work": work}, 5.0, "t-2")] == ["t-2", "t-1"]


def test_records_survive_newest_first_and_bounded(tmp_path: Path) -> None:
    records = reclaim.Reclaims(tmp_path)
    for number in range(2 * limits.RECLAIMS_MAX + 5):
        taken = Taken(step="scratch", count=number, left=("a: b",))
        records.add(Reclaim(worker_id=f"p-{number}", pool="p", pid=1, level="process", steps=(taken,)))
    with (tmp_path / "reclaims.jsonl").open("ab") as file:
        file.write(b'{"worker_id": "torn')
    again = reclaim.Reclaims(tmp_path)
    assert again.recent == records.recent
    assert len(again.recent) == limits.RECLAIMS_MAX
    assert len((tmp_path / "reclaims.jsonl").read_bytes().splitlines()) <= 2 * limits.RECLAIMS_MAX


def test_a_name_that_is_not_utf_8_is_written_down_so_that_every_message_can_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "FOLDER", tmp_path / "shm")
    name = remains(tmp_path).prefix + "\udcff"
    # which no unlink removes
    (tmp_path / "shm" / name).mkdir(parents=True)
    scratch = tmp_path / "t-1" / "\udcfe"
    scratch.mkdir(parents=True)
    # a file that stays, as of a file system that is read only
    monkeypatch.setattr(os, "rmdir", refuse)
    found: list[Reclaim] = []
    reclaimer = Reclaimer(Place(tmp_path), found.append)
    reclaimer.begin(remains(tmp_path))
    reclaimer.finish(5.0)
    (record,) = found
    left = {taken.step: taken.left for taken in record.steps}
    assert any("\\xff" in one for one in left["shared memory"])
    assert any("\\xfe" in one for one in left["scratch"])
    codec.encode(node.Reclaimed(record))


def refuse(*_args: object, **_named: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_records_that_no_message_can_hold_are_made_so_when_they_are_read(tmp_path: Path) -> None:
    before = Reclaim(
        worker_id="p-1", pool="p", pid=1, level="process", steps=(Taken(step="scratch", left=("\udcff: a",)),)
    )
    odd = Reclaim(
        worker_id="p-2", pool="p", pid=1, level="process", steps=(Taken(step="scratch", left=("\ud800",)),)
    )
    lines = [json.dumps(codec.as_plain(one)) for one in (before, odd)]
    (tmp_path / "reclaims.jsonl").write_text("".join(line + "\n" for line in lines))
    records = reclaim.Reclaims(tmp_path).recent
    assert records[-1].steps[0].left == ("\\xff: a",)
    codec.encode(node.Deaths((), {}, records))


# -- folders --------------------------------------------------------------------------------------------


def removed(path: Path) -> Removal:
    removal = Removal(path)
    assert removal.go_on(time.monotonic() + 20)
    return removal


def test_a_folder_of_many_files_goes_in_slices(tmp_path: Path) -> None:
    top = tmp_path / "scratch"
    top.mkdir()
    for number in range(2000):
        (top / str(number)).touch()
    removal = Removal(top)
    slices = 1
    while not removal.go_on(time.monotonic() + 0.001):
        slices += 1
    assert removal.is_gone
    assert removal.files == 2001
    assert slices > 2


def test_a_link_in_the_place_of_the_folder_goes_and_its_target_is_not_even_opened(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    (target / "file").touch()
    (tmp_path / "scratch").symlink_to(target)
    assert removed(tmp_path / "scratch").is_gone
    assert (target / "file").exists()
    assert target.stat().st_mode & 0o777 == 0o755


def test_a_large_file_is_cut_down_in_parts_and_a_hard_link_elsewhere_keeps_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "FREE_BYTES_MAX", 64 * 1024)
    top = tmp_path / "scratch"
    top.mkdir()
    (top / "large").write_bytes(b"x" * 1024 * 1024)
    (top / "shared").write_bytes(b"y" * 1024 * 1024)
    (tmp_path / "kept").hardlink_to(top / "shared")
    removal = removed(top)
    assert removal.is_gone
    assert removal.bytes == 1024 * 1024
    assert (tmp_path / "kept").read_bytes() == b"y" * 1024 * 1024


def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = tmp_path / "scratch"
    top.mkdir()
    (top / "file").touch()
    (top / "other").touch()
    unlink = os.unlink

    def stubborn(path: str, *, dir_fd: int | None = None) -> None:
        if path == "file":
            raise PermissionError(1, "Operation not permitted")
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", stubborn)
    removal = removed(top)
    assert not removal.is_gone
    assert removal.left == ["file: Operation not permitted", "scratch: Directory not empty"]


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount; nobody else can leave a mount behind")
def test_what_is_mounted_in_a_folder_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "scratch" / "mount").mkdir(parents=True)
    code = (
        "import ctypes, pathlib, sys\n"
        "from mcp_broker.supervisor.reclaim import remove_tree\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "top = pathlib.Path(sys.argv[1])\n"
        "new_namespace, private, bind = 0x20000, 0x44000, 0x1000\n"
        "if libc.unshare(new_namespace) or libc.mount(b'none', b'/', None, private, None): sys.exit(77)\n"
        "if libc.mount(bytes(top / 'kept'), bytes(top / 'scratch' / 'mount'), None, bind, None): sys.exit(77)\n"
        "sys.exit(remove_tree(top / 'scratch'))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    if ran.returncode == 77:
        pytest.skip("this root may not mount")
    assert ran.returncode == 0, "something is left, and it says so"
    assert (tmp_path / "kept" / "file").exists()


# -- shared memory ----------------------------------------------------------------------------------------


def test_shared_memory_and_semaphores_go_by_prefix_or_owner_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "FOLDER", tmp_path)
    prefix = memory.prefix("ab", "t-1")
    ours = [f"{prefix}psm_1", f"sem.{prefix}mp-2"]
    others = ["psm_1234", "sem.mp-x", memory.prefix("ab", "t-11") + "psm_1", memory.prefix("cd", "t-1") + "x"]
    for name in (*ours, *others):
        (tmp_path / name).write_bytes(b"x" * 5000)
    assert sorted(memory.names(prefix)) == sorted(ours)
    assert sorted(memory.names(prefix, os.geteuid())) == sorted([*ours, *others])
    assert len(memory.names(memory.prefix("ab"))) == 3
    assert all(memory.remove(name) for name in ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    assert not memory.remove(ours[0])


def test_large_shared_memory_is_freed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "FOLDER", tmp_path)
    monkeypatch.setattr(limits, "FREE_BYTES_MAX", 64 * 1024)
    (tmp_path / "m").write_bytes(b"x" * 256 * 1024)
    assert list(memory.freeing("m")) == [64 * 1024] * 4
    assert not (tmp_path / "m").exists()


SHMGET = """
import ctypes, os
libc = ctypes.CDLL(None)
print(libc.shmget(0, 8192, 0o1600), libc.semget(0, 1, 0o1600), libc.msgget(0, 0o1600))
"""


@pytest.mark.process
def test_system_v_shared_memory_goes_with_its_maker_and_no_other() -> None:
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", SHMGET], stdout=subprocess.PIPE, text=True) as maker:
        made, _ = maker.communicate()
    shm, sem, msg = map(int, made.split())
    try:
        if shm < 0:
            pytest.skip("this kernel has no System V shared memory")
        assert sysv.made_by(maker.pid, time.time() + 5, None) == [], "an earlier process of that pid made it"
        assert sysv.made_by(maker.pid + 1, before, None) == []
        assert sysv.made_by(maker.pid, before, None) == [sysv.Item("shm", shm, 8192)]
        all_of_uid = {(item.kind, item.id) for item in sysv.made_by(0, before, os.geteuid())}
        assert {("shm", shm), ("sem", sem), ("msg", msg)} <= all_of_uid
    finally:
        gone = [sysv.remove(sysv.Item(kind, id_)) for kind, id_ in (("shm", shm), ("sem", sem), ("msg", msg))]
    assert all(gone)
    assert sysv.made_by(maker.pid, before, None) == []
    assert not sysv.remove(sysv.Item("shm", shm))


# -- control groups ---------------------------------------------------------------------------------------

HYBRID_MOUNTS = """\
24 30 0:22 / /proc rw - proc proc rw
31 28 0:27 /box /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 28 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 28 0:29 / /sys/fs/cgroup/with\\040space rw - cgroup2 cgroup2 rw,nsdelegate
"""
HYBRID_GROUPS = "4:memory:/box/inner\n3:cpu,cpuacct:/some\n0::/user/x\n"


def test_hierarchies_are_read_where_they_are_mounted_whatever_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(HYBRID_MOUNTS)
    (tmp_path / "cgroup").write_text(HYBRID_GROUPS)
    memory_, cpu, unified = cgroups.hierarchies(tmp_path)
    assert (memory_.own, memory_.controllers) == (Path("/sys/fs/cgroup/memory/inner"), frozenset({"memory"}))
    assert (cpu.own, cpu.controllers) == (
        Path("/sys/fs/cgroup/cpu,cpuacct/some"),
        frozenset({"cpu", "cpuacct"}),
    )
    assert (unified.own, unified.is_v2) == (Path("/sys/fs/cgroup/with space/user/x"), True)
    assert cgroups.hierarchies(tmp_path / "nowhere") == []


@pytest.mark.process
def test_a_killed_group_takes_all_that_its_process_started(tmp_path: Path) -> None:
    groups = cgroups.open_groups("test" + tmp_path.parent.name.replace("-", ""))
    if groups is None:
        pytest.skip("this machine or this user has no control groups that can kill")
    group = groups.of("t-1")
    try:
        group.make()
        code = "import os, time\nfor _ in range(3): os.fork()\nprint('.', flush=True); time.sleep(600)"
        with subprocess.Popen(
            [sys.executable, "-c", "input(); " + f"exec({code!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as parent:
            assert parent.stdin is not None
            assert parent.stdout is not None
            group.add(parent.pid)
            parent.stdin.write(b"\n")
            parent.stdin.flush()
            for _ in range(8):
                parent.stdout.readline()
            assert len(group.pids()) == 8
            assert not group.remove()
            assert group.kill()
            assert parent.stdout.read() == b"", "nobody holds its other end any more"
    finally:
        deadline = time.monotonic() + 5
        while not group.remove() and time.monotonic() < deadline:
            time.sleep(0.002)
        groups.close()
    assert not groups.top.exists
