"""A blocking or asyncio client's connection to a broker, and the one ZeroMQ context of its process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from mcp_broker import errors, transport
from mcp_broker.transport import Connection

if TYPE_CHECKING:
    from mcp_broker.auth.profile import Profile

#: a large frame on a slow link must not look like silence: 1 MiB in 15 s is 70 kB/s
HEARTBEAT_MS: Final = (5_000, 15_000)
#: time for a GOODBYE to leave
LINGER_MS: Final = 200

_context: transport.Context | None = None
#: contexts of parent processes: never used again, and never destroyed, since their threads are not here
_inherited: list[transport.Context] = []
#: how many forks lie between this process and the one that first imported this module
generation = 0


def _after_fork() -> None:
    global _context, generation  # noqa: PLW0603 (one Context a process is the point)
    generation += 1
    if _context is not None:
        _inherited.append(_context)
        _context = None


os.register_at_fork(after_in_child=_after_fork)


def context() -> transport.Context:
    """Return this process's only ZeroMQ context."""
    global _context  # noqa: PLW0603
    if _context is None:
        _context = transport.new_context()
    return _context


def wrong_process() -> errors.WrongProcess:
    """Make the error of a client that is used where it was not connected."""
    return errors.WrongProcess(
        "this client belongs to the process that connected it, and this one was forked from that",
        {"hint": "connect a client after the fork"},
    )


def connect(endpoint: str, profile: Profile) -> Connection:
    """Begin to connect.

    Raises:
        zmq.ZMQError: there is no such endpoint.
    """
    return Connection(
        context(),
        endpoint,
        server_key=profile.server_key,
        public_key=profile.keys.public,
        secret_key=profile.keys.secret,
        heartbeat_ms=HEARTBEAT_MS,
    )
