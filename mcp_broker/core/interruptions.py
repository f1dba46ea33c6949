"""Stopping calls that have ended where they run: signals by their worker's supervisor, until the worker lets go.

The supervisor knows what a worker runs by the page that the worker writes, and spares one that runs another call by now.
That keeps a signal that comes late from a call that it is not meant for, and trusts a page that any tool can write. So it does
not count for ever: when every call that the worker can be running has ended, and it lets go of none, the worker is killed
whatever its page says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.core.calls import CallState
from mcp_broker.core.worker import WorkerState
from mcp_broker.wire import node

if TYPE_CHECKING:
    from mcp_broker.core.routing import Routing
    from mcp_broker.core.worker import Worker

_UNHEEDED_MAX: Final = limits.KILL_UNHEEDED_S / limits.CANCEL_KILL_S


@dataclass(slots=True)
class _Interruption:
    """A call that its worker is to drop.

    Args:
        given: the number of the last call that the worker had by then.
        kills: how often its kill was asked for. Counted, not timed: a broker that stood still has heard nothing meanwhile.
    """

    worker: Worker
    call_id: bytes
    seq: int
    why: node.Why
    given: int
    kills: int = 0


class Interruptions:
    """What is being stopped; the timers hold it."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing

    def begin(self, worker: Worker, call_id: bytes, seq: int, why: node.Why, now: float) -> None:
        """Have a call raise now, and its worker told to end, then killed, if it still holds the call later."""
        self._interrupt(worker, seq, "raise", why)
        self._later(_Interruption(worker, call_id, seq, why, worker.seq), now)

    def end(self, worker: Worker, why: node.Why) -> None:
        """Have a worker killed, whatever it runs."""
        self._interrupt(worker, node.WHATEVER, "kill", why)

    def _later(self, stop: _Interruption, now: float) -> None:
        self._routing.timers.add(now + limits.CANCEL_TERM_S, self._term, stop)
        self._routing.timers.add(now + limits.CANCEL_KILL_S, self._kill, stop)

    def _term(self, stop: _Interruption, now: float) -> None:  # noqa: ARG002 (the shape of what is due)
        if self._is_held(stop):
            self._interrupt(stop.worker, stop.seq, "term", stop.why)

    def _kill(self, stop: _Interruption, now: float) -> None:
        if not self._is_held(stop):
            return
        stop.kills += 1
        if stop.kills > _UNHEEDED_MAX and self._is_over(stop):
            self.end(stop.worker, stop.why)
        else:
            self._interrupt(stop.worker, stop.seq, "kill", stop.why)
        # the supervisor spares a call that has not started: it waits behind another, and may start before the
        # worker reads that it need not
        self._later(stop, now)

    def _is_held(self, stop: _Interruption) -> bool:
        if stop.worker.state >= WorkerState.DYING:
            return False
        call = stop.worker.held.get(stop.call_id)
        if call is not None:
            return call.seq == stop.seq
        return self._routing.reconciliation.is_running(stop.worker, stop.call_id, stop.seq)

    def _is_over(self, stop: _Interruption) -> bool:
        """Tell whether all has ended that the worker can have begun before it was to stop this call.

        What it was given since then runs behind this call, so it is no reason to wait.
        """
        held = stop.worker.held.values()
        return all(
            call.state is CallState.ENDED or call.seq > stop.given for call in held
        ) and not self._routing.reconciliation.may_run(stop.worker, stop.given)

    def _interrupt(self, worker: Worker, seq: int, stage: node.Stage, why: node.Why) -> None:
        self._routing.to_node.append(node.Interrupt(worker.worker_id, seq, stage, why))
