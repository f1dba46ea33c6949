"""What an interpreter needs of the host to run at all, and how a folder is opened without what must stay closed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: programs and libraries of the system
SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
#: of /etc: how names, times, libraries and certificates are found; nothing that says what runs here
SETTINGS: Final = tuple(
    f"/etc/{name}"
    for name in (
        *("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "timezone", "locale.alias", "os-release"),
        *("passwd", "group", "nsswitch.conf", "hosts", "host.conf", "resolv.conf", "gai.conf", "services"),
        *("protocols", "mime.types", "ssl", "pki", "ca-certificates", "alternatives", "fonts"),
    )
)
#: what the kernel tells of processes (more is told of one's own than of others'), of processors, and of memory that
#: may be used: DuckDB aborts where it sees the latter and may not read it
KERNEL: Final = ("/proc", "/sys/devices/system", "/sys/fs/cgroup")
#: of these, what is shown in a file system of one's own, beside a new /proc
SHOWN: Final = ("/sys/devices/system",)
DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
#: found through the import system, since an editable install stands elsewhere
_OURS: Final = ("mcp_broker", "mcp_broker_workers")


def essential() -> tuple[str, ...]:
    """Return the folders without which nothing can be imported."""
    return (sys.prefix, sys.base_prefix, str(Path(__file__).parent))


def runtime() -> tuple[str, ...]:
    """Return the folders that this interpreter imports from, and those of its programs."""
    found = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    # an interpreter below none of them is a link to one: the folder of its file
    found.append(str(Path(sys.executable).resolve().parent))
    named = (*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    found += [entry for entry in named if entry.startswith("/")]
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += spec.submodule_search_locations
    return existing(found)


def existing(paths: Iterable[str]) -> tuple[str, ...]:
    """Return those that are there and not the whole file system, under their own name and where links lead."""
    found: dict[str, None] = {}
    for path in paths:
        for name in (os.path.normpath(path), os.path.realpath(path)):
            # one that cannot be looked at cannot be opened either
            with contextlib.suppress(OSError):
                if name != "/" and Path(name).exists():
                    found.setdefault(name)
    return tuple(found)


def outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the paths that lie below none of the others, in order."""
    chosen: list[str] = []
    for path in sorted(set(paths)):
        if not any(is_within(path, other) for other in chosen):
            chosen.append(path)
    return tuple(chosen)


def is_within(path: str, folder: str) -> bool:
    """Tell whether a path is a folder or lies below it; both absolute."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def carved(path: str, hidden: Iterable[str]) -> tuple[str, ...]:
    """Return what is to be opened so that all of a folder is open, as it is now, except the hidden parts."""
    inner = [one for one in hidden if is_within(one, path)]
    if not inner:
        return (path,)
    if path in inner:
        return ()
    opened: list[str] = []
    with os.scandir(path) as entries:
        for entry in sorted(entry.path for entry in entries):
            opened += carved(entry, inner)
    return tuple(opened)
