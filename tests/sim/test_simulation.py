"""The real machines of broker, clients, workers and supervisor, under a virtual clock and everything that can go wrong.

A failure prints its seed and the last events; ``make sim SEED=n STEPS=n`` shows it again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.invariants import Violation
from tests.sim.mutants import MUTANTS
from tests.sim.world import World

ROOT = Path(__file__).resolve().parents[2]

SEEDS = 200
STEPS = 1000
#: a planted bug is seen within so many seeds
MUTANT_SEEDS = 10


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_every_call_has_one_outcome_and_nothing_is_left_whatever_happens(first: int) -> None:
    for seed in range(first, first + 10):
        world = World(seed)
        world.run(STEPS)
        assert world.steps > STEPS


@pytest.mark.slow
@pytest.mark.parametrize("why", ["retire_worker", "change_pool"])
def test_workers_that_retire_cost_no_call(why: str) -> None:
    retired = 0
    for seed in range(20):
        world = World(seed)
        world.faults.a_second = 20.0
        world.faults.only(getattr(world.faults, why))
        world.wishes.harm = 0.0
        # else a call that is late takes its worker along, before that is heard to have ended it
        world.network.latency_s = 0.001
        world.run(STEPS)
        retired += world.supervisor.lifecycles - sum(len(pool.slots) for pool in world.supervisor.pools)
        lost = [
            record
            for record in world.records.values()
            # before broker and workers are up, nothing runs
            if record.code in {"WORKER_LOST", "POISONED"}
            or (record.code in {"BROKER_LOST", "UNAVAILABLE"} and record.executions)
        ]
        assert not lost
    assert retired > 200, "there were workers that retired"


def run_until_seen() -> None:
    for seed in range(MUTANT_SEEDS):
        World(seed).run(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_planted_bug_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    with pytest.raises(Violation, match="again: make sim SEED="):
        run_until_seen()


def test_a_failure_tells_the_seed_and_the_last_events(monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS["a dropped outcome"](monkeypatch)
    with pytest.raises(Violation) as caught:
        run_until_seen()
    text = str(caught.value)
    again = re.fullmatch(rf"again: make sim SEED=(\d+) STEPS={STEPS}", text.splitlines()[-1])
    assert again is not None
    assert f"seed {again[1]}, step " in text
    assert re.search(r"^ *\d+\.\d{6}  \S+ +(<-|->) ", text, re.MULTILINE) is not None, (
        "what peers said to each other"
    )


def test_a_seed_replays_exactly() -> None:
    first, again, other = World(7), World(7), World(8)
    for world in (first, again, other):
        world.run(300)
    assert first.chronicle.digest == again.chronicle.digest
    assert first.steps == again.steps
    assert first.chronicle.digest != other.chronicle.digest


@pytest.mark.process
def test_a_seed_replays_exactly_in_another_process() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-m", "tests.sim", "--seed", "5", "--steps", "500", "--digest"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    digests = [output.splitlines()[-1] for output in outputs]
    assert digests[0].startswith("digest ")
    assert digests[0] == digests[1]
