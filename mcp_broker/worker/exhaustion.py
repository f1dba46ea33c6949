"""Limits that a tool meets by itself: the kernel refuses it something, and its code raises.

Only what is surely a limit of this worker becomes RESOURCE_EXHAUSTED; every other error stays the tool's own. What a tool
makes of such an error (another exception, raised from it) is its own too.
"""

from __future__ import annotations

import contextlib
import errno
import linecache
import os
import resource
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from mcp_broker import limits
from mcp_broker.confine import kernel, rlimits

#: modules of the standard library whose code forks
_STARTERS: Final = frozenset({"subprocess.py", "popen_fork.py", "popen_spawn_posix.py", "util.py", "pty.py"})
_DISK_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
#: a file system with less than this is full, bytes
_FULL_BYTES: Final = 64 * 1024
#: a write that does not fit whole leaves a file below its bound by less than this
_NEARLY_BYTES: Final = 16 * 1024 * 1024


def limit_of(error: BaseException, scratch: Path) -> str:
    """Return the limit that an error of a tool is about, "" if it is about none.

    Args:
        error: what the tool raised.
        scratch: the worker's private folder.
    """
    if isinstance(error, MemoryError):
        return "memory_mb"
    if isinstance(error, RuntimeError):
        return "processes" if str(error) == "can't start new thread" else ""
    if not isinstance(error, OSError):
        return ""
    if error.errno == errno.EMFILE:
        return "open_files"
    if error.errno == errno.ENOMEM:
        return "memory_mb"
    if error.errno == errno.EAGAIN:
        # the same number means "not yet" to whoever reads without waiting
        return "processes" if _is_forking(error.__traceback__) else ""
    if error.errno == errno.EFBIG:
        return _limit_of_files()
    return "scratch_mb" if error.errno in _DISK_FULL and _is_within(error, scratch) else ""


def told(limit: str, bounds: Mapping[str, float]) -> tuple[str, dict[str, object]]:
    """Say that a limit was reached: a sentence, and details {limit, limit_value}."""
    value = bounds.get(limit)
    how = "" if value is None else f" = {value:g}"
    details: dict[str, object] = {"limit": limit}
    if value is not None:
        details["limit_value"] = value
    return f"The worker's limit {limit}{how} was reached; do less in one call, or raise it", details


def bind_files(open_files: int) -> None:
    """From now on each process here may hold so many descriptors more than this one holds now."""
    try:
        held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (counted, not walked)
    except OSError:  # nothing to count them by: the supervisor does
        return
    with contextlib.suppress(kernel.Refused):
        rlimits.limit({"nofile": held + open_files + limits.OWN_FILES})


def _limit_of_files() -> str:
    bound = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if bound == resource.RLIM_INFINITY:
        return ""
    # the bound is for files in memory too, and the error does not say which file it is about
    return "memory_mb" if _has_file_in_memory(bound) else "scratch_mb"


def _has_file_in_memory(size: int) -> bool:
    """Tell whether an open file that no folder has is so large, or nearly."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if (
                    str(entry.readlink()).startswith("/memfd:")
                    and entry.stat().st_size >= size - _NEARLY_BYTES
                ):
                    return True
    return False


def _is_forking(trace: TracebackType | None) -> bool:
    """Tell whether an error was raised where a process is started."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    if Path(code.co_filename).name in _STARTERS:
        return True
    return "fork" in linecache.getline(code.co_filename, trace.tb_lineno)


def _is_within(error: OSError, scratch: Path) -> bool:
    """Tell whether the file system that is full is that of the scratch folder, and it was written there."""
    if isinstance(error.filename, str):
        try:
            return Path(error.filename).absolute().is_relative_to(scratch)
        except OSError:  # the working directory is gone
            return False
    # a write names no file
    try:
        found = os.statvfs(scratch)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < _FULL_BYTES
