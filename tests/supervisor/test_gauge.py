"""What a process and all below it hold, against what they were told to hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from mcp_broker import limits, proctable
from mcp_broker.supervisor.gauge import Gauge, Sizes, tree
from mcp_broker.supervisor.mappings import Mapped, Mappings
from mcp_broker.supervisor.scratch import Scratch
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from mcp_broker.supervisor.quota import Quota

MIB = 1 << 20

#: runs what it reads, a line at a time, and says when it is done
HOLDER = """
import ctypes, mmap, os, socket, subprocess, sys

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def opened(path=None):
    "Make a file without a name, in memory or where one is given."
    if path is None:
        return os.memfd_create("tool")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.unlink(path)
    return fd


def mapped(fd, size, part=None):
    "Take room for a file and map it, or a part of it; no page is ever touched, and no copy kept of the descriptor."
    os.posix_fallocate(fd, 0, size)
    return libc.mmap(None, part or size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)


print("up", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""

pytestmark = pytest.mark.process


class Holder:
    """A process that holds what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, proctable.WORKER_VARIABLE: "held-1"}, start_new_session=True,
        )  # fmt: skip
        self.heard()
        self.gauge = Gauge(self.popen.pid, folder)
        self.ready = self.gauge.ready()

    def heard(self) -> None:
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline()

    def does(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()
        self.heard()

    def grown(self, *, exactly: bool = False) -> float:
        """Return its memory above what it held at first, MiB."""
        self.gauge.look()
        self.gauge.look_at_files()
        return self.gauge.sample(exactly=exactly).memory_mb - self.ready.memory_mb

    def scratch_mb(self) -> float:
        """Return what is counted of its folder, without an entry that has a name, MiB."""
        self.gauge.look()
        self.gauge.look_at_files()
        return self.gauge.files.deleted_kib / 1024

    def close(self) -> None:
        for pid in reversed(tree(self.popen.pid)):
            os.kill(pid, 9)
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()


class Members:
    """Groups that tell of these processes."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids

    def members(self) -> list[int]:
        return self._pids


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Holder]:
    held = Holder(tmp_path)
    yield held
    held.close()


def test_memory_of_its_own_is_seen_as_it_is(holder: Holder) -> None:
    holder.does(f"own = bytearray(b'x') * {20 * MIB}")
    assert 19 < holder.grown() < 23
    assert holder.gauge.is_exact


def test_a_memory_file_counts_once_whether_it_is_mapped_or_not(holder: Holder) -> None:
    holder.does(f"fd = os.memfd_create('tool'); os.write(fd, b'x' * {20 * MIB})")
    assert 19 < holder.grown() < 23, "resident sets do not show it"
    holder.does(f"page = mmap.mmap(fd, {20 * MIB}); sum(page[at] for at in range(0, {20 * MIB}, 4096))")
    assert 39 < holder.grown() < 45, "the cheap figure counts it twice"
    assert not holder.gauge.is_exact
    assert 19 < holder.grown(exactly=True) < 25


def test_a_memory_file_that_is_only_mapped_counts_though_no_page_of_it_is_resident(holder: Holder) -> None:
    holder.does(f"fd = opened(); at = mapped(fd, {20 * MIB}); os.close(fd)")
    assert 19 < holder.grown() < 23
    assert holder.gauge.cost.rss_kib / 1024 - holder.ready.memory_mb < 5
    assert 19 < holder.grown(exactly=True) < 25
    holder.does(f"libc.munmap(at, {20 * MIB})")
    assert holder.grown() < 5


def test_a_removed_file_that_is_only_mapped_counts_until_it_is_unmapped(
    holder: Holder, tmp_path: Path
) -> None:
    holder.does(f"fd = opened({str(tmp_path / 'x')!r}); at = mapped(fd, {20 * MIB}); os.close(fd)")
    assert 19 < holder.scratch_mb() < 21
    holder.does(f"libc.munmap(at, {20 * MIB})")
    assert holder.scratch_mb() == 0


