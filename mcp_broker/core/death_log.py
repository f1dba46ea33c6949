"""Which death certificates are kept: the newest, and those that nobody had wished for longest.

A pool that grows and shrinks, or is replaced, lets many workers go; they may not push out the one death that somebody asks
about the next morning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections import deque

    from mcp_broker.wire.node import Certificate

#: of all that are kept, so many may be of workers that were to go
_WISHED_SHARE: Final = 4


def is_wished(certificate: Certificate) -> bool:
    """Tell whether the worker was told to go."""
    return certificate.kind == "operator"


def keep(deaths: deque[Certificate], certificate: Certificate) -> None:
    """Put one more in front of some deaths, newest first; a full deque loses the oldest of those that matter least."""
    most = deaths.maxlen or 0
    if len(deaths) >= most:
        wished = [place for place, one in enumerate(deaths) if is_wished(one)]
        if len(wished) > most // _WISHED_SHARE:
            del deaths[wished[-1]]
    deaths.appendleft(certificate)
