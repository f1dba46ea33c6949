"""Who serves the socket of a blocking client: whoever waits does the work.

Rules
    The lock guards session, link and socket. It is never held while anybody waits, nor while callbacks run.
    One thread at a time *leads*: it waits for the socket's fd, and serves. A thread that waits for a call leads if
    nobody does; else it takes a *seat*, and is woken when its call has ended or the leader leaves. Waiting means
    ``poll`` on the raw fd, which does not touch the socket: meanwhile any other thread may take the lock, send
    and receive. Whoever did so and told somebody kicks the leader.
    Calls that nobody waits for are served by the *helper* thread, started on first need: it leads when nobody
    else did for a tick, gives way to any thread that waits, and ends itself after a second without calls.
    It also runs the callbacks of futures, and does not lead meanwhile: one that takes its time holds up other callbacks,
    and no thread that waits for a call of its own.
    What is submitted while calls are in flight goes out in one batch when a thread next serves.
    An I/O thread on every call would cost half the latency: two more thread switches.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.client import connection, feeder
from mcp_broker.client.serving import Serving
from mcp_broker.client.session import shrunk
from mcp_broker.client.targets import OVER, Room, Target, Unattended, window_full

if TYPE_CHECKING:
    from mcp_broker.client.link import Link
    from mcp_broker.client.session import PendingCall, Wishes

#: how long calls may wait for a thread before the helper takes them on (after one to two ticks); ticks grow while
#: other threads serve, since each one takes the GIL from them
TICK_S: Final = 0.002
TICK_MAX_S: Final = 0.008
#: ticks without calls after which the helper sleeps, and how long it then waits before it ends
QUIET_TICKS: Final = 25
HELPER_IDLE_S: Final = 1.0


class Leadership(Serving):
    """Serves one link for the threads of one process."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self._generation = connection.generation
        #: what the leading thread waits for, if one leads, and which thread it is
        self._leader: Target | None = None
        self._leading_thread = 0
        #: threads that could lead, longest waiting first
        self._seats: deque[threading.Event] = deque()
        #: counts what leaders do, so that the helper sees whether anybody serves
        self._turns = 0
        self._helper: threading.Thread | None = None
        self._bell = threading.Event()
        self._asleep = False
        self._urgent = False
        self._unattended = Unattended(link, self._callbacks)

    def check_process(self) -> None:
        """Refuse to work in a forked child.

        Raises:
            WrongProcess: this is not the process that connected (the caller's fault).
        """
        if self._generation != connection.generation:
            raise connection.wrong_process()

    # -- what the client asks for -----------------------------------------------------------------------------

    def submit(
        self,
        tool: str,
        timeout_s: float,
        packed: bytes,
        waiter: Any,  # noqa: ANN401 (a future or a stream)
        *,
        streamed: bool = False,
        waits: bool = False,
        wishes: Wishes | None = None,
    ) -> None:
        """Take a call, after waiting for a place in the window, and set ``waiter.pending``.

        Args:
            waits: this thread waits for the outcome at once, and will send it then.

        Raises:
            Overloaded: there was no place within ``timeout_s``.
            ClientClosed, WrongProcess: the client takes no calls, or not here.
            BrokerError: the session was refused, or such a call cannot be.
        """
        if self._generation != connection.generation:
            self.check_process()
        session = self.session
        book = session.book
        if len(packed) >= limits.COMPRESS_BYTES_MIN and session.compresses:
            packed, wishes = shrunk(packed, wishes)
        with self._lock:
            now = monotonic()
            if len(book.calls) >= session.granted.window and session.state not in OVER:
                self._await_room(now + timeout_s)
                now = monotonic()
            waiter.pending = session.submit(
                tool, timeout_s, packed, now, waiter, streamed=streamed, wishes=wishes
            )
            if wishes is not None and wishes.upload is not None:
                feeder.start(self, waiter.pending, wishes.upload)
            if waits:
                return
            if not book.in_flight or len(book.queue) >= limits.BATCH_MAX:
                self._push()
            elif self._polling:
                self._kick()
            if self._asleep or self._helper is None:
                self._call_helper()

    def cancel_pending(self, pending: PendingCall) -> bool:
        """End a call as CANCELLED and tell the broker now; False if it had ended."""
        self.check_process()
        with self._lock:
            done = self.session.cancel(pending)
            if done:
                self._push()
        return done

    def took(self, pending: PendingCall) -> None:
        """A part of a stream was taken."""
        with self._lock:
            self.session.took(pending)
            if self.session.book.credits:
                self._push()

    def feed(self, pending: PendingCall, data: bytes) -> None:
        """Send the next chunk of a call's argument; no bytes: that was all."""
        with self._lock:
            self.session.book.uploads.add(pending, data)
            self._push()

    def fail(self, pending: PendingCall, error: Exception) -> None:
        """End a call whose argument cannot be read."""
        with self._lock:
            self.session.book.spoil(pending, error)
            self._push()

    def attend(self) -> None:
        """Somebody waits in a way that serves nothing: the helper leads from now on."""
        with self._lock:
            if self.session.book.calls and not self._closed:
                self._urgent = True
                self._call_helper()
                self._bell.set()

    def await_end(self, target: Target, timeout_s: float | None) -> bool:
        """Serve, or wait for who serves, until ``target.ready``; False if the time ran out before."""
        if self._generation != connection.generation:
            self.check_process()
        with self._lock:
            self._await(target, None if timeout_s is None else monotonic() + timeout_s)
        return target.ready

    def close(self) -> None:
        """End the session; calls that have not ended are cancelled. A forked child has nothing to close."""
        if self._generation != connection.generation:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.link.close()
            self._settle()
            self._bell.set()
            self._hand_over()
            # the helper may have ended
            self._run_callbacks()
            if self._leader is not None:
                self._kick()  # it drops the wake fd when it leaves
            else:
                self._drop_wake_fd()

    def __del__(self) -> None:
        # nobody is inside: a thread there, or a future, would hold a reference
        if getattr(self, "_closed", True) or self._generation != connection.generation:
            return
        if sys.is_finalizing():
            # the modules that a GOODBYE takes are gone; the end of the process ends the session, too
            return
        text = "a Client was dropped and not closed; use `with` or close()"
        warnings.warn(text, ResourceWarning, stacklevel=2, source=self)
        self.close()

    # -- waiting; the lock is held in all that follows ----------------------------------------------------------

    def _await(self, target: Target, ends: float | None) -> None:
        try:
            while not target.ready and not self._closed:
                # a report of progress that the leader runs leads in its place
                if self._leader is None or self._leading_thread == threading.get_ident():
                    self._lead(target, ends)
                    break
                if not self._sit(target, ends):
                    break
        finally:
            # this thread led, or was woken to lead and does not
            self._hand_over()

    def _await_room(self, ends: float) -> None:
        room = Room(self.link)
        self._rooms.append(room)
        try:
            self._await(room, ends)
        finally:
            self._rooms.remove(room)
        if not room.ready:
            raise window_full(self.session.granted.window)

    def _sit(self, target: Target, ends: float | None) -> bool:
        """Wait until the target is there or the leader leaves; False if the time ran out."""
        self._push()
        if self._leader is self._unattended:
            self._unattended.give_way = True
            self._kick()
        seat = threading.Event()
        if target.seats is None:
            target.seats = []
        target.seats.append(seat)
        self._seats.append(seat)
        in_time = True
        # who makes it ready looks at the seats afterwards, so look again now
        if not target.ready and self._leader is not None:
            self._lock.release()
            try:
                in_time = seat.wait(None if ends is None else max(0.0, ends - monotonic()))
            finally:
                self._lock.acquire()
        if seat in self._seats:
            self._seats.remove(seat)
        return in_time

    def _hand_over(self) -> None:
        """If nobody leads, wake one who could."""
        if self._leader is None and self._seats:
            self._seats.popleft().set()

    # -- serving ------------------------------------------------------------------------------------------------

    def _lead(self, target: Target, ends: float | None) -> None:
        outer = self._leader
        self._leader = target
        self._leading_thread = threading.get_ident()
        try:
            while not self._closed:
                self._turns += 1
                now = monotonic()
                more = self._serve(now)
                if target.ready or self._closed:
                    if self.session.book.cancels:
                        # nobody may come after this thread
                        self.link.flush(now)
                    return
                if more or self.session.has_outgoing:
                    continue
                wait_s = self.link.wait_s(now)
                if ends is not None:
                    if now >= ends:
                        return
                    wait_s = min(wait_s, ends - now)
                self._poll(target, wait_s)
        finally:
            self._leader = outer
            self._polling = False
            if self._closed and outer is None:
                self._drop_wake_fd()

    # -- the helper -----------------------------------------------------------------------------------------------

    def _call_helper(self) -> None:
        if self._helper is None:
            self._helper = threading.Thread(target=self._help, name="mcp-broker-helper", daemon=True)
            self._helper.start()
        elif self._asleep or self._callbacks:
            self._asleep = False
            self._bell.set()
            if self._leader is self._unattended and self._polling:
                self._kick()

    def _help(self) -> None:
        with self._lock:
            try:
                self._stand_by()
                # a thread may have found some while another one closed the client
                while self._callbacks:
                    self._run_callbacks()
            finally:
                self._helper = None

    def _stand_by(self) -> None:
        seen, quiet, tick_s = -1, 0, TICK_S
        book = self.session.book
        while not self._closed:
            if book.calls and self._leader is None and (self._urgent or self._turns == seen):
                self._unattended.give_way = False
                self._lead(self._unattended, None)
                self._hand_over()
            if self._callbacks:
                self._run_callbacks()
                # others served meanwhile, or nobody did
                self._urgent = True
                continue
            if self._orphans:
                self._push()
            quiet = 0 if book.calls or self._turns != seen else quiet + 1
            tick_s = TICK_S if self._turns == seen else min(tick_s * 2, TICK_MAX_S)
            seen, self._urgent = self._turns, False
            self._asleep = quiet > QUIET_TICKS
            self._bell.clear()
            self._lock.release()
            try:
                rung = self._bell.wait(HELPER_IDLE_S if self._asleep else tick_s)
            finally:
                self._lock.acquire()
            if self._asleep and not rung and not book.calls:
                break
