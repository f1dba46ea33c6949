"""Clients that read large results more slowly than workers make them: their calls wait until they have caught up.

A window counts calls, and the results of one window may be a gigabyte. Small results are bounded by their number; a tool
that returned a large one (one with a second frame) is expected to do so again. Its calls are given to workers only while
what their client has yet to read, and what its workers are expected to make, stays within a bound. The others are set
aside here, still QUEUED, and go back to their pool's queue, in their order, as the client acknowledges: behind what their
principal has there, since what waits for its own client comes before nobody else's.

A tool that was never seen to return so much may surprise us, at most with what workers hold at a time; past a hard bound
such a result is dropped, and its caller is told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core.calls import Call, fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mcp_broker.core.client_session import ClientSession
    from mcp_broker.core.pool import Pool
    from mcp_broker.wire import messages


class Backpressure:
    """What clients have yet to read, and the calls that wait for it; false until a first large result."""

    def __init__(self) -> None:
        self._seen = False
        #: session -> its calls by id, in the order of their turn; none is empty
        self._aside: dict[ClientSession, dict[bytes, Call]] = {}

    def __bool__(self) -> bool:
        return self._seen

    def __len__(self) -> int:
        """Return how many calls are set aside."""
        return sum(map(len, self._aside.values()))

    @property
    def sessions(self) -> list[ClientSession]:
        """The sessions that have calls here."""
        return list(self._aside)

    def behind(self, calls: Iterable[Call | None]) -> Iterable[ClientSession]:
        """Return those of these calls' sessions that have calls here."""
        if not self._aside:
            return ()
        return dict.fromkeys(call.session for call in calls if call is not None and call.session.is_behind)

    def large(self, call: Call, size: int) -> messages.Outcome | None:
        """Take note of a large result of so many bytes.

        Returns:
            None, or what its caller gets in place of it, since there is no more room.
        """
        self._seen = True
        tool, session = call.tool, call.session
        tool.result_bytes = max(size, tool.result_bytes - (tool.result_bytes >> 3))
        if session.unread_bytes + size <= limits.CLIENT_UNREAD_BYTES_MAX:
            return None
        text = (
            f"{tool.name} ran, but its result of {size:,} bytes was dropped: this client has yet to take "
            f"{session.unread_bytes:,} bytes of results, of at most {limits.CLIENT_UNREAD_BYTES_MAX:,}; "
            "read results as they come, or ask for fewer at a time"
        )
        details = {"limit": "unread_bytes", "limit_bytes": limits.CLIENT_UNREAD_BYTES_MAX, "bytes": size}
        return fault(call.call_id, "RESOURCE_EXHAUSTED", text, details, retryable=tool.definition.idempotent)

    @staticmethod
    def small(call: Call) -> None:
        """Take note that a result was small which was expected to be large."""
        left = call.tool.result_bytes - (call.tool.result_bytes >> 3)
        call.tool.result_bytes = left if left > limits.INLINE_BYTES_MAX else 0

    def sift(
        self, calls: Iterable[Call], may_wait: Callable[[Call, Pool], bool] = lambda *_: True
    ) -> list[Call]:
        """Return the calls that workers may have now, and set the others aside. They are in no queue.

        Args:
            may_wait: asked before a call is set aside; ends it if not.
        """
        ready = []
        for call in calls:
            expected, pool = call.tool.result_bytes, call.tool.pool
            # one that has its share already came back from here
            if not expected or call.expected_bytes or pool is None:
                ready.append(call)
                continue
            session = call.session
            due = session.due_bytes
            if session not in self._aside and (not due or due + expected <= limits.CLIENT_BEHIND_BYTES):
                self._expect(call)
                ready.append(call)
            elif may_wait(call, pool):
                self._set_aside(call)
        return ready

    @staticmethod
    def _expect(call: Call) -> None:
        call.expected_bytes = call.tool.result_bytes
        call.session.expected_bytes += call.expected_bytes

    def caught_up(self, session: ClientSession) -> list[Call]:
        """Return the calls that need wait no more, in the order of their turn; none before half the bound is free."""
        aside = self._aside.get(session, {})
        ready: list[Call] = []
        if session.due_bytes >= limits.CLIENT_BEHIND_BYTES // 2:
            return ready
        for call in list(aside.values()):
            if session.due_bytes and session.due_bytes + call.tool.result_bytes > limits.CLIENT_BEHIND_BYTES:
                break
            self._expect(call)
            self.release(call)
            ready.append(call)
        return ready

    def move(self, call: Call, session: ClientSession) -> None:
        """Make a call another session's."""
        was_aside = self.release(call)
        call.session.expected_bytes -= call.expected_bytes
        session.expected_bytes += call.expected_bytes
        call.session = session
        if was_aside:
            self._set_aside(call)

    def _set_aside(self, call: Call) -> None:
        call.session.is_behind = True
        self._aside.setdefault(call.session, {})[call.call_id] = call
        if call.tool.pool is not None:
            # it takes up room to wait all the same
            call.tool.pool.count_in(call)

    def release(self, call: Call) -> bool:
        """Let go of a call before its arguments are; False if it is not here."""
        aside = self._aside.get(call.session)
        if aside is None or aside.pop(call.call_id, None) is None:
            return False
        if call.tool.pool is not None:
            call.tool.pool.count_out(call)
        if not aside:
            del self._aside[call.session]
            call.session.is_behind = False
        return True

    def of_pool(self, pool: Pool) -> list[Call]:
        """Return the calls of a pool that are set aside."""
        return [call for aside in self._aside.values() for call in aside.values() if call.tool.pool is pool]
