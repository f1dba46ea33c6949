"""The reference: libzmq's own ``zmq.proxy`` between plain pyzmq ends, CURVE on, a process each.

It authorises nothing, keeps no deadline and loses what its worker held: the price of a message alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, Final

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


def worker() -> None:
    """Send every message back."""
    setup = peer.read()
    assert setup is not None
    socket = _dealer(setup["port"], setup["key"])
    peer.answer({"pid": os.getpid()})
    _end_with_parent()
    while True:
        socket.send_multipart(socket.recv_multipart())


def client() -> None:
    """Keep a number of messages in flight for a time; the parent says how many and how long."""
    setup = peer.read()
    assert setup is not None
    socket = _dealer(setup["port"], setup["key"])
    peer.answer({"pid": os.getpid()})

    def run(*, seconds: float, in_flight: int, size: int, **_: Any) -> dict[str, Any]:
        blob = os.urandom(size)
        return alone(blob, seconds) if in_flight == 1 else pipelined(blob, seconds, in_flight)

    def alone(blob: bytes, seconds: float) -> dict[str, Any]:
        clock = time.perf_counter
        durations = []
        began = now = clock()
        until = began + seconds
        while now < until:
            socket.send(blob)
            socket.recv()
            after = clock()
            durations.append(after - now)
            now = after
        return {
            "calls": len(durations),
            "seconds": now - began,
            "p50_us": peer.percentile_us(durations, 0.5),
            "p99_us": peer.percentile_us(durations, 0.99),
        }

    def pipelined(blob: bytes, seconds: float, in_flight: int) -> dict[str, Any]:
        clock = time.perf_counter
        began = clock()
        until = began + seconds
        for _ in range(in_flight):
            socket.send(blob)
        calls = 0
        while clock() < until:
            socket.recv()
            calls += 1
            socket.send(blob)
        for _ in range(in_flight):
            socket.recv()
        return {"calls": calls + in_flight, "seconds": clock() - began}

    peer.serve(run)


class Reference:
    """Proxy, worker and client, running."""

    name = "reference"

    def __init__(self) -> None:
        self._proxy = peer.Peer("bench.reference", "proxy")
        key = self._proxy.ready["key"]
        self._worker = peer.Peer(
            "bench.reference", "worker", {"port": self._proxy.ready["worker_port"], "key": key}
        )
        self._client = peer.Peer(
            "bench.reference", "client", {"port": self._proxy.ready["client_port"], "key": key}
        )
        self.broker_pid, self.client_pid, self.worker_pid = (
            self._proxy.pid,
            self._client.pid,
            self._worker.pid,
        )

    def run(self, **case: Any) -> dict[str, Any]:
        """Run one case; returns calls, seconds and, at one in flight, p50_us and p99_us."""
        return self._client.ask(case)

    def close(self) -> None:
        """End all three."""
        for part in (self._client, self._worker, self._proxy):
            part.close()


if __name__ == "__main__":
    {"proxy": proxy, "worker": worker, "client": client}[sys.argv[1]]()
