"""What may wait at the broker: calls and bytes of their arguments, for a pool, for a principal, and in all.

What follows another call with its key waits too, and so does what may have started before this broker did. What is given
to a worker at once does not wait, and is not counted here. What waits again because its worker died is counted, and never
refused: it was accepted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mcp_broker import limits
from mcp_broker.core.calls import fault
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.pool import Pool
    from mcp_broker.wire import messages


class Waiting(Slim):
    """How many calls wait, and the bytes of their arguments."""

    calls: int = 0
    bytes: int = 0

    def add(self, calls: int, size: int) -> None:
        """Count so many more, with so many bytes; negative: less."""
        self.calls += calls
        self.bytes += size


class Bound(NamedTuple):
    """What may wait in one place."""

    calls: int
    bytes: int

    def broken(self, waiting: Waiting, size: int) -> str | None:
        """Return which of the two one more call would break: "calls", "bytes" or None."""
        if waiting.calls >= self.calls:
            return "calls"
        return "bytes" if waiting.bytes + size > self.bytes else None


_NOTHING: Final = Waiting()
POOL: Final = Bound(limits.QUEUE_CALLS_MAX, limits.QUEUE_BYTES_MAX)
PRINCIPAL: Final = Bound(limits.PRINCIPAL_QUEUE_CALLS_MAX, limits.PRINCIPAL_QUEUE_BYTES_MAX)
BROKER: Final = Bound(limits.BROKER_QUEUE_CALLS_MAX, limits.BROKER_QUEUE_BYTES_MAX)


class Budget:
    """All that waits at one broker.

    Attributes:
        total: over all pools.
        principals: by principal, those only that have something waiting.
    """

    def __init__(self, pool: Bound = POOL, principal: Bound = PRINCIPAL, broker: Bound = BROKER) -> None:
        self.pool = pool
        self.principal = principal
        self.broker = broker
        self.total = Waiting()
        self.principals: dict[str, Waiting] = {}

    def add(self, principal: str, calls: int, size: int) -> None:
        """Count calls of a principal that begin to wait, and the bytes of their arguments; negative: that wait no more."""
        self.total.add(calls, size)
        mine = self.principals.get(principal)
        if mine is None:
            mine = self.principals[principal] = Waiting()
        mine.add(calls, size)
        if not mine.calls:
            del self.principals[principal]

    def room(self, principal: str, waiting: Waiting) -> tuple[int, int]:
        """Return how many calls more, and bytes, a principal may let wait for a pool where so many are."""
        total, mine = self.total, self.principals.get(principal) or _NOTHING
        return (
            min(
                self.pool.calls - waiting.calls,
                self.principal.calls - mine.calls,
                self.broker.calls - total.calls,
            ),
            min(
                self.pool.bytes - waiting.bytes,
                self.principal.bytes - mine.bytes,
                self.broker.bytes - total.bytes,
            ),
        )

    def refusal(self, call: Call, pool: Pool) -> messages.Outcome | None:
        """Return how a call ends for which there is no room to wait, or None."""
        size, principal = call.bytes_held(), call.session.grant.caller.principal
        mine = self.principals.get(principal) or _NOTHING
        for name, where, bound, waiting in (
            ("pool", f"for pool {pool.name!r}", self.pool, pool.waiting),
            ("principal", f"of {principal}", self.principal, mine),
            ("broker", "at this broker", self.broker, self.total),
        ):
            what = bound.broken(waiting, size)
            if what is None:
                continue
            maximum = bound.calls if what == "calls" else bound.bytes
            unit = "" if what == "calls" else " bytes of arguments"
            retry_after_s = pool.retry_after_s(waiting.calls)
            return fault(
                call.call_id,
                "OVERLOADED",
                f"{waiting.calls:,} calls {where} wait already, and {maximum:,}{unit or ' calls'} are the limit;"
                f" try again in {retry_after_s:g} s",
                {
                    "limit": f"{name}_{what}",
                    "maximum": maximum,
                    "waiting_calls": waiting.calls,
                    "waiting_bytes": waiting.bytes,
                    "pool": pool.name,
                    "retry_after_s": retry_after_s,
                },
            )
        return None
