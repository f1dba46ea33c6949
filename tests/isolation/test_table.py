"""The table of docs/isolation.md: what each level stops, tried by a hostile tool in a real worker, and what it does not.

A row holds what comes of one attempt: at `process` as root and as an ordinary user, then at `restricted`, then at
`sandboxed`. "done" is as
much a promise as a refusal: what a level allows is documented by the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.isolation.conftest import LEVELS, Site

pytestmark = [pytest.mark.process, pytest.mark.slow]

Argument = Callable[[Site], Any]


def nothing(_site: Site) -> None:
    return None


def tcp(site: Site) -> list[Any]:
    return list(site.tcp.getsockname())


#: name -> what is tried, at what, and what comes of it: process as (root, ordinary), restricted, sandboxed
ROWS: dict[str, tuple[str, Argument, tuple[str, str], tuple[str, str], tuple[str, str]]] = {
    # files
    "read the password hashes": ("read", lambda _: "/etc/shadow", ("done", "EACCES"), ("ENOENT", "EACCES"), ("ENOENT", "ENOENT")),
    "read a file of the host": (
        "read", lambda site: f"{site.folder}/else/file", ("done", "done"), ("ENOENT", "EACCES"), ("ENOENT", "ENOENT")
    ),
    "read a key of the broker": (
        "read", lambda site: str(next((site.running.state_dir / "keys").iterdir())), ("done", "done"),
        ("ENOENT", "EACCES"), ("ENOENT", "ENOENT"),
    ),
    "list a folder of the host": (
        "list", lambda site: f"{site.folder}/else", ("done", "done"), ("ENOENT", "EACCES"), ("ENOENT", "ENOENT")
    ),
    "list a sibling's scratch": (
        "list", lambda site: site.scratch_of_a_sibling, ("done", "done"), ("ENOENT", "EACCES"), ("ENOENT", "ENOENT")
    ),
    "read what it may read": ("read", lambda site: f"{site.folder}/in/file", ("done", "done"), ("done", "done"), ("done", "done")),
    "write what it may only read": (
        "write", lambda site: f"{site.folder}/in", ("done", "done"), ("EROFS", "EACCES"), ("EROFS", "EROFS")
    ),
    "write what it may write": ("write", lambda site: f"{site.folder}/out", ("done", "done"), ("done", "done"), ("done", "done")),
    "make a set-user-id program": (
        "make a set-user-id program", lambda site: f"{site.folder}/out", ("done", "done"), ("EPERM", "EPERM"),
        ("EPERM", "EPERM"),
    ),
    "write its own code": (
        "write", lambda site: f"{site.folder}/tools", ("done", "done"), ("EROFS", "EACCES"), ("EROFS", "EROFS")
    ),
    "write to /tmp": ("write", lambda _: "/tmp", ("done", "done"), ("EROFS", "EACCES"), ("done", "done")),
    "run a program": ("run a program", nothing, ("done", "done"), ("done", "done"), ("done", "done")),
    # network
    "connect by TCP": ("connect by TCP", tcp, ("done", "done"), ("EAFNOSUPPORT", "EACCES"), ("EAFNOSUPPORT", "EAFNOSUPPORT")),
    "listen on a TCP port": ("listen on a port", nothing, ("done", "done"), ("EAFNOSUPPORT", "EACCES"), ("EAFNOSUPPORT", "EAFNOSUPPORT")),
    "connect by UDP": ("connect by UDP", tcp, ("done", "done"), ("EAFNOSUPPORT", "EAFNOSUPPORT"), ("EAFNOSUPPORT", "EAFNOSUPPORT")),
    "open a packet socket": ("open a packet socket", nothing, ("done", "EPERM"), ("EAFNOSUPPORT", "EAFNOSUPPORT"), ("EAFNOSUPPORT", "EAFNOSUPPORT")),
    "open a raw socket": ("open a raw socket", nothing, ("done", "EPERM"), ("EAFNOSUPPORT", "EAFNOSUPPORT"), ("EAFNOSUPPORT", "EAFNOSUPPORT")),
    "connect to a socket file of the host": (
        "connect to a socket file", lambda site: str(site.unix_path), ("done", "done"), ("ENOENT", "EAFNOSUPPORT"), ("ENOENT", "ENOENT")
    ),
    "connect to an abstract socket": (
        "connect to an abstract socket", lambda site: site.abstract_name, ("done", "done"),
        ("EPERM", "EAFNOSUPPORT"), ("ECONNREFUSED", "ECONNREFUSED"),
    ),
    "make a pair of sockets": ("make a pair of sockets", nothing, ("done", "done"), ("done", "done"), ("done", "done")),
    # other processes
    "signal the supervisor": ("signal", lambda site: site.supervisor, ("done", "done"), ("EPERM", "EPERM"), ("ESRCH", "ESRCH")),
    "signal the broker": ("signal", lambda site: site.broker, ("done", "done"), ("EPERM", "EPERM"), ("ESRCH", "ESRCH")),
    "read a sibling's environment": (
        "read a sibling's environment", lambda site: site.pids, ("done", "done"), ("ENOENT", "EACCES"), ("ENOENT", "ENOENT")
    ),
    "open a sibling's memory": (
        "open a sibling's memory", lambda site: site.pids, ("done", "done"), ("ENOENT", "EACCES"), ("ENOENT", "ENOENT")
    ),
    "read the broker's environment": (
        "read", lambda site: f"/proc/{site.broker}/environ", ("done", "done"), ("ENOENT", "EACCES"), ("ENOENT", "ENOENT")
    ),
    "open the broker's memory": (
        "read", lambda site: f"/proc/{site.broker}/mem", ("EIO", "EIO"), ("ENOENT", "EACCES"), ("ENOENT", "ENOENT")
    ),
    "trace a child": ("trace", nothing, ("done", "done"), ("EPERM", "EPERM"), ("EPERM", "EPERM")),
    # the kernel
    "make a user namespace": ("make a user namespace", nothing, ("done", "done"), ("EPERM", "EPERM"), ("EPERM", "EPERM")),
    "make a network namespace": ("make a network namespace", nothing, ("done", "EPERM"), ("EPERM", "EPERM"), ("EPERM", "EPERM")),
    "mount": ("mount", nothing, ("done", "EPERM"), ("EPERM", "EPERM"), ("EPERM", "EPERM")),
    "set up io_uring": ("set up io_uring", nothing, ("done", "done"), ("EPERM", "EPERM"), ("EPERM", "EPERM")),
    "handle page faults": ("handle page faults", nothing, ("done", "done"), ("EPERM", "EPERM"), ("EPERM", "EPERM")),
    "use keyrings": ("use keyrings", nothing, ("done", "done"), ("EPERM", "EPERM"), ("EPERM", "EPERM")),
    "become root again": ("become root again", nothing, ("done", "EPERM"), ("EPERM", "EPERM"), ("EPERM", "EINVAL")),
    # what tools need
    "use threads": ("use threads", nothing, ("done", "done"), ("done", "done"), ("done", "done")),
    "use POSIX semaphores": ("use POSIX semaphores", nothing, ("done", "done"), ("done", "EACCES"), ("done", "done")),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("row", ROWS)
def test_a_level_stops_what_the_table_says_and_nothing_else(site: Site, row: str, level: str) -> None:
    what, argument, *expected = ROWS[row]
    aim = argument(site)
    if isinstance(aim, dict):
        aim = aim[level]
    assert site.attempt(level, what, aim) == expected[LEVELS.index(level)][site.user == "ordinary"]
