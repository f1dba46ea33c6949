"""What a worker and its supervisor say to each other, over the one socketpair that ties them: the tether.

One packet is one message, a msgpack array ``[kind, fields...]``, with at most one descriptor beside it, towards the worker
only. End of file means that the other one is gone. Source: docs/protocol.md, "Tether".
"""

from __future__ import annotations

from typing import Final

import msgspec

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


FromWorker = Warm
ToWorker = Go

#: what each end takes
from_worker: Final[Decoder[FromWorker]] = Decoder(FromWorker, limits.TETHER_BYTES_MAX)
to_worker: Final[Decoder[ToWorker]] = Decoder(ToWorker, limits.TETHER_BYTES_MAX)
