"""A client without mcp_broker: pyzmq, msgpack and docs/protocol.md are enough.

python examples/raw_client.py PROFILE [TOOL [NAME=TEXT ...]]
"""

from __future__ import annotations

import itertools
import os
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgpack
import zmq


class RawClient:
    """One session, one call at a time."""

    def __init__(self, profile: Path) -> None:
        if profile.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SystemExit(f"others may read {profile}: chmod 600 it")
        known = tomllib.loads(profile.read_text())
        self.socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)  # we would reconnect ourselves, with a new socket
        self.socket.setsockopt(zmq.ROUTING_ID, os.urandom(16))
        self.socket.curve_serverkey = known["server_key"].encode()
        self.socket.curve_publickey = known["public_key"].encode()
        self.socket.curve_secretkey = known["secret_key"].encode()
        self.socket.connect(known["endpoints"][0])
        self.epoch = 0
        self.count = 0  # outcomes received, which is also what we acknowledge
        self.ids = (os.urandom(8) + bytes(2) + n.to_bytes(6, "big") for n in itertools.count(1))
        self.send("HELLO", "MCPB", [1], known["token"], None, [], "raw_client/1")
        _, self.epoch, _, _, _, self.name, *_ = self.receive("WELCOME")[0]

    def send(self, kind: str, *fields: object) -> None:
        """Send one message: a single frame, [kind, epoch, fields...]."""
        self.socket.send(msgpack.packb([kind, self.epoch, *fields]))

    def receive(self, wanted: str, seconds: float = 5.0) -> tuple[list[Any], bytes | None]:
        """Wait for a kind; answer heartbeats meanwhile. Returns the message and its body frame."""
        while self.socket.poll(int(seconds * 1000)):
            envelope, *body = self.socket.recv_multipart()
            message = msgpack.unpackb(envelope)
            if message[0] == wanted:
                return message, body[0] if body else None
            if message[0] == "HEARTBEAT":
                self.send("ACK", self.count)
            if message[0] in {"ERROR", "GOODBYE"}:
                raise SystemExit(f"the broker says {message[2:]}")
        raise SystemExit(f"no {wanted} within {seconds} s")

    def call(self, tool: str, arguments: dict[str, Any], seconds: float = 5.0) -> tuple[str, Any]:
        """Call a tool; returns "OK" and the result, or an error's code and its fault."""
        call_id = next(self.ids)
        self.send("CALLS", self.count, [[call_id, tool, int(seconds * 1000), msgpack.packb(arguments)]])
        while True:
            (_, _, first, outcomes), body = self.receive("OUTCOMES", seconds + 0.5)
            for number, (of, code, inline, _usage, fault, *_) in enumerate(outcomes, first):
                self.count = max(self.count, number)
                if of == call_id and code == "OK":
                    return code, msgpack.unpackb(inline if body is None else body)
                if of == call_id:
                    return code, {"message": fault[0], "retryable": fault[1], **msgpack.unpackb(fault[2])}


if __name__ == "__main__":
    client = RawClient(Path(sys.argv[1]))
    name, *pairs = sys.argv[2:] or ["text.word_count", "text=a b a"]
    print(client.name, *client.call(name, dict(pair.split("=", 1) for pair in pairs)))
    print(client.name, *client.call("no.such_tool", {}))
    client.send("GOODBYE", "done")
