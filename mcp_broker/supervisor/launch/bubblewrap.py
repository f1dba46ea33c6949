"""What bubblewrap is told, as a list of arguments: a pure function from what is to be seen to how it is mounted.

Order matters to bubblewrap: it works through its arguments one by one, and what is mounted later covers what was there.
So the outer folder comes before the inner one, and what makes the root read-only comes last.

Source: bwrap(1), 0.8 and later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from mcp_broker.confine import folders
from mcp_broker.wire.confinement import ENDPOINT_FOLDER

_MIB: Final = 1024 * 1024
#: of /tmp and /dev/shm, each, where no size of the scratch folder is given
_TMP_MB: Final = 64
_TMP: Final = "/tmp"  # noqa: S108 (the sandbox's own)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """One sandbox.

    Args:
        system: paths of the host that are seen as they are, read-only.
        links: links of the root folder, name -> target, as the host has them (/lib -> usr/lib).
        read, write: the operator's folders and files, by their own names.
        hidden: folders that are covered where an opened one would show them.
        scratch: the worker's folder; its working directory.
        scratch_mb: its size in memory, MiB; 0: it is the host's folder.
        endpoint_folder: the host's folder with the worker's own socket.
        has_network: the host's network; otherwise one with nothing but a loopback interface.
        user_namespace: descriptor of a namespace that is there already, in which the first process may change its uid;
            None: one is made, in which it has the uid that it has outside, and no right.
        environment: all of it.
    """

    system: Sequence[str]
    links: Mapping[str, str] = field(default_factory=dict)
    read: Sequence[str] = ()
    write: Sequence[str] = ()
    hidden: Sequence[str] = ()
    scratch: str
    scratch_mb: int = 0
    endpoint_folder: str
    has_network: bool = False
    user_namespace: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def arguments(sandbox: Sandbox) -> list[str]:
    """Return bubblewrap's options; the program follows them."""
    return [
        *_namespaces(sandbox),
        *("--die-with-parent", "--new-session", "--as-pid-1"),
        *_rights(sandbox),
        "--clearenv",
        *(word for item in sandbox.environment.items() for word in ("--setenv", *item)),
        *_mounts(sandbox),
    ]


def _namespaces(sandbox: Sandbox) -> list[str]:
    network = [] if sandbox.has_network else ["--unshare-net"]
    others = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", *network]
    if sandbox.user_namespace is None:
        return ["--unshare-user", "--disable-userns", *others]
    # its maker has seen to it that none can be made below it
    return ["--userns", str(sandbox.user_namespace), "--assert-userns-disabled", *others]


def _rights(sandbox: Sandbox) -> list[str]:
    dropped = ["--cap-drop", "ALL"]
    if sandbox.user_namespace is None:
        return dropped
    # for the first process, which gives them up before it becomes a worker
    kept = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_CHOWN")
    return [*dropped, *(word for name in kept for word in ("--cap-add", name))]


def _mounts(sandbox: Sandbox) -> list[str]:
    size = str((sandbox.scratch_mb or _TMP_MB) * _MIB)
    # a folder of the host that the sandbox has one of its own for is not seen, only what lies in it
    system = [path for path in sandbox.system if path not in {_TMP, "/dev", "/dev/shm", "/proc"}]  # noqa: S108
    # the outermost are enough, and what the operator opens may lie in them and be opened further
    shown = {path: ["--ro-bind", path, path] for path in folders.outermost(system)}
    shown.update({path: ["--ro-bind", path, path] for path in sandbox.read})
    empty = {path for path in sandbox.hidden if _cover(path, shown) is not None}
    shown.update({path: ["--tmpfs", path] for path in empty})
    shown.update({path: ["--bind", path, path] for path in sandbox.write})
    shown[sandbox.scratch] = ["--bind", sandbox.scratch, sandbox.scratch]
    if sandbox.scratch_mb:
        shown[sandbox.scratch] = ["--size", size, "--perms", "0700", "--tmpfs", sandbox.scratch]
    shown[ENDPOINT_FOLDER] = ["--ro-bind", sandbox.endpoint_folder, ENDPOINT_FOLDER]
    shown["/proc"] = ["--proc", "/proc"]
    shown["/dev"] = ["--dev", "/dev"]
    for path in (_TMP, "/dev/shm"):  # noqa: S108 (the same)
        shown[path] = ["--size", size, "--perms", "1777", "--tmpfs", path]
    empty |= {_TMP, "/dev"}
    words: list[str] = []
    for name, target in sandbox.links.items():
        words += ["--symlink", target, name]
    made = set(shown)
    for path in sorted(shown, key=lambda one: one.rstrip("/").split("/")):
        for folder in _above(path):
            # bubblewrap would make them for its own uid alone; in a folder that is shown they are there already
            cover = _cover(folder, shown)
            if folder not in made and (cover is None or cover in empty):
                words += ["--dir", folder]
            made.add(folder)
        words += shown[path]
    # what is left writable is of a known size
    return [*words, "--remount-ro", "/dev", "--remount-ro", "/"]


def _cover(path: str, shown: Iterable[str]) -> str | None:
    """Return the innermost of what is shown that a path is or lies in."""
    return max((other for other in shown if folders.is_within(path, other)), key=len, default=None)


def _above(path: str) -> list[str]:
    """Return the folders on the way to a path, the outer first, without the root and without itself."""
    parts = path.strip("/").split("/")[:-1]
    return ["/" + "/".join(parts[: count + 1]) for count in range(len(parts))]


def packed(words: Iterable[str]) -> bytes:
    """Return options as `--args FD` reads them: no other process sees them then, and they may be many."""
    return b"".join(os.fsencode(word) + b"\0" for word in words)
