"""The zygote of fake workers: the real one, but for what its workers are.

The variable ``TRY`` of a pool's environment has it go wrong.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from mcp_broker.worker import zygote

#: python -P leaves it out
sys.path.insert(0, str(Path(__file__).parent))

import worker  # type: ignore[import-not-found]

fork = os.fork


def fork_and_lose_the_zygote() -> int:
    """Kill the zygote between its two forks: in the process in between, before the worker is made."""
    if os.getpid() != ZYGOTE:
        os.kill(ZYGOTE, signal.SIGKILL)
    return fork()


def fork_and_be_lost() -> int:
    """Kill the process in between, once it has made the worker."""
    pid = fork()
    if pid and os.getpid() != ZYGOTE:
        os.kill(os.getpid(), signal.SIGKILL)
    return pid


ZYGOTE = os.getpid()
TRY = os.environ.get("TRY")
if TRY == "lose the zygote":
    os.fork = fork_and_lose_the_zygote
elif TRY == "lose the one in between":
    os.fork = fork_and_be_lost
elif TRY == "no zygote":
    sys.exit("no room for a zygote here")

parser = argparse.ArgumentParser()
parser.add_argument("--orders-fd", type=int)
sys.exit(zygote.main(parser.parse_args().orders_fd, worker.run, lambda: None))
