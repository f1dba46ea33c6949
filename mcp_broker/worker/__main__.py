"""``python -m mcp_broker.worker --boot-fd N --tether-fd N``: started by the supervisor, never by hand."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
from typing import NoReturn

from mcp_broker.worker.process import main


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mcp_broker.worker", description=__doc__)
    parser.add_argument("--boot-fd", type=int, required=True, help="inherited fd with the boot record")
    parser.add_argument("--tether-fd", type=int, required=True, help="inherited socket to the supervisor")
    return parser.parse_args()


def _leave(code: int) -> NoReturn:
    """End the process after what it owes, without tearing the interpreter down.

    The teardown destroys modules in no useful order: it costs time at every restart, and binding libraries
    report their own objects as leaks on the way.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 (the only way to have them run before os._exit)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    given = _arguments()
    _leave(main(given.boot_fd, given.tether_fd))
