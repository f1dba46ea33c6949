"""The recovery ladder: which step follows which failures, that it never goes down while things fail, and that it is bounded."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker import limits
from mcp_broker.core.recovery import (
    CEILING,
    CLASSES,
    FIRST,
    NOTED_ONLY,
    Attempt,
    Cause,
    Class,
    Failure,
    Ladder,
    Step,
)
from mcp_broker.core.tool_health import cause_of
from mcp_broker.wire import node

HOUR_S = 3600.0


def fail(
    ladder: Ladder,
    cause: Cause = Cause.CRASH,
    now: float = 0.0,
    principal: str = "ann",
    *,
    died: bool = False,
    isolated: bool = False,
) -> Attempt | None:
    return ladder.failed(Failure(now, cause, principal, "why"), died=died, isolated=isolated)


def step(ladder: Ladder, *others: object, **more: object) -> Step | None:
    attempt = fail(ladder, *others, **more)  # type: ignore[arg-type]
    return None if attempt is None else attempt.step


def test_every_cause_has_a_class_and_every_class_a_first_step() -> None:
    assert set(CLASSES) == set(Cause)
    assert set(FIRST) == set(Class)
    assert [FIRST[cls] for cls in Class] == sorted(FIRST[cls] for cls in Class)


@pytest.mark.parametrize(
    ("cause", "first"),
    [
        (Cause.EXCEPTION, Step.RETRY),
        (Cause.BREAKER, Step.RETRY),
        (Cause.LIMIT, Step.RESET),
        (Cause.PROBE, Step.RESET),
        (Cause.TIMEOUT, Step.RESTART),
        (Cause.CRASH, Step.RESTART),
        (Cause.PROTOCOL, Step.ISOLATE),
        (Cause.SECURITY, Step.UNREGISTER),
        (Cause.KILLED, None),
    ],
)
def test_the_first_failure_gets_the_first_step_of_its_class(cause: Cause, first: Step | None) -> None:
    assert step(Ladder(), cause) is first


def test_failures_in_a_row_climb_one_step_each_and_end_with_the_tool_taken_out() -> None:
    ladder = Ladder()
    steps = [step(ladder, Cause.LIMIT, principal=who) for who in ("ann", "ann", "bob", "ann")]
    assert steps == [Step.RESET, Step.RESET, Step.RESTART, Step.ISOLATE]
    assert step(ladder, Cause.LIMIT, isolated=True) is Step.UNREGISTER


def test_calls_of_one_principal_do_not_take_a_tool_from_everybody() -> None:
    ladder = Ladder()
    for _ in range(50):
        taken = step(ladder, principal="mallory", isolated=True)
        assert taken is not None
        assert taken <= Step.ISOLATE
    assert step(ladder, principal="bob", isolated=True) is Step.UNREGISTER


def test_five_failures_within_an_hour_isolate_however_many_succeed_between() -> None:
    ladder, steps = Ladder(), []
    for number in range(5):
        steps.append(step(ladder, now=number * 60.0))
        ladder.succeeded(number * 60.0 + 1)
    assert steps == [Step.RESTART] * 4 + [Step.ISOLATE]


def test_failures_of_long_ago_do_not_isolate() -> None:
    ladder = Ladder()
    for number in range(12):
        assert step(ladder, now=number * HOUR_S / 3.9) is Step.RESTART
        ladder.succeeded(number * HOUR_S / 3.9)


def test_after_a_death_nothing_below_a_restart_is_left_to_do() -> None:
    assert step(Ladder(), Cause.LIMIT, died=True) is Step.RESTART


@pytest.mark.parametrize("cause", list(CEILING))
def test_what_a_tool_raises_never_isolates_it_nor_takes_it_out(cause: Cause) -> None:
    ladder = Ladder()
    for who in itertools.islice(itertools.cycle(("ann", "bob")), 40):
        taken = step(ladder, cause, principal=who)
        assert taken is not None
        assert taken <= CEILING[cause]


def test_a_kill_that_nobody_here_sent_is_noted_and_climbs_nothing() -> None:
    ladder = Ladder()
    for _ in range(100):
        assert fail(ladder, Cause.KILLED, died=True) is None
    assert ladder.position is None
    assert len(ladder.failures) == limits.FAILURES_KEPT


def test_a_step_has_succeeded_when_the_next_call_does_and_failed_when_the_next_failure_comes_first() -> None:
    ladder = Ladder()
    first, second = fail(ladder, now=1.0), fail(ladder, now=1.5)
    assert first is not None
    assert second is not None
    assert (first.succeeded, first.duration_s) == (False, 0.5)
    assert ladder.is_open
    assert ladder.success_rate == 0
    assert ladder.succeeded(2.0)
    assert (second.succeeded, second.duration_s) == (True, 0.5)
    assert ladder.success_rate == 0.5
    assert not ladder.succeeded(3.0), "one success decides one step"
    assert Ladder().success_rate is None, "without a decided step there is no rate, and not one of 100 %"


def test_quiet_takes_it_down_one_step_at_a_time_to_the_bottom() -> None:
    ladder = Ladder()
    for _ in range(4):
        fail(ladder)
    assert ladder.position is Step.ISOLATE
    ladder.succeeded(1.0)
    positions = []
    for number in range(1, 5):
        assert not ladder.decay(number * limits.LADDER_QUIET_S - 1)
        assert ladder.decay(number * limits.LADDER_QUIET_S)
        positions.append(ladder.position)
    assert positions == [Step.RESTART, Step.RESET, Step.RETRY, None]
    assert not ladder.decay(1e9)


def test_an_operator_forgives_and_the_record_stays() -> None:
    ladder = Ladder()
    for _ in range(5):
        fail(ladder)
    ladder.forgive()
    assert (ladder.position, ladder.in_a_row) == (None, 0)
    assert len(ladder.failures) == 5
    assert step(ladder, now=1.0) is Step.RESTART


def test_the_penalty_begins_with_the_second_failure_doubles_and_is_capped() -> None:
    ladder, penalties = Ladder(), []
    for _ in range(9):
        fail(ladder)
        penalties.append(ladder.penalty_s(0.0))
    assert penalties == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]
    assert 2.5 <= ladder.penalty_s(0.999) < 5.0


FAILURES = st.tuples(
    st.sampled_from(list(Cause)),
    st.sampled_from(["ann", "bob"]),
    st.floats(min_value=0, max_value=limits.LADDER_QUIET_S * 0.99),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(FAILURES, max_size=60))
def test_while_failures_come_no_step_is_weaker_than_the_one_before_and_nothing_grows(
    failures: list[tuple[Cause, str, float, bool, bool]],
) -> None:
    ladder, now, last = Ladder(), 0.0, None
    for cause, principal, passes, died, succeeds in failures:
        # KILLED is noted only, and a failure that does not count does not keep the ladder up either
        now += 0.0 if cause in NOTED_ONLY else passes
        taken = step(ladder, cause, now, principal, died=died)
        if taken is not None:
            assert last is None or taken >= last
            last = taken
        if succeeds:
            ladder.succeeded(now)
        assert len(ladder.failures) <= limits.FAILURES_KEPT
        assert len(ladder.attempts) <= limits.STEPS_KEPT
        assert ladder.recovered <= ladder.tried
        assert 0 <= ladder.penalty_s(0.5) <= limits.PENALTY_S_MAX


CAUSES: tuple[tuple[dict[str, Any], Cause | None], ...] = (
    ({"kind": "limit", "limit": "memory_mb", "signal": "SIGKILL"}, Cause.LIMIT),
    ({"kind": "signal", "signal": "SIGKILL", "is_oom": True}, Cause.LIMIT),
    ({"kind": "violation", "signal": "SIGKILL"}, Cause.SECURITY),
    ({"kind": "signal", "signal": "SIGSYS"}, Cause.SECURITY),
    ({"kind": "deadline", "signal": "SIGKILL"}, Cause.TIMEOUT),
    ({"kind": "signal", "signal": "SIGKILL"}, Cause.KILLED),
    ({"kind": "signal", "signal": "SIGSEGV"}, Cause.CRASH),
    ({"kind": "exit", "exit_code": 0}, Cause.CRASH),
    ({"kind": "unknown"}, Cause.CRASH),
    ({"kind": "cancel", "signal": "SIGKILL"}, None),
    ({"kind": "silence"}, None),
    ({"kind": "hook", "signal": "SIGKILL"}, None),
    ({"kind": "operator"}, None),
    ({"kind": "boot_failure"}, None),
)


@pytest.mark.parametrize(("facts", "cause"), CAUSES)
def test_a_certificate_tells_the_cause(facts: dict[str, Any], cause: Cause | None) -> None:
    certificate = node.Certificate(worker_id="t-1", pool="t", pid=1, cause="so", **facts)
    assert cause_of(certificate) is cause


def test_no_kind_of_death_is_without_a_cause_or_a_reason_for_none() -> None:
    assert {facts["kind"] for facts, _ in CAUSES} == set(get_args(node.DeathKind))
