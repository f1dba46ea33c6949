"""``python -m mcp_broker.worker.zygote --orders-fd N``: imports what every worker imports, and forks workers.

1. It runs no tool's code, holds no secret and has one thread: what it is, every worker is.
2. A worker is forked twice. The one in between ends at once, which makes the worker a child of the supervisor: it is the
   nearest subreaper, and the only one who reaps workers.
3. A worker does nothing before the supervisor knows it, and ends if that never happens: it waits at a gate.
4. From there on it is as if it had been executed: :func:`mcp_broker.worker.process.run`.

Deliberately absent: a ZeroMQ context, whose threads no fork copies.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import fcntl
import functools
import gc
import os
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Final, NoReturn

from mcp_broker import limits
from mcp_broker.confine import kernel
from mcp_broker.proctable import WORKER_VARIABLE
from mcp_broker.wire import codec, zygote
from mcp_broker.worker import process
from mcp_broker.worker.process_title import ProcessTitle

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.wire.zygote import Order

    #: boot fd and tether fd -> never back
    BeWorker = Callable[[int, int], NoReturn]
    #: an order and its descriptors -> never back
    Become = Callable[[Order, list[int]], NoReturn]

#: the gate, standard output and error, boot record, tether, and a few more
_FDS_MAX: Final = 64
_STDERR: Final = 2
_FD_BYTES: Final = array.array("i").itemsize


def main(orders_fd: int, be_worker: BeWorker = process.run, warm: Callable[[], None] = process.warm) -> int:
    """Be a zygote until the supervisor is gone; return the exit code."""
    kernel.die_with_parent(os.getppid())
    plate = ProcessTitle(WORKER_VARIABLE)
    plate.show(sys.orig_argv, os.environ.get(WORKER_VARIABLE, "").rstrip())
    warm()
    threads = os.listdir("/proc/self/task")  # noqa: PTH208 (of this process)
    if len(threads) != 1:
        print(  # noqa: T201 (its log is its stderr)
            'an import started a thread, which no fork would copy; set start = "exec" for pools of this interpreter',
            file=sys.stderr,
        )
        return 1
    orders = socket.socket(fileno=orders_fd)
    os.set_inheritable(orders_fd, False)
    gc.collect()
    # no collection writes to what workers share with us
    gc.freeze()
    orders.send(codec.encode(zygote.Ready()))
    become = functools.partial(_become, be_worker, plate)
    while (received := _receive(orders)) is not None:
        orders.send(codec.encode(_fork(orders, *received, become)))
    return 0


def _receive(orders: socket.socket) -> tuple[Order, list[int]] | None:
    """Wait for an order and its descriptors; None when the supervisor is gone."""
    try:
        packet, ancillary, _flags, _address = orders.recvmsg(
            limits.ZYGOTE_BYTES_MAX, socket.CMSG_SPACE(_FDS_MAX * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return None
    if not packet:
        return None
    fds = array.array("i")
    for _level, _kind, data in ancillary:
        fds.frombytes(data)
    return zygote.to_zygote.decode(packet), list(fds)


def _fork(orders: socket.socket, order: Order, fds: list[int], become: Become) -> zygote.FromZygote:
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        between = os.fork()
        if between == 0:
            _fork_again(orders, order, fds, write, become)
        told = b""
        os.close(write)
        write = -1
        told = os.read(read, 32)
        # the worker is the supervisor's child when this one is gone
        os.waitpid(between, 0)
    except OSError as error:
        return zygote.Stillborn(order.number, f"fork: {error.strerror}")
    finally:
        for fd in (read, write, *fds):
            if fd >= 0:
                os.close(fd)
    if not told.isdigit():
        return zygote.Stillborn(order.number, told.decode() or "the process in between was killed")
    return zygote.Born(order.number, int(told))


def _fork_again(orders: socket.socket, order: Order, fds: list[int], write: int, become: Become) -> NoReturn:
    status = 0
    try:
        try:
            pid = os.fork()
        except OSError as error:
            os.write(write, f"fork: {error.strerror}".encode()[:32])
            os._exit(1)
        if pid == 0:
            # whoever comes back from there has failed
            status = 1
            # closed by number below, and never by the object
            orders.detach()
            become(order, fds)
        os.write(write, str(pid).encode())
    finally:
        os._exit(status)


def _become(be_worker: BeWorker, plate: ProcessTitle, order: Order, fds: list[int]) -> NoReturn:
    """Turn a copy of the zygote into what a program that was started for this order would be."""
    try:
        gate = _take(order, fds)
        os.setsid()
        os.umask(0o077)
        os.chdir(order.cwd)
        os.environ.clear()
        os.environ.update(order.env)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        sys.argv = ["-m", order.worker_id]
        plate.show((*sys.orig_argv[:2], "-m", "mcp_broker.worker", order.worker_id), order.worker_id)
        is_known = os.read(gate, 1)
        os.close(gate)
        if not is_known or os.getppid() != order.parent:
            os._exit(0)
        be_worker(order.boot_fd, order.tether_fd)
    except SystemExit as leaving:
        os._exit(leaving.code if isinstance(leaving.code, int) else 1)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _take(order: Order, fds: list[int]) -> int:
    """Give the descriptors the numbers that they are to have, close all others, and return the gate."""
    above = max(order.fds) + 1
    # out of the way first: one may have the number that another is to get
    gate, *lifted = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in fds]
    for fd, number in zip(lifted, order.fds, strict=True):
        os.dup2(fd, number, inheritable=number <= _STDERR)
    kept = {0, gate, *order.fds}
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 (numbers)
        if fd not in kept:
            # the one that the list was read from is closed already
            with contextlib.suppress(OSError):
                os.close(fd)
    return gate


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m mcp_broker.worker.zygote", description=__doc__)
    parser.add_argument("--orders-fd", type=int, required=True, help="inherited socket to the supervisor")
    sys.exit(main(parser.parse_args().orders_fd))
