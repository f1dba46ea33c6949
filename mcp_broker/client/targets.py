"""What a thread of a blocking client may wait for."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol

from mcp_broker import errors
from mcp_broker.client.session import State

if TYPE_CHECKING:
    from collections.abc import Collection

    from mcp_broker.client.link import Link

#: states that no event but close leaves
OVER: Final = frozenset({State.REFUSED, State.CLOSED})


class Target(Protocol):
    """What a thread waits for."""

    #: threads that wait for it and do not lead; whoever makes it ready sets them
    seats: list[threading.Event] | None

    @property
    def ready(self) -> bool:
        """It is there."""
        ...


class Connected:
    """The session is open, or never will be."""

    def __init__(self, link: Link) -> None:
        self.seats: list[threading.Event] | None = None
        self._session = link.session

    @property
    def ready(self) -> bool:
        """It is there."""
        return self._session.state is State.OPEN or self._session.state in OVER


class Room(Connected):
    """The window has room for another call."""

    @property
    def ready(self) -> bool:
        """It is there."""
        return self._session.has_room or self._session.state in OVER


class Unattended:
    """What the helper leads for: until a thread wants to, no calls are left, or there are callbacks to run."""

    def __init__(self, link: Link, callbacks: Collection[object]) -> None:
        self.seats: list[threading.Event] | None = None
        self._book = link.session.book
        self._callbacks = callbacks
        self.give_way = False

    @property
    def ready(self) -> bool:
        """It is there."""
        return self.give_way or not self._book.calls or bool(self._callbacks)


def window_full(window: int) -> errors.Overloaded:
    """Make the error of a call that found no place in the window in time."""
    return errors.Overloaded(
        f"the session's window of {window} unfinished calls stayed full",
        {"limit": "window", "maximum": window, "retry_after_s": 0.1},
    )