def test_a_removed_file_counts_once_whoever_has_it_open_or_mapped(holder: Holder, tmp_path: Path) -> None:
    holder.does(f"fd = opened({str(tmp_path / 'x')!r}); at = mapped(fd, {20 * MIB}, {10 * MIB})")
    holder.does(
        "r, w = os.pipe(); os.fork() or [os.write(w, b'x'), __import__('time').sleep(60)]; os.read(r, 1)"
    )
    assert 19 < holder.scratch_mb() < 21
    holder.does("os.close(fd)")
    assert 19 < holder.scratch_mb() < 21, "the child has it open"


def test_a_file_in_layers_which_has_one_device_open_and_another_mapped_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * MIB)
    found = path.stat()
    sizes = Sizes()
    sizes.add_open(str(path), "x (deleted)")
    for key in ((found.st_dev + 1, found.st_ino), (found.st_dev, found.st_ino)):
        sizes.add_mapped(key, Mapped("x (deleted)", 9999))
    assert sizes.total == 1024
    sizes.add_mapped((found.st_dev, found.st_ino + 1), Mapped("x (deleted)", 10))
    assert sizes.total == 1034, "another file that had the same name"


def test_who_may_not_look_at_what_is_mapped_counts_what_is_mapped_of_it(
    holder: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(place: str) -> os.stat_result:
        raise PermissionError(place)

    monkeypatch.setattr("mcp_broker.supervisor.mappings._look_at", refused)
    holder.does(f"fd = opened(); at = mapped(fd, {20 * MIB}, {12 * MIB}); os.close(fd)")
    assert 11 < holder.grown() < 15
    holder.does(f"shared = mmap.mmap(-1, {40 * MIB})")
    assert 11 < holder.grown() < 15, "what is not touched is not used"


def test_many_mappings_are_read_a_little_at_a_time(holder: Holder) -> None:
    holder.does("pages = [mmap.mmap(-1, 4096, prot=1 + 2 * (n % 2)) for n in range(2000)]")
    mappings = Mappings("/nowhere")
    looks = 1
    while not mappings.look([holder.popen.pid]):
        looks += 1
    assert looks > 2
    holder.does(f"fd = opened(); at = mapped(fd, {20 * MIB}); os.close(fd)")
    wait_for(lambda: holder.grown() > 19, what="the look that comes to it")


def test_without_a_reason_mappings_are_read_rarely(holder: Holder) -> None:
    holder.does(f"free = mmap.mmap(-1, {20 * MIB}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)")
    holder.grown()
    holder.does(f"free.close(); fd = opened(); at = mapped(fd, {20 * MIB}); os.close(fd)")
    holder.gauge.look()
    holder.gauge.look_at_files(rarely=False)
    assert holder.gauge.files.shared_kib < 1024, "as much is mapped as before"
    holder.does(f"fd = opened(); more = mapped(fd, {MIB}); os.close(fd)")
    holder.gauge.look()
    holder.gauge.look_at_files(rarely=False)
    assert holder.gauge.files.shared_kib > 20 * 1024


def test_what_a_forked_child_shares_counts_once_and_what_it_writes_counts(holder: Holder) -> None:
    holder.does(f"own = bytearray(b'x') * {20 * MIB}")
    holder.does(
        "r, w = os.pipe(); pid = os.fork() or [own.__setitem__(slice(0, 10 << 20), b'y' * (10 << 20)),"
        " os.write(w, b'x'), os.read(r, 9) and __import__('time').sleep(60)]"
    )
    wait_for(lambda: 27 < holder.grown(exactly=True) < 37, what="the child's own ten")
    assert holder.gauge.processes == 1


def test_descriptors_and_sockets_count_above_what_it_had(holder: Holder) -> None:
    assert (holder.ready.open_files, holder.gauge.files.most) == (0, 0)
    holder.does("files = [open(os.devnull) for _ in range(5)]; pair = socket.socketpair()")
    holder.gauge.look()
    holder.gauge.look_at_files()
    sample = holder.gauge.sample()
    assert (sample.open_files, sample.connections) == (7, 2)


def test_processes_and_their_cpu_count_also_after_their_end(holder: Holder) -> None:
    holder.does("subprocess.run([sys.executable, '-c', 'sum(range(8_000_000))'])")
    holder.gauge.look()
    assert holder.gauge.processes == 0
    spent = holder.gauge.cost.cpu_s - holder.ready.cpu_s
    assert spent > 0.05
    holder.does("one = subprocess.Popen(['sleep', '60'])")
    assert len(holder.gauge.look()) == 2
    assert holder.gauge.cost.cpu_s - holder.ready.cpu_s >= spent


def test_a_process_without_parent_is_counted_where_it_says_it_belongs(holder: Holder) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        assert holder.gauge.look(lambda: [other.pid]) == [holder.popen.pid, other.pid]
        assert holder.gauge.processes == 1
    finally:
        other.kill()
        other.wait()


def test_a_child_that_is_in_no_group_counts_too_and_nobody_counts_twice(holder: Holder) -> None:
    holder.does("one = subprocess.Popen(['sleep', '60'])")
    child = holder.gauge.look()[1]
    holder.gauge.quota = cast("Quota", Members([holder.popen.pid]))
    assert holder.gauge.look() == [holder.popen.pid, child]
    holder.gauge.quota = cast("Quota", Members([child, holder.popen.pid]))
    assert holder.gauge.look(lambda: [child]) == [holder.popen.pid, child]


def test_a_process_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    popen = subprocess.Popen(["true"])
    popen.wait()
    gauge = Gauge(popen.pid, tmp_path)
    gauge.ready()
    assert gauge.sample().memory_mb == 0


# -- folders --------------------------------------------------------------------------------------


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def passes(scratch: Scratch) -> float:
    while not scratch.look():
        pass
    return scratch.kib


def test_a_folder_is_counted_to_its_depths_and_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    (below / "file").write_bytes(b"x" * MIB)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "large").write_bytes(b"x" * 8 * MIB)
    (folder / "link").symlink_to(tmp_path / "else")
    scratch = Scratch(folder)
    assert 1024 <= passes(scratch) < 1100
    (below / "file").unlink()
    assert passes(scratch) < 50


