"""The serving of a blocking client's socket, by one thread at a time; who that is stands in ``leadership``.

The lock guards session, link and socket; it is held in all that begins with an underscore.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from mcp_broker.client import progress

if TYPE_CHECKING:
    from mcp_broker.client.link import Link
    from mcp_broker.client.session import PendingCall
    from mcp_broker.client.targets import Room, Target
    from mcp_broker.transport import Connection


class Serving:
    """Moves what the link has to move, and tells whom it concerns."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.session = link.session
        self._lock = threading.Lock()
        self._rooms: list[Room] = []
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._wake_fd, select.POLLIN)
        self._polled: Connection | None = None
        #: the leader waits for the fd, or is about to
        self._polling = False
        self._kicked = False
        #: what is still to be told to strangers, with the lock released
        self._untold: deque[Callable[[], Callable[[], object] | None]] = deque()
        #: callbacks of futures; they may take as long as they like, and so the helper runs them
        self._callbacks: deque[Callable[[], object]] = deque()
        #: calls whose stream was dropped; a destructor may not take the lock
        self._orphans: deque[PendingCall] = deque()
        self._closed = False

    def orphan(self, pending: PendingCall) -> None:
        """Nobody can take this call's parts any more. Safe in a destructor: takes no lock."""
        self._orphans.append(pending)

    def _poll(self, target: Target, wait_s: float) -> None:
        current = self.link.connection
        if current is not self._polled:
            if self._polled is not None:
                self._poller.unregister(self._polled.fd)
            if current is not None:
                self._poller.register(current.fd, select.POLLIN)
            self._polled = current
        # who makes the target ready looks at _polling afterwards, so look again now
        self._polling = True
        if not target.ready:
            self._lock.release()
            try:
                # rounded up, or the last fraction of a millisecond would be spent spinning
                self._poller.poll(wait_s * 1000 + 1)
            finally:
                self._lock.acquire()
        self._polling = False
        if self._kicked:
            self._kicked = False
            os.eventfd_read(self._wake_fd)

    def _serve(self, now: float) -> bool:
        """Serve once, and tell whom it concerns; True if there may be more at once."""
        while self._orphans:
            self.session.cancel(self._orphans.popleft())
        more = self.link.serve(now)
        book = self.session.book
        if book.ended or book.arrived or book.progressed or book.uploads.raised or self._untold:
            self._settle()
        elif self._rooms:
            self._tell_rooms()
        return more

    def _push(self) -> None:
        """Serve without waiting, on behalf of whoever leads."""
        before = self.link.connection
        now = monotonic()
        while not self._closed and self._serve(now):
            pass
        if self._polling and self.link.connection is not before:
            self._kick()

    def _settle(self) -> None:
        """Tell futures and streams; those that have strangers waiting with the lock released."""
        book = self.session.book
        ended, book.ended = book.ended, []
        arrived, book.arrived = book.arrived, []
        for pending, part in arrived:
            pending.waiter.feed(part)
        if book.progressed:
            self._untold.extend(progress.reports(book))
        for end in ended:
            # future and call hold each other: taken apart here, they cost the collector nothing
            waiter, end.pending.waiter = end.pending.waiter, None
            if end.pending.upload is not None:
                book.uploads.raised.append(end.pending)
            if waiter.settle(end.value, end.error, end.usage):
                self._untold.append(waiter.tell_strangers)
        if self._rooms:
            self._tell_rooms()
        if book.uploads.raised:
            self._tell_feeders()
        if self._polling:
            # the leader's own call may be among them
            self._kick()
        if self._untold:
            self._tell_strangers()
        if self._callbacks:
            self._call_helper()

    def _call_helper(self) -> None:
        """Have the helper look at what there is to do, with the lock held."""
        raise NotImplementedError

    def _tell_strangers(self) -> None:
        # one list for all threads: who reports progress may wait for a future that stands behind it
        self._lock.release()
        try:
            while self._untold:
                try:
                    tell = self._untold.popleft()
                except IndexError:
                    break
                callbacks = tell()
                if callbacks is not None:
                    self._callbacks.append(callbacks)
        finally:
            self._lock.acquire()

    def _run_callbacks(self) -> None:
        self._lock.release()
        try:
            while self._callbacks:
                try:
                    run = self._callbacks.popleft()
                except IndexError:
                    break
                run()
        finally:
            self._lock.acquire()

    def _tell_rooms(self) -> None:
        for room in self._rooms:
            if room.ready and room.seats:
                for seat in room.seats:
                    seat.set()

    def _tell_feeders(self) -> None:
        uploads = self.session.book.uploads
        raised, uploads.raised = uploads.raised, []
        for pending in raised:
            if pending.upload is not None and pending.upload.seats:
                seats, pending.upload.seats = pending.upload.seats, None
                for seat in seats:
                    seat.set()

    def _kick(self) -> None:
        """Let the leader look again."""
        if not self._kicked and self._wake_fd >= 0:
            self._kicked = True
            os.eventfd_write(self._wake_fd, 1)

    def _drop_wake_fd(self) -> None:
        if self._wake_fd >= 0:
            fd, self._wake_fd = self._wake_fd, -1
            os.close(fd)
