"""``python -m mcp_broker.confine.init``: the first process of a sandbox, between bubblewrap and the worker.

It is pid 1 of the sandbox's pid namespace: whatever loses its parent in there becomes its child and is reaped, and when
it ends the kernel kills whoever is left. It forks the worker, hands the supervisor a descriptor of that process (pids in
here mean nothing out there), and tells at its end how it ended: bubblewrap says 137 both of SIGKILL and of an exit with
that code. All this goes over the status socket, which the worker never has; its end of file means that the supervisor
is gone.

It starts with the right to change its uid where the supervisor is root, and gives it up before it forks.

Packets of the status socket: ``B``, with a pidfd of the worker (SCM_RIGHTS); ``E`` and :data:`END`.
"""

from __future__ import annotations

import argparse
import os
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from mcp_broker.confine import kernel, privileges

#: how an interpreter is told to be it
PROGRAM: Final = ("-m", "mcp_broker.confine.init")

BORN: Final = b"B"
ENDED: Final = b"E"
#: raw wait status, user and system time (us) and peak resident memory (KiB) of the worker
END: Final = struct.Struct("<iqqq")

_PR_SET_DUMPABLE: Final = 4
_MICROSECONDS: Final = 1_000_000
#: the first descriptor that is neither standard input, output nor error
_FIRST_FD: Final = 3
_FD_MAX: Final = 1 << 20


def main(arguments: Sequence[str]) -> NoReturn:
    """Be the first process; returns in the worker only, never here."""
    given = _arguments(arguments)
    if given.uid is not None:
        for folder in given.own:
            os.chown(folder, given.uid, given.uid)
        # the last capabilities go with it
        privileges.become(given.uid)
    os.chdir(given.cwd)
    # a change of uid has undone what bubblewrap had set; whether it still lives, the pipe of the status tells below: it is
    # outside our namespace, where its pid is none
    kernel.die_with_parent(os.getppid())
    status = socket.socket(fileno=given.status_fd)
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        # a handler, so that it interrupts; what is to be done stands in the pipe
        signal.signal(number, lambda _number, _frame: None)
    waiter = select.poll()  # select() takes no descriptor above 1023
    waiter.register(status, select.POLLIN)
    if waiter.poll(0):
        # nothing is ever said to us: it is the end of file
        os._exit(0)
    worker = os.fork()
    if worker == 0:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for fd in (status.detach(), wake_read, wake_write):
            os.close(fd)
        # signals to its own group are not for us
        os.setsid()
        _run(given.program)
    # the worker has the same uid, and must read nothing of ours in /proc nor trace us
    kernel.prctl("dumpable", _PR_SET_DUMPABLE, 0)
    pidfd = os.pidfd_open(worker)
    try:
        socket.send_fds(status, [BORN], [pidfd])
    except OSError:
        # the supervisor ended meanwhile
        os._exit(0)
    _keep((status.fileno(), wake_read, wake_write))
    _watch(worker, status, wake_read)


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mcp_broker.confine.init", description=__doc__)
    parser.add_argument("--status-fd", type=int, required=True, help="inherited socket to the supervisor")
    parser.add_argument("--cwd", required=True, help="where the worker starts")
    parser.add_argument("--uid", type=int, help="uid and gid to become")
    parser.add_argument("--own", action="append", default=[], help="folder that is to belong to that uid")
    parser.add_argument(
        "program", nargs="+", help="what the worker runs: -m MODULE or FILE, and its arguments"
    )
    return parser.parse_args(arguments)


def _run(program: Sequence[str]) -> NoReturn:
    """Be the worker."""
    is_module = program[0] == "-m"
    sys.argv = list(program[is_module:])
    try:
        if is_module:
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)  # noqa: T201 (as the interpreter does)
            code = 1
        _leave(code or 0)
    except BaseException:  # noqa: BLE001 (nothing of the worker may run on in our code)
        sys.excepthook(*sys.exc_info())
        _leave(1)
    _leave(0)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _keep(fds: Sequence[int]) -> None:
    """Close every descriptor but these: what the worker holds is not ours to hold open."""
    first = _FIRST_FD
    for fd in sorted(fds):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, _FD_MAX)


def _watch(worker: int, status: socket.socket, wake: int) -> NoReturn:
    """Reap everybody until the worker has ended, or the supervisor."""
    poller = select.poll()
    poller.register(status, select.POLLIN)
    poller.register(wake, select.POLLIN)
    while True:
        _reap(worker, status)
        ready = [fd for fd, _ in poller.poll()]
        if status.fileno() in ready:
            os._exit(0)
        if signal.SIGTERM in os.read(wake, 64):
            os.kill(worker, signal.SIGTERM)


def _reap(worker: int, status: socket.socket) -> None:
    while True:
        try:
            pid, how, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == worker:
            user_us, system_us = (int(spent * _MICROSECONDS) for spent in (usage.ru_utime, usage.ru_stime))
            status.send(ENDED + END.pack(how, user_us, system_us, usage.ru_maxrss))
            # and with us whatever it has left
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
