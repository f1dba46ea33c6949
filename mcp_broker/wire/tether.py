"""What a worker and its supervisor say to each other, over the one socketpair that ties them: the tether.

One packet is one message, a msgpack array ``[kind, fields...]``, with at most one descriptor beside it, towards the worker
only. End of file means that the other one is gone. Source: docs/protocol.md, "Tether".
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from mcp_broker import limits
from mcp_broker.wire.codec import Decoder


class TetherMessage(msgspec.Struct, array_like=True, frozen=True):
    """One packet of the tether; the kind is the tag."""


class Request(TetherMessage, frozen=True):
    """A worker's wish that is answered; an :class:`Answer` brings its number back."""

    number: int


class Answer(TetherMessage, frozen=True):
    """The answer to the request of this number."""

    number: int


class Warm(TetherMessage, tag="WARM", frozen=True):
    """Worker, a spare: its tools are imported; it connects to the broker when it is told to go."""


class Go(TetherMessage, tag="GO", frozen=True):
    """Supervisor, to a spare: connect to the broker and serve."""


class Asks(TetherMessage, tag="ASKS", frozen=True):
    """Worker, before it connects: limits that its tools ask for, of each the most; 0: none asks."""

    memory_mb: Annotated[int, Meta(ge=0, le=limits.MEMORY_MB_MAX)] = 0
    cpu_s: Annotated[float, Meta(ge=0, le=limits.CPU_S_MAX)] = 0.0
    open_files: Annotated[int, Meta(ge=0, le=limits.OPEN_FILES_MAX)] = 0
    connections: Annotated[int, Meta(ge=0, le=limits.CONNECTIONS_MAX)] = 0


class LeasePort(Request, tag="LEASE", frozen=True):
    """Worker: lend me a port; LEASED or REFUSED answers."""

    #: 0: any
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    #: for how long; None: until it is given back, or the worker ends
    ttl_ms: Annotated[int, Meta(ge=1, le=2**40)] | None = None


class Leased(Answer, tag="LEASED", frozen=True):
    """Supervisor: the port is yours; its listening socket comes with the message."""

    host: str
    port: int


class LeaseRefused(Answer, tag="REFUSED", frozen=True):
    """Supervisor: no port, and why; ``code`` is that of a :class:`mcp_broker.errors.PortError`."""

    code: str
    message: str


class ReturnPort(TetherMessage, tag="RETURN", frozen=True):
    """Worker: I do not need this port any more."""

    port: int


FromWorker = Warm | Asks | LeasePort | ReturnPort
ToWorker = Go | Leased | LeaseRefused

#: what each end takes
from_worker: Final[Decoder[FromWorker]] = Decoder(FromWorker, limits.TETHER_BYTES_MAX)
to_worker: Final[Decoder[ToWorker]] = Decoder(ToWorker, limits.TETHER_BYTES_MAX)
