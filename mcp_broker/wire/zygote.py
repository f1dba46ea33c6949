"""What a supervisor and a zygote say to each other, over a SOCK_SEQPACKET socketpair: a packet is one message.

A zygote is a process that has imported what every worker imports, and forks workers. An ORDER comes with the descriptors
of the worker to be. Source: docs/protocol.md, "Zygote".
"""

from __future__ import annotations

from typing import Final

import msgspec

from mcp_broker import limits
from mcp_broker.wire.codec import Decoder


class ZygoteMessage(msgspec.Struct, array_like=True, frozen=True):
    """One packet; the kind is the tag."""


class Order(ZygoteMessage, tag="ORDER", frozen=True):
    """Supervisor: fork a worker. The first descriptor beside it is the gate, then come those of ``fds``.

    The worker runs nothing before one byte comes through the gate; it ends when the gate is closed instead.
    """

    number: int
    worker_id: str
    #: its whole environment
    env: dict[str, str]
    #: where it starts
    cwd: str
    #: under which numbers it has the descriptors
    fds: tuple[int, ...]
    #: which of them hold its boot record, and its end of the tether
    boot_fd: int
    tether_fd: int
    #: the process whose child it is
    parent: int


class Ready(ZygoteMessage, tag="READY", frozen=True):
    """Zygote: everything is imported."""


class Born(ZygoteMessage, tag="BORN", frozen=True):
    """Zygote: the order of this number is carried out, and the worker handed over: it is the supervisor's child."""

    number: int
    pid: int


class Stillborn(ZygoteMessage, tag="STILLBORN", frozen=True):
    """Zygote: the order of this number cannot be carried out."""

    number: int
    reason: str


FromZygote = Ready | Born | Stillborn

#: what each end takes
from_zygote: Final[Decoder[FromZygote]] = Decoder(FromZygote, limits.ZYGOTE_BYTES_MAX)
to_zygote: Final[Decoder[Order]] = Decoder(Order, limits.ZYGOTE_BYTES_MAX)
