"""The primitive `sandbox`: a real sandbox with our interpreter in it, looked at from outside, then ended.

Bubblewrap may be there and refused, or its options taken and ignored; only a process in it shows.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from typing import Final

from mcp_broker.confine import init, user_namespace
from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor.isolation import attestation
from mcp_broker.supervisor.isolation.probe import NotHolding, uid_range
from mcp_broker.supervisor.launch import bubblewrap
from mcp_broker.supervisor.launch.local import sealed
from mcp_broker.supervisor.launch.sandbox import born, program, visible
from mcp_broker.wire.confinement import Confinement

#: bubblewrap, an interpreter, a fork
_PATIENCE_S: Final = 4.0
_PACKET_BYTES: Final = 64


def try_it() -> str:
    """Make a sandbox; run it in a child, since it leaves a user namespace and a folder to be cleared away.

    Returns:
        Which bubblewrap.

    Raises:
        NotHolding: it cannot be made, in bubblewrap's own words, or does not hold.
        kernel.Refused: the user namespace cannot be made.
    """
    try:
        path = program()
    except SupervisionError as error:
        raise NotHolding(str(error)) from error
    span = uid_range() if os.geteuid() == 0 else None
    uid = None if span is None else span[0]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mcpb-probe-"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        stack.enter_context(theirs)
        below = None if uid is None else user_namespace.closed()
        sandbox = bubblewrap.Sandbox(
            **visible(), scratch=folder, scratch_mb=1, endpoint_folder=folder, user_namespace=below
        )
        options = sealed(bubblewrap.packed(bubblewrap.arguments(sandbox)), "mcpb-sandbox")
        become = [] if uid is None else ["--uid", str(uid)]
        status = ("--status-fd", str(theirs.fileno()), "--cwd", "/")
        witness = ("--", "-m", "mcp_broker.confine.witness")
        child = subprocess.Popen(
            [
                path,
                "--args",
                str(options),
                "--",
                sys.executable,
                "-P",
                *init.PROGRAM,
                *status,
                *become,
                *witness,
            ],
            pass_fds=[options, theirs.fileno(), *([] if below is None else [below])],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        stack.callback(child.kill)
        theirs.close()
        _look(ours, child, uid)
    return path


def _look(status: socket.socket, child: subprocess.Popen[bytes], uid: int | None) -> None:
    """Look at the witness from outside, then let it end, and see that this is told."""
    status.settimeout(_PATIENCE_S)
    packet, fds, _, _ = socket.recv_fds(status, _PACKET_BYTES, 1)
    if packet != init.BORN or not fds:
        assert child.stderr is not None  # noqa: S101 (a pipe)
        said = child.stderr.read(4096).decode(errors="replace").strip().splitlines()
        raise NotHolding(said[-1] if said else f"bubblewrap ended with {child.wait(_PATIENCE_S)}")
    pid = born(fds[0])
    demanded = Confinement(level="sandboxed", uid=uid, own_mounts=True, own_network=True)
    lacks = "it is gone" if pid is None else attestation.fault(pid, demanded, is_filtered=False)
    if lacks:
        raise NotHolding(f"a sandbox was made, but {lacks}")
    assert child.stdin is not None  # noqa: S101 (a pipe)
    child.stdin.close()
    if not status.recv(_PACKET_BYTES).startswith(init.ENDED):
        raise NotHolding("the end of a process in the sandbox was not told")
