"""The TCP connections of this machine, as the kernel lists them: who is connected to a port, and what went through.

Source: sock_diag(7). A machine without it, or one that does not let us ask, has no figures.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_REQUEST_DUMP: Final = 0x301
_DONE: Final = 3
_ERROR: Final = 2
_ESTABLISHED: Final = 1
_INFO: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
_ASK: Final = struct.Struct("=BBBBI48x")
#: family, state, timer, retransmissions; then ports and addresses, big-endian
_FOUND: Final = struct.Struct("!HH16s16s")
_FOUND_BYTES: Final = 72
#: in struct tcp_info: bytes acknowledged by the peer, bytes received
_BYTES: Final = struct.Struct("=QQ")
_BYTES_AT: Final = 120
_READ_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Connection:
    """One established connection.

    Args:
        port: ours.
        peer: address and port, packed; with the port it names the connection.
        sent, received: bytes so far.
    """

    port: int
    peer: bytes
    sent: int
    received: int


def established(family: int) -> list[Connection]:
    """Return all established connections of an address family.

    Raises:
        OSError: the kernel does not tell.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as asking:
        ask = _ASK.pack(family, socket.IPPROTO_TCP, 1 << (_INFO - 1), 0, 1 << _ESTABLISHED)
        asking.send(_HEADER.pack(_HEADER.size + len(ask), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + ask)
        found: list[Connection] = []
        while True:
            data = asking.recv(_READ_BYTES)
            for kind, body in _messages(data):
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], "the kernel lists no connections")
                found.append(_connection(body))


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _connection(body: bytes) -> Connection:
    port, peer_port, _, peer = _FOUND.unpack_from(body, 4)
    sent = received = 0
    at = _FOUND_BYTES
    while at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        if kind == _INFO and length >= 4 + _BYTES_AT + _BYTES.size:
            sent, received = _BYTES.unpack_from(body, at + 4 + _BYTES_AT)
        at += max(4, (length + 3) & ~3)
    return Connection(port, peer + peer_port.to_bytes(2, "big"), sent, received)
