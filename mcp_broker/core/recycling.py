"""When a worker that works well is replaced all the same: after so many calls, so much memory, so long a life.

What leaks slowly, or goes stale, never gets far then. Each life draws its own share of jitter, so that workers that were
started together do not leave together; what is configured is the latest, never the earliest.

A worker whose limit has it throttled gets no calls; when it rests and does not recover, it is replaced too: else it
would stay for ever.

Pure: time and jitter are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcp_broker import limits
from mcp_broker.core.metering import Level, Meter


@dataclass(frozen=True, slots=True)
class Policy:
    """After what a worker is replaced, at the latest; None: never for that.

    Args:
        calls: that it has started.
        rss_mb: resident memory, all of it.
        age_s: since it was ready.
    """

    calls: int | None = None
    rss_mb: float | None = None
    age_s: float | None = None


class Recycling:
    """One life of a worker.

    Args:
        jitter: a random number of [0, 1).
        born_at: when it was ready, monotonic seconds.
    """

    def __init__(self, policy: Policy, jitter: float, born_at: float) -> None:
        self._policy = policy
        self._share = 1.0 - limits.RECYCLE_JITTER * jitter
        self._born_at = born_at
        self._stuck_since: float | None = None

    def reason(self, meter: Meter, rss_mb: float, now: float, *, is_resting: bool) -> str:
        """Return why it is to be replaced now, or ""."""
        policy, share = self._policy, self._share
        if policy.calls is not None and meter.calls >= max(1, round(policy.calls * share)):
            return f"it has run {meter.calls} calls"
        if policy.rss_mb is not None and rss_mb >= policy.rss_mb * share:
            return f"its resident memory is {rss_mb:.0f} MB"
        if policy.age_s is not None and now - self._born_at >= policy.age_s * share:
            return f"it is {now - self._born_at:.0f} s old"
        if meter.reading.level is not Level.THROTTLE or not is_resting:
            self._stuck_since = None
            return ""
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since < limits.THROTTLED_REST_S:
            return ""
        reading = meter.reading
        return f"it holds {reading.used:.0f} of {reading.limit} = {reading.value:g}, and does not let go"
