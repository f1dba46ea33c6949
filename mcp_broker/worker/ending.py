"""The end of a worker's process: what it owes to its tools and to the log, within a time that nothing can hold up."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import signal
import sys
from typing import Final, NoReturn

from mcp_broker import limits

_STDERR: Final = 2


#: the end of this process has its time
_is_bound = False


def bound(seconds: float) -> None:
    """From now on the process has so long to end; the first call counts.

    Beyond that it ends with code 1, and its standard error tells what each thread was doing. A thread of C code sees to
    it, so that no tool holds that up, whether it waits in Python or keeps the GIL in C.
    """
    global _is_bound  # noqa: PLW0603 (a fact of the process)
    if _is_bound:
        return
    _is_bound = True
    try:
        faulthandler.dump_traceback_later(seconds, exit=True, file=_STDERR)
    except RuntimeError:  # no thread is to be had: the kernel ends it then, without a word
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def leave(status: int) -> NoReturn:
    """End the process after what it owes, without tearing the interpreter down.

    The teardown destroys modules in no useful order: it costs time at every restart, and binding libraries
    report their own objects as leaks on the way.
    """
    try:
        bound(limits.HOOK_S)
        # what a module registered is its own: it does not keep us from the next step
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # noqa: SLF001 (the only way to have them run before os._exit)
        with contextlib.suppress(BaseException):
            logging.shutdown()
        flush()
    finally:
        os._exit(status)


def flush() -> None:
    """Write out what was printed, whatever stands in the place of the standard streams by now."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
