"""The echo tools, called as functions and through their validation."""

from __future__ import annotations

import time
from typing import Any

import pytest
from mcp_broker_workers import echo

from mcp_broker.errors import Cancelled, DeadlineExceeded, InvalidArgument
from mcp_broker.worker import ToolContext


@pytest.mark.parametrize("value", [None, 1, "x", b"\0", [1, {"a": [None]}], 2.5])
def test_echo_returns_what_it_was_given(value: Any) -> None:
    assert echo.echo(**echo.echo.validate({"value": value})) == value


def test_sleep_says_how_long_it_took() -> None:
    assert 0.01 <= echo.sleep(0.01, ToolContext()) < 5
    assert not echo.sleep.definition.idempotent


def test_sleep_ends_when_nobody_waits_any_more() -> None:
    began = time.monotonic()
    with pytest.raises(Cancelled):
        echo.sleep(100.0, ToolContext(cancelled=True))
    with pytest.raises(DeadlineExceeded):
        echo.sleep(100.0, ToolContext(deadline=time.monotonic() + 0.02))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("seconds", [-1, "1", float("nan")])
def test_sleep_refuses_what_is_no_duration(seconds: Any) -> None:
    with pytest.raises(InvalidArgument):
        echo.sleep.validate({"seconds": seconds})


def test_fail_fails_with_its_message() -> None:
    with pytest.raises(ValueError, match="as asked"):
        echo.fail("as asked")


def test_count_streams_numbers() -> None:
    assert list(echo.count(3)) == [1, 2, 3]
    assert list(echo.count(2, start=5, pause_s=0.001)) == [5, 6]
    assert list(echo.count(0)) == []
    assert echo.count.definition.streaming
