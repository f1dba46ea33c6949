"""Tools that do next to nothing: to try a broker, to measure it, and to see how failures look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from mcp_broker.worker import ToolContext, tool

#: how often a sleeper looks whether anybody still waits, seconds
_NAP_S = 0.05


@tool(name="echo.echo", idempotent=True, category="try", tags=("example",))
def echo(value: Any = None) -> Any:  # noqa: ANN401 (any value is the point)
    """Return the argument `value` unchanged.

    Any JSON-like value, bytes too; up to a mebibyte.
    """
    return value


@tool(name="echo.sleep", timeout_s=60, category="try", tags=("example",))
def sleep(seconds: Annotated[float, Field(ge=0, le=86_400)], context: ToolContext) -> float:
    """Do nothing for `seconds`, and return how many seconds that took.

    It stops early when the call is cancelled or its time is over.
    """
    began = time.monotonic()
    while (left := began + seconds - time.monotonic()) > 0:
        context.check_cancelled()
        time.sleep(min(left, _NAP_S))
    return time.monotonic() - began


@tool(name="echo.fail", idempotent=True, category="try", tags=("example",))
def fail(message: str = "this tool always fails") -> None:
    """Fail with `message`: the caller gets TOOL_FAILED, with this file and line."""
    raise ValueError(message)


@tool(name="echo.count", idempotent=True, category="try", tags=("example", "stream"))
def count(
    to: Annotated[int, Field(ge=0, le=1_000_000)],
    start: int = 1,
    pause_s: Annotated[float, Field(ge=0, le=60)] = 0.0,
) -> Iterator[int]:
    """Stream `to` numbers, from `start` up, with a pause of `pause_s` seconds before each but the first."""
    for number in range(start, start + to):
        if pause_s and number > start:
            time.sleep(pause_s)
        yield number
