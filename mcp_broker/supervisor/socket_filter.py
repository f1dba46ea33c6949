"""Which addresses reach a listening socket: a filter in the kernel, which the worker that gets the socket cannot remove.

What it refuses is dropped, as if nobody were there. Source: classic BPF, as in socket(7), SO_ATTACH_FILTER.
"""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import struct
from collections.abc import Sequence
from typing import Final

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_SO_ATTACH_FILTER: Final = 26
_SO_LOCK_FILTER: Final = 44
#: loads a word of the packet; of the network's header, where the socket sees only TCP's
_LOAD: Final = 0x20
_NETWORK_HEADER: Final = 0xFFF00000
_AND: Final = 0x54
_JUMP_IF_EQUAL: Final = 0x15
_RETURN: Final = 0x06
_ALL: Final = 0xFFFFFFFF
#: where the sender's address is in the header
_SOURCE: Final = {socket.AF_INET: 12, socket.AF_INET6: 8}


def program(networks: Sequence[Network], family: int) -> list[tuple[int, int, int, int]]:
    """Return the filter: (code, jump if true, jump if false, operand) an instruction.

    Networks of the other family let nobody in.
    """
    made: list[tuple[int, int, int, int]] = []
    for network in networks:
        if (network.version == 4) is not (family == socket.AF_INET):  # noqa: PLR2004 (IPv4)
            continue
        words = struct.unpack(f">{len(network.network_address.packed) // 4}I", network.network_address.packed)
        masks = struct.unpack(f">{len(words)}I", network.netmask.packed)
        wanted = [(at, word, mask) for at, (word, mask) in enumerate(zip(words, masks, strict=True)) if mask]
        for number, (at, word, mask) in enumerate(wanted):
            # past what is left of this network: its further words, and its verdict
            past = (len(wanted) - number - 1) * 3 + 1
            made += [
                (_LOAD, 0, 0, _NETWORK_HEADER + _SOURCE[socket.AddressFamily(family)] + 4 * at),
                (_AND, 0, 0, mask),
                (_JUMP_IF_EQUAL, 0, past, word),
            ]
        made.append((_RETURN, 0, 0, _ALL))
    return [*made, (_RETURN, 0, 0, 0)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def attach(listener: socket.socket, networks: Sequence[Network]) -> None:
    """Let only these in, for good.

    Raises:
        OSError: this kernel has no socket filters.
    """
    made = program(networks, listener.family)
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in made)
    whole = _Program(len(made), packed)
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(whole))
    listener.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
