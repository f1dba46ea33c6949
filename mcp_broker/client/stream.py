"""The parts of one streamed result: where they come in, and how a blocking client takes them."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from mcp_broker.client.leadership import Leadership
    from mcp_broker.client.session import PendingCall
    from mcp_broker.errors import CallError
    from mcp_broker.wire.messages import Usage


class Inbox:
    """Where the client puts parts and end; apart from the iterator, so that dropping that one is noticed."""

    pending: PendingCall

    def __init__(self) -> None:
        self.parts: deque[Any] = deque()
        self.ended = False
        self.fed = 0
        self.error: CallError | None = None
        self.usage: Usage | None = None
        #: threads that wait for the next part
        self.seats: list[threading.Event] | None = None

    @property
    def is_made(self) -> bool:
        """Tell whether the session has the call."""
        return hasattr(self, "pending")

    @property
    def ready(self) -> bool:
        """A part, or the end, is there."""
        return bool(self.parts) or self.ended

    def feed(self, part: Any) -> None:  # noqa: ANN401 (any payload)
        """Take the next part."""
        self.fed += 1
        self.parts.append(part)
        self._wake()

    def settle(self, value: Any, error: CallError | None, usage: Usage | None) -> bool:  # noqa: ANN401
        """Take the end, once. Runs nobody's code; False: nobody else is to be told."""
        self.usage = usage
        self.error = error
        if value is not None and not self.fed:
            # a tool that does not stream
            self.parts.append(value)
        self.ended = True
        self._wake()
        return False

    def _wake(self) -> None:
        seats = self.seats
        if seats:
            self.seats = None
            for seat in seats:
                seat.set()


class PartStream:
    """An iterator over the parts of a call's result, in order, as they come.

    Each step may raise the call's CallError; parts before it stay true. A tool that does not stream gives its
    result as the only part (none, if that is None). Leaving its ``with`` block, :meth:`close`, or dropping the
    iterator cancels the call if it has not ended.
    """

    def __init__(self, owner: Leadership) -> None:
        self._owner = owner
        self.inbox = Inbox()

    @property
    def call_id(self) -> bytes:
        """The call's id on the wire, 16 bytes."""
        return self.inbox.pending.call_id

    @property
    def usage(self) -> Usage | None:
        """What the execution cost, once it has ended."""
        return self.inbox.usage

    def __iter__(self) -> PartStream:
        return self

    def __next__(self) -> Any:  # noqa: ANN401 (any payload)
        inbox = self.inbox
        while not inbox.parts:
            if inbox.ended:
                error, inbox.error = inbox.error, None
                if error is not None:
                    raise error
                raise StopIteration
            self._owner.await_end(inbox, None)
        part = inbox.parts.popleft()
        if not inbox.ended:
            self._owner.took(inbox.pending)
        return part

    def cancel(self) -> bool:
        """Cancel the call; the parts that came before can still be taken. False if it had ended."""
        return not self.inbox.ended and self._owner.cancel_pending(self.inbox.pending)

    def close(self) -> None:
        """Cancel the call, if it has not ended, and drop what came."""
        self.cancel()
        self.inbox.parts.clear()
        self.inbox.error = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        inbox = self.inbox
        if inbox.is_made and not inbox.ended:
            self._owner.orphan(inbox.pending)
