"""Errors of a tool that are about a limit of its worker, and those that only look like it."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mcp_broker.worker.exhaustion import limit_of


def raised(number: int, name: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


def test_memory_and_descriptors_that_are_used_up_are_limits(tmp_path: Path) -> None:
    assert limit_of(MemoryError(), tmp_path) == "memory_mb"
    assert limit_of(raised(errno.ENOMEM), tmp_path) == "memory_mb"
    assert limit_of(raised(errno.EMFILE, "data.csv"), tmp_path) == "open_files"
    assert limit_of(RuntimeError("can't start new thread"), tmp_path) == "processes"


def test_ordinary_errors_stay_the_tools_own(tmp_path: Path) -> None:
    for error in (
        ValueError("no"),
        RuntimeError("can't"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "closed"),
        raised(errno.ENFILE),
        raised(errno.EPIPE),
        KeyboardInterrupt(),
    ):
        assert limit_of(error, tmp_path) == "", error


def test_an_error_that_a_tool_made_of_one_is_its_own(tmp_path: Path) -> None:
    made = ValueError("the table is too large")
    made.__cause__ = MemoryError()
    assert limit_of(made, tmp_path) == ""


def test_not_yet_is_no_limit_where_nothing_is_started(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError) as found:
        os.read(read, 1)
    os.close(read)
    os.close(write)
    assert limit_of(found.value, tmp_path) == ""


def test_a_process_that_cannot_be_started_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise raised(errno.EAGAIN)

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(BlockingIOError) as plain:
        os.fork()
    # the innermost frame is the stand-in's own; what is asked of the kernel has none
    assert plain.value.__traceback__ is not None
    bare = plain.value.with_traceback(plain.value.__traceback__)
    bare.__traceback__.tb_next = None  # type: ignore[union-attr]
    assert limit_of(bare, tmp_path) == "processes"
    # which of the two starts a program depends on the version of Python
    monkeypatch.setattr(subprocess, "_fork_exec", refuse)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    with pytest.raises(BlockingIOError) as started:
        subprocess.run([sys.executable, "-c", ""], check=True)
    trace = started.value.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_next.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    trace.tb_next = None
    assert limit_of(started.value, tmp_path) == "processes"


def test_a_full_disk_is_a_limit_in_the_scratch_folder_only(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert limit_of(raised(number, str(tmp_path / "part")), tmp_path) == "scratch_mb"
        assert limit_of(raised(number, "/data/table"), tmp_path) == ""
        assert limit_of(raised(number), tmp_path) == "", "the folder's own file system has room"
        assert limit_of(raised(number), tmp_path / "nowhere") == ""


def test_a_file_that_is_too_large_is_a_limit_where_files_have_one(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert limit_of(raised(errno.EFBIG), tmp_path) == ""
    code = (
        "import errno, resource; from pathlib import Path; from mcp_broker.worker.exhaustion import limit_of\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: Path('large').write_bytes(bytes(2 << 20))\n"
        "except OSError as error: print(limit_of(error, Path.cwd()))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout == "scratch_mb\n"


def test_a_process_may_hold_so_many_descriptors_more_and_a_few_for_its_own_use() -> None:
    code = (
        "import os; from mcp_broker import limits; from mcp_broker.worker import exhaustion\n"
        "exhaustion.bind_files(20)\nheld = []\n"
        "try:\n    while True: held.append(os.open('/', os.O_RDONLY))\n"
        "except OSError as error: print(len(held) - limits.OWN_FILES, error.errno)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, number = map(int, told.stdout.split())
    assert number == errno.EMFILE
    assert 19 <= count <= 21
