"""A broker without ZeroMQ: speaks the node link, and takes its tests' orders on the client socket.

A worker that connects to the worker socket and sends its id is UP. A test that connects to the client socket sends
one JSON line: {"interrupt": {...}} is passed on, and so is {"say": [[NAME, {...}], ...]}, {"exit": code} ends this process,
anything else is answered with what the supervisor said so far.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path

from mcp_broker.wire import codec, messages, node
from mcp_broker.wire.framing import FrameReader, frame

#: it starts in STATE_DIR/runtime/INSTANCE/NAME; the environment of its tests does not reach it
STATE_DIR = Path.cwd().parents[2]


class Broker:
    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self.reader = FrameReader()
        self.told: list[dict[str, object]] = []
        self.boot: node.Boot | None = None
        self.selector = selectors.DefaultSelector()
        self.selector.register(link, selectors.EVENT_READ, self.hear)
        self.connections: list[socket.socket] = []

    def say(self, message: node.ToSupervisor) -> None:
        self.link.sendall(frame(codec.encode(message)))

    def hear(self, link: socket.socket) -> None:
        chunk = link.recv(65536)
        if not chunk:
            sys.exit(1)
        for body in self.reader.feed(chunk):
            message = codec.from_supervisor.decode(body)
            kind = str(message.__struct_config__.tag)
            self.told.append({"kind": kind, **self.plain(message)})
            if isinstance(message, node.Shutdown):
                # for tests that look when this process is gone
                (STATE_DIR / f"shutdown-{os.getpid()}").touch()
            if isinstance(message, node.Boot):
                self.boot = message
                for fd, callback in ((message.client_fd, self.order), (message.worker_fd, self.up)):
                    listener = socket.socket(fileno=fd)
                    listener.setblocking(True)
                    self.selector.register(listener, selectors.EVENT_READ, callback)
                self.say(node.Serving(os.getpid()))
            elif isinstance(message, node.Report):
                self.say(node.Demand(()))
            elif isinstance(message, node.Shutdown) and not (STATE_DIR / "stubborn").exists():
                self.say(node.Drained(0))

    @staticmethod
    def plain(message: node.FromSupervisor) -> dict[str, object]:
        if isinstance(message, node.Died):
            return {"certificate": codec.as_plain(message.certificate)}
        if isinstance(message, node.Admit):
            return {"workers": [worker.worker_id for worker in message.workers]}
        if isinstance(message, node.Report):
            return {"pools": [codec.as_plain(pool) for pool in message.pools]}
        if isinstance(message, node.Commanded):
            return {"code": message.code, "message": message.message}
        if isinstance(message, node.Deaths):
            return {"certificates": [codec.as_plain(one) for one in message.certificates]}
        return {"epoch": message.epoch} if isinstance(message, node.Boot) else {}

    def up(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        word, worker_id = connection.makefile().readline().split()
        if word == "up":
            tool = messages.ToolDefinition(name="fake.tool", version="1.0.0", capabilities=("fake",))
            self.say(node.WorkerUp(worker_id, (tool,)))
        else:
            self.say(node.WorkerRefused(worker_id, "the name fake.tool belongs to another pool"))
        self.connections.append(connection)

    def order(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        order = json.loads(connection.makefile().readline())
        if "interrupt" in order:
            self.say(node.Interrupt(**order["interrupt"]))
        for name, fields in order.get("say", ()):
            self.say(getattr(node, name)(**fields))
        if "exit" in order:
            os._exit(order["exit"])
        connection.sendall(json.dumps(self.told).encode())
        connection.close()

    def run(self) -> None:
        while True:
            for key, _ in self.selector.select():
                key.data(key.fileobj)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--link-fd", type=int)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if (STATE_DIR / "broken").exists():
        sys.exit("no room for a broker here")
    Broker(socket.socket(fileno=parser.parse_args().link_fd)).run()


if __name__ == "__main__":
    main()
