"""What a worker writes down of its calls is read by its supervisor when it is dead."""

from __future__ import annotations

import pytest

from mcp_broker.wire.marks import BESIDE, MARKS_BYTES, RING, Marks


def call_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def two_ends() -> tuple[Marks, Marks]:
    buffer = bytearray(MARKS_BYTES)
    return Marks(memoryview(buffer)), Marks(memoryview(buffer))


def test_the_calls_that_started_last_are_told_the_newest_last() -> None:
    worker, supervisor = two_ends()
    assert supervisor.started_calls() == ()
    for seq in range(1, RING + 11):
        worker.start(seq, call_id(seq))
    assert supervisor.started_seq == RING + 10
    assert supervisor.started_calls() == tuple(map(call_id, range(11, RING + 11)))


def test_a_call_that_runs_beside_others_is_told_however_many_start_meanwhile() -> None:
    worker, supervisor = two_ends()
    for seq in range(1, BESIDE + 1):
        worker.start_beside(seq, call_id(seq))
    for seq in range(3, BESIDE + 1):
        worker.end(call_id(seq))
    for seq in range(BESIDE + 1, 10 * BESIDE):
        worker.start_beside(seq, call_id(seq))
        worker.end(call_id(seq))
    told = supervisor.started_calls()
    assert {call_id(1), call_id(2)} <= set(told)
    assert call_id(10 * BESIDE - 1) in told
    assert len(told) == len(set(told)) <= RING + BESIDE


def test_more_calls_beside_each_other_than_there_are_places_are_told_as_far_as_the_ring_goes() -> None:
    worker, supervisor = two_ends()
    for seq in range(1, BESIDE + 5):
        worker.start_beside(seq, call_id(seq))
    assert set(supervisor.started_calls()) == set(map(call_id, range(1, BESIDE + 5)))
    worker.end(call_id(BESIDE + 4))
    worker.start_beside(BESIDE + 5, call_id(BESIDE + 5))
    assert call_id(BESIDE + 5) in supervisor.started_calls()


def test_a_worker_rests_until_it_starts_another_call() -> None:
    worker, supervisor = two_ends()
    told = [supervisor.is_resting]
    worker.start(7, call_id(7))
    told.append(supervisor.is_resting)
    worker.rest()
    told.append(supervisor.is_resting)
    assert told == [True, False, True]


def test_a_worker_is_spared_while_it_runs_a_detached_call() -> None:
    worker, supervisor = two_ends()
    worker.start(1, call_id(1))
    told = [supervisor.spared_until]
    worker.start(2, call_id(2))
    worker.spare(2, 1234.5)
    told.append(supervisor.spared_until)
    worker.rest()
    told.append(supervisor.spared_until)
    worker.start(3, call_id(3))
    told.append(supervisor.spared_until)
    assert told == [0.0, pytest.approx(1234.5), 0.0, 0.0]
