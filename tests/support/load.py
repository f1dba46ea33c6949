"""What the load and soak tests share: how much they do, what they report, and how clients drive the broker."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench import kernel
from mcp_broker.errors import CallError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from concurrent.futures import Future
    from typing import Any

    from tests.support.running import Running

MIB = 1024 * 1024
PROGRESS_S = 10.0


@dataclass(slots=True)
class Soak:
    """One test's amount of work, and the lines of its report.

    Args:
        is_full: the counts of the acceptance; else a sample for every run of the tests.
        title: of the report.
    """

    is_full: bool
    title: str
    lines: list[str] = field(default_factory=list)
    _told_at: float = field(default_factory=time.monotonic)

    def count(self, *, sample: int, full: int) -> int:
        """Return how much to do."""
        return full if self.is_full else sample

    def report(self, name: str, value: object) -> None:
        """Add a line to the report."""
        self.lines.append(f"{name}: {value}")

    def progress(self, text: str) -> None:
        """Say how far a long run is, now and then."""
        now = time.monotonic()
        if self.is_full and now - self._told_at >= PROGRESS_S:
            self._told_at = now
            sys.stderr.write(f"  {self.title}: {text}\n")


def broker_rss(running: Running) -> int:
    """Return the broker's resident memory, bytes."""
    return kernel.sample(running.status()["broker"]["pid"]).rss_bytes


def percentile(seconds: Iterable[float], share: float) -> float:
    """Return a percentile of durations, in their own unit."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def outcome_of(future: Future[Any], within_s: float) -> str:
    """Return "OK" or the code of a call's error; a call without an outcome in time fails the test."""
    try:
        future.result(within_s)
    except CallError as error:
        return error.code
    return "OK"


def tally(codes: Sequence[str]) -> str:
    """Say how often each code came: ``OK 12, WORKER_LOST 3``."""
    return ", ".join(f"{code} {codes.count(code):,}" for code in sorted(set(codes)))
