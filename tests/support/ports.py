"""Ports of this machine: free ones, and connections to them."""

from __future__ import annotations

import socket


def free_span(count: int) -> int:
    """Return the first of so many ports in a row that nobody has just now."""
    for first in range(20_000, 30_000, count):
        try:
            for number in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return first
    raise AssertionError("no ports are free")


def connect(port: int, source: str = "127.0.0.1", timeout_s: float = 5.0) -> socket.socket:
    client = socket.socket()
    try:
        client.settimeout(timeout_s)
        client.bind((source, 0))
        client.connect(("127.0.0.1", port))
    except OSError:
        client.close()
        raise
    return client
