"""A client that says HELLO, takes the answer, submits calls, and never reads again; a process of its own.

python -m tests.support.mute PROFILE TOOL ARGUMENTS(JSON) CALLS

Its own queue for what comes holds one message: libzmq stops reading the connection then. It prints how many calls the
connection took, and lives until its standard input ends.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import zmq

from examples.raw_client import RawClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
#: calls in one message
BATCH = 256
TIMEOUT_MS = 60_000
#: a broker that takes no message for so long has ended the connection
FULL_MS = 2000


@contextmanager
def mute(
    profile: Path, tool: str, arguments: Mapping[str, Any], calls: int
) -> Iterator[subprocess.Popen[str]]:
    """Start one, and end it."""
    words = (str(profile), tool, json.dumps(arguments), str(calls))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.mute", *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def submit(client: RawClient, tool: str, arguments: Mapping[str, Any], calls: int) -> int:
    """Send calls without waiting for anything; return how many the connection took."""
    packed = msgpack.packb(arguments)
    sent = 0
    while sent < calls and client.socket.poll(FULL_MS, zmq.POLLOUT):
        some = min(BATCH, calls - sent)
        batch = [[call_id, tool, TIMEOUT_MS, packed] for call_id in itertools.islice(client.ids, some)]
        client.send("CALLS", 0, batch)
        sent += some
    return sent


def main(profile: str, tool: str, arguments: str, calls: str) -> None:
    """Be one."""
    client = RawClient(Path(profile))
    client.socket.setsockopt(zmq.RCVHWM, 1)
    print(submit(client, tool, json.loads(arguments), int(calls)), flush=True)  # noqa: T201 (its answer)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
