"""A call's future: a :class:`concurrent.futures.Future` to the world, and cheap.

The standard class makes a condition, a lock and two lists for every future (3.7 us). This one makes them when
somebody asks, and most calls end before anybody does. Whoever completes it *writes the state, then looks for
waiters*; whoever waits *registers, then looks at the state*: one of the two sees the other.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any, Final, Protocol

from mcp_broker.errors import CallError, Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.client.session import PendingCall
    from mcp_broker.wire.messages import Usage

#: the states of concurrent.futures that we use; their spellings are what wait() and as_completed() compare
_PENDING: Final = "PENDING"
_FINISHED: Final = "FINISHED"
_CANCELLED: Final = "CANCELLED_AND_NOTIFIED"

#: guards the making of conditions, which is rare
_making = threading.Lock()


class Owner(Protocol):
    """The client that a future belongs to."""

    def await_end(self, target: CallFuture, timeout_s: float | None) -> bool:
        """Serve, or wait for who serves, until ``target.ready``; False if the time ran out before."""
        ...

    def attend(self) -> None:
        """Somebody waits in a way that lets no thread of his serve."""
        ...

    def cancel_pending(self, pending: PendingCall) -> bool:
        """Send CANCEL; False if the call had ended."""
        ...

    def orphan(self, pending: PendingCall) -> None:
        """Cancel the call soon, since nobody waits for it any more; takes no lock."""
        ...


class CallFuture(Future[Any]):
    """The outcome of one call, now or later.

    Attributes:
        call_id: the call's id on the wire, 16 bytes.
        usage: what the execution cost, once done; None where nothing ran.
    """

    _state = _PENDING
    _result: Any = None
    _exception: CallError | None = None
    _real_condition: threading.Condition | None = None
    #: set as soon as the outcome is there
    ready = False
    usage: Usage | None = None
    #: threads that wait, each set when the future is done
    seats: list[threading.Event] | None = None
    pending: PendingCall

    def __init__(self, owner: Owner) -> None:  # the base's __init__ is what costs
        self._owner = owner

    @property
    def call_id(self) -> bytes:
        """The call's id on the wire, 16 bytes."""
        return self.pending.call_id

    if not TYPE_CHECKING:  # checkers see the base's plain attribute, as they must to take this for a Future

        @property
        def _condition(self) -> threading.Condition:
            """What concurrent.futures reaches for; whoever does waits in a way that serves nothing."""
            condition = self._real_condition
            if condition is None:
                with _making:
                    if self._real_condition is None:
                        self._waiters = []
                        self._done_callbacks = []
                        self._real_condition = threading.Condition()
                    condition = self._real_condition
                if not self.ready:
                    self._owner.attend()
            return condition

    def settle(self, value: Any, error: CallError | None, usage: Usage | None) -> bool:  # noqa: ANN401
        """Give the future its outcome; once, by its client. Runs nobody's code.

        Returns:
            True if :meth:`tell_strangers` must follow, with no lock held.
        """
        self.usage = usage
        self._result = value
        if error is not None:
            self._exception = error
        self._state = _CANCELLED if isinstance(error, Cancelled) else _FINISHED
        self.ready = True
        seats = self.seats
        if seats is not None:
            self.seats = None
            for seat in seats:
                seat.set()
        return self._real_condition is not None

    def tell_strangers(self) -> Callable[[], None] | None:
        """Tell those who wait by concurrent.futures; return what runs the callbacks, if there are any.

        A callback that is added later runs at once, since the state is there.
        """
        with self._condition:
            for waiter in self._waiters:
                if self._state == _CANCELLED:
                    waiter.add_cancelled(self)
                elif self._exception is not None:
                    waiter.add_exception(self)
                else:
                    waiter.add_result(self)
            self._condition.notify_all()
            return self._invoke_callbacks if self._done_callbacks else None  # type: ignore[attr-defined]

    def done(self) -> bool:
        """Tell whether the outcome is there."""
        return self.ready

    def running(self) -> bool:
        """Tell whether the call is under way; whether its tool has started, only the broker knows."""
        return not self.ready

    def cancelled(self) -> bool:
        """Tell whether the call ended as CANCELLED."""
        return self._state == _CANCELLED

    def cancel(self) -> bool:
        """Cancel the call, running or not.

        Returns:
            True once CANCEL was sent (or the call was never sent): :meth:`result` then raises
            :class:`~mcp_broker.errors.Cancelled`. False if the call has another outcome.
        """
        if not self.ready:
            self._owner.cancel_pending(self.pending)
        return self._state == _CANCELLED

    def drop(self) -> None:
        """Cancel the call soon, if it has not ended. Unlike :meth:`cancel`, this may be called by a destructor."""
        if not self.ready:
            self._owner.orphan(self.pending)

    def result(self, timeout: float | None = None) -> Any:  # noqa: ANN401
        """Wait for the outcome.

        Raises:
            CallError: the call ended without a result.
            TimeoutError: ``timeout`` seconds passed; the call goes on.
        """
        if not self.ready and not self._owner.await_end(self, timeout):
            raise FutureTimeoutError
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                # the traceback holds this frame, and this frame the future: no cycle, please
                self = None  # type: ignore[assignment]  # noqa: PLW0642
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As :meth:`result`, but return the error instead of raising it (Cancelled is raised)."""
        if not self.ready and not self._owner.await_end(self, timeout):
            raise FutureTimeoutError
        if self._state == _CANCELLED and self._exception is not None:
            raise self._exception
        return self._exception
