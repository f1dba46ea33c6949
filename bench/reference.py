"""What ours is measured against: libzmq's own ``zmq.proxy`` between plain pyzmq ends, CURVE on, a process each.

``reference``: the least that is a call. The client numbers each request, packs a tool's name and its arguments with
msgpack, and finds the caller of each answer by its number; the worker unpacks, calls a function, packs its result.
Nothing is authorised, checked or timed, and what a worker held is lost with it.

``bare``: the least that is a message. 128 bytes go round and nobody could tell which answer is whose.

Why two: docs/adr/0003-what-the-bench-compares-with.md.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, Final

import msgpack
import zmq

from bench import peer

_CONTEXT: Final[zmq.Context[zmq.Socket[bytes]]] = zmq.Context()


def _dealer(port: int, server_key: str) -> zmq.Socket[bytes]:
    socket = _CONTEXT.socket(zmq.DEALER)
    socket.linger = 0
    socket.curve_serverkey = server_key.encode()
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


def _end_with_parent() -> None:
    # proxy and worker block in libzmq: their parent's end is seen by a thread
    def wait() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def proxy() -> None:
    """Bind ROUTER and DEALER with one key, and forward."""
    peer.read()
    public, secret = zmq.curve_keypair()
    sockets = []
    for kind in (zmq.ROUTER, zmq.DEALER):
        socket = _CONTEXT.socket(kind)
        socket.linger = 0
        socket.curve_server = 1
        socket.curve_secretkey = secret
        sockets.append(socket)
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in sockets]
    peer.answer({"client_port": ports[0], "worker_port": ports[1], "key": public.decode()})
    _end_with_parent()
    zmq.proxy(*sockets)


def _echo(blob: bytes) -> bytes:
    return blob


def worker() -> None:
    """Answer every message."""
    setup = peer.read()
    assert setup is not None
    socket = _dealer(setup["port"], setup["key"])
    peer.answer({"pid": os.getpid()})
    _end_with_parent()
    if setup["style"] == "bare":
        while True:
            socket.send_multipart(socket.recv_multipart())
    tools = {"bench.echo": _echo}
    while True:
        routing_id, number, packed = socket.recv_multipart()
        request = msgpack.unpackb(packed)
        result = tools[request["tool"]](**request["arguments"])
        socket.send_multipart([routing_id, number, msgpack.packb({"result": result})])


class Bare:
    """Bytes that come back."""

    def __init__(self, socket: zmq.Socket[bytes], size: int) -> None:
        self._socket = socket
        self._blob = os.urandom(size)

    def submit(self) -> None:
        """Send them."""
        self._socket.send(self._blob)

    def result(self) -> bytes:
        """Wait for the next ones."""
        return self._socket.recv()


class Calls:
    """Calls, each with a number by which its answer is found."""

    def __init__(self, socket: zmq.Socket[bytes], size: int) -> None:
        self._socket = socket
        self._arguments = {"blob": os.urandom(size)}
        self._last = 0
        self._pending: dict[bytes, None] = {}

    def submit(self) -> None:
        """Send one."""
        self._last += 1
        number = self._last.to_bytes(8, "big")
        self._pending[number] = None
        request = {"tool": "bench.echo", "arguments": self._arguments}
        self._socket.send_multipart([number, msgpack.packb(request)])

    def result(self) -> bytes:
        """Wait for the next answer."""
        number, packed = self._socket.recv_multipart()
        del self._pending[number]
        result: bytes = msgpack.unpackb(packed)["result"]
        return result


def client() -> None:
    """Keep a number of messages in flight for a time; the parent says how many and how long."""
    setup = peer.read()
    assert setup is not None
    socket = _dealer(setup["port"], setup["key"])
    peer.answer({"pid": os.getpid()})
    kind = Bare if setup["style"] == "bare" else Calls

    def run(*, seconds: float, in_flight: int, size: int, **_: Any) -> dict[str, Any]:
        caller = kind(socket, size)
        return alone(caller, seconds) if in_flight == 1 else pipelined(caller, seconds, in_flight)

    def alone(caller: Bare | Calls, seconds: float) -> dict[str, Any]:
        clock = time.perf_counter
        durations = []
        began = now = clock()
        until = began + seconds
        while now < until:
            caller.submit()
            caller.result()
            after = clock()
            durations.append(after - now)
            now = after
        return {
            "calls": len(durations),
            "seconds": now - began,
            "p50_us": peer.percentile_us(durations, 0.5),
            "p99_us": peer.percentile_us(durations, 0.99),
        }

    def pipelined(caller: Bare | Calls, seconds: float, in_flight: int) -> dict[str, Any]:
        clock = time.perf_counter
        began = clock()
        until = began + seconds
        for _ in range(in_flight):
            caller.submit()
        calls = 0
        while clock() < until:
            caller.result()
            calls += 1
            caller.submit()
        for _ in range(in_flight):
            caller.result()
        return {"calls": calls + in_flight, "seconds": clock() - began}

    peer.serve(run)


class Reference:
    """Proxy, worker and client, running.

    Args:
        style: "calls" or "bare".
    """

    def __init__(self, style: str) -> None:
        self._proxy = peer.Peer("bench.reference", "proxy")
        setup = {"key": self._proxy.ready["key"], "style": style}
        worker_port, client_port = self._proxy.ready["worker_port"], self._proxy.ready["client_port"]
        self._worker = peer.Peer("bench.reference", "worker", {"port": worker_port, **setup})
        self._client = peer.Peer("bench.reference", "client", {"port": client_port, **setup})
        self.broker_pid = self._proxy.pid
        self.client_pid = self._client.pid
        self.worker_pid = self._worker.pid

    def run(self, **case: Any) -> dict[str, Any]:
        """Run one case; returns calls, seconds and, at one in flight, p50_us and p99_us."""
        return self._client.ask(case)

    def close(self) -> None:
        """End all three."""
        for part in (self._client, self._worker, self._proxy):
            part.close()


if __name__ == "__main__":
    {"proxy": proxy, "worker": worker, "client": client}[sys.argv[1]]()
