"""What a worker does to itself before it imports a tool: its level, and everything that the level is made of.

The supervisor decides it and reads afterwards from /proc what came of it; the worker only obeys. It travels inside
:class:`mcp_broker.wire.node.WorkerBoot`.
"""

from __future__ import annotations

from typing import Final

from mcp_broker.wire.items import Record

#: where a worker with a file system of its own sees the folder of its endpoint
ENDPOINT_FOLDER: Final = "/run/broker"


class Confinement(Record, kw_only=True, frozen=True):
    """The confinement of one worker process."""

    #: process, restricted or sandboxed
    level: str = "process"
    #: the uid, and gid, that only this process has while it lives; None: the supervisor's own
    uid: int | None = None
    #: folders and files of the host, absolute: what it may read, and what it may read and write besides its scratch
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    #: folders that stay closed although a folder above them is open: the state directory
    hidden: tuple[str, ...] = ()
    #: none, loopback (a network of its own with nothing but a loopback interface) or full
    network: str = "full"
    #: a mount namespace with nothing in it but what this record opens; private /dev/shm and System V IPC too
    own_mounts: bool = False
    #: the host's folder with the socket to the broker, seen at ENDPOINT_FOLDER; it needs `own_mounts`
    endpoint_folder: str = ""
    #: a network namespace of its own
    own_network: bool = False
    #: size of a scratch folder in memory, MiB, which ends with the process; 0: a folder of the host.
    #: It needs `own_mounts`.
    scratch_mb: int = 0
    #: size of its own /dev/shm, MiB
    shm_mb: int = 64
    #: name of a resource limit as in resource.RLIMIT_*, in lower case, without that prefix -> soft and hard value
    rlimits: dict[str, int] = {}
    #: added to the kernel's out-of-memory score: the higher, the sooner it is chosen, at most 1000
    oom_score_adj: int = 0
