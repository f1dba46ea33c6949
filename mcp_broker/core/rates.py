"""Rate limits: how many calls a principal may make, and how many a tool takes, in a second.

Nothing here is asked while no rate is set.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core.bucket import Bucket, Rate
from mcp_broker.core.calls import fault

if TYPE_CHECKING:
    from mcp_broker.core.registry import Tool
    from mcp_broker.wire import messages


class Rates:
    """The buckets of principals, and the question before each call that has one to pass.

    Attributes:
        principal: what every principal may, over all its sessions and tools; None: as much as it likes.
    """

    def __init__(self) -> None:
        self.principal: Rate | None = None
        self._buckets: dict[str, Bucket] = {}

    def refusal(self, call_id: bytes, tool: Tool, principal: str, now: float) -> messages.Outcome | None:
        """Take a token from each bucket that counts, or none and return how the call ends."""
        mine = None if self.principal is None else self._bucket(self.principal, principal, now)
        wait_s = mine.wait_s(now) if mine is not None else 0.0
        its = tool.bucket
        its_wait_s = its.wait_s(now) if its is not None else 0.0
        if wait_s <= 0 and its_wait_s <= 0:
            for bucket in (mine, its):
                if bucket is not None:
                    bucket.take(now)
            return None
        if wait_s >= its_wait_s and mine is not None:
            rate, limit, text = mine.rate, "principal_rate", f"{principal} may make"
        elif its is not None:
            rate, limit, text = its.rate, "tool_rate", f"{tool.name} takes"
        retry_after_s = math.ceil(max(wait_s, its_wait_s) * 1000 - 0.001) / 1000
        return fault(
            call_id,
            "RATE_LIMITED",
            f"{text} {rate.per_s:g} calls a second, {rate.burst} at once; the next one in {retry_after_s:g} s",
            {
                "limit": limit,
                "rate_per_s": rate.per_s,
                "burst": rate.burst,
                "retry_after_s": retry_after_s,
                "tool": tool.name,
                "principal": principal,
            },
        )

    def _bucket(self, rate: Rate, principal: str, now: float) -> Bucket:
        bucket = self._buckets.get(principal)
        if bucket is None or bucket.rate != rate:
            if len(self._buckets) >= limits.BUCKETS_MAX:
                self._sweep(now)
            bucket = self._buckets[principal] = Bucket(rate)
        return bucket

    def _sweep(self, now: float) -> None:
        """Forget buckets that are full, being as good as new; if none is, the ones that were made first."""
        full = [principal for principal, bucket in self._buckets.items() if bucket.is_full(now)]
        for principal in full or list(self._buckets)[: limits.BUCKETS_MAX // 2]:
            del self._buckets[principal]
