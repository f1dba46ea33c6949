"""Everything that can be killed, stopped or starved is, under load: each call has one outcome, and all recover."""

from __future__ import annotations

import faulthandler
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from tests.chaos.__main__ import RECOVERED
from tests.chaos.ledger import Ledger, Recovery
from tests.chaos.plan import Kind, Plan
from tests.chaos.run import run

if TYPE_CHECKING:
    from pathlib import Path

SEED = 20261125
SECONDS = 60.0


def test_plan_is_its_seed_s_and_knows_every_kind() -> None:
    one, two = Plan(7), Plan(7)
    faults = [one.next() for _ in range(50)]
    assert faults == [two.next() for _ in range(50)]
    assert {fault.kind for fault in faults[: len(Kind)]} == set(Kind)
    assert faults != [Plan(8).next() for _ in range(50)]


def test_ledger_counts_what_did_not_recover() -> None:
    ledger = Ledger(1, [Recovery(Kind.WORKER_KILL, 0.2), Recovery(Kind.WORKER_KILL, None)])
    assert ledger.share() == 0.5
    assert ledger.mean_s(Kind.WORKER_KILL) == 0.2
    assert ledger.mean_s(Kind.BROKER_KILL) is None


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_chaos_costs_no_call_its_outcome_and_all_recover(tmp_path: Path) -> None:
    # it takes longer than what else would look like a hang
    faulthandler.cancel_dump_traceback_later()
    ledger = run(tmp_path, SEED, SECONDS, lambda _text: None)
    console = Console(width=100)
    console.print(ledger.table())
    console.print(ledger.outcomes())
    assert not ledger.violations, "\n".join(ledger.violations)
    assert ledger.share() >= RECOVERED
    answered = sum(code == "OK" for code in ledger.codes.values())
    assert answered > 0.9 * len(ledger.codes), ledger.outcomes()
