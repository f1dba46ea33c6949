"""What must not end the supervisor: a failure of ours, while it does one of its many things.

Whatever comes from a process of ours may be hostile, and there will be a bug. Everything on this machine ends with its
supervisor, so a failure costs the one thing that failed: it is logged with its traceback, and the rest goes on. What is
not contained: what fails before anything is served, and the poller itself, without which nothing would be heard.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.supervisor.process import SHORTAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_log = logging.getLogger("mcp_broker.supervisor")

#: after so long it is told how many more of a kind there were
TOLD_S: Final = 60.0
_REST_S: Final = 0.01


@dataclass(slots=True)
class _Kind:
    """Failures at one place, by one type of exception."""

    count: int = 0
    told_at: float = 0.0


class Containment:
    """Logs failures: the first of a kind with its traceback, then rarely, whoever can provoke them.

    Args:
        clock: monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[object, _Kind] = {}
        self._has_failed = False

    def note(self, what: str, error: Exception) -> None:
        """Take note that something failed.

        Args:
            what: was being done.
        """
        self._has_failed = True
        now = self._clock()
        kind = self._kind(error)
        kind.count += 1
        if kind.count > 1 and now < kind.told_at + TOLD_S:
            return
        kind.told_at = now
        if isinstance(error, OSError) and error.errno in SHORTAGES:
            # no bug: what is lost by it is looked after where it happens, the rest is done at the next turn
            _log.warning(
                "the machine has nothing left (%s): %s failed; %d times by now", error, what, kind.count
            )
            return
        _log.error(
            "%s failed, and the rest goes on; %d times by now. This is a bug of mcp-broker: please report these lines",
            what,
            kind.count,
            exc_info=error,
        )

    def rest(self) -> None:
        """Wait a little if something failed since the last rest: it may fail again at once, and for long."""
        if self._has_failed:
            self._has_failed = False
            time.sleep(_REST_S)

    def _kind(self, error: Exception) -> _Kind:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = None if place is None else (place.tb_frame.f_code.co_filename, place.tb_lineno)
        key: object = (type(error), where)
        if key not in self._kinds and len(self._kinds) >= limits.FAILURE_KINDS_MAX:
            key = None
        return self._kinds.setdefault(key, _Kind())


#: the process's own, as its log is
ours = Containment()


@contextlib.contextmanager
def contained(what: str) -> Iterator[None]:
    """Let a failure cost what is in the block, or the function that this decorates, and nothing else."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (that is what it is for)
        ours.note(what, error)
