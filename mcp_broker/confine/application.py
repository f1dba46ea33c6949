"""Applying a confinement: what a worker process does to itself, in the one order in which it works.

1. Descriptors that it should not have are closed, and no program gives it rights again.
2. Namespaces and mounts, as root.
3. Limits, and the uid, after which it is nobody.
4. Landlock, then the filter of system calls: neither could be set up under the other's refusals in another order.
5. The death signal, which the change of uid has cleared; that is for the caller, who knows the parent.

It holds for this thread and what it starts from now on, so it comes while there is one thread only: before a ZeroMQ
context exists and before any code of a tool runs. It works after exec and after a fork.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker.confine import folders, kernel, landlock, mounts, privileges, rlimits, seccomp
from mcp_broker.errors import ConfigError
from mcp_broker.wire.confinement import ENDPOINT_FOLDER

if TYPE_CHECKING:
    from mcp_broker.wire.confinement import Confinement

_IPC: Final = "ipc://"
_TCP: Final = "tcp://"


def apply(
    confinement: Confinement,
    *,
    scratch: str,
    endpoint: str,
    path: Iterable[str] = (),
    keep: Iterable[int] = (),
) -> None:
    """Confine this process, for ever.

    Args:
        confinement: what the supervisor decided.
        scratch: its private folder, in which it stands afterwards.
        endpoint: of the broker, which it must reach.
        path: folders that its tools are imported from.
        keep: descriptors that it needs, beside standard input, output and error.

    Raises:
        ConfigError: a step was refused; the message names it and the errno. The process must end then: it may be
            confined in part.
    """
    if len(os.listdir("/proc/self/task")) != 1:  # noqa: PTH208 (counted before every start)
        raise ConfigError("a worker confines itself while it has one thread, and it has more already")
    try:
        os.umask(0o077)
        privileges.close_others(keep)
        if confinement.oom_score_adj:
            privileges.prefer_as_victim(confinement.oom_score_adj)
        if confinement.level == "process":
            privileges.gain_no_more()
            rlimits.limit(confinement.rlimits)
        else:
            _restrict(confinement, scratch, endpoint, folders.existing(path))
    except OSError as error:
        step = str(error) if isinstance(error, kernel.Refused) else _told(error)
        raise ConfigError(f"cannot be confined at level {confinement.level}: {step}") from error


def _told(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def _restrict(confinement: Confinement, scratch: str, endpoint: str, path: tuple[str, ...]) -> None:
    hidden = folders.existing(confinement.hidden)
    system = (
        *folders.existing((*folders.SYSTEM, *folders.SETTINGS, *folders.SHOWN)),
        *folders.runtime(),
    )
    # the folders of its tools may be as closed as any other of the operator's
    read, write = (*_named("read", confinement.read), *path), _named("write", confinement.write)
    # bubblewrap has made a sandbox's mounts, and its first process has changed the uid
    is_made = confinement.level == "sandboxed"
    if confinement.own_mounts and not is_made:
        elsewhere = {confinement.endpoint_folder: ENDPOINT_FOLDER} if confinement.endpoint_folder else {}
        mounts.leave(network=confinement.own_network)
        mounts.enter(
            mounts.View(
                system=system,
                read=read,
                write=write,
                hidden=hidden,
                scratch=scratch,
                scratch_mb=confinement.scratch_mb,
                uid=confinement.uid,
                shm_mb=confinement.shm_mb,
                elsewhere=elsewhere,
            )
        )
    privileges.gain_no_more()
    rlimits.limit(confinement.rlimits)
    if confinement.uid is not None:
        if not is_made:
            privileges.become(confinement.uid)
        _check_reach(confinement, (*folders.essential(), *path, scratch))
        _check_writable(write, confinement.uid)
    landlock.restrict(_rules(confinement, scratch, endpoint, (*system, *read), write, hidden))
    seccomp.install(seccomp.program(_policy(confinement, endpoint)))


def _named(key: str, paths: Iterable[str]) -> tuple[str, ...]:
    """Return folders of the configuration, which must be there, under their name and where links lead."""
    for path in paths:
        try:
            Path(path).stat()
        except OSError as error:
            raise kernel.Refused(error.errno or 0, f"the pool's {key} names {path}") from error
    return folders.existing(paths)


def _check_reach(confinement: Confinement, paths: Iterable[str]) -> None:
    """Refuse to go on as a uid that cannot even import: it would fail later, and less clearly."""
    for path in paths:
        if not os.access(path, os.R_OK):
            mend = "install Python and the tools where others may read them"
            if not confinement.own_mounts:
                mend += ", or let the supervisor make mounts (CAP_SYS_ADMIN)"
            raise PermissionError(errno.EACCES, f"uid {confinement.uid} cannot reach it: {mend}", path)


def _check_writable(write: Iterable[str], uid: int) -> None:
    for path in write:
        if not os.access(path, os.W_OK):
            raise PermissionError(
                13,
                f"uid {uid} may not write it, and its file system has no id-mapped mounts: chmod o+w",
                path,
            )


def _rules(
    confinement: Confinement,
    scratch: str,
    endpoint: str,
    read: tuple[str, ...],
    write: tuple[str, ...],
    hidden: tuple[str, ...],
) -> landlock.Rules:
    opened = folders.outermost(folders.existing((*folders.KERNEL, *read)))
    # in a file system of its own, what is hidden is covered already
    covered = () if confinement.own_mounts else hidden
    parts = {path: folders.carved(path, covered) for path in opened}
    writable = [scratch, *write]
    if confinement.own_mounts:
        writable.append("/dev/shm")  # noqa: S108 (its own)
    if confinement.level == "sandboxed":
        writable.append("/tmp")  # noqa: S108 (likewise)
    # without TCP there is no kind of socket that a rule would apply to, so an old kernel need not know ports
    is_tcp = confinement.network == "none" and endpoint.startswith(_TCP)
    connect = (int(endpoint.rpartition(":")[2]),) if is_tcp else None
    has_scopes = landlock.abi() >= landlock.SCOPE_ABI
    return landlock.Rules(
        read=[part for path in opened for part in parts[path]],
        # names can be listed, or nothing could be imported from a folder that holds what is hidden
        listed=[path for path in opened if parts[path] != (path,)],
        write=writable,
        devices=folders.DEVICES,
        connect=connect,
        # without them, a uid and a network of its own keep it from others' processes and sockets
        scoped=has_scopes or confinement.uid is None or not confinement.own_network,
    )


def _policy(confinement: Confinement, endpoint: str) -> seccomp.Policy:
    return seccomp.Policy(
        unix=endpoint.startswith(_IPC),
        tcp=endpoint.startswith(_TCP),
        network=confinement.network != "none",
    )
