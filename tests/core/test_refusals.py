"""What of refusals is told, whoever sends how many."""

from __future__ import annotations

import math

from mcp_broker.core.refusals import Refusals


def test_the_first_of_each_kind_is_told_and_the_others_by_number_at_the_end_of_the_period() -> None:
    refusals = Refusals(60.0)
    told = [refusals.note(kind, 5.0 + turn / 1000) for turn in range(1000) for kind in ("key", "frame")]
    assert (told.count(True), told[:2]) == (2, [True, True])
    assert refusals.due == 65.0
    assert refusals.expire(64.9) == {}
    assert refusals.expire(65.0) == {"key": 999, "frame": 999}


def test_after_its_end_a_period_begins_with_the_next_refusal() -> None:
    refusals = Refusals(60.0)
    refusals.note("key", 0.0)
    assert refusals.expire(60.0) == {}, "the one that there was is told already"
    assert refusals.due == math.inf
    assert refusals.note("key", 500.0)
    assert refusals.due == 560.0
