"""Waiting on conditions, with a deadline: the tests never sleep and hope."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

#: a condition that holds at all holds long before, also on a busy machine
WITHIN_S = 20.0
_LOOK_S = 0.002


def wait_for(condition: Callable[[], T], *, within_s: float = WITHIN_S, what: str = "the condition") -> T:
    """Return the condition's first true value; fail the test when there was none in time."""
    until = time.monotonic() + within_s
    while not (value := condition()):
        _fail_after(until, within_s, what)
        time.sleep(_LOOK_S)
    return value


async def wait_for_async(
    condition: Callable[[], T], *, within_s: float = WITHIN_S, what: str = "the condition"
) -> T:
    """Do the same while the event loop goes on."""
    until = time.monotonic() + within_s
    while not (value := condition()):
        _fail_after(until, within_s, what)
        await asyncio.sleep(_LOOK_S)
    return value


def _fail_after(until: float, within_s: float, what: str) -> None:
    if time.monotonic() > until:
        raise AssertionError(f"{what} did not come true within {within_s} s")