def test_many_empty_files_are_something_and_are_counted_a_little_at_a_time(tmp_path: Path) -> None:
    for number in range(limits.SCRATCH_ENTRIES_A_LOOK + 10):
        (tmp_path / str(number)).touch()
    scratch = Scratch(tmp_path)
    assert not scratch.look()
    assert scratch.kib == limits.SCRATCH_ENTRIES_A_LOOK * 4, "what is counted so far is told"
    assert scratch.look()
    assert scratch.kib == (limits.SCRATCH_ENTRIES_A_LOOK + 10) * 4


def test_a_folder_nested_without_end_holds_no_descriptors_afterwards(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    before = open_files()
    assert passes(Scratch(tmp_path)) == limits.SCRATCH_DEPTH_MAX * 4
    half = Scratch(tmp_path)
    for number in range(limits.SCRATCH_ENTRIES_A_LOOK * 2):
        (tmp_path / str(number)).touch()
    half.look()
    half.close()
    assert open_files() == before


def test_a_count_that_rests_deep_in_a_folder_holds_two_descriptors_and_goes_on_where_it_was(
    tmp_path: Path,
) -> None:
    deep = tmp_path.joinpath(*"d" * (limits.SCRATCH_DEPTH_MAX - 1))
    deep.mkdir(parents=True)
    for number in range(limits.SCRATCH_ENTRIES_A_LOOK * 2):
        (deep / str(number)).touch()
    beside = tmp_path / "d" / "beside"
    beside.mkdir()
    (beside / "file").write_bytes(b"x" * MIB)
    before = open_files()
    scratch = Scratch(tmp_path)
    looks, most = 1, 0
    while not scratch.look():
        looks += 1
        most = max(most, open_files() - before)
    assert looks == 3
    assert 1 <= most <= 2, "the folder, and its list"
    least = 1024 + (limits.SCRATCH_DEPTH_MAX + limits.SCRATCH_ENTRIES_A_LOOK * 2) * 4
    assert least <= scratch.kib < least + 256, "a folder with a long list takes more than its entry"
    assert open_files() == before


def test_nothing_is_counted_of_a_folder_that_goes_away_meanwhile(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(limits.SCRATCH_ENTRIES_A_LOOK):
            (tmp_path / name / str(number)).touch()
    scratch = Scratch(tmp_path)
    assert not scratch.look()
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert passes(scratch) < (limits.SCRATCH_ENTRIES_A_LOOK + 2) * 4 + 256
    assert passes(scratch) == 0


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert passes(Scratch(tmp_path / "nowhere")) == 0
