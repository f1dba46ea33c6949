"""What a caller may ask for besides a tool's arguments and time."""

from __future__ import annotations

import difflib
from typing import Final, TypedDict

from mcp_broker.client.progress import OnProgress  # noqa: TC001 (so that who reads the options' types finds it)
from mcp_broker.client.session import Wishes


class CallOptions(TypedDict, total=False):
    """Options of a call; each may be left out, or None."""

    #: how long its worker may send neither a part nor progress, in seconds; left out: for as long as the call may take
    idle_timeout_s: float | None
    #: called with (fraction or None, text) when the tool tells of its progress, in whichever thread serves the client
    #: then, or in the loop; it should be quick, since other calls wait meanwhile
    on_progress: OnProgress | None
    #: calls of one principal and tool with the same key are one execution, and its outcome is remembered for a while
    idempotency_key: str | None
    #: the call goes on when this client goes away; ``attach`` with its id takes it up again
    detach: bool
    #: 0 (high), 1 (normal) or 2 (low), see :class:`mcp_broker.Priority`: how soon it is served where calls wait; above
    #: what the token allows it counts as what that allows
    priority: int


#: a session's wishes hold more than these: what the client adds itself, and nobody else may
_NAMES: Final = frozenset(CallOptions.__annotations__)


def wished(method: str, options: CallOptions) -> Wishes | None:
    """Return the options as the session takes them.

    Args:
        method: the one that was given them, for people.

    Raises:
        TypeError: there is no such option (the caller's fault).
    """
    if not options:
        return None
    for name in options:
        if name not in _NAMES:
            raise TypeError(f"{method}() has no option {name!r}; {_instead(name)}")
    return Wishes(**options)


def _instead(name: str) -> str:
    known = sorted({*_NAMES, "timeout_s"})
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
