"""A file system of one's own: a root with nothing in it but what is opened, as it will be seen after the uid is dropped.

Made as root, before the change of uid: a worker's new uid could not even reach an interpreter inside root's home. The
folders on the way (``/root``) are new and empty, with nothing but what was opened below them.

Folders that the operator opens are seen as the worker's own (an id-mapped mount): what belongs to the folder's owner
belongs to the worker's uid here, and what the worker makes belongs to the folder's owner there. Where the file system
cannot do that, the rights are as they are.

Nothing of it needs to be undone: all mounts end with the last process that sees them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mcp_broker.confine import folders, kernel

_NEW_MOUNTS: Final = 0x0002_0000
_NEW_IPC: Final = 0x0800_0000
_NEW_NETWORK: Final = 0x4000_0000
_NEW_USER: Final = 0x1000_0000

_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 1 << 18
_MNT_DETACH: Final = 2

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_ATTR_RDONLY: Final = 1
_ATTR_NOSUID: Final = 2
_ATTR_NODEV: Final = 4
_ATTR_IDMAP: Final = 0x0010_0000

_LINKS: Final = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}


@dataclass(frozen=True, slots=True)
class View:
    """What is to be seen.

    Args:
        system: paths that are seen as they are, read-only.
        read, write: the operator's folders and files.
        hidden: folders that are covered where an opened one would show them.
        scratch: the private folder.
        scratch_mb: its size in memory, MiB; 0: the folder itself.
        uid: who will look; None: nobody changes.
        shm_mb: size of /dev/shm, MiB.
        elsewhere: folders of the host that are seen under another path, read-only.
    """

    system: tuple[str, ...]
    read: tuple[str, ...]
    write: tuple[str, ...]
    hidden: tuple[str, ...]
    scratch: str
    scratch_mb: int
    uid: int | None
    shm_mb: int = 64
    elsewhere: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Tree:
    """A copy of a part of the host's tree that is not in sight yet; without one, an empty folder in memory.

    Args:
        fd: of the copy.
        options: of the folder in memory.
        is_cover: it only covers what would be seen otherwise.
    """

    path: str
    fd: int | None = None
    is_folder: bool = True
    options: str = ""
    is_cover: bool = False


def leave(*, network: bool) -> None:
    """Leave the namespaces of mounts and System V IPC, and that of the network if so.

    Raises:
        kernel.Refused: we may not.
    """
    kernel.unshare(_NEW_MOUNTS | _NEW_IPC)
    if network:
        kernel.unshare(_NEW_NETWORK)
        _raise_loopback()
    # what is mounted from here on is nobody else's
    kernel.mount(None, "/", None, _MS_REC | _MS_PRIVATE)


def enter(view: View) -> None:
    """Make the view the root of this process; the working directory is the scratch folder then.

    Raises:
        kernel.Refused: a mount was refused.
        OSError: a path cannot be opened.
    """
    trees = list(_trees(view))
    root = view.scratch
    links = [Path(path) for path in folders.SYSTEM if Path(path).is_symlink()]
    kernel.mount("none", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for link in links:
        Path(f"{root}{link}").symlink_to(link.readlink())
    for tree in trees:
        _show(tree, root)
    _mount_kernel(root, view)
    os.chdir(root)
    kernel.call("pivot_root", b".", b".")
    kernel.umount(".", _MNT_DETACH)
    os.chdir("/")
    _set(_AT_FDCWD, b"/", 0, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    os.chdir(view.scratch)


def _trees(view: View) -> Iterator[_Tree]:
    """Copy what is to be seen, while it can be seen; the outer before the inner."""
    wanted = dict.fromkeys(folders.outermost(view.system), "system")
    for path in folders.SYSTEM:
        if Path(path).is_symlink():
            wanted.pop(path, None)
    wanted |= dict.fromkeys(view.read, "read") | dict.fromkeys(view.write, "write")
    wanted |= dict.fromkeys(view.hidden, "hidden") | dict.fromkeys(folders.DEVICES, "device")
    wanted[view.scratch] = "memory" if view.scratch_mb else "scratch"
    mapped: dict[tuple[int, int], int] = {}
    sources = {path: path for path in wanted} | {seen: path for path, seen in view.elsewhere.items()}
    for path in sorted(sources):
        kind = wanted.get(path, "system")
        if kind == "hidden":
            # nobody can list it, and what is opened below it can still be reached
            yield _Tree(path, options="mode=711,size=1m", is_cover=True)
            continue
        if kind == "memory":
            owner = "" if view.uid is None else f",uid={view.uid},gid={view.uid}"
            yield _Tree(path, options=f"mode=700,size={view.scratch_mb}m{owner}")
            continue
        attributes = _ATTR_NOSUID
        attributes |= 0 if kind == "device" else _ATTR_NODEV
        attributes |= 0 if kind in {"write", "scratch", "device"} else _ATTR_RDONLY
        fd = _copy(sources[path], attributes)
        found = os.fstat(fd)
        if kind in {"read", "write"} and view.uid is not None:
            _map_owner(fd, found, view.uid, mapped)
        yield _Tree(path, fd, is_folder=stat.S_ISDIR(found.st_mode))
    for user_namespace in mapped.values():
        os.close(user_namespace)


def mapped_tree(path: str, uid: int) -> int:
    """Copy a folder of the operator's so that what belongs to its owner belongs to a worker's uid.

    Returns:
        The descriptor of the copy, for move_mount.

    Raises:
        kernel.Refused: we may not.
    """
    fd = _copy(path, _ATTR_NOSUID | _ATTR_NODEV)
    mapped: dict[tuple[int, int], int] = {}
    _map_owner(fd, os.fstat(fd), uid, mapped)
    for user_namespace in mapped.values():
        os.close(user_namespace)
    return fd


def _copy(path: str, attributes: int) -> int:
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE
    fd = kernel.call("open_tree", _AT_FDCWD, os.fsencode(path), flags)
    _set(fd, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, attributes)
    return fd


def _map_owner(fd: int, found: os.stat_result, uid: int, mapped: dict[tuple[int, int], int]) -> None:
    """Let the worker's uid stand for the owner of a tree; a file system, or a machine, that cannot leaves it as it is.

    Args:
        mapped: (owner, group) -> a user namespace that maps them; one is added where it is missing.
    """
    owner = (found.st_uid, found.st_gid)
    with contextlib.suppress(kernel.Refused):
        if owner not in mapped:
            mapped[owner] = _user_namespace(*owner, uid)
        _set(fd, b"", _AT_EMPTY_PATH, _ATTR_IDMAP, mapped[owner])


def _user_namespace(owner: int, group: int, uid: int) -> int:
    """Return a user namespace that maps a folder's owner to a worker; made by a child that ends at once."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(OSError):
            kernel.unshare(_NEW_USER)
            os.write(theirs, b"1")
            signal.pause()
        os._exit(1)
    os.close(theirs)
    try:
        if not os.read(ours, 1):
            raise kernel.Refused(errno.EPERM, "unshare (user namespace)")
        Path(f"/proc/{child}/uid_map").write_text(f"{owner} {uid} 1", encoding="ascii")
        Path(f"/proc/{child}/gid_map").write_text(f"{group} {uid} 1", encoding="ascii")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _show(tree: _Tree, root: str) -> None:
    target = Path(root + tree.path)
    if tree.is_cover and not target.is_dir():
        return
    if tree.fd is None:
        _make_place(target, is_folder=True)
        kernel.mount("none", str(target), "tmpfs", _MS_NOSUID | _MS_NODEV, tree.options)
        return
    _make_place(target, is_folder=tree.is_folder)
    try:
        kernel.call("move_mount", tree.fd, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    except kernel.Refused as error:
        raise kernel.Refused(error.errno or 0, f"move_mount {tree.path}") from error
    finally:
        os.close(tree.fd)


def _make_place(target: Path, *, is_folder: bool) -> None:
    """Make what is mounted over, with folders on the way that everybody may pass."""
    mask = os.umask(0o022)
    try:
        if is_folder:
            target.mkdir(parents=True, exist_ok=True)
        elif not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
    finally:
        os.umask(mask)


def _mount_kernel(root: str, view: View) -> None:
    """Mount /proc, in which only one's own processes are seen, and what else belongs into /dev."""
    _make_place(Path(root, "proc"), is_folder=True)
    kernel.mount("proc", f"{root}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "hidepid=2")
    shared = f"{root}/dev/shm"  # noqa: S108 (the worker's own, below its new root)
    _make_place(Path(shared), is_folder=True)
    kernel.mount("none", shared, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=1777,size={view.shm_mb}m")
    for name, target in _LINKS.items():
        Path(root, "dev", name).symlink_to(target)


def show_again(trees: Sequence[tuple[int, str]]) -> None:
    """Leave the namespace of mounts, and put copies where their folders are, in the sight of this process alone."""
    kernel.unshare(_NEW_MOUNTS)
    kernel.mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    for fd, path in trees:
        kernel.call("move_mount", fd, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)


def _set(fd: int, path: bytes, flags: int, attributes: int, user_namespace: int = 0) -> None:
    attribute = struct.pack("<QQQQ", attributes, 0, 0, user_namespace)
    kernel.call("mount_setattr", fd, path, flags, attribute, len(attribute))


def _raise_loopback() -> None:
    """Bring the new network's loopback interface up."""
    import fcntl  # noqa: PLC0415 (needed here only)

    siocsifflags, up_and_running = 0x8914, 0x41
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, siocsifflags, struct.pack("16sh22x", b"lo", up_and_running))
