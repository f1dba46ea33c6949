"""A process that a tool forked off its worker: only the tool's own code may run in it.

It has a copy of all that the worker holds: calls, connection, signal handlers, the page shared with the supervisor. Where it
comes back from the tool's code it ends, with the status and the traceback that a program of its own would have.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, NoReturn

from mcp_broker.worker import ending
from mcp_broker.worker.interrupts import HANDLED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: this process was forked off a worker
is_fork = False


def watch(begun: Callable[[], None]) -> None:
    """From now on know whoever is forked off this process by its tools.

    Args:
        begun: called in the new process, before any other code.
    """
    # by thread: tools may fork in several
    before = threading.local()

    def hold() -> None:
        # CPython drops what comes to a new process before our handlers are gone
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def note() -> None:
        global is_fork  # noqa: PLW0603 (a fact of the process)
        is_fork = True
        begun()
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=note)


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Run code of a module's author: who is forked off there does not come back from it."""
    try:
        yield
    except BaseException as error:
        if is_fork:
            leave(error)
        raise
    if is_fork:
        leave()


def leave(error: BaseException | None = None) -> NoReturn:
    """End this process, which is none of the worker's business any more.

    Nothing that is registered for the end of the worker runs: it belongs to the worker.

    Args:
        error: what ended the tool's code; None: it returned.
    """
    status = 0
    try:
        if isinstance(error, SystemExit):
            status = status_of(error.code)
        elif error is not None:
            status = 1
            traceback.print_exception(error)
        ending.flush()
    finally:
        os._exit(status)


def status_of(code: object) -> int:
    """Return what :func:`sys.exit` makes of its argument."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    # what it says there is the tool's own, and so is what stands in the place of standard error
    with contextlib.suppress(Exception):
        print(code, file=sys.stderr)  # noqa: T201
    return 1
