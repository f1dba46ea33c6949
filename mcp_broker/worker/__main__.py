"""``python -m mcp_broker.worker --boot-fd N --tether-fd N``: started by the supervisor, never by hand."""

from __future__ import annotations

import argparse

from mcp_broker.worker.process import run


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mcp_broker.worker", description=__doc__)
    parser.add_argument("--boot-fd", type=int, required=True, help="inherited fd with the boot record")
    parser.add_argument("--tether-fd", type=int, required=True, help="inherited socket to the supervisor")
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    run(given.boot_fd, given.tether_fd)
