"""Waiting on conditions, with a deadline: the tests never sleep and hope."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def wait_for(condition: Callable[[], T], *, within_s: float = 10.0, what: str = "the condition") -> T:
    """Return the condition's first true value; fail the test when there was none in time."""
    until = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            raise AssertionError(f"{what} did not come true within {within_s} s")
        time.sleep(0.005)
